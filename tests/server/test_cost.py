"""What one request may cost, and work off the event loop: limits, time limits, turns of keys, and jobs that nothing waits for."""
from __future__ import annotations

import asyncio
import dataclasses
import gc
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.config import ServerConfig
from minivllm.engine.chat_template import ChatTemplate
from minivllm.errors import InvalidInput
from minivllm.server import cost, generation, work
from minivllm.server.authentication import RefusalBrake
from minivllm.server.cost import CostLedger, check_entries
from minivllm.server.errors import ApiError
from minivllm.server.formatters import CompletionFormatter
from minivllm.server.strict import StrictModel
from minivllm.server.work import WORKERS, TextWorkers
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server

CHAT = "/v1/chat/completions"
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def live(tokenizer_folder: Path) -> Iterator[LiveServer]:
    with scripted_server(ScriptedEngine(tokenizer_folder), trust_request_chat_template=True) as live:
        yield live


def post(live: LiveServer, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = httpx.post(live.url + path, json=body, timeout=60)
    return response.status_code, response.json()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("path, body, param", [
    (CHAT, {"messages": user("") * 3000}, "messages"), ("/tokenize", {"messages": user("") * 3000}, "messages"),
    ("/v1/completions", {"prompt": "x " * 40_000}, "prompt"), (CHAT, {"messages": user("x " * 40_000)}, "messages"),
    ("/tokenize", {"prompt": "x " * 4_000}, "prompt"), ("/detokenize", {"tokens": [5] * 5_000}, "tokens"),
    ("/v1/completions", {"prompt": "x", "stop_token_ids": [5] * 5000}, "stop_token_ids"),
    ("/v1/completions", {"prompt": "x", "structured_outputs": {"choice": ["ab"] * 20_000}}, "structured_outputs.choice"),
    ("/v1/completions", {"prompt": "x", "n": 257}, "n"), ("/v1/completions", {"prompt": ["x"] * 257}, "prompt"),
    ("/v1/completions", {"prompt": [5], "n": 200, "max_tokens": 100, "logprobs": 20}, "logprobs"),
    (CHAT, {"messages": user("x"), "n": 200, "max_tokens": 100, "logprobs": True, "top_logprobs": 20}, "logprobs"),
    ("/v1/completions", {"prompt": [[5] * 200] * 200, "max_tokens": 1, "prompt_logprobs": 20}, "prompt_logprobs"),
    ("/v1/completions", {"prompt": [5] * 100, "n": 256, "max_tokens": 1, "prompt_logprobs": 20}, "prompt_logprobs"),
    ("/v1/completions", {"prompt": [5] * 100, "n": 256, "max_tokens": 1, "echo": True}, "echo"),
    ("/v1/completions", {"prompt": "x" * 100, "n": 256, "max_tokens": 1, "echo": True}, "echo"),
    ("/v1/completions", {"prompt": [5] * 100, "n": 256, "max_tokens": 1, "return_token_ids": True}, "return_token_ids"),
])
def test_a_request_that_costs_too_much_is_refused(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str,
) -> None:
    monkeypatch.setattr(cost, "MAX_TOKENIZED", 4096)
    monkeypatch.setattr(cost, "MAX_REPEATED", 10_000)
    status, answer = post(live, path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_long_text_is_refused_by_its_first_pieces(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = live.server.config.app.state.frontend.tokenizer  # type: ignore[union-attr]
    encode, sizes = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda text, **more: sizes.append(len(text)) or encode(text, **more))
    monkeypatch.setattr(cost, "PIECE", 1000)
    status, answer = post(live, "/v1/completions", {"prompt": "x y " * 12_000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded") and sizes == [1000], answer


def test_a_chat_template_that_never_ends_is_interrupted(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2 * WORKERS):  # more than there are threads: each gets free again
        monkeypatch.setattr(work, "WORK_SECONDS", 0.1)
        status, answer = post(live, CHAT, {"messages": user("hi"), "chat_template": SLOW})
        assert (status, answer["error"]["code"]) == (400, "prompt_too_slow"), answer
    monkeypatch.setattr(work, "WORK_SECONDS", 30.0)
    assert post(live, CHAT, {"messages": user("hi")})[0] == 200


@pytest.mark.parametrize("expression", ["'x' * 9999999999", "9 ** 999999999", "[0] * 9999999999"])
def test_no_operation_of_a_template_makes_a_huge_value(expression: str) -> None:
    with pytest.raises(InvalidInput, match="large values"):
        ChatTemplate("{{ (" + expression + ")|length }}").render(user("x"))
    assert ChatTemplate("{{ '-' * 3 }}{{ 2 * 4 }}").render(user("x")) == "---8"


def blocked(workers: TextWorkers) -> tuple[threading.Event, list[asyncio.Task[None]]]:
    """Occupy all workers until the event is set."""
    gate = threading.Event()
    return gate, [asyncio.ensure_future(workers.run(f"x{i}", 1, lambda: gate.wait() and None)) for i in range(WORKERS)]


def test_one_owner_leaves_a_thread_to_others() -> None:
    async def run() -> None:
        workers, gate = TextWorkers(), threading.Event()
        hostile = [asyncio.ensure_future(workers.run("hostile", 1, lambda: gate.wait() and None)) for _ in range(10)]
        await asyncio.sleep(0)
        assert await workers.run("good", 1, lambda: "done") == "done"
        gate.set()
        await asyncio.gather(*hostile)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_many_log_probabilities_are_written_off_the_event_loop(live: LiveServer, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    body = {"prompt": [5] * 50, "n": 3, "echo": True, "logprobs": 1, "stream": stream}
    threads: set[str] = set()
    before = CompletionFormatter.format_logprobs

    def spy(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return before(*arguments)

    monkeypatch.setattr(CompletionFormatter, "format_logprobs", spy)
    answers = []
    for limit in (10**6, 100):
        monkeypatch.setattr(generation, "LARGE_ANSWER", limit)
        text = httpx.post(live.url + "/v1/completions", json=body).text
        answers.append(sorted(re.findall(r'"token_logprobs":\[.*?\]', text)))
    assert len(answers[0]) >= 3 and answers[0] == answers[1]
    assert len(threads) > 1, "the event loop's, and another one"


def test_a_job_is_dropped_if_its_client_leaves_and_owners_take_turns() -> None:
    async def run() -> list[str]:
        workers, ran = TextWorkers(), []
        gates = [threading.Event() for _ in range(WORKERS)]
        tasks = [asyncio.ensure_future(workers.run(f"x{i}", 1, lambda gate=gate: gate.wait() and None))  # type: ignore[misc]
                 for i, gate in enumerate(gates)]
        await asyncio.sleep(0)  # they are queued now
        later = {name: asyncio.ensure_future(workers.run(name[0], 1, lambda name=name: ran.append(name)))  # type: ignore[misc]
                 for name in ("a1", "a2", "a3", "b1", "c1")}
        await asyncio.sleep(0)
        later.pop("a2").cancel()
        await asyncio.sleep(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "MAX_QUEUED", 100)
            with pytest.raises(ApiError) as refused:
                await workers.run("a", 99, lambda: None)
            assert refused.value.status == 429
        gates[0].set()  # one thread does all that is left, so the order is certain
        await asyncio.gather(*later.values())
        for gate in gates:
            gate.set()
        await asyncio.gather(*tasks)
        return ran

    ran = asyncio.run(run())
    assert sorted(ran) == ["a1", "a3", "b1", "c1"]
    assert ran.index("a3") > 1, "the other owners are served between"


@pytest.mark.parametrize("path, body", [
    (CHAT, {"messages": user("x"), "max_tokens": 1}), (CHAT, {"messages": user("x " * 40_000)}), (CHAT, {"messages": user("") * 3000}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 1, "user": "u" * 100_000}), ("/v1/completions", {"prompt": 5, "user": "u" * 100_000}),
    ("/v1/completions", {"prompt": "x " * 40_000}), ("/v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(range(9000), 1)}),
    ("/v1/responses", {"input": "x", "max_output_tokens": 1}), ("/v1/responses", {"input": user("x") * 3000}),
    ("/tokenize", {"prompt": "x " * 200_000}),
], ids=lambda value: value if isinstance(value, str) else "")
def test_nothing_keeps_a_body_after_its_answer(live: LiveServer, path: str, body: dict[str, Any]) -> None:
    """Neither a timer nor a cycle of references, which only the garbage collector would find, some hundred requests later."""
    gc.collect()
    gc.disable()
    try:
        post(live, path, body)
        for _ in range(50):
            if not kept():
                break
            assert httpx.get(live.url + "/health").status_code == 200  # the server does what it has yet to do
        assert kept() == []
    finally:
        gc.enable()


def kept() -> list[str]:
    """Names of the types of bodies and jobs that exist."""
    return [type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), (StrictModel, work._Job))]


def test_a_delayed_refusal_keeps_no_body(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of refusals may wait for up to 30 s. The traceback of an error would keep the body in its frames."""
    seen: list[list[str]] = []

    async def delay(brake: RefusalBrake, owner: str) -> bool:
        seen.append(kept())
        return True

    monkeypatch.setattr(RefusalBrake, "delay", delay)
    gc.collect()
    gc.disable()
    try:
        for field, value in (("logit_bias", dict.fromkeys(range(5000), 1)), ("temperature", 9), ("n", 999)):
            body = {"prompt": "x", field: value}
            assert post(live, "/v1/completions", body)[0] == 400
    finally:
        gc.enable()
    assert seen == [[], [], []]


def test_log_probabilities_that_answers_keep_are_charged_to_their_owner() -> None:
    ledger = CostLedger(100, "entries")
    ledger.add("a", 90)
    ledger.add("b", 40)  # less than its share, although all together are more than the limit
    for owner in "ab":
        with pytest.raises(ApiError):
            ledger.add(owner, 20)
    ledger.release("a", 90)
    ledger.add("b", 50)
    check_entries(1, 10**6, 20, 0, 10**6, "logprobs")  # one full context is always allowed
    assert ServerConfig().max_choices == 256


def test_an_answer_with_log_probabilities_releases_what_it_kept(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = live.server.running.entries
    body = {"prompt": [5], "n": 2, "logprobs": 2}
    assert post(live, "/v1/completions", body)[0] == 200 and ledger._kept == {}
    monkeypatch.setattr(ledger, "_limit", 3)
    status, answer = post(live, "/v1/completions", body)
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded") and ledger._kept == {}


def test_more_requests_than_the_engine_takes_are_refused_before_they_are_read(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    with scripted_server(engine, api_key=("good", "hostile")) as live, ThreadPoolExecutor(2) as pool:
        client = live.server.running._client
        client._info = dataclasses.replace(client.info, max_requests=2)

        def send(key: str, body: bytes = b'{"prompt": [5]}') -> httpx.Response:
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            return httpx.post(live.url + "/v1/completions", content=body, headers=headers, timeout=60)

        running = [pool.submit(send, "hostile") for _ in range(2)]
        live.wait_until(lambda: len(live.server.running) == 2)
        refused = send("hostile", b"no JSON")
        assert refused.status_code == 429 and "2 unfinished requests" in refused.text and refused.headers["retry-after"]
        assert send("good", b"no JSON").status_code == 400
        engine.gate.release(100)  # type: ignore[union-attr]
        assert [answer.result(60).status_code for answer in running] == [200, 200]
        assert send("hostile").status_code == 200


def test_prompts_of_unfinished_requests_are_limited(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(0))
    with scripted_server(engine, api_key=("a", "b")) as live, ThreadPoolExecutor(1) as pool:
        live.server.running._tokens = CostLedger(10, "prompt tokens")

        def ask(key: str) -> int:
            return httpx.post(live.url + "/v1/completions", json={"prompt": [5] * 8, "max_tokens": 1}, timeout=60,
                              headers={"authorization": f"Bearer {key}"}).status_code

        first = pool.submit(ask, "a")
        live.wait_until(lambda: len(live.server.running) == 1)
        assert ask("a") == ask("b") == 429
        engine.gate.release(100)  # type: ignore[union-attr]
        assert first.result(60) == 200 and ask("b") == 200
