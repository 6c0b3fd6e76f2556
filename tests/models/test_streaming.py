"""Layers streamed through two staging buffers compute what they compute on the device, however late or early their copies run."""
from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.kernel_check import twin_with
from minivllm.families import LinearSpec, ModelSpec
from minivllm.kernels import REFERENCE, tuning
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.loader import load_model
from minivllm.models.streaming import HostWeights, StreamedLayer, WeightStream, tensors_of
from minivllm.quantization.awq import AWQMethod
from minivllm.quantization.base import LinearMethod, Matmul
from minivllm.quantization.compressed_tensors import IntMethod
from minivllm.quantization.dense import DENSE
from minivllm.quantization.fp8 import FP8Method
from minivllm.quantization.gguf import GGUFMethod
from minivllm.quantization.gptq import GPTQMethod
from minivllm.quantization.methods import layer_bytes
from minivllm.quantization.online import OnlineMethod
from minivllm.quantization.parts import PartsMethod
from tests.models.paged import Paged
from tests.models.test_parity import MODELS
from tests.models.tiny import make_hf, read_spec
from tests.quantization.toy_int4 import ToyInt4
from tests.worker.test_model_runner import Tiny, run, sequences_of

CPU = torch.device("cpu")
AWQ = AWQMethod(16)
# As on a GPU, weights stay as checkpoints have them. (oneDNN's packed weights have no storage that could be a view.)
PLAIN = replace(REFERENCE, pack_weight=lambda weight, dtype: weight.to(dtype).contiguous())

METHODS: dict[str, Callable[[LinearSpec], LinearMethod]] = {
    "dense": lambda linear: DENSE,
    "awq": lambda linear: AWQ,
    "int4 without fused kernels": lambda linear: ToyInt4(),
    "parts of a fused layer differ": lambda linear: PartsMethod.of((AWQ, *[DENSE] * (len(linear.rows) - 1))),
    "gptq": lambda linear: GPTQMethod(4, 16, sym=False, desc_act=False, v1=True),
    "fp8": lambda linear: FP8Method((16, 16), quantize_input=True, input_scale=True),
    "int8": lambda linear: IntMethod(8, -1, symmetric=True, packed=False),
    "fp8 made while loading": lambda linear: OnlineMethod("fp8"),
    "gguf": lambda linear: GGUFMethod("Q8_0" if linear.name.endswith("o") else "Q4_1"),
    "gguf, K-quants": lambda linear: GGUFMethod("Q6_K" if linear.name.endswith("qkv") else "Q4_K"),
    "layers differ": lambda linear: AWQ if ".1." in linear.name else DENSE,
}


class TestCopies:
    """Copies that run when they are started, or only when they are waited for. Until then, a buffer that receives one holds NaN."""

    __test__ = False

    def __init__(self, late: Callable[[], bool] = lambda: True) -> None:
        self.late, self.queue, self.log = late, [], []

    def start(self, weights: HostWeights, buffer: Tensor) -> int:
        buffer.fill_(255)  # NaN in every float format
        self.queue.append(lambda: weights.copy_to(buffer))
        self.log.append(("start", len(self.queue)))
        if not self.late():
            self.run_until(len(self.queue))
        return len(self.queue)

    def run_until(self, copy: int) -> None:
        """Copies run in the order in which they were started."""
        for i in range(copy):
            self.queue[i]()
            self.queue[i] = lambda: None

    def wait(self, copy: int) -> None:
        self.log.append(("wait", copy))
        self.run_until(copy)


def spec_of(name: str, folder: Path, layers: int = 5, **config: Any) -> ModelSpec:
    family, base = MODELS[name]
    kinds = {"layer_types": (base["layer_types"] * layers)[:layers]} if "layer_types" in base else {}
    make_hf(family, **{"hidden_size": 64, **base, "num_hidden_layers": layers, **kinds, **config}).config.save_pretrained(folder)
    return replace(read_spec(folder), architecture=family)


