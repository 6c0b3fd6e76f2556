"""LoRA adapters beside a base model: what a step costs with none, one and many of them in a batch.

    python -m bench.lora [--model qwen3-0.6b] [--rank 16] [--quantization fp8]      random weights, random adapters on all linear layers

    base            an engine without adapters
    enabled         an engine with them, whose requests have none: the same graphs, so the same speed
    1, 4, 16 ...    requests spread evenly over so many adapters, all of them in slots

Rows: one request (ms per token), and 32 requests (tokens/s). Prints one JSON line per figure, and the ratios to `base`.
"""
from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.machine import describe, one_line
from bench.models import write_config
from minivllm import LLM, LoRARequest, SamplingParams
from minivllm.benchmarks.statistics import median
from minivllm.families import ModelSpec, linear_specs, parse_config

PROMPT, REPEATS = 128, 3  # tokens, repetitions


def write_adapter(folder: Path, spec: ModelSpec, rank: int, seed: int) -> Path:
    """A random adapter of all linear layers, so weak that the activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, linear in linear_specs(spec).items():
        for rows, module in zip(linear.rows, linear.checkpoint_names, strict=False):
            if name.startswith("layers."):
                tensors[f"base_model.model.model.{module}.lora_A.weight"] = torch.randn(rank, linear.cols, generator=generator).bfloat16()
                tensors[f"base_model.model.model.{module}.lora_B.weight"] = (torch.randn(rows, rank, generator=generator) / 1000).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}))
    return folder


def seconds(llm: LLM, count: int, tokens: int, adapters: list[LoRARequest | None], seed: int) -> float:
    """Time of `count` requests with fresh prompts."""
    generator = torch.Generator().manual_seed(seed)
    prompts: list[Any] = [{"prompt_token_ids": torch.randint(10, 5000, (PROMPT,), generator=generator).tolist()} for _ in range(count)]
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False,
                 lora_request=[adapters[i % len(adapters)] for i in range(count)])
    return time.perf_counter() - start


def measure(llm: LLM, name: str, adapters: list[LoRARequest | None], counts: tuple[int, ...], output: int) -> dict[str, float]:
    """ms per step of each number of requests, prompts not included. output: steps that are timed."""
    found = {}
    for count in counts:
        seconds(llm, count, 4, adapters, 99)  # loads the adapters and brings them into slots
        some = [seconds(llm, count, output + 1, adapters, 2 * i) - seconds(llm, count, 1, adapters, 2 * i + 1) for i in range(REPEATS)]
        step = 1e3 * median(some) / output
        found[f"{count} requests"] = step
        print(json.dumps({"row": name, "requests": count, "ms_per_token": round(step, 3), "tokens_per_s": round(1e3 * count / step)}),
              flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b", help="a shape of bench/models.py")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output", type=int, default=256, help="tokens of each request that are timed")
    parser.add_argument("--quantization")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print(one_line(describe("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu", torch.get_num_threads())), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = root / "model"
        write_config(args.model, folder)
        spec = parse_config(json.loads((folder / "config.json").read_text()))
        common: dict[str, Any] = dict(
            model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=1024, device=args.device,
            max_num_seqs=max(args.requests, 8), quantization=args.quantization, enable_prefix_caching=False)
        counts = (1, args.requests)
        with LLM(**common) as llm:
            base = measure(llm, "base", [None], counts, args.output)
        gc.collect()
        most = max(args.adapters)
        names: list[LoRARequest | None] = [
            LoRARequest(f"a{i}", i + 1, str(write_adapter(root / f"a{i}", spec, args.rank, i))) for i in range(most)]
        with LLM(**common, enable_lora=True, max_loras=most, max_lora_rank=args.rank) as llm:
            rows = {"enabled": measure(llm, "enabled", [None], counts, args.output)}
            for number in args.adapters:
                rows[f"{number} adapters"] = measure(llm, f"{number} adapters", names[:number], counts if number == 1 else counts[1:],
                                                      args.output)
    for name, found in rows.items():
        ratios = ", ".join(f"{count}: {base[count] / step:.1%} of base" for count, step in found.items())
        print(f"{name:12} {ratios}")


if __name__ == "__main__":
    main()
