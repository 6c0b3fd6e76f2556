"""Are an engine's kernels right at a model's full size? The same weights and steps, computed again with the reference kernels.

    step         what is compared                               each side has its own cache, with NaN in unwritten slots
    prompts      the last logits of prompts of several lengths
    mixed        chunks with earlier context, beside decodes
    decodes      several sequences, then one alone, then several with the same leading blocks
    the engine   its own greedy tokens, with graphs and sampler: how far they are from the reference's best tokens

bfloat16 has 8 bits of precision, and two correct computations of 30 layers differ after the first rounding. With random weights of the 0.6B
shape, the reference in bfloat16 differs from itself in float32 by 0.015 (standard deviation 0.02) or 0.038 (0.04) of the logits' standard
deviation. Two correct computations in bfloat16 may differ by 1.4 times as much, and the tolerance is twice that. Quantized weights that
round more have a larger one, by the same rule (`NOISE`), but at most half of the distance of two unrelated computations. So this check
finds a kernel that is wrong at some shape, length or stride. Smaller errors are found by the kernels' tests and by `bench.gpu_kernels`: one
missing key among hundreds, for example, or errors of attention that random weights hide, because with them attention is almost uniform.
A wrong kernel can be fast, so no figures are printed for kernels that fail. The reference unpacks quantized weights before each product
(bench/unpacked.py), and quantizes the inputs of fp8 products where the kernels do.

    python -m bench.kernel_check --noise qwen3-0.6b [--stored awq]    prints the difference of bfloat16 and float32
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.unpacked import reference_ops
from minivllm.benchmarks.workloads import WorkloadRequest, check_requests
from minivllm.core.plan import NULL_BLOCK
from minivllm.families import ModelSpec, parse_config
from minivllm.kernels import REFERENCE, Ops
from minivllm.kernels.layout import InputBatch
from minivllm.kernels.reference.grouped import quantize_rows, unpack_groups
from minivllm.kernels.tuning import PACKED_MAX_ROWS, SHARED_KEYS_MULTIPLE
from minivllm.layers.build import BuildContext
from minivllm.models.decoder import Decoder
from minivllm.models.loader import DummyWeights
from minivllm.models.streaming import WeightStream
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS, all_linears, method_of, parameters
from minivllm.worker.kv_cache import KVLayout

# Distances are the rms of the differences of a row / the standard deviation of the reference's row. NOISE is that of bfloat16 and float32:
# of 16-bit weights (above), and by the type of the weights those of `--noise mistral-7b --stored awq --device cuda`, and fp8, on an H200.
# Inputs of fp8 products are quantized. An input on the edge of two codes gets another code after each small difference.
NOISE_OF_16_BITS, NOISE = 0.038, MappingProxyType({"AWQ int4": 0.152, "fp8": 0.495})
UNRELATED = 1.4  # distance of two unrelated rows
TOKENS_APART = 5  # tolerance of (best logit - logit of a greedy token) / the same standard deviation, for each 1 of the logits' tolerance
UNRELATED_TOKEN = 4.0  # the same of a random token
STEPS: tuple[tuple[tuple[int, int], ...], ...] = (  # per step: (sequence, tokens), decodes first, as in the packer
    ((0, 300), (1, 37), (2, 1000)),
    ((1, 1), (0, 1), (2, 130), (3, 20)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((2, 1),),
    ((4, 20), (5, 40), (6, 3)),
    ((2, 1), (4, 1), (5, 1), (6, 1)),
)
FORKS = dict.fromkeys((4, 5, 6), (2, 256))  # sequence -> (another sequence, number of leading tokens that it shares, in the same blocks)


def twin_with(model: Decoder, ops: Ops) -> Decoder:
    """The same model with the same weights and other kernels: each kernel in a layer is replaced by that of the same name in `ops`."""
    mine = model.build.ops
    names = {getattr(mine, f.name): getattr(ops, f.name) for f in dataclasses.fields(Ops)}

    def replaced(thing: Any) -> Any:
        if isinstance(thing, Ops):
            return ops
        if isinstance(thing, WeightStream):
            return thing  # its buffers hold the weights of both
        if isinstance(thing, (list, tuple)) and type(thing) in (list, tuple):
            return type(thing)(replaced(each) for each in thing)
        if callable(thing) and thing in names:
            return names[thing]
        if not type(thing).__module__.startswith(("minivllm.layers", "minivllm.models", "minivllm.quantization")):
            return thing
        new = copy.copy(thing)
        for name in (*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())):
            if hasattr(thing, name):
                object.__setattr__(new, name, replaced(getattr(thing, name)))
        return new

    return replaced(model)


class Trial:
    """Sequences of random tokens, computed step by step with one model and a small cache."""

    def __init__(self, model: Decoder, layout: KVLayout, steps: Sequence[Sequence[tuple[int, int]]] = STEPS,
                 forks: Mapping[int, tuple[int, int]] = FORKS, plain: bool = False) -> None:
        """plain: every layer computes all tokens, and a shared prefix is not read once for all sequences."""
        self.model, self.layout, self.plain = model, layout, plain
        self.steps = steps
        rng = random.Random(0)
        self.forks = {seq: fork for seq, fork in forks.items() if any(seq == s for step in steps for s, _ in step)}
        lengths = {seq: count for seq, (_, count) in self.forks.items()}
        for step in steps:
            for seq, count in step:
                lengths[seq] = lengths.get(seq, 0) + count
        vocab = model.spec.vocab_size
        self.tokens = {seq: [rng.randrange(vocab) for _ in range(n)] for seq, n in sorted(lengths.items())}
        groups, size = len(layout.groups), layout.block_size
        widths = {seq: -(-n // size) for seq, n in lengths.items()}
        num_blocks = NULL_BLOCK + 1 + groups * sum(widths.values())
        blocks = list(range(NULL_BLOCK + 1, num_blocks))
        rng.shuffle(blocks)
        self.blocks = {(g, seq): [blocks.pop() for _ in range(n)] for g in range(groups) for seq, n in sorted(widths.items())}
        self.done = dict.fromkeys(self.tokens, 0)
        for seq, (source, count) in self.forks.items():
            self.done[seq] = count
            self.tokens[seq][:count] = self.tokens[source][:count]
            for g in range(groups):
                self.blocks[g, seq][: count // size] = self.blocks[g, source][: count // size]
        self.kv = layout.views(layout.allocate(num_blocks, model.build.device))
        for layer in self.kv:
            for t in (layer.k, layer.v) if layer.scales is None else (layer.scales,):
                t.fill_(torch.nan)

    def run(self) -> list[Tensor]:
        """-> per step, the logits of each sequence's last token: [B, V] float32."""
        return [self._step(step) for step in self.steps]

    def _step(self, step: Sequence[tuple[int, int]]) -> Tensor:
        device, size = self.model.build.device, self.layout.block_size
        spans = [(seq, self.done[seq], self.done[seq] + count) for seq, count in step]
        for seq, _, end in spans:
            self.done[seq] = end
        tokens = [t for seq, start, end in spans for t in self.tokens[seq][start:end]]
        positions = [p for _, start, end in spans for p in range(start, end)]
        width = max(-(-end // size) for _, _, end in spans)
        tables, slots = [], []
        for g in range(len(self.layout.groups)):
            own = [(self.blocks[g, seq] + [NULL_BLOCK] * width)[:width] for seq, _, _ in spans]
            tables.append(torch.tensor(own, dtype=torch.int32, device=device))
            slots.append(torch.tensor([self.blocks[g, seq][p // size] * size + p % size for seq, start, end in spans
                                       for p in range(start, end)], device=device))
        query_lens, seq_lens = tuple(end - start for _, start, end in spans), tuple(end for _, _, end in spans)
        query_start = torch.tensor([0, *query_lens]).cumsum(0)
        some_prompt = max(query_lens) > 1
        shared = min((self._shared(seq) for seq, _, _ in spans), default=0)
        batch = InputBatch(
            tokens=torch.tensor(tokens, dtype=torch.int32, device=device), positions=torch.tensor(positions, device=device),
            query_start=query_start.int().to(device), seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            slots=tuple(slots), block_tables=tuple(tables), logit_rows=(query_start[1:] - 1).to(device),
            num_decodes=sum(n == 1 for n in query_lens), query_lens_host=query_lens, seq_lens_host=seq_lens,
            last_only=some_prompt and not self.plain,
            shared=torch.tensor([shared], dtype=torch.int32, device=device) if shared and not (some_prompt or self.plain) else None)
        hidden = self.model.forward(batch, self.kv, size)
        return self.model.logits(hidden if batch.last_only else hidden[batch.logit_rows])

    def _shared(self, seq: int) -> int:
        """Number of its leading keys in blocks that several sequences share."""
        counts = [count for one, (source, count) in self.forks.items() if seq in (one, source)]
        return min(counts, default=0) // SHARED_KEYS_MULTIPLE * SHARED_KEYS_MULTIPLE


def apart(got: Tensor, want: Tensor) -> float:
    """The largest error of a row, relative to the standard deviation of the reference's row; infinite for NaN."""
    error = (got - want).square().mean(-1).sqrt() / want.std(-1)
    return float(error.nan_to_num(nan=torch.inf).max())


def short_of_best(model: Decoder, layout: KVLayout, requests: Sequence[WorkloadRequest], outputs: Sequence[Sequence[int]]) -> float:
    """The largest distance of a greedy token's logit from the best logit, in standard deviations, given all tokens before it."""
    worst = 0.0
    for request, output in zip(requests, outputs, strict=True):
        prompt = list(request.prompt_token_ids)
        trial = Trial(model, layout, [[(0, len(prompt))], *([[(0, 1)]] * (len(output) - 1))])
        trial.tokens[0] = prompt + list(output[:-1])
        for logits, token in zip(trial.run(), output, strict=True):
            short = (logits.max() - logits[0, token]) / logits.std()
            worst = max(worst, float(short.nan_to_num(nan=torch.inf)))
    return worst


def tolerances(model: Decoder) -> tuple[float, float]:
    """-> (largest distance of logits, the same of a greedy token's logit from the best logit) for the types of the model's weights."""
    method = model.build.method
    types = {name for linear in all_linears(model.spec) for name in method(linear).bytes_by_type(linear.stored_rows, linear.cols, 2)}
    tolerance = min(2 * 1.4 * max((NOISE.get(name, NOISE_OF_16_BITS) for name in types), default=NOISE_OF_16_BITS), UNRELATED / 2)
    return tolerance, min(TOKENS_APART * tolerance, UNRELATED_TOKEN / 2)


@torch.inference_mode()
def check(model: Decoder, layout: KVLayout, greedy: Callable[[list[WorkloadRequest]], list[list[int]]] | None = None) -> dict[str, Any]:
    """-> the distances, and "refused" with the reason if they are too large. greedy: returns the engine's tokens."""
    reference = twin_with(model, reference_ops())
    logits = [Trial(model, layout).run(), Trial(reference, layout, plain=True).run()]
    distance = max(apart(got, want) for got, want in zip(*logits, strict=True))
    tolerance, token_tolerance = tolerances(model)
    result: dict[str, Any] = {"logits_apart": round(distance, 4), "tolerance": round(tolerance, 4)}
    refused = [] if distance <= tolerance else [f"logits are {distance:.3g} from the reference's, more than {tolerance:.3g}"]
    if greedy is not None:
        requests = check_requests()
        short = short_of_best(reference, layout, requests, greedy(requests))
        result |= {"tokens_short_of_best": round(short, 4), "token_tolerance": round(token_tolerance, 4)}
        if not short <= token_tolerance:
            refused.append(f"a greedy token is {short:.3g} below the reference's best, more than {token_tolerance:.3g}")
    return result | ({"refused": "; ".join(refused)} if refused else {})


def noise(shape: str, stored: str = "", device: str = "cpu") -> dict[str, float]:
    """Weights -> difference of the reference in bfloat16 and in float32, with a small vocabulary.

    stored: a storage of `bench.run --stored`, "fp8" for `quantization="fp8"`, or "": with random weights of two standard deviations. Else
    with `load_format="dummy"`'s weights. On a CPU the model then has the same depth and an eighth of the width, and weights times the
    square root of 8: so layers change their input as much as at full width.
    """
    config, narrow = {**models.config_of(shape), "vocab_size": 2000}, bool(stored) and device == "cpu"
    if narrow:
        sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        config |= {name: max(1, config[name] // 8) for name in sizes}
    if stored not in ("", "fp8"):
        config["quantization_config"] = dict(quantization_config(stored, parse_config(config), METHODS))
    spec, method = parse_config(config, methods=METHODS), method_of(config, wanted="fp8" if stored == "fp8" else None)
    ops = dataclasses.replace(REFERENCE, pack_weight=lambda weight, dtype: weight.to(dtype), grouped_linear=_with_quantized_inputs)
    steps = (((0, 40), (1, 7), (2, 60)), ((0, 1), (1, 1), (2, 5)), ((0, 1), (1, 1), (2, 1)), ((2, 1),))
    found = {}
    for std in (0.0,) if stored else (0.02, 0.04):
        logits = []
        for dtype in (torch.bfloat16, torch.float32):
            build = BuildContext(torch.device(device), dtype, ops, method)
            take = _Rounded(spec, build, std, 8**0.5 if narrow else 1.0)
            logits.append(Trial(Decoder(spec, build, partial(take, dtype)), KVLayout.of(spec, 16, dtype), steps).run())
        name = f"{stored} of load_format dummy" if stored else f"standard deviation {std}"
        found[name] = max(apart(*pair) for pair in zip(*logits, strict=True))
    return found


class _Rounded:
    """Random weights that are the same in bfloat16 and in float32."""

    def __init__(self, spec: ModelSpec, build: BuildContext, std: float, factor: float) -> None:
        """std: of matrices; 0: that of load_format "dummy", times `factor` in layers."""
        self.std, self.factor, self.parameters = std, factor, parameters(spec, build.method)
        self.dummy = DummyWeights(self.parameters, dataclasses.replace(build, dtype=torch.bfloat16), 0)
        self.generator = torch.Generator(build.device).manual_seed(0)

    def __call__(self, dtype: torch.dtype, name: str) -> Tensor:
        wanted = self.parameters[name]
        out = self.dummy(name)
        if wanted.dummy == "normal" and self.std:
            out.normal_(0.0, self.std, generator=self.generator)
        elif wanted.dummy == "normal" and name.startswith("layers."):
            out *= self.factor
        return out.to(dtype) if wanted.dtype is None else out


def _with_quantized_inputs(x: Tensor, packed: Any, bias: Tensor | None = None, *, norm: tuple[Tensor, float] | None = None,
                           **options: Any) -> Tensor:
    """As the product of many rows with fp8 weights on a GPU."""
    if len(x) > PACKED_MAX_ROWS and unpack_groups(packed).quantize_input:
        if norm is not None:
            x, norm = REFERENCE.rms_norm(x, *norm), None
        codes, scales = quantize_rows(x)
        x = (codes.float() * scales).to(x.dtype)
    return REFERENCE.grouped_linear(x, packed, bias, norm=norm, **options)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", choices=models.SHAPES, required=True, metavar="SHAPE")
    parser.add_argument("--stored", default="", metavar="STORAGE", help="awq, gptq, Q4_K_M ... as in bench.run, or fp8")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: quantized models at full width")
    args = parser.parse_args()
    with torch.inference_mode():
        for name, distance in noise(args.noise, args.stored, args.device).items():
            print(f"{args.noise}, weights with {name}: bfloat16 is {distance:.4f} from float32")


if __name__ == "__main__":
    main()