def both(spec: ModelSpec, streamed: Sequence[int], method: Callable[[LinearSpec], LinearMethod] = METHODS["dense"],
         copies: TestCopies | None = None) -> tuple[Decoder, Decoder]:
    """The same random model, resident and streamed. Embedding and head are dense."""
    build = BuildContext(CPU, torch.float32, PLAIN, lambda linear: method(linear) if linear.name.startswith("layers.") else DENSE)
    stream = WeightStream(streamed, CPU, copies or TestCopies())
    return load_model(spec, Path(), "dummy", build, 1), load_model(spec, Path(), "dummy", build, 1, stream)


def logits_of(model: Decoder, seed: int) -> list[Tensor]:
    """Prompt chunks and decodes of three sequences in a random order; some steps compute last tokens only."""
    rng, paged, found = random.Random(seed), Paged(model, 40, num_seqs=3), []
    for _ in range(9):
        counts = sorted(((s, rng.choice((1, 1, 4))) for s in rng.sample(range(3), rng.randint(1, 3))), key=lambda work: work[1])
        work = [(s, [rng.randrange(97) for _ in range(count)]) for s, count in counts]
        found.append(paged.run(*work, last_only=rng.random() < 0.4))
    return found


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "qwen2, alternating windows", "opt-125m's shape", "opt-350m's shape",
                                  "galactica's shape", "qwen2-moe", "gpt-oss", "deepseek-v3, yarn"])
@pytest.mark.parametrize("streamed", [(1, 2, 3, 4), (0, 2, 4), range(5), (3,)], ids=str)
def test_every_family_computes_the_same(name: str, streamed: Sequence[int], tmp_path: Path) -> None:
    resident, stream = both(spec_of(name, tmp_path), streamed)
    assert [isinstance(layer, StreamedLayer) for layer in stream.layers] == [i in streamed for i in range(5)]
    assert same(logits_of(resident, 1), logits_of(stream, 1))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_the_same_and_nothing_of_a_streamed_layer_stays_on_the_device(method: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256} if "K-quants" in method else {"intermediate_size": 96}
    spec = spec_of("llama", tmp_path, **sizes)
    resident, stream = both(spec, range(1, 5), METHODS[method])
    assert same(logits_of(resident, 2), logits_of(stream, 2))
    held = [sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(layer)}.values())
            for layer in resident.layers]
    # Every tensor was found. (Random scales are kept in float32 by methods that keep those of checkpoints in 16 bits.)
    assert all(size >= least for size, least in zip(held, layer_bytes(spec, resident.build.method, 4, on_gpu=False), strict=True))
    streaming, padding = stream._stream, 20 * 256  # bytes, of about 20 aligned tensors per layer
    addresses = {buffer.data_ptr() for buffer in streaming._buffers}
    for layer in stream.layers[1:]:
        assert {t.untyped_storage().data_ptr() for t in tensors_of(layer._layer) if t.numel()} <= addresses
    assert 0 <= streaming.host_bytes - sum(held[1:]) < 4 * padding and streaming.staging_bytes <= 2 * (max(held) + padding)


