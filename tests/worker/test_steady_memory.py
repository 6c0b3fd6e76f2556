"""All tensors that outlive a step are allocated at the start, and the memory ledger counts them."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.engine.engine import EngineCore
from minivllm.engine.llm import LLM
from minivllm.sampling.sampler import Sampler
from minivllm.sampling_params import SamplingParams
from minivllm.worker.memory import row_bytes

ROWS, LONGEST = 8, 64
KINDS: list[dict[str, Any]] = [
    dict(temperature=0), dict(temperature=0.8, top_p=0.9, logprobs=3, n=2), dict(temperature=1.2, top_k=7, min_p=0.01, seed=5),
    dict(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5, logprobs=0, prompt_logprobs=2),
    dict(min_tokens=3, logit_bias={5: 4.0, 9: -100}, stop_token_ids=[11]), dict(allowed_token_ids=[3, 4, 5]),
    dict(bad_words=["the cat", "hat"], repetition_penalty=2.0), dict(structured_outputs={"regex": "[ab]{9}"}, presence_penalty=1.0),
]


def kept(part: Any, seen: set[int] | None = None) -> dict[int, int]:
    """Storages of tensors that an object holds: address -> bytes."""
    seen = set() if seen is None else seen
    if id(part) in seen:
        return {}
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()}
    if isinstance(part, dict):
        inside: list[Any] = list(part.values())
    elif isinstance(part, (list, tuple, set)):
        inside = list(part)
    elif type(part).__module__.startswith("minivllm."):
        names = [*getattr(part, "__dict__", ()), *getattr(type(part), "__slots__", ())]
        inside = [getattr(part, name, None) for name in names]
        if dataclasses.is_dataclass(part):
            inside += [getattr(part, f.name) for f in dataclasses.fields(part)]
    else:
        return {}
    found: dict[int, int] = {}
    for item in inside:
        found |= kept(item, seen)
    return found


def serve(core: EngineCore) -> None:
    """Requests of every kind, in changing batches, with preemptions."""
    for turn in range(3 * len(KINDS)):
        kind = KINDS[(turn * 5) % len(KINDS)]
        core.add_request(f"r{turn}", {"prompt_token_ids": [3 + (turn * 7 + i) % 200 for i in range(5 + turn)]},
                         SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **kind}))
        core.step()
    while core.has_unfinished_requests():
        core.step()


@pytest.mark.usefixtures("one_torch_thread")
def test_no_tensor_that_outlives_a_step_is_created_while_serving(tiny_llama: Callable[..., Path]) -> None:
    with LLM(str(tiny_llama()), device="cpu", dtype="float32", num_gpu_blocks_override=40, block_size=4, max_model_len=LONGEST,
             max_num_seqs=ROWS, max_num_batched_tokens=32) as llm:
        core = llm.llm_engine.core
        runner = core.executor.runner  # type: ignore[attr-defined]
        before = kept([runner.sampler, runner.rows, runner.kv])
        serve(core)
        assert core.stats().num_preemptions > 0
        after = kept([runner.sampler, runner.rows, runner.kv])
        grown = {at: size for at, size in after.items() if at not in before}
        assert before.items() <= after.items()
        pairs = kept(runner.sampler._bad_words)
        assert set(grown) <= set(pairs) and sum(pairs.values()) <= ROWS * 2 * 1024 * 24, "only bad words, within what the ledger counts"
        runner.drop_rows()
        assert kept([runner.sampler, runner.rows, runner.kv]) == before, "a dropped row table keeps its memory"
        vocab, layout = runner.model.spec.vocab_size, runner.kv.layout
        rows = sum(kept([runner.sampler, runner.rows]).values())
        assert rows <= row_bytes(layout, ROWS, LONGEST, vocab) <= rows + ROWS * 2 * 1024 * 24
        assert runner.sampler._penalties.counts.nbytes + runner.sampler._penalties.seen.nbytes == 5 * ROWS * vocab


def test_the_figure_of_the_ledger_grows_with_rows_and_vocabulary() -> None:
    assert Sampler.num_bytes(256, 151_936) > 256 * 151_936 * 5
    assert Sampler.num_bytes(256, 151_936) - Sampler.num_bytes(128, 151_936) > 128 * 151_936 * 5


def test_a_planted_tensor_is_found() -> None:
    sampler = Sampler(2, 10, torch.device("cpu"))
    before = kept(sampler)
    sampler._zeros = torch.zeros(10**5)
    assert len(kept(sampler).keys() - before.keys()) == 1


def test_kernels_are_compiled_with_every_kind_of_layer_and_the_last_one_is_the_models_last() -> None:
    """The last layer may compute last tokens only, which other layers never do."""
    from minivllm.families import parse_config
    from minivllm.kernels import select
    from minivllm.layers.build import BuildContext
    from minivllm.models.loader import load_model

    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
              "num_hidden_layers": 9, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}
    spec = parse_config(config)
    wide = dataclasses.replace(spec.layers[0], mlp=dataclasses.replace(spec.layers[0].mlp, intermediate_size=96))
    device = torch.device("cpu")
    for pattern in ("aaabbbbba", "ababababa", "aaaaaaaab", "aaaaaaaaa", "abbbbbbbb"):
        layers = tuple(wide if kind == "b" else spec.layers[0] for kind in pattern)
        model = load_model(dataclasses.replace(spec, layers=layers), Path(), "dummy",
                           BuildContext(device, torch.float32, select(device)), 0)
        few = [pattern[layer.index] for layer in model.without_repetition().layers]
        assert few[-1] == pattern[-1] and sorted(few[:-1]) == sorted(set(pattern[:-1])), pattern
        assert model.without_repetition().layers[-1] is model.layers[-1] and len(model.layers) == 9
