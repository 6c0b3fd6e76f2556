"""Every Triton kernel alone, at a model's sizes: is its result right, and how close does it come to the GPU's limits?

    python -m bench.gpu_kernels --shape qwen3-0.6b [--rows 1,8,32,128] [--only linear,packed,decode,decode8,..] [--save FILE]

Each row compares the kernel with the reference on the same random inputs. If they differ, the row has no figure. `MB` is what must be
moved at least once: weights, inputs, outputs, keys and values. `of copy` may exceed 100%, since reading alone is faster than copying.
The last column divides the bytes by the bandwidth of a small card. It is a prediction, given only where bandwidth limits that card.
"""
from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import gpu_timing, machine, models
from bench.gpu_timing import CARD, CARD_BYTES, CARD_FLOPS, Ceiling, copies_beyond_l2, seconds
from minivllm.families import ModelSpec, parse_config
from minivllm.kernels import REFERENCE, Ops
from minivllm.kernels.grouped import GroupedWeight
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.kernels.reference.kv_cache import quantize

BLOCK_SIZE = 16
QUANTUM = 0.08  # limit of the largest error in a quantized cache: rounding may give one of two neighbors, such as 416 and 448 in fp8
RMS, WORST = 0.01, 0.05  # limits: rms of the error / rms of the reference, largest error / largest value of the reference
DECODES = {"1 x 192": [192], "1 x 8000": [8000], "1 x 32000": [32000], "8 x 256": [256] * 8, "32 x 256": [256] * 32,
           "128 x 256": [256] * 128,
           "256 x 200..1800": sorted((random.Random(i).randint(200, 1800) for i in range(256)), reverse=True)}  # fmt: skip
SHARING = {"64 x 2150, 2048 shared": ([2150] * 64, 2048)}  # (keys of each decode, leading keys in the same blocks)
PROMPTS = (2048, 8000)
LATER_CHUNKS = ((8192, 16384), (7424, 32000), (256, 32000))  # (tokens of a chunk, keys with it)
MIN_PREDICTED = 1 << 20  # bytes; for fewer the start and the end of a kernel take longer than the transfer
KINDS = ("linear", "packed", "decode", "decode8", "prompt", "norm", "sampler")
PACKED: dict[str, dict[str, Any]] = {  # codes of 4, 6 or 8 bits, and what belongs to each group of inputs
    "awq": dict(bits=4, group=128, zeros=True), "q4_k": dict(bits=4, group=32, mins=True, super_group=256),
    "q6_k": dict(bits=6, group=16, zero=32, super_group=256), "fp8": dict(bits=8),
}
QUANTIZED_CACHES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Case:
    """One row of the table: a call on several copies of its data, and the amount of its work."""

    name: str
    size: str
    calls: Sequence[Callable[[], Any]]
    wrong: Callable[[], str]  # "" if the kernel's result equals the reference's
    num_bytes: int
    flops: int = 0


