"""Embeddings: the pooled hidden states that Transformers computes, whatever the engine does meanwhile."""
from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from minivllm import LLM, AsyncLLM, LoRARequest, PoolingParams, PoolingRequestOutput, SamplingParams
from minivllm.config import EngineConfig
from minivllm.core.trace import read, replay
from minivllm.engine.pooling import PooledPrompt, default_pooling
from minivllm.errors import InvalidInput, ModelError, NotSupportedYet, RequestFailed
from minivllm.kernels import tuning
from tests.models.tiny import make_hf

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles

transformers = pytest.importorskip("transformers")
RAW = PoolingParams(use_activation=False)
MEAN = PoolingParams(use_activation=False, pooling_type="mean")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Reference:
    """Transformers' hidden states after the final norm."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    def states(self, tokens: list[int]) -> torch.Tensor:
        """[T, size]"""
        with torch.no_grad():
            return self.model.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0].float()  # type: ignore[no-any-return]

    def last(self, tokens: list[int]) -> torch.Tensor:
        return self.states(tokens)[-1]

    def mean(self, tokens: list[int]) -> torch.Tensor:
        return self.states(tokens).mean(0)


def prompts_of(lengths: tuple[int, ...], vocabulary: int = 320) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, vocabulary) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module", autouse=True)
def steps_of_both_kinds() -> Iterator[None]:
    """Short steps in which the last layer computes all tokens, and longer ones in which it computes last tokens only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MIN_SKIPPED_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def reference(tiny_llama: Callable[..., Path]) -> Reference:
    return Reference(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama()))


def engine(folder: Path, **settings: Any) -> LLM:
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_gpu_blocks_override": 100, "max_model_len": 128, "block_size": 4}
    return LLM(str(folder), **{**defaults, **settings})


@pytest.fixture(scope="module")
def llm(tiny_llama: Callable[..., Path]) -> Iterator[LLM]:
    """Prompts of more than 16 tokens are computed in chunks."""
    with engine(tiny_llama(), max_num_batched_tokens=16) as llm:
        yield llm