@given(st.integers(0, 10**6), st.sets(st.integers(0, 4), min_size=1), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_it_does_not_matter_when_the_copies_run(tmp_path_factory: pytest.TempPathFactory, seed: int, streamed: set[int], rng: Any) -> None:
    spec = spec_of("llama", tmp_path_factory.mktemp("llama"))
    resident, stream = both(spec, sorted(streamed), copies=TestCopies(lambda: rng.random() < 0.5))
    assert same(logits_of(resident, seed), logits_of(stream, seed))


def test_a_layer_that_does_not_wait_for_its_own_copy_computes_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would notice."""
    _, stream = both(spec_of("llama", tmp_path), range(5))
    monkeypatch.setattr(TestCopies, "wait", lambda self, copy: None)
    assert logits_of(stream, 0)[0].isnan().any()


def test_a_step_after_one_that_failed_half_way_and_after_a_short_model_is_right(tmp_path: Path) -> None:
    resident, stream = both(spec_of("qwen2, alternating windows", tmp_path, layers=6), range(6))
    failing = stream.layers[3]._layer
    stream.layers[3]._layer = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        logits_of(stream, 0)
    stream.layers[3]._layer = failing
    assert same(logits_of(resident, 3), logits_of(stream, 3))
    few, whole = stream.without_repetition(), resident.without_repetition()
    assert len(few.layers) == len(whole.layers) == 3
    assert same(logits_of(whole, 4), logits_of(few, 4)) and same(logits_of(resident, 5), logits_of(stream, 5))
    assert same(logits_of(twin_with(stream, REFERENCE), 6), logits_of(stream, 6))  # as the benchmark checks its kernels


@pytest.mark.parametrize("streamed", [(1, 4), (0, 2, 4), (1, 2, 3, 4), range(5)], ids=str)
def test_a_step_between_two_settled_states_can_be_captured(streamed: Sequence[int], tmp_path: Path) -> None:
    """It waits only for copies that it started itself, all of them, and every step does the same."""
    copies = TestCopies()
    _, stream = both(spec_of("llama", tmp_path), streamed, copies=copies)
    paged, steps = Paged(stream, 40), []
    paged.run((0, [1, 2, 3]))
    for token in range(3):
        stream.settle()
        copies.log.clear()
        first = len(copies.queue)
        paged.run((0, [token]))
        stream.settle()
        steps.append([(what, copy - first) for what, copy in copies.log])
    assert steps[0] == steps[1] == steps[2]
    started = [copy for what, copy in steps[0] if what == "start"]
    assert sorted(copy for what, copy in steps[0] if what == "wait") == started == list(range(1, len(started) + 1))
    users = [len(streamed[b::2]) for b in range(2)]
    assert len(started) == sum(n for n in users if n > 1)  # a layer with a buffer for itself is never copied again


def test_tensors_are_found_wherever_a_matmul_may_keep_them() -> None:
    class State:  # such as a library's
        def __init__(self, scale: Tensor) -> None:
            self.scale, self.kernel, self.module = scale, torch.relu, torch

    class Slotted(Matmul):
        __slots__ = ("codes", "missing", "state")

    matmul, (a, b, c, d) = Slotted(), torch.ones(4, 2)
    matmul.codes, matmul.state, matmul.others = {"a": [(a, b)]}, State(c), matmul  # a circle
    assert {id(t) for t in tensors_of((matmul, DENSE.build({"weight": d}, (1,), PLAIN)))} >= {id(a), id(b), id(c)}
    assert len(list(tensors_of((matmul, matmul)))) == 3


def test_a_tensor_object_that_two_layers_hold_is_refused() -> None:
    """It cannot view a staging buffer and keep its value."""
    @dataclasses.dataclass
    class Layer:
        index: int
        weight: Tensor
        attention: Any = None

    shared = torch.ones(8)
    stream = WeightStream((0,), CPU, TestCopies())
    stream.add(Layer(0, shared))
    with pytest.raises(AssertionError, match="share a tensor"):
        stream.start((Layer(1, shared),))


@pytest.fixture(scope="module", params=[False, True], ids=["full attention", "two KV groups"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    made = Tiny(folder, request.param)
    build, layers = replace(made.model.build, ops=PLAIN), len(made.model.layers)
    made.model = load_model(made.model.spec, folder, "auto", build, stream=WeightStream(range(layers), CPU, TestCopies()))
    return made


@given(st.integers(0, 10**6), st.integers(0, 2), st.sampled_from([2, 7, 100]))
@settings(max_examples=8, deadline=None)
def test_greedy_tokens_equal_transformers_for_any_plan(tiny: Tiny, seed: int, depth: int, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MIN_SKIPPED_TOKENS", 6)  # so that some steps compute last tokens only
        sequences = sequences_of(tiny)
        run(tiny.runner(), tiny.planner(seed=seed), sequences, random.Random(seed), depth, most=most)
    assert [s.outputs for s in sequences] == tiny.expected
