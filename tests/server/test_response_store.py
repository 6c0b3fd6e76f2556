"""Stored responses: continuing them, referring to their items, reading and deleting them, and the bounds on their memory."""
from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.engine.chat_template import built_in_template
from minivllm.server.errors import ApiError
from minivllm.server.response_store import ResponseStore
from tests.server.scripted import ScriptedEngine, scripted_server
from tests.server.test_tools import CALL, WEATHER, ScriptedChat, scripted_chat

PATH, MODEL = "/v1/responses", "org/fake-model"
FLAT: Any = {"type": "function", **WEATHER["function"]}


@pytest.fixture(scope="module")
def chat(tokenizer_folder: Path) -> Iterator[ScriptedChat]:
    with scripted_chat(tokenizer_folder, built_in_template("tool_chatml")) as chat:
        yield chat


def create(chat: ScriptedChat, text: str = "fine", **fields: Any) -> Any:
    chat.generate(text)
    return chat.api.responses.create(**{"model": MODEL, "input": "hello", **fields})


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])


def test_a_response_is_continued_with_the_prompt_that_its_items_would_give(chat: ScriptedChat) -> None:
    first = create(chat, "one", instructions="be brief")
    second = create(chat, "two", input=[{"role": "user", "content": "and?"}], previous_response_id=first.id)
    third = create(chat, "three", input="more", previous_response_id=second.id, instructions="be long")
    assert second.previous_response_id == first.id and third.previous_response_id == second.id and first.store is True
    continued = chat.prompt
    create(chat, input=[{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "and?"}, *second.output,
                        {"role": "user", "content": "more"}], instructions="be long")
    assert chat.prompt == continued and "be brief" not in continued, "instructions are not continued, as in OpenAI's API"


def test_calls_and_results_are_continued_streamed_or_not(chat: ScriptedChat) -> None:
    for stream in (False, True):
        first = create(chat, CALL, tools=[FLAT], stream=stream)
        if stream:
            first = list(first)[-1].response
        call = first.output[0]
        create(chat, previous_response_id=first.id, tools=[FLAT],
               input=[{"type": "function_call_output", "call_id": call.call_id, "output": "mild"}])
        assert "Paris" in chat.prompt and "mild" in chat.prompt


def test_items_are_found_by_reference_in_both_forms(chat: ScriptedChat) -> None:
    first = create(chat, "one")
    plain = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "and?"}]
    create(chat, input=plain)
    wanted = chat.prompt
    name = first.output[0].id
    for reference in ({"type": "item_reference", "id": name}, {"id": name}, {"id": name, "type": None}):
        second = create(chat, "two", input=[plain[0], reference, plain[-1]])
        assert chat.prompt == wanted
        create(chat, input="more", previous_response_id=second.id)
        assert chat.prompt.startswith(wanted), "the stored input has the item, not the reference"
    error = error_of(httpx.post(chat.live.url + PATH, json={"input": [{"type": "item_reference", "id": "msg_nothing"}]}), 404)
    assert error["param"] == "input" and "Item with id 'msg_nothing' not found" in error["message"]


def test_an_unknown_or_unstored_response_cannot_be_continued(chat: ScriptedChat) -> None:
    unstored = create(chat, store=False)
    assert unstored.store is False
    for response_id in ("resp_nothing", unstored.id):
        error = error_of(httpx.post(chat.live.url + PATH, json={"input": "x", "previous_response_id": response_id}), 400)
        assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")
        assert f"Previous response with id '{response_id}' not found" in error["message"]
    with pytest.raises(openai.NotFoundError):
        create(chat, input=[{"type": "item_reference", "id": unstored.output[0].id}])


def test_a_stored_response_can_be_read_and_deleted(chat: ScriptedChat) -> None:
    first = create(chat, "one", metadata={"a": "b"})
    assert chat.api.responses.retrieve(first.id).to_dict() == first.to_dict()
    second = create(chat, "two", previous_response_id=first.id)
    deleted = httpx.delete(f"{chat.live.url}{PATH}/{first.id}")
    assert deleted.json() == {"id": first.id, "object": "response", "deleted": True}
    for answer in (httpx.get(f"{chat.live.url}{PATH}/{first.id}"), httpx.delete(f"{chat.live.url}{PATH}/{first.id}"),
                   httpx.get(f"{chat.live.url}{PATH}/{first.id}/input_items")):
        assert f"Response with id '{first.id}' not found" in error_of(answer, 404)["message"]
    create(chat, "three", previous_response_id=second.id)
    assert "one" in chat.prompt, "the later response keeps what it continued"
    assert error_of(httpx.get(f"{chat.live.url}{PATH}/{second.id}?stream=true"), 400)["param"] == "stream"


def test_input_items_come_in_pages(chat: ScriptedChat) -> None:
    texts = [f"text {i}" for i in range(7)]
    response = create(chat, input=[{"role": "user", "content": text} for text in texts])
    listed = [item.content for item in chat.api.responses.input_items.list(response.id, limit=3)]  # type: ignore[union-attr]
    assert listed == texts[::-1], "newest first, and the client follows the pages"
    listed = [item.content for item in chat.api.responses.input_items.list(response.id, limit=3, order="asc")]  # type: ignore[union-attr]
    assert listed == texts
    url = f"{chat.live.url}{PATH}/{response.id}/input_items"
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nothing", "limit=" + "9" * 5000):
        assert error_of(httpx.get(f"{url}?{query}"), 400)["param"] == query.partition("=")[0]


