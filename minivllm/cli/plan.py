"""`minivllm plan MODEL`: what a model takes of a device's memory, what fits beside it, and how fast it could be. Nothing is loaded."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from minivllm.cli.flags import add_config_flags, add_model_argument, build, given
from minivllm.cli.numbers import gibibytes, real_number
from minivllm.config import EngineConfig

if TYPE_CHECKING:
    from minivllm.engine.plan_model import ModelPlan
    from minivllm.planning.gpus import GPU

FIELDS = ("model", "revision", "hf_overrides", "dtype", "kv_cache_dtype", "max_model_len", "block_size", "gpu_memory_utilization",
          "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "cpu_offload_gb",
          "enable_lora", "max_loras", "max_lora_rank", "tensor_parallel_size", "model_impl", "trust_remote_code")
GIB = 1 << 30


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="show what a model takes of a GPU's memory, what fits, and how fast it could be, before it is downloaded",
        description="Plan a model before its weights are downloaded: from config.json and the headers of its files.")
    add_model_argument(parser)
    group = parser.add_argument_group("device")
    group.add_argument("--gpu", default="auto", metavar="NAME",
                       help="such as rtx4060, rtx4090, l4, a100, h100, h200; cpu; auto: this machine's GPU, else its CPU (default: auto)")
    group.add_argument("--memory-gib", type=gibibytes, metavar="GIB", help="memory of a GPU that has no name here, or of a part of one")
    group.add_argument("--bandwidth", type=real_number, metavar="GB/S", help="bandwidth of its memory, for predictions")
    group.add_argument("--tflops", type=real_number, metavar="X", help="its dense TFLOP/s in 16 bits on tensor cores, for predictions")
    parser.add_argument("--quantization", dest="what_if", metavar="NAME",
                        help="fp8, int8, bitsandbytes: quantized while it is loaded, as by serve; awq, gptq, Q4_K_M, Q8_0, ...: what if "
                             "its weights were stored so?")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_config_flags(parser, EngineConfig, "engine", only=FIELDS)


def run(args: argparse.Namespace) -> int:
    from minivllm.engine.plan_model import check_settings, plan_model
    from minivllm.models.hub import describe_model
    from minivllm.models.loader import check_header
    from minivllm.models.transformers_spec import ForeignSpec, read_spec
    from minivllm.quantization.methods import METHODS

    gpu = _gpu(args)
    config = build(EngineConfig, given(args, EngineConfig))
    found = describe_model(config, check_settings(config))
    if found.tensors and not isinstance(read_spec(config, found.config, METHODS), ForeignSpec):  # Transformers knows the others' names
        check_header(found.config, found.tensors, found.name)
    plan = plan_model(config, found.config, gpu, args.what_if)
    if args.json:
        print(json.dumps(as_json(plan) | {"model": found.name, "download_bytes": 0 if found.is_local else found.size}, indent=2))
        return 0
    for line in lines(plan, found.name, 0 if found.is_local else found.size):
        print(line)
    return 0


def _gpu(args: argparse.Namespace) -> GPU | None:
    """The device that the flags describe. None: this machine's CPU."""
    import dataclasses

    from minivllm.engine.plan_model import gpu_here
    from minivllm.errors import InvalidInput
    from minivllm.planning.gpus import GPU, find_gpu

    described = {"memory_gib": args.memory_gib, "bandwidth": args.bandwidth, "tflops": args.tflops}
    described = {name: value for name, value in described.items() if value is not None}
    for name, value in described.items():
        if not 0 < value < 1e6:
            raise InvalidInput(f"{name} must be above 0 and below a million, got {value:g}", name)
    known = None if args.gpu == "cpu" else gpu_here() if args.gpu == "auto" else find_gpu(args.gpu)
    if not described:
        return known
    if args.gpu == "auto" and args.memory_gib is not None:
        return GPU("a GPU", **described)
    if known is None:
        fix = "leave it out" if args.gpu == "cpu" else "give memory_gib too, or name a GPU"
        raise InvalidInput(f"{next(iter(described))} describes a GPU, and gpu is {args.gpu!r}: {fix}", "gpu")
    return dataclasses.replace(known, **described)