class Maker:
    """Random inputs of a model's sizes, and the cases that use them."""

    def __init__(self, spec: ModelSpec, ops: Ops, device: torch.device, dtype: torch.dtype = torch.bfloat16,
                 compared_rows: int = 128) -> None:
        """compared_rows: number of rows whose sampled tokens are compared, for every number of timed rows."""
        self.spec, self.ops, self.device, self.dtype, self.compared_rows = spec, ops, device, dtype, compared_rows
        self.attention = spec.layers[0].attention
        torch.manual_seed(0)

    def random(self, *size: int, std: float = 1.0) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(0.0, std)

    # -- linears --------------------------------------------------------------------------------------------------------

    def linears(self, rows: Sequence[int]) -> Iterator[Case]:
        s, a, m = self.spec, self.attention, self.spec.layers[0].mlp
        heads = a.num_heads * a.head_dim
        yield from self._linear("norm + qkv", heads + 2 * a.num_kv_heads * a.head_dim, s.hidden_size, rows, norm=True)
        yield from self._linear("o + residual", s.hidden_size, heads, rows, add=True)
        gated = m.gated
        yield from self._linear("norm + gate, up", m.intermediate_size, s.hidden_size, rows, norm=True, gated=gated)
        yield from self._linear("down + residual", s.hidden_size, m.intermediate_size, rows, add=True)
        yield from self._linear("norm + head", s.vocab_size, s.hidden_size, rows, norm=True)

    def _linear(self, name: str, n: int, k: int, rows: Sequence[int], norm: bool = False, gated: bool = False,
                add: bool = False) -> Iterator[Case]:
        height = 2 * n if gated else n
        weights = [self.random(height, k, std=k**-0.5) for _ in range(copies_beyond_l2(2 * height * k, self.device))]
        before = (1.0 + self.random(k, std=0.1), self.spec.norm_eps) if norm else None
        for t in rows:
            x, residual = self.random(t, k), self.random(t, n) if add else None

            def call(weight: Tensor, ops: Ops = self.ops, x: Tensor = x, residual: Tensor | None = residual) -> Tensor:
                return ops.fused_linear(x, weight, norm=before, gated=gated, residual=residual)

            def wrong(call: Callable[..., Tensor] = call, residual: Tensor | None = residual) -> str:
                both = [call(weights[-1], ops, residual=None if residual is None else residual.clone()) for ops in (self.ops, REFERENCE)]
                return compare(*both)

            yield Case(name, f"{t} x {k} -> {n}", [lambda w=w, call=call: call(w) for w in weights], wrong,
                       2 * (height * k + t * (k + n + (n if add else 0))), 2 * t * height * k)

    def packed(self, rows: Sequence[int]) -> Iterator[Case]:
        """The largest layer and the one with the fewest outputs, in formats of quantized weights."""
        s, m = self.spec, self.spec.layers[0].mlp
        for kind in PACKED:
            yield from self._packed(f"{kind}: norm + gate, up", kind, m.intermediate_size, s.hidden_size, rows, norm=True)
            yield from self._packed(f"{kind}: down + residual", kind, s.hidden_size, m.intermediate_size, rows, norm=False)

    def quantized(self, kind: str, n: int, k: int) -> GroupedWeight:
        """Random codes, scales and zeros or minima. Groups that do not divide the inputs are replaced by groups of 32."""
        form = dict(group=k, zeros=False, zero=0, mins=False, super_group=0) | PACKED[kind]
        if k % max(form["group"], form["super_group"]):
            form |= dict(group=32, super_group=0)
        groups, integers = k // form["group"], partial(torch.randint, dtype=torch.uint8, device=self.device)
        codes = self.random(n, k).to(torch.float8_e4m3fn) if kind == "fp8" else integers(0, 1 << form["bits"], (n, k))
        scales = (torch.rand(n, groups, device=self.device) * k**-0.5 / (1 << form["bits"])).half()
        supers = mins = None
        if form["super_group"]:
            supers, scales = scales[:, :: groups * form["super_group"] // k] / 32, integers(1, 64, (n, groups))
            mins = integers(0, 64, (n, groups)) if form["mins"] else None
        zeros = integers(0, 16, (n, groups)) if form["zeros"] else form["zero"]
        return GroupedWeight(codes=codes, bits=form["bits"], scales=scales, zeros=zeros, mins=mins, super_scales=supers,
                             super_mins=None if mins is None else supers)

    def _packed(self, name: str, kind: str, n: int, k: int, rows: Sequence[int], norm: bool) -> Iterator[Case]:
        height = 2 * n if norm else n  # the layer with a norm is gated
        weight = self.quantized(kind, height, k)
        size = sum(t.nbytes for f in fields(weight) if isinstance(t := getattr(weight, f.name), Tensor) and f.name != "codes")
        size += height * k * weight.bits // 8
        copies = [self.ops.pack_groups(weight) for _ in range(copies_beyond_l2(size, self.device))]
        theirs = REFERENCE.pack_groups(weight)
        before = (1.0 + self.random(k, std=0.1), self.spec.norm_eps) if norm else None
        for t in rows:
            x, residual = self.random(t, k), None if norm else self.random(t, n)

            def call(packed: Any, ops: Ops = self.ops, x: Tensor = x, residual: Tensor | None = residual) -> Tensor:
                return ops.grouped_linear(x, packed, norm=before, gated=norm, residual=residual)

            def wrong(call: Callable[..., Tensor] = call, residual: Tensor | None = residual) -> str:
                both = [call(packed, ops, residual=None if residual is None else residual.clone())
                        for packed, ops in ((copies[-1], self.ops), (theirs, REFERENCE))]
                return compare(*both)

            yield Case(name, f"{t} x {k} -> {n}", [lambda w=w, call=call: call(w) for w in copies], wrong,
                       size + 2 * t * (k + n + (0 if norm else n)), 2 * t * height * k)

    # -- attention ------------------------------------------------------------------------------------------------------

    def decodes(self, sizes: dict[str, list[int]], sharing: dict[str, tuple[list[int], int]], kv: str = "") -> Iterator[Case]:
        """kv: a key of `QUANTIZED_CACHES`; "": the model's dtype."""
        cache_dtype, of = QUANTIZED_CACHES.get(kv), f", {kv} KV cache" if kv else ""
        for size, lens in sizes.items():
            yield self._attention(f"decode attention{of}", size, [1] * len(lens), lens, cache_dtype=cache_dtype)
        for size, (lens, shared) in sharing.items():
            yield self._attention(f"decode attention, shared prefix{of}", size, [1] * len(lens), lens, shared, cache_dtype)

    def prompts(self, lengths: Sequence[int], later: Sequence[tuple[int, int]]) -> Iterator[Case]:
        """later: (tokens, keys) of chunks after earlier ones."""
        for length in lengths:
            if length <= self.spec.max_model_len:
                yield self._position(length)
                yield self._attention("position, store, prompt attention", str(length), [length], [length])
        for tokens, keys in later:
            if keys <= self.spec.max_model_len:
                yield from self._gather(tokens, keys)
                yield self._attention("the same with earlier keys", f"{tokens} of {keys}", [tokens], [keys])

    def _attention(self, name: str, size: str, query_lens: list[int], lens: list[int], shared: int = 0,
                   cache_dtype: torch.dtype | None = None) -> Case:
        a, (batch, caches, args) = self.attention, self._step(query_lens, lens, shared, cache_dtype)
        metas = {ops: self._prepare(ops, batch, cache_dtype) for ops in (self.ops, REFERENCE)}

        def call(kv: KVLayer, ops: Ops = self.ops) -> Tensor:
            return ops.self_attention(args["qkv"], kv, batch.slots[0], metas[ops], **args["how"])

        def wrong() -> str:
            pair = [copy.deepcopy(caches[-1]) for _ in range(2)]
            got, want = (call(kv, ops) for kv, ops in zip(pair, (self.ops, REFERENCE), strict=True))
            worst = WORST if cache_dtype is None else QUANTUM
            return compare(got, want) or compare(pair[0].k, pair[1].k, worst) or compare(pair[0].v, pair[1].v, worst)

        tokens, per_token = sum(query_lens), 2 * a.num_heads * a.head_dim + 2 * a.num_kv_heads * a.head_dim
        pairs = sum(q * (n - q) + q * (q + 1) // 2 for q, n in zip(query_lens, lens, strict=True))  # (query, visible key)
        head_bytes = 2 * a.head_dim if cache_dtype is None else a.head_dim + 2  # of a key or a value, with its scale
        moved = 2 * (sum(lens) - shared * (len(lens) - 1)) * a.num_kv_heads * head_bytes + 2 * tokens * per_token
        return Case(name, size, [lambda kv=kv: call(kv) for kv in caches], wrong, moved, 4 * pairs * a.num_heads * a.head_dim)

    def _position(self, length: int) -> Case:
        """The kernel before the attention of prompts, alone."""
        from minivllm.kernels.triton import attention

        a, (batch, caches, args) = self.attention, self._step([length], [length])
        meta = self._prepare(self.ops, batch)

        def call(kv: KVLayer) -> Tensor:
            with mock.patch.object(attention, "_attend_prompts") as rest:
                self.ops.self_attention(args["qkv"], kv, batch.slots[0], meta, **args["how"])
            return rest.call_args.args[1]  # queries and keys, normalized and rotated

        def wrong() -> str:
            pair = [KVLayer(caches[-1].k.clone(), caches[-1].v.clone()) for _ in range(2)]
            qk = call(pair[0])
            REFERENCE.self_attention(args["qkv"], pair[1], batch.slots[0], self._prepare(REFERENCE, batch), **args["how"])
            keys = pair[1].k.view(-1, a.num_kv_heads, a.head_dim)[batch.slots[0]]
            return compare(pair[0].k, pair[1].k) or compare(pair[0].v, pair[1].v) or compare(qk[:, a.num_heads :], keys)

        moved = 2 * length * a.head_dim * (2 * a.num_heads + 5 * a.num_kv_heads + 2)
        return Case("position and store", str(length), [lambda kv=kv: call(kv) for kv in caches], wrong, moved)

    def _gather(self, tokens: int, keys: int) -> Iterator[Case]:
        """The copy of keys and values in order before the attention of later chunks, alone, where there is one."""
        from minivllm.kernels.triton import attention, gathered_prompts

        a, (batch, caches, _) = self.attention, self._step([tokens], [keys])
        meta = self._prepare(self.ops, batch)
        ordered = getattr(meta, "ordered", None)
        if ordered is None or [part.heads for part in ordered.passes] != [a.num_kv_heads]:
            return
        qk = self.random(1, a.num_heads + a.num_kv_heads, a.head_dim)
        out, table = self.random(1, a.num_heads * a.head_dim), batch.block_tables[0][0].long()

        def call(kv: KVLayer) -> Any:
            with mock.patch.object(gathered_prompts.hopper_kernel(self.device), "attend") as rest:
                attention._attend_prompts(out, qk, qk, kv, meta, 1.0, None, None, None)
            return rest.call_args.args[2:4]

        def wrong() -> str:
            both = zip(call(caches[-1]), (caches[-1].k, caches[-1].v), strict=True)
            return "".join(compare(got[:keys], cached[table].flatten(0, 1)[:keys].flatten(1), 0.0) for got, cached in both)

        yield Case("gather keys and values", f"{tokens} of {keys}", [lambda kv=kv: call(kv) for kv in caches], wrong,
                   8 * keys * a.num_kv_heads * a.head_dim)

    def _prepare(self, ops: Ops, batch: InputBatch, cache_dtype: torch.dtype | None = None) -> Any:
        a = self.attention
        return ops.prepare_attention(batch, 0, block_size=BLOCK_SIZE, num_heads=a.num_heads, num_kv_heads=a.num_kv_heads,
                                     head_dim=a.head_dim, window=None, dtype=self.dtype, cache_dtype=cache_dtype)

    def _step(self, query_lens: list[int], lens: list[int], shared: int = 0,
              cache_dtype: torch.dtype | None = None) -> tuple[InputBatch, list[KVLayer], dict[str, Any]]:
        """A batch over scattered blocks, caches for it, and the other arguments of `self_attention`."""
        a, device = self.attention, self.device
        batch = scattered(query_lens, lens, device, shared)
        shape = (sum(-(-n // BLOCK_SIZE) for n in lens) + 1, BLOCK_SIZE, a.num_kv_heads, a.head_dim)
        num_bytes = (4 if cache_dtype is None else 2) * shape[0] * BLOCK_SIZE * a.num_kv_heads * a.head_dim
        caches = [self._cache(shape, cache_dtype) for _ in range(copies_beyond_l2(num_bytes, device))]
        heads = a.num_heads + a.num_kv_heads
        how: dict[str, Any] = {"scale": a.head_dim**-0.5}
        if a.rope is not None:
            inv_freq = a.rope.theta ** -(torch.arange(0, a.head_dim, 2, device=device) / a.head_dim)
            how["rope"] = self.ops.rope_angles(batch.positions, inv_freq, 1.0, self.dtype)
        if a.qk_norm:
            how["qk_norm"] = 1.0 + self.random(heads, a.head_dim, std=0.1), self.spec.norm_eps
        return batch, caches, {"qkv": self.random(sum(query_lens), (heads + a.num_kv_heads) * a.head_dim), "how": how}

    def _cache(self, shape: tuple[int, ...], cache_dtype: torch.dtype | None) -> KVLayer:
        k, v = self.random(*shape), self.random(*shape)
        if cache_dtype is None:
            return KVLayer(k, v)
        (k, k_scale), (v, v_scale) = quantize(k, cache_dtype), quantize(v, cache_dtype)
        return KVLayer(k, v, torch.stack((k_scale, v_scale), -1))

    # -- the rest -------------------------------------------------------------------------------------------------------

    def norms(self, rows: Sequence[int]) -> Iterator[Case]:
        n, eps = self.spec.hidden_size, self.spec.norm_eps
        weight = 1.0 + self.random(n, std=0.1)
        for t in rows:
            xs = [self.random(t, n) for _ in range(copies_beyond_l2(4 * t * n, self.device))]

            def wrong(x: Tensor = xs[-1]) -> str:
                return compare(self.ops.rms_norm(x, weight, eps), REFERENCE.rms_norm(x, weight, eps))

            yield Case("rms_norm", f"{t} x {n}", [lambda x=x: self.ops.rms_norm(x, weight, eps) for x in xs], wrong, 2 * (2 * t * n + n))

    def samplers(self, rows: Sequence[int]) -> Iterator[Case]:
        vocab = self.spec.vocab_size
        for kind in ("greedy", "random", "random, top_p 0.9"):
            for t in rows:
                logits = [self.random(t, vocab, std=4.0) for _ in range(copies_beyond_l2(2 * t * vocab, self.device))]

                def wrong(kind: str = kind) -> str:
                    some = self.random(self.compared_rows, vocab, std=4.0)
                    args, filters = self._sampling_arguments(kind, self.compared_rows)
                    got, want = (ops.sample(some, *args, **filters) for ops in (self.ops, REFERENCE))
                    if kind == "greedy":  # several tokens may have the largest logit
                        got, want = (some.gather(1, tokens[:, None]) for tokens in (got, want))
                    differ = int((got != want).sum())
                    # one may differ, if its two best scores are equal
                    return "" if differ <= 1 else f"{differ} of {self.compared_rows} tokens differ"

                args, filters = self._sampling_arguments(kind, t)
                calls = [lambda x=x, args=args, filters=filters: self.ops.sample(x, *args, **filters) for x in logits]
                yield Case(f"sampler, {kind}", f"{t} x {vocab}", calls, wrong, 2 * t * vocab)

    def _sampling_arguments(self, kind: str, rows: int) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        temperature = torch.full((rows,), 0.0 if kind == "greedy" else 0.8, device=self.device)
        keys = torch.randint(-(2**31), 2**31 - 1, (rows, 2), dtype=torch.int32, device=self.device)
        return (temperature, keys), {"top_p": torch.full((rows,), 0.9, device=self.device)} if "top_p" in kind else {}


def scattered(query_lens: list[int], lens: list[int], device: torch.device, shared: int = 0) -> InputBatch:
    """A step over sequences in scattered blocks, decodes first. shared: number of leading keys in the same blocks."""
    counts = [-(-n // BLOCK_SIZE) for n in lens]
    blocks = (torch.randperm(sum(counts)) + 1).int()
    table = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, some in zip(table, blocks.split(counts), strict=True):
        row[: len(some)] = some
    table[:, : shared // BLOCK_SIZE] = table[0, : shared // BLOCK_SIZE]
    positions = torch.cat([torch.arange(n - q, n) for q, n in zip(query_lens, lens, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(query_lens))
    slots = table[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    query_start = torch.tensor([0, *query_lens]).cumsum(0).int()
    return InputBatch(
        tokens=torch.zeros(sum(query_lens), dtype=torch.int32, device=device), positions=positions.to(device),
        query_start=query_start.to(device), seq_lens=torch.tensor(lens, dtype=torch.int32, device=device), slots=(slots.to(device),),
        block_tables=(table.to(device),), logit_rows=(query_start[1:].long() - 1).to(device), num_decodes=sum(q == 1 for q in query_lens),
        query_lens_host=tuple(query_lens), seq_lens_host=tuple(lens),
        shared=torch.tensor([shared], dtype=torch.int32, device=device) if shared else None)


def compare(got: Tensor, want: Tensor, most: float = WORST) -> str:
    """"" if they are equal up to the precision of bfloat16, else their difference. most: limit of the largest error."""
    a, b = got.float(), want.float()
    rms = ((a - b).square().mean() / b.square().mean()).sqrt().item()
    worst = ((a - b).abs().max() / b.abs().max()).item()
    return "" if rms <= RMS and worst <= most else f"off by {rms:.2g} (rms), {worst:.2g} (worst)"  # NaN is never <=


def cases(maker: Maker, kinds: Sequence[str], rows: Sequence[int], decodes: dict[str, list[int]] = DECODES,
          sharing: dict[str, tuple[list[int], int]] = SHARING, prompts: Sequence[int] = PROMPTS,
          later: Sequence[tuple[int, int]] = LATER_CHUNKS) -> Iterator[Case]:
    makers = {"linear": lambda: maker.linears(rows), "packed": lambda: maker.packed(rows),
              "decode": lambda: maker.decodes(decodes, sharing),
              "decode8": lambda: (case for kv in QUANTIZED_CACHES for case in maker.decodes(decodes, sharing, kv)),
              "prompt": lambda: maker.prompts(prompts, later), "norm": lambda: maker.norms([*rows, *prompts]),
              "sampler": lambda: maker.samplers(rows)}
    for kind in kinds:
        yield from makers[kind]()


def figures(case: Case, limits: Ceiling) -> dict[str, Any]:
    """The figures of a row, or the reason that it has none."""
    row: dict[str, Any] = {"kernel": case.name, "size": case.size}
    try:
        if wrong := case.wrong():
            return row | {"refused": f"WRONG, {wrong}"}
        took = seconds(case.calls)
    except torch.OutOfMemoryError:
        return row | {"refused": "does not fit into this GPU's memory"}
    row |= {"us": round(1e6 * took, 2), "bytes": case.num_bytes, "GB/s": round(case.num_bytes / took / 1e9, 1),
            "of_copy": round(case.num_bytes / took / limits.copy, 3)}
    if case.flops:
        row["TFLOP/s"] = round(case.flops / took / 1e12, 1)
    if case.num_bytes >= MIN_PREDICTED and case.flops / case.num_bytes <= CARD_FLOPS / CARD_BYTES:
        row["predicted_us"] = round(1e6 * case.num_bytes / CARD_BYTES, 1)
    return row


def line(row: dict[str, Any]) -> str:
    start = f"{row['kernel']:<35}{row['size']:<24}"
    if "refused" in row:
        return start + row["refused"]
    return (f"{start}{row['us']:>10,.2f}{row['bytes'] / 1e6:>11,.3f}{row['GB/s']:>9,.0f}{row['of_copy']:>9.0%}{row.get('TFLOP/s', '-'):>9}"
            f"{row.get('predicted_us', '-'):>12}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=models.SHAPES, default="qwen3-0.6b")
    parser.add_argument("--rows", default="1,8,32,128", help="tokens of a step, for linears, norm and sampler")
    parser.add_argument("--only", default=",".join(KINDS), help="which kernels: " + ", ".join(KINDS))
    parser.add_argument("--save", help="file for the JSON record")
    args = parser.parse_args()
    kinds, rows = args.only.split(","), [int(n) for n in args.rows.split(",")]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown in --only: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_kernels measures on an NVIDIA GPU, and PyTorch sees none")
    from minivllm.kernels import select

    device = torch.device("cuda", torch.cuda.current_device())
    where = machine.describe("cuda", 1)
    print(machine.one_line(where))
    spec = replace(parse_config(models.config_of(args.shape)), dtype="bfloat16")
    with torch.inference_mode():
        limits = gpu_timing.ceiling(device)
        print(f"{limits}; shape {args.shape}, bfloat16\n{'kernel':<35}{'size':<24}{'us':>10}{'MB':>11}{'GB/s':>9}{'of copy':>9}"
              f"{'TFLOP/s':>9}{f'us, {CARD}'[:12]:>12}", flush=True)
        results = []
        for case in cases(Maker(spec, select(device), device), kinds, rows):
            results.append(figures(case, limits))
            print(line(results[-1]), flush=True)
    print(f"last column: bytes at {CARD_BYTES / 1e9:.0f} GB/s, a prediction for an {CARD}")
    gpu_timing.save(args.save, {"bench": "gpu_kernels", "shape": args.shape, "machine": where, "copy_GB/s": round(limits.copy / 1e9, 1),
                                "matmul_TFLOP/s": round(limits.matmul / 1e12, 1), "rows": results})


if __name__ == "__main__":
    main()