def test_only_the_key_that_created_a_response_can_use_it(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), api_key=("one", "two")) as live:
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        first = httpx.post(live.url + PATH, json={"input": "x", "request_id": "same"}, headers=mine).json()
        path = f"{live.url}{PATH}/{first['id']}"
        assert httpx.get(path).status_code == 401 and httpx.get(path, headers=mine).json() == first
        for answer in (httpx.get(path, headers=other), httpx.delete(path, headers=other), httpx.get(path + "/input_items", headers=other)):
            error_of(answer, 404)
        error_of(httpx.post(live.url + PATH, json={"input": "x", "previous_response_id": first["id"]}, headers=other), 400)
        reference = [{"type": "item_reference", "id": first["output"][0]["id"]}]
        error_of(httpx.post(live.url + PATH, json={"input": reference}, headers=other), 404)
        second = httpx.post(live.url + PATH, json={"input": "y", "request_id": "same"}, headers=other).json()
        assert second["id"] == first["id"] and httpx.get(path, headers=mine).json() == first, "an id that another key chose too"


def test_a_server_without_a_store_says_so(tokenizer_folder: Path) -> None:
    with scripted_server(ScriptedEngine(tokenizer_folder), response_store_size=0) as live:
        answer = httpx.post(live.url + PATH, json={"input": "x", "store": True})
        assert answer.json()["store"] is False and answer.headers["x-minivllm-ignored"] == "store"
        assert "x-minivllm-ignored" not in httpx.post(live.url + PATH, json={"input": "x"}).headers
        error_of(httpx.get(f"{live.url}{PATH}/{answer.json()['id']}"), 404)


def test_a_response_is_stored_when_it_is_complete_and_not_if_its_client_leaves(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder, gate=threading.Semaphore(1))
    with scripted_server(engine) as live:
        engine.script = lambda prompt, params, child: [((7,), "x")] * 100
        store = live.server.config.app.state.frontend.responses  # type: ignore[union-attr]
        with httpx.stream("POST", live.url + PATH, json={"input": "x", "stream": True, "request_id": "left"}) as response:
            next(response.iter_lines())
            error_of(httpx.get(f"{live.url}{PATH}/resp_left"), 404)
        live.wait_until(lambda: len(live.server.running) == 0)
        engine.run_until(lambda: bool(engine.aborted))
        error_of(httpx.get(f"{live.url}{PATH}/resp_left"), 404)
        assert store.size == 0


def test_parallel_requests_continue_the_same_response(chat: ScriptedChat) -> None:
    first = create(chat, "one")
    bodies = [{"input": f"{i}", "previous_response_id": first.id} for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: httpx.post(chat.live.url + PATH, json=body), bodies))
    assert {answer.status_code for answer in answers} == {200} and len({answer.json()["id"] for answer in answers}) == 24
    assert all(httpx.get(f"{chat.live.url}{PATH}/{answer.json()['id']}").json() == answer.json() for answer in answers[:4])


def test_an_item_that_the_conversation_has_is_not_written_twice(chat: ScriptedChat) -> None:
    first = create(chat, "one")
    call = create(chat, CALL, tools=[FLAT], previous_response_id=first.id).output[0]
    earlier = create(chat, "two", previous_response_id=first.id, input="and?")
    more = {"role": "user", "content": "more"}
    create(chat, previous_response_id=earlier.id, input=[more])
    wanted = chat.prompt
    for again in ([{"type": "item_reference", "id": first.output[0].id}], [{"id": first.output[0].id}] * 2, [first.output[0]],
                  [first.output[0].to_dict(), {"type": "item_reference", "id": earlier.output[0].id}]):
        create(chat, previous_response_id=earlier.id, input=[*again, more])
        assert chat.prompt == wanted, again
    reference = {"type": "item_reference", "id": call.id}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "mild"}
    create(chat, input=[more, call, result], tools=[FLAT])
    wanted = chat.prompt
    create(chat, input=[more, reference, reference, result], tools=[FLAT])
    assert chat.prompt == wanted
    twice = [{"id": "u", "role": "user", "content": "yes"}, {"id": "u", "role": "user", "content": "no"}]
    create(chat, input=twice)
    assert "yes" in chat.prompt and "no" in chat.prompt, "a client may give different items one id"


def test_an_item_of_an_input_is_found_by_reference(chat: ScriptedChat) -> None:
    first = create(chat, "one", input=[{"role": "user", "content": "remember 7"}, {"id": None, "role": "user", "content": "and 8"}])
    second = create(chat, "two", input="more", previous_response_id=first.id)
    httpx.delete(f"{chat.live.url}{PATH}/{first.id}")
    listed = chat.api.responses.input_items.list(second.id, order="asc").data
    assert len(listed) == 4 and len({item.id for item in listed}) == 4
    create(chat, input=[{"type": "item_reference", "id": item.id} for item in listed])
    assert chat.prompt.index("remember 7") < chat.prompt.index("and 8") < chat.prompt.index("one") < chat.prompt.index("more")
    httpx.delete(f"{chat.live.url}{PATH}/{second.id}")