def lines(plan: ModelPlan, name: str, download: int) -> Iterator[str]:
    """The plan for a terminal."""
    from minivllm.planning.memory_plan import TYPICAL_REQUEST

    m = plan.memory
    yield name
    yield f"  {m.dtype} on {m.device}: {m.usable / GIB:.2f} of {m.total / GIB:.2f} GiB may be used"
    yield from (f"  {note}" for note in plan.notes)
    if download:
        yield f"  {download / 1e9:.2f} GB would be downloaded"
    yield ""
    yield f"{'weights':<36}{'GiB':>7}"
    yield from (f"  {kind:<16}{stored:<18}{size / GIB:>7.2f}" for (kind, stored), size in m.weights.items())
    yield from _memory_table(plan)
    yield ""
    yield (f"KV cache in {m.kv_dtype}: {m.token_bytes / 1024:g} KiB a token, {m.num_blocks:,} blocks of {m.block_size} tokens "
           f"({m.block_bytes / 2**20:.2f} MiB)")
    lengths = dict.fromkeys((m.max_model_len, min(TYPICAL_REQUEST, m.max_model_len)))
    yield f"          {m.tokens:,} tokens: at a time " + ", or ".join(f"{m.sequences(n):,} x {n:,}" for n in lengths)
    yield from _speed_table(plan)
    yield ""
    yield plan.advice()


def _memory_table(plan: ModelPlan) -> Iterator[str]:
    m = plan.memory
    rows = [("weights in all", m.weight_bytes, ""), ("less what --cpu-offload-gb saves", -m.offloaded, ""),
            ("peak of a step", m.step, "  estimate"), ("CUDA graphs", m.graphs, "  set aside"), ("row tables", m.rows, ""),
            ("driver and libraries", m.other, "  estimate"), ("KV cache", m.cache, ""),
            ("left", m.usable - m.beside_cache - m.cache, "")]
    yield from (f"{label:<36}{size / GIB:>7.2f}{note}" for label, size, note in rows if size)


def _speed_table(plan: ModelPlan) -> Iterator[str]:
    from minivllm.planning.roofline import BATCHES, CONTEXT, PROMPTS

    speed = plan.roofline
    if speed is None:
        return
    columns = [*((f"{n} sequence{'s' * (n > 1)}", speed.tpot(n)) for n in BATCHES), *((f"{n:,} tokens", speed.ttft(n)) for n in PROMPTS)]
    yield ""
    yield f"{'predicted, ms':<16}" + f"per token, {CONTEXT:,} tokens before it".ljust(42) + "to the first token of a prompt"
    yield " " * 14 + "".join(f"{title:>14}" for title, _ in columns)
    yield f"{'expected':<14}" + "".join(f"{ms.expected:>14.1f}" for _, ms in columns)
    yield f"{'at the limit':<14}" + "".join(f"{ms.floor:>14.1f}" for _, ms in columns)


def as_json(plan: ModelPlan) -> dict[str, Any]:
    """The plan as plain values. Sizes in bytes, times in milliseconds."""
    from minivllm.planning.memory_plan import TYPICAL_REQUEST
    from minivllm.planning.roofline import BATCHES, CONTEXT, PROMPTS

    m, speed = plan.memory, plan.roofline
    found: dict[str, Any] = {
        "device": m.device, "total": m.total, "usable": m.usable, "dtype": m.dtype, "kv_dtype": m.kv_dtype, "notes": list(plan.notes),
        "weights": [{"kind": kind, "type": stored, "bytes": size} for (kind, stored), size in m.weights.items()],
        "weight_bytes": m.weight_bytes, "offloaded": m.offloaded, "step": m.step, "graphs": m.graphs, "rows": m.rows, "other": m.other,
        "kv_cache_bytes": m.cache, "kv_bytes_per_token": m.token_bytes, "block_bytes": m.block_bytes, "block_size": m.block_size,
        "num_blocks": m.num_blocks, "tokens": m.tokens, "max_model_len": m.max_model_len, "served_max_model_len": m.served,
        "sequences": {str(n): m.sequences(n) for n in (m.max_model_len, min(TYPICAL_REQUEST, m.max_model_len))},
        "fits": m.fits, "missing": m.missing, "verdict": m.verdict(),
        "change": None if plan.change is None else [change.flags for change in plan.change],
    }
    if speed is not None:
        found["context"] = CONTEXT
        for name, predict, sizes in (("tpot_ms", speed.tpot, BATCHES), ("ttft_ms", speed.ttft, PROMPTS)):
            found[name] = {str(n): {"expected": round(predict(n).expected, 3), "floor": round(predict(n).floor, 3)} for n in sizes}
    return found
