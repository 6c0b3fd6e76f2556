"""Features of the engine with a decoder that runs in Transformers' code."""
from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minivllm import LLM, SamplingParams
from minivllm.config import EngineConfig
from minivllm.engine.tokenizer import Tokenizer
from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.server.run import start_engine
from tests.conftest import write_tiny_tokenizer
from tests.models.test_transformers_model import make
from tests.models.tiny import hf_logits
from tests.server.scripted import serving

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    make("Nemotron", {"vocab_size": 320, "max_position_embeddings": 128, "eos_token_id": 1, "num_hidden_layers": 1}, folder)
    write_tiny_tokenizer(folder)
    return folder


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
WANTED = {
    "greedy": GREEDY, "long": replace(GREEDY, max_tokens=60), "seeded": replace(GREEDY, temperature=1.0, seed=5, top_p=0.9, n=2),
    "penalized": replace(GREEDY, repetition_penalty=1.3, top_k=9, temperature=0.7, seed=1), "logprobs": replace(GREEDY, logprobs=3),
}
Answer = list[tuple[list[int], str]]


def answers(llm: LLM, names: Collection[str] = tuple(WANTED)) -> dict[str, Answer]:
    """Token ids and text of each choice, all requests at a time."""
    outputs = llm.generate([{"prompt": "the cat and the hat and the cat"}] * len(names), [WANTED[name] for name in names], use_tqdm=False)
    return {name: [(list(o.token_ids), o.text) for o in output.outputs] for name, output in zip(names, outputs, strict=True)}


def start(folder: Path, **config: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "device": "cpu", "num_gpu_blocks_override": 200, "block_size": 4, **config})


@pytest.fixture(scope="module")
def plain(with_tokenizer: Path) -> Iterator[LLM]:
    with start(with_tokenizer) as llm:
        yield llm


@pytest.fixture(scope="module")
def wanted(plain: LLM) -> dict[str, Answer]:
    return answers(plain)


@pytest.mark.parametrize("config", [
    {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 9}, {"num_gpu_blocks_override": 24, "kv_offloading_size": 2**-10},
    {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
], ids=["preempted", "swapped", "n-gram drafts"])
def test_no_token_depends_on_how_steps_are_made(
    with_tokenizer: Path, wanted: dict[str, Answer], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(1e9, 0.0, 1000))  # drafts cost nothing, so many are verified
    with start(with_tokenizer, **config) as llm:
        assert answers(llm) == wanted
        stats = llm.llm_engine.core.stats()
        if "speculative_config" in config:
            assert stats.drafts is not None and stats.drafts.num_accepted > 0
        else:
            assert stats.num_preemptions > 0


def test_sampling(with_tokenizer: Path, plain: LLM, wanted: dict[str, Answer]) -> None:
    """Seeds, several choices, stop strings and logprobs; what a server streams is what `generate` gives."""
    assert answers(plain) == wanted
    assert len({tuple(tokens) for tokens, _ in wanted["seeded"]}) == 2
    (tokens, text), = wanted["logprobs"]
    output, = plain.generate([{"prompt": "the cat and the hat and the cat"}], WANTED["logprobs"], use_tqdm=False)
    theirs = AutoModelForCausalLM.from_pretrained(with_tokenizer, attn_implementation="eager")
    logprobs = hf_logits(theirs, [*output.prompt_token_ids, *tokens])[len(output.prompt_token_ids) - 1 : -1].log_softmax(-1)
    assert output.outputs[0].logprobs is not None
    for token, row, found in zip(tokens, logprobs, output.outputs[0].logprobs, strict=True):
        assert int(row.argmax()) == token and set(found) == set(row.topk(3).indices.tolist())
        assert all(abs(float(row[t]) - x.logprob) < 1e-4 for t, x in found.items())
    stop = text[len(text) // 2 :][:3]
    stopped, = plain.generate(["the cat and the hat and the cat"], replace(GREEDY, stop=stop), use_tqdm=False)
    assert (stopped.outputs[0].text, stopped.outputs[0].finish_reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_a_quantized_cache_is_near(with_tokenizer: Path, plain: LLM, cache: str) -> None:
    """The logprobs of a prompt in chunks, whose keys are read from the cache."""
    params = replace(GREEDY, prompt_logprobs=0, max_tokens=1)
    prompt = "the cat and the hat and then that other thing in the end"

    def ask(llm: LLM) -> Tensor:
        found = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
        assert found is not None
        return torch.tensor([next(iter(x.values())).logprob for x in found if x])

    with start(with_tokenizer, kv_cache_dtype=cache, max_num_batched_tokens=5) as llm:
        exact = ask(plain)
        assert 0 < (ask(llm) - exact).abs().mean() < 0.1 * exact.std()


def test_server(with_tokenizer: Path, wanted: dict[str, Answer]) -> None:
    config = EngineConfig(model=str(with_tokenizer), dtype="float32", device="cpu", num_gpu_blocks_override=200)
    client = start_engine(config, process=False, log_level="warning")
    try:
        with serving(client, Tokenizer(with_tokenizer), served_model_name=("tiny",)) as live:
            body = {"model": "tiny", "prompt": "the cat and the hat and the cat", "temperature": 0, "max_tokens": 24, "ignore_eos": True}
            answer = httpx.post(live.url + "/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["text"] == wanted["greedy"][0][1]
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4, "ignore_eos": True}
            assert httpx.post(live.url + "/v1/chat/completions", json=chat, timeout=60).json()["usage"]["completion_tokens"] == 4
    finally:
        client.close()