@pytest.mark.parametrize("item, param, words", [
    ({"type": "item_reference"}, "input.0.id", "required"), ({"type": "item_reference", "id": 5}, "input.0.id", "must be a string"),
    ({"type": "item_reference", "id": None}, "input.0.id", "must be a string"), ({"id": 5}, "input.0.id", "must be a string"),
    ({"type": "item_reference", "id": "a", "foo": 1}, "input.0.foo", "unknown"),
    ({"role": "user", "content": "x", "id": 5}, "input.0.id", "string"),
])
def test_a_wrong_reference_is_refused_by_field(chat: ScriptedChat, item: dict[str, Any], param: str, words: str) -> None:
    error = error_of(httpx.post(chat.live.url + PATH, json={"input": [item]}), 400)
    assert error["param"] == param and words in error["message"], error


def test_a_response_that_is_larger_than_the_store_is_not_stored_and_drops_no_other(tokenizer_folder: Path) -> None:
    engine = ScriptedEngine(tokenizer_folder)
    with scripted_server(engine, response_store_size=20_000) as live:
        small = [httpx.post(live.url + PATH, json={"input": "x"}).json() for _ in range(3)]
        engine.script = lambda prompt, params, child: [((7,), "x" * 25_000)]
        large = httpx.post(live.url + PATH, json={"input": "x"}).json()
        streamed = httpx.post(live.url + PATH, json={"input": "x", "stream": True}).text.strip().split("\n")[-1].removeprefix("data: ")
        for body in (large, json.loads(streamed)["response"]):
            assert body["store"] is False
            error_of(httpx.get(f"{live.url}{PATH}/{body['id']}"), 404)
        for body in small:
            assert body["store"] is True and httpx.get(f"{live.url}{PATH}/{body['id']}").json() == body


# -- the store alone -------------------------------------------------------------------------------------------------


def response(name: str, text: str = "x") -> dict[str, Any]:
    return {"id": name, "output": [{"id": "msg_" + name, "text": text}]}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_responses_expire() -> None:
    clock = Clock()
    store = ResponseStore(10**6, 60, clock)
    store.put("", response("a"), (), [])
    clock.now = 59
    store.put("", response("b"), (), [])
    assert store.get("", "a") is not None
    clock.now = 60
    assert store.get("", "a") is None and store.get("", "b") is not None and store.item("", "msg_b")["text"] == "x"
    with pytest.raises(ApiError):
        store.item("", "msg_a")
    clock.now = 200
    assert store.get("", "b") is None and store.size == 0


def test_the_key_with_the_most_bytes_loses_its_oldest_response() -> None:
    store = ResponseStore(20_000, 60)
    store.put("quiet", response("a"), (), [])
    for i in range(100):
        store.put("busy", response(f"b{i}", "x" * 1000), (), [])
    assert store.get("quiet", "a") is not None and store.get("busy", "b0") is None and store.get("busy", "b99") is not None
    assert not store.put("busy", response("large", "x" * 50_000), (), [])
    assert store.get("busy", "large") is None and store.get("busy", "b99") is not None and store.get("quiet", "a") is not None


@given(st.lists(st.tuples(st.sampled_from(["", "k"]), st.integers(0, 5), st.integers(0, 3000), st.booleans()), max_size=40))
def test_the_bound_holds_and_nothing_is_left_behind(steps: list[tuple[bytes, int, int, bool]]) -> None:
    store = ResponseStore(8_000, 60)
    for owner, number, length, deletes in steps:
        if deletes:
            store.delete(owner, f"r{number}")
        else:
            earlier = store.get(owner, f"r{(number + 1) % 6}")
            store.put(owner, response(f"r{number}", "x" * length), () if earlier is None else earlier.conversation, [{"id": "i"}])
        kept = [stored for responses in store._kept.values() for stored in responses.values()]
        assert store.size == sum(stored.size for stored in kept) <= 8_000
        listed = {(owner, item.id) for owner, r in store._kept.items() for stored in r.values() for item in stored.conversation}
        assert set(store._items) == listed
    for owner in ("", "k"):
        for number in range(6):
            store.delete(owner, f"r{number}")
    assert store.size == 0 and not store._kept and not store._items


def test_the_memory_of_long_conversations_stays_below_the_bound() -> None:
    limit = 2 * 2**20
    store = ResponseStore(limit, 3600)
    tracemalloc.start()
    try:
        for turn in range(3000):
            earlier = store.get("", f"r{turn - 1}")
            store.put("", response(f"r{turn}", str(turn) * 20), () if earlier is None or turn % 50 == 0 else earlier.conversation,
                      [{"id": f"i{turn}", "content": str(turn) * 20}])
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert limit / 2 < store.size <= limit and used <= limit, (used, store.size)
    assert json.loads(store.get("", "r2999").body)["id"] == "r2999"  # type: ignore[union-attr]
