"""The default model: this engine, with packed weights, and HF Transformers, with dequantized ones, generate the same tokens in float32."""
from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from minivllm import LLM, SamplingParams
from tests.engine.oracle import Oracle

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles
    from minivllm.outputs import RequestOutput

pytest.importorskip("transformers")

TEXT = (
    "Paging was invented so that programs need not know how much memory a machine has. A page table says where each page of a "
    "program lies, and a page that was not used for a while may be moved away. The same idea serves a language model: the keys "
    "and values of a conversation lie in blocks, wherever there was room, and a block table says where. Nobody has to reserve the "
    "longest conversation that could ever happen. Two conversations that begin alike can share the blocks of their beginning. "
    "In Paris, the capital of France, 2 + 2 = 4; def add(a, b): return a + b. Once upon a time there was a small engine which "
    "could answer many questions at once, because it never waited for the slowest of them. "
)
OUTPUT = 40
GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, prompt_logprobs=0)


@pytest.fixture(scope="module")
def folder(default_model: ModelFiles) -> Path:
    return default_model.folder


@pytest.fixture(scope="module")
def oracle(default_float32: Path) -> Oracle:
    return Oracle(default_float32)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def llm(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    blocks = 2000 if request.param == "cuda" else None
    with LLM(str(folder), dtype="float32", device=request.param, max_model_len=2048, num_gpu_blocks_override=blocks) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    """12 prompts of 1 to 300 tokens. The first ones end beside the ends of blocks."""
    ids = llm.llm_engine.core.tokenizer.encode(TEXT * 4)
    lengths = [1, 2, 15, 16, 17, 300, *(random.Random(0).sample(range(3, 200), 6))]
    return [ids[7 * i: 7 * i + length] for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def together(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    return llm.generate(prompts, GREEDY, use_tqdm=False)  # type: ignore[arg-type]


def _check(oracle: Oracle, outputs: list[RequestOutput]) -> None:
    for output in outputs:
        tokens = output.outputs[0].token_ids
        assert len(tokens) == OUTPUT
        oracle.check_greedy(output.prompt_token_ids, tokens)
    print(f"\n{oracle.num_ties} ties in {oracle.num_checked} tokens")
    assert oracle.num_ties <= 1


def test_prompts_of_many_lengths_in_one_batch_get_hfs_greedy_tokens(oracle: Oracle, together: list[RequestOutput]) -> None:
    _check(oracle, together)


def test_single_prompts_get_the_same_tokens(
    llm: LLM, oracle: Oracle, prompts: list[list[int]], together: list[RequestOutput],
) -> None:
    llm.reset_prefix_cache()
    for prompt, batched in list(zip(prompts, together, strict=True))[:6]:
        (alone,) = llm.generate([prompt], GREEDY, use_tqdm=False)  # type: ignore[list-item]
        if alone.outputs[0].token_ids != batched.outputs[0].token_ids:
            _check(oracle, [alone])  # both are right if they differ at a tie


def test_prompt_logprobs_equal_hf_within_a_thousandth(oracle: Oracle, together: list[RequestOutput]) -> None:
    for output in together:
        entries = output.prompt_logprobs
        assert entries is not None and entries[0] is None
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        expected = oracle.logprobs(tokens)[: len(output.prompt_token_ids) - 1]
        ours = [e[t].logprob for e, t in zip(entries[1:], output.prompt_token_ids[1:], strict=True) if e is not None]
        assert ours == pytest.approx(expected, abs=1e-3)