def check(llm: LLM, prompts: list[list[int]], params: PoolingParams, wanted: Callable[[list[int]], torch.Tensor], **options: Any) -> None:
    outputs = llm.encode(prompts, params, use_tqdm=False, **options)  # type: ignore[arg-type]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt and output.finished
        torch.testing.assert_close(output.outputs.data, wanted(prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("params", [RAW, MEAN], ids=["last", "mean"])
@pytest.mark.parametrize("budget", [8, 128], ids=["chunked", "whole"])
def test_vectors_are_those_of_transformers(
    tiny_llama: Callable[..., Path], reference: Reference, params: PoolingParams, budget: int,
) -> None:
    wanted = reference.mean if params.needs_all else reference.last
    with engine(tiny_llama(), max_num_batched_tokens=budget) as llm:
        check(llm, prompts_of((1, 7, 8, 9, 40, 100, 2)), params, wanted)
        check(llm, prompts_of((128,)), params, wanted)  # the whole context, since nothing is sampled


@pytest.mark.parametrize("params", [RAW, MEAN], ids=["last", "mean"])
def test_a_cached_prefix_changes_no_vector(llm: LLM, reference: Reference, params: PoolingParams) -> None:
    (prompt,) = prompts_of((50,))
    llm.reset_prefix_cache()
    for _ in range(2):
        (output,) = llm.encode([prompt], params, use_tqdm=False)  # type: ignore[list-item]
        wanted = reference.mean(prompt) if params.needs_all else reference.last(prompt)
        torch.testing.assert_close(output.outputs.data, wanted, rtol=1e-4, atol=1e-4)
    assert output.num_cached_tokens == (0 if params.needs_all else 48)  # the mean needs the states of all positions
    generated = llm.generate([[*prompt, 5]], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    assert generated[0].num_cached_tokens == 48  # but its blocks serve others


def test_embeddings_and_outputs_share_steps(llm: LLM, reference: Reference) -> None:
    prompts = prompts_of((30, 3, 17, 45, 5, 24))
    llm.reset_prefix_cache()
    alone = llm.generate([prompts[0], prompts[2]], GREEDY, use_tqdm=False)  # type: ignore[list-item]
    llm.reset_prefix_cache()
    core = llm.llm_engine
    for name, prompt, params in (("a", prompts[0], GREEDY), ("b", prompts[1], MEAN), ("c", prompts[2], GREEDY),
                                 ("d", prompts[3], MEAN), ("e", prompts[4], RAW), ("f", prompts[5], RAW)):
        core.add_request(name, {"prompt_token_ids": prompt}, params)
    done = {}
    while core.has_unfinished_requests():
        done.update({output.request_id: output for output in core.step() if output.finished})
    assert [done["a"].outputs[0].token_ids, done["c"].outputs[0].token_ids] == [output.outputs[0].token_ids for output in alone]
    for name, wanted in (("b", reference.mean(prompts[1])), ("d", reference.mean(prompts[3])), ("e", reference.last(prompts[4])),
                         ("f", reference.last(prompts[5]))):
        torch.testing.assert_close(done[name].outputs.data, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offload", [0.0, 0.001], ids=["recomputed", "swapped"])
def test_preempted_prompts_get_the_same_vectors(tiny_llama: Callable[..., Path], reference: Reference, offload: float) -> None:
    prompts = prompts_of((60, 60, 60, 60))
    with engine(tiny_llama(), max_num_batched_tokens=8, num_gpu_blocks_override=34, kv_offloading_size=offload) as llm:
        core = llm.llm_engine
        core.add_request("first", {"prompt_token_ids": prompts[0]}, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        for i, prompt in enumerate(prompts):
            core.add_request(str(i), {"prompt_token_ids": prompt}, MEAN)
        done = {}
        while core.has_unfinished_requests():
            done.update({output.request_id: output for output in core.step() if output.finished})
        assert core.stats().num_preemptions > 0
        for i, prompt in enumerate(prompts):
            torch.testing.assert_close(done[str(i)].outputs.data, reference.mean(prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "config"), [
    ("OPT", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}), ("OPT", {}), ("Gemma2", {"sliding_window": 6}),
    ("Cohere", {"logit_scale": 0.0625}),
], ids=["opt-350m", "opt", "gemma2", "cohere"])
def test_the_final_norm_and_projection_of_a_family_are_applied(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    """Cohere's factor on logits is folded into the norm's weights."""
    hf = make_hf(family, **config)
    hf.save_pretrained(tmp_path)
    prompts = prompts_of((23, 5), 97)
    with engine(tmp_path, skip_tokenizer_init=True, max_model_len=64, max_num_batched_tokens=8) as llm:
        check(llm, prompts, MEAN, Reference(hf).mean)
        check(llm, prompts, RAW, Reference(hf).last)


def test_the_default_model_gives_the_vectors_of_transformers(default_model: ModelFiles, default_float32: Path) -> None:
    reference = Reference(transformers.AutoModelForCausalLM.from_pretrained(default_float32, dtype=torch.float32))
    with LLM(str(default_model.folder), dtype="float32", device="cpu", max_model_len=256, max_num_batched_tokens=64) as llm:
        prompts = [llm.llm_engine.core.tokenizer.encode(text) for text in ("Paris is the capital of France.", "A page table. " * 30)]
        check(llm, prompts, MEAN, reference.mean)
        check(llm, prompts, RAW, reference.last)
        (output,) = llm.embed([prompts[0]], use_tqdm=False)  # type: ignore[list-item]
        wanted = torch.nn.functional.normalize(reference.last(prompts[0]), dim=0)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, rtol=1e-4, atol=1e-4)


def test_an_embedding_has_length_1_after_its_dimensions_are_cut(llm: LLM, reference: Reference) -> None:
    (prompt,) = prompts_of((20,))
    (whole,) = llm.embed(prompt, use_tqdm=False)
    assert len(whole.outputs.embedding) == whole.outputs.hidden_size == 32
    (short,) = llm.embed([prompt], pooling_params=PoolingParams(dimensions=8), use_tqdm=False)  # type: ignore[list-item]
    wanted = torch.nn.functional.normalize(reference.last(prompt)[:8], dim=0)
    torch.testing.assert_close(torch.tensor(short.outputs.embedding), wanted, rtol=1e-4, atol=1e-4)
    (raw,) = llm.embed(prompt, pooling_params=PoolingParams(normalize=False), use_tqdm=False)
    torch.testing.assert_close(torch.tensor(raw.outputs.embedding), reference.last(prompt), rtol=1e-4, atol=1e-4)


def test_scores_are_cosines(llm: LLM) -> None:
    one, two, three = prompts_of((9, 12, 5))
    vectors = [torch.tensor(output.outputs.embedding) for output in llm.embed([one, two, three], use_tqdm=False)]  # type: ignore[list-item]
    scores = llm.score(one, [two, three, one], use_tqdm=False)  # type: ignore[list-item]
    wanted = [float(vectors[0] @ vector) for vector in (vectors[1], vectors[2], vectors[0])]
    assert [score.outputs.score for score in scores] == pytest.approx(wanted, abs=1e-5)
    assert scores[0].prompt_token_ids == one + two
    pairs = llm.score([one, two], [two, one], use_tqdm=False)  # type: ignore[list-item]
    assert pairs[0].outputs.score == pytest.approx(pairs[1].outputs.score) == pytest.approx(wanted[0], abs=1e-5)
    with pytest.raises(InvalidInput, match="2 prompts cannot be compared with 3"):
        llm.score([one, two], [one, two, three])  # type: ignore[list-item]


def test_texts_are_truncated_to_their_last_tokens(llm: LLM, reference: Reference) -> None:
    (prompt,) = prompts_of((150,))
    (output,) = llm.encode([prompt], RAW, truncate_prompt_tokens=10, use_tqdm=False)  # type: ignore[list-item]
    assert output.prompt_token_ids == prompt[-10:]
    (output,) = llm.encode([prompt], RAW, truncate_prompt_tokens=-1, use_tqdm=False)  # type: ignore[list-item]
    assert output.prompt_token_ids == prompt[-128:]
    with pytest.raises(InvalidInput, match="150 tokens, but the context length is 128"):
        llm.embed([prompt], use_tqdm=False)  # type: ignore[list-item]


def test_each_prompt_may_have_its_parameters(llm: LLM) -> None:
    prompts = prompts_of((4, 5))
    outputs = llm.encode(prompts, [MEAN, PoolingParams(dimensions=3)], use_tqdm=False)  # type: ignore[arg-type]
    assert [len(output.outputs.data) for output in outputs] == [32, 3]
    with pytest.raises(InvalidInput, match="2 prompts, but 1 PoolingParams"):
        llm.encode(prompts, [MEAN], use_tqdm=False)  # type: ignore[arg-type]


def test_wrong_parameters_are_named(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="dimensions must be at most 32, the size of this model's vectors, got 33"):
        llm.embed("the cat", pooling_params=PoolingParams(dimensions=33), use_tqdm=False)
    with pytest.raises(InvalidInput, match="dimensions must be at least 1, got 0"):
        PoolingParams(dimensions=0)
    with pytest.raises(InvalidInput, match="pooling_type must be one of LAST, MEAN, got 'CLS'"):
        PoolingParams(pooling_type="CLS")
    with pytest.raises(NotSupportedYet, match="the pooling task 'token_embed' is not supported yet"):
        llm.encode("the cat", pooling_task="token_embed")
    with pytest.raises(InvalidInput, match="pooling_params must be PoolingParams"):
        llm.embed("the cat", pooling_params=GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="pooler_config has no entry 'pooling'; did you mean 'pooling_type'"):
        EngineConfig(pooler_config={"pooling": "MEAN"})
    with pytest.raises(InvalidInput, match="pooler_config: pooling_type must be one of"):
        EngineConfig(pooler_config={"pooling_type": "CLS"})


def test_the_engine_has_defaults_for_embeddings(tiny_llama: Callable[..., Path], reference: Reference) -> None:
    (prompt,) = prompts_of((20,))
    config = {"seq_pooling_type": "MEAN", "normalize": False, "dimensions": 5}
    with engine(tiny_llama(), runner="pooling", override_pooler_config=config) as llm:
        check(llm, [prompt], PoolingParams(), lambda tokens: reference.mean(tokens)[:5])
        check(llm, [prompt], PoolingParams(pooling_type="LAST", dimensions=6), lambda tokens: reference.last(tokens)[:6])


def test_a_model_may_say_how_it_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert default_pooling(tmp_path).pooling_type == "LAST"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text('{"word_embedding_dimension": 8, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}')
    assert default_pooling(tmp_path).pooling_type == "MEAN" and not capsys.readouterr().err
    file.write_text('{"pooling_mode_cls_token": true}')
    assert default_pooling(tmp_path).pooling_type == "LAST"
    assert "pooling_mode_cls_token, which is not supported" in capsys.readouterr().err
    for damaged in ("{", "[]", '{"a": NaN}'):
        file.write_text(damaged)
        with pytest.raises(ModelError, match=re.escape(str(file))):
            default_pooling(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "1_Pooling").symlink_to(file.parent)
    with pytest.raises(ModelError, match="outside the model's folder"):
        default_pooling(model)


def test_a_prompt_that_is_drafted_for_has_no_drafts(tiny_llama: Callable[..., Path], reference: Reference) -> None:
    prompts = [tokens * 5 for tokens in prompts_of((6, 7))]
    speculation = {"method": "ngram", "num_speculative_tokens": 3}
    with engine(tiny_llama(), speculative_config=speculation, max_num_batched_tokens=8) as llm:
        for prompt, params, wanted in ((prompts[0], MEAN, reference.mean), (prompts[1], RAW, reference.last)):
            llm.llm_engine.add_request("beside", {"prompt_token_ids": prompts[1]}, GREEDY)
            check(llm, [prompt], params, wanted)
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()


def test_states_that_are_not_finite_fail_their_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add = PooledPrompt.add

    def spoiled(self: PooledPrompt, first: int, count: int, data: bytes) -> None:
        add(self, first, count, torch.full((32,), torch.nan).numpy().tobytes() if self._num_tokens == 6 else data)

    monkeypatch.setattr(PooledPrompt, "add", spoiled)
    good, bad = prompts_of((5, 6))
    with pytest.raises(RequestFailed, match="has no vector"):
        llm.encode([good, bad], RAW, use_tqdm=False)  # type: ignore[list-item]
    assert len(llm.embed(good, use_tqdm=False)) == 1


def test_an_adapter_changes_the_vector(tiny_llama: Callable[..., Path], tmp_path: Path, reference: Reference) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama()), peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    with_adapter = Reference(adapted.merge_and_unload())
    prompts = prompts_of((20, 9))
    with engine(tiny_llama(), enable_lora=True, max_num_batched_tokens=8) as llm:
        check(llm, prompts, MEAN, with_adapter.mean, lora_request=LoRARequest("a", 1, str(tmp_path)))
        check(llm, prompts, MEAN, reference.mean)


def test_async_llm_yields_one_vector(tiny_llama: Callable[..., Path], reference: Reference) -> None:
    (prompt,) = prompts_of((30,))

    async def main() -> list[PoolingRequestOutput]:
        async with AsyncLLM(str(tiny_llama()), dtype="float32", device="cpu", num_gpu_blocks_override=100, max_num_batched_tokens=8) as llm:
            return [output async for output in llm.encode({"prompt_token_ids": prompt}, MEAN)]

    (output,) = asyncio.run(main())
    torch.testing.assert_close(output.outputs.data, reference.mean(prompt), rtol=1e-4, atol=1e-4)


def test_a_trace_with_embeddings_can_be_replayed(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    with engine(tiny_llama(), max_num_batched_tokens=8, trace=str(tmp_path / "trace")) as llm:
        llm.embed(prompts_of((20, 5)), pooling_params=[MEAN, RAW], use_tqdm=False)  # type: ignore[arg-type]
    steps = list(replay(read(tmp_path / "trace")))
    assert steps and all(step.mismatch is None for step in steps)
