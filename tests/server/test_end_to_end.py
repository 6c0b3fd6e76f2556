"""The server with a tiny real model gives the results of `LLM.generate`, with the engine in a thread or in a process."""
from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minivllm import LLM, SamplingParams
from tests.server.scripted import LiveServer, serving_model

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_batched_tokens": 64, "num_gpu_blocks_override": 128}
PROMPTS = ["the cat", "the hat and", "then that other thing in the end " * 8, "a"]


@pytest.fixture(scope="module")
def offline(folder: Path) -> Iterator[LLM]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for a second thread
    with LLM(model=str(folder), **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["thread", "process"])
def live(request: pytest.FixtureRequest, folder: Path) -> Iterator[LiveServer]:
    with serving_model(folder, process=request.param == "process", **SETTINGS) as live:
        yield live


def test_greedy_completions_equal_generate_complete_and_streamed(api: openai.OpenAI, offline: LLM) -> None:
    wanted = [o.outputs[0].text for o in offline.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)]
    whole = api.completions.create(model="tiny", prompt=PROMPTS, temperature=0, max_tokens=24)
    assert [choice.text for choice in whole.choices] == wanted
    pieces = [""] * len(PROMPTS)
    for chunk in api.completions.create(model="tiny", prompt=PROMPTS, temperature=0, max_tokens=24, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == wanted


def test_a_greedy_chat_completion_equals_llm_chat(api: openai.OpenAI, offline: LLM) -> None:
    messages: Any = [{"role": "user", "content": "the cat"}]
    wanted = offline.chat(messages, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0].outputs[0].text
    whole = api.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=16)
    streamed = api.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=16, stream=True)
    assert whole.choices[0].message.content == wanted == "".join(c.choices[0].delta.content or "" for c in streamed)


def test_a_seeded_request_samples_the_same_tokens_in_any_batch(api: openai.OpenAI, offline: LLM) -> None:
    def ask(_: int) -> list[str]:
        choices = api.completions.create(model="tiny", prompt="the cat", temperature=1, seed=7, n=3, max_tokens=12).choices
        return [choice.text for choice in choices]

    params = SamplingParams(temperature=1, seed=7, n=3, max_tokens=12)
    wanted = [o.text for o in offline.generate("the cat", params, use_tqdm=False)[0].outputs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [wanted] * 8
    assert len(set(wanted)) == 3


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_requests_of_lm_eval_get_the_log_likelihoods_of_transformers(live: LiveServer, folder: Path, max_tokens: int) -> None:
    """Its local-completions sends token ids with echo and logprobs=1, and reads each token's logprob and the most probable token."""
    import torch
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[5 + 7 * i % 240 for i in range(length)] for length in (2, 40, 150)]  # of tokens with different texts
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    choices = httpx.post(live.url + "/v1/completions", json=body, timeout=60).json()["choices"]
    for prompt, choice in zip(prompts, sorted(choices, key=lambda choice: choice["index"]), strict=True):
        with torch.no_grad():
            wanted = hf(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = choice["logprobs"]
        assert [len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs")] == [len(prompt) + max_tokens] * 3
        assert found["token_logprobs"][0] is None
        targets = [*prompt[1:], int(wanted[-1].argmax())][:len(prompt) - 1 + max_tokens]
        expected = [float(wanted[i, token]) for i, token in enumerate(targets)]
        assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
        for i, token in enumerate(targets):
            top = found["top_logprobs"][i + 1]
            assert max(top.values()) == pytest.approx(float(wanted[i].max()), abs=1e-3)
            assert (found["tokens"][i + 1] == max(top, key=top.get)) == (token == int(wanted[i].argmax()))


def test_a_stop_string_ends_the_text_before_it_and_is_the_stop_reason(api: openai.OpenAI) -> None:
    text = api.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=40).choices[0].text
    stop = text[5:8]
    for stream in (False, True):
        answer = api.completions.create(model="tiny", prompt="the cat", temperature=0, max_tokens=40, stop=stop, stream=stream)  # type: ignore[call-overload]
        choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
        assert "".join(c.text for c in choices) == text[:text.index(stop)]
        assert choices[-1].finish_reason == "stop" and choices[-1].model_dump()["stop_reason"] == stop


def test_a_repeated_prompt_is_found_in_the_prefix_cache(api: openai.OpenAI) -> None:
    prompt = "cats and hats " * 12
    cached = [api.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    first, second = (usage.prompt_tokens_details.cached_tokens for usage in cached)  # type: ignore[union-attr]
    assert first == 0 and second is not None and second >= 16


def test_scoring_a_prompt_equals_generates_prompt_logprobs(api: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    rows = offline.generate("the cat and the hat", params, use_tqdm=False)[0]
    assert rows.prompt_logprobs is not None
    wanted = [None if row is None else row[token].logprob for token, row in zip(rows.prompt_token_ids, rows.prompt_logprobs, strict=True)]
    answer = api.completions.create(model="tiny", prompt="the cat and the hat", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert answer.logprobs is not None and answer.logprobs.token_logprobs is not None and answer.text == "the cat and the hat"
    got = list(answer.logprobs.token_logprobs)
    assert got[0] is None and got[1:] == pytest.approx(wanted[1:], abs=1e-4)


@pytest.mark.parametrize("change, param", [
    ({"prompt": [5, 320]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"logit_bias": {"320": 1}}, "logit_bias"),
    ({"allowed_token_ids": [320]}, "allowed_token_ids"), ({"stop_token_ids": [10**12]}, "stop_token_ids"),
])
def test_token_ids_outside_the_vocabulary_are_400(live: LiveServer, change: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        response = httpx.post(live.url + "/v1/completions", json={"prompt": "x", "stream": stream, **change})
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_a_disconnect_frees_the_blocks_of_its_request(live: LiveServer) -> None:
    body = {"prompt": PROMPTS, "n": 4, "max_tokens": 150, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", live.url + "/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
        assert live.client.stats().used_blocks > 0
    while len(live.server.running):  # until the server has noticed the disconnect; it answers other requests meanwhile
        assert httpx.get(live.url + "/health").status_code == 200
    # The aborts are in the engine's inbox before this request, so they are handled before its response.
    httpx.post(live.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60)
    stats = live.client.stats()
    assert (stats.used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)


def test_metrics_count_generated_tokens(live: LiveServer, api: openai.OpenAI) -> None:
    def generated() -> float:
        lines = httpx.get(live.url + "/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith('minivllm:generation_tokens_total{model_name="tiny"}')).split()[-1])

    before = generated()
    api.completions.create(model="tiny", prompt="the cat", max_tokens=9, extra_body={"ignore_eos": True})
    assert generated() - before == 9
