"""Perplexity of a model on Python's documentation, computed by this engine.

    python -m bench.perplexity --model FOLDER [--quantization fp8] [--kv-cache-dtype fp8]        one line
    python -m bench.perplexity --table [--rows bf16,awq,gptq,rtn] [--work FOLDER]                the default model in all formats
    python -m bench.perplexity --table --task                             instead of perplexity, the questions of bench/cloze.py

The text is `pydoc_data.topics`, the language reference that every Python brings: 110,000 tokens of SmolLM2, of which the first 51,200 are
used, in windows of 1,024. `minivllm quantize` calibrates with other text (docstrings of the standard library). A window is a prompt with
prompt_logprobs. It is computed in chunks of 512 tokens, so the second half reads keys and values from the KV cache, in the cache's dtype.

The default model is a Q4_1 file. All rows of the table start from its dequantized weights, so `bf16` is as exact as that file. The rows
Q4_K and Q8_0 are GGUF files (see `gguf_files.py`), nf4 stores the rounded numbers, and the last two rows quantize only the KV cache.
Rows of one work folder can run at the same time, once `bf16` is there.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import machine

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, WINDOW = 51_200, 1024
CHUNK = 512  # tokens per step
CACHE_BYTES = 1 << 30  # of the KV cache on a GPU: enough for some windows, so that several processes fit on it
CHARACTERS = 8  # of text per token that is needed; tokens have 4 on average


# ---- one model

def read_ids(tokenizer: Path, count: int) -> list[int]:
    """The first `count` tokens of the text."""
    import pydoc_data.topics

    from minivllm.engine.tokenizer import Tokenizer

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[: count * CHARACTERS]
    return Tokenizer(str(tokenizer)).encode(text, add_special_tokens=False)[:count]


def measure_task(model: str | None, **options: Any) -> dict[str, Any]:
    """Which questions one model answers right, with these settings of the engine."""
    from bench import cloze
    from minivllm import LLM

    with LLM(model=model, max_model_len=128, max_num_batched_tokens=CHUNK, enable_prefix_caching=False, **options) as llm:
        info = llm.llm_engine.info()
        start = time.perf_counter()
        right = cloze.score(llm)
        return {"right": right, "error": cloze.standard_error(sum(right), len(right)), "weight_bytes": info.weight_bytes,
                "dtype": info.dtype, "seconds": round(time.perf_counter() - start, 1)}


def measure(model: str | None, tokens: int, window: int, **options: Any) -> dict[str, Any]:
    """The perplexity of one model, with these settings of the engine."""
    from minivllm import LLM, SamplingParams

    with LLM(model=model, max_model_len=window + 16, max_num_batched_tokens=CHUNK, enable_prefix_caching=False, **options) as llm:
        info = llm.llm_engine.info()
        ids = read_ids(Path(info.model_folder), tokens)
        prompts = [{"prompt_token_ids": ids[i: i + window]} for i in range(0, len(ids) - window + 1, window)]
        start = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
    values = [entry[token].logprob for prompt, output in zip(prompts, outputs, strict=True)
              for token, entry in zip(prompt["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True)]
    return {"perplexity": math.exp(-math.fsum(values) / len(values)), "tokens": len(values), "weight_bytes": info.weight_bytes,
            "dtype": info.dtype, "seconds": round(seconds, 1)}


# ---- the table

def _source(folder: Path) -> None:
    from minivllm.models.gguf import convert
    from minivllm.models.hub import default_gguf

    convert(default_gguf(), folder)


def _quantized(*flags: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "minivllm", "quantize", str(folder.parent / "bf16"), "-o", str(folder), *flags]
        subprocess.run(command, check=True)

    return make


def _gguf(kind: str) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        from bench.gguf_files import requantize
        from minivllm.models.hub import default_gguf

        requantize(default_gguf(), file, kind)

    return make


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # of Dettmers et al. 2023, as in bitsandbytes


def _nf4(folder: Path) -> None:
    """The decoder layers' matrices rounded to nf4 in blocks of 64, and stored as plain numbers: the quality does not need the package."""
    import shutil

    from safetensors.torch import load_file, save_file

    source = folder.parent / "bf16"
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    save_file({name: nf4_rounded(t) if name.endswith("_proj.weight") else t for name, t in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})


def nf4_rounded(weight: Tensor) -> Tensor:
    """Each block of 64 numbers becomes the nearest of NF4 times the block's largest magnitude."""
    import torch

    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4)
    codes = torch.bucketize(blocks / largest.clamp_min(1e-30), (table[1:] + table[:-1]) / 2)
    return (table[codes] * largest).view(weight.shape).to(weight.dtype)


# Name of the row: what it runs, in the work folder; how that is made; settings of the engine.
ROWS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "bf16": ("bf16", _source, {}),
    "fp8": ("fp8", _quantized("--method", "fp8"), {}),
    "int8": ("int8", _quantized("--method", "int8"), {}),
    "awq": ("awq", _quantized("--method", "awq"), {}),
    "gptq": ("gptq", _quantized("--method", "gptq"), {}),
    "rtn": ("rtn", _quantized("--method", "rtn"), {}),
    "nf4": ("nf4", _nf4, {}),
    "Q4_K": ("Q4_K.gguf", _gguf("Q4_K"), {}),
    "Q8_0": ("Q8_0.gguf", _gguf("Q8_0"), {}),
    "fp8 KV": ("bf16", _source, {"kv_cache_dtype": "fp8"}),
    "int8 KV": ("bf16", _source, {"kv_cache_dtype": "int8"}),
}


def table(args: argparse.Namespace, common: dict[str, Any]) -> None:
    """One process per row, because memory that PyTorch keeps would change later rows."""
    args.work.mkdir(parents=True, exist_ok=True)
    reference: dict[str, Any] | None = None
    for name in ["bf16", *(row for row in ROWS if row != "bf16")]:  # the first is the source of the others
        path, make, options = ROWS[name]
        if name not in args.rows:
            continue
        for file, maker in (("bf16", _source), (path, make)):
            if not (args.work / file).exists():
                maker(args.work / file)
        job = {"model": str(args.work / path), **kind(args), **common, **options}
        done = subprocess.run([sys.executable, "-m", "bench.perplexity", "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True,
                              check=False)
        if done.returncode:
            print(f"{name:10} failed, see above", flush=True)
        else:
            row = json.loads(done.stdout.splitlines()[-1])
            show(name, row, reference := row if name == "bf16" else reference)


def kind(args: argparse.Namespace) -> dict[str, int]:
    """The arguments of `measure`, or none, as `measure_task` has none."""
    return {} if args.task else {"tokens": args.tokens or TOKENS, "window": args.window or WINDOW}


def run(job: dict[str, Any]) -> dict[str, Any]:
    return measure(**job) if "tokens" in job else measure_task(**job)


def show(name: str, row: dict[str, Any], reference: dict[str, Any] | None = None) -> None:
    """Print a row. A task's row also counts the questions that only it, and only the reference, answers right: they pair the two."""
    if "right" in row:
        right = row["right"]
        score = f"task {sum(right) / len(right):6.1%} +- {row['error']:.1%}   {sum(right)} of {len(right)} right"
        if reference is not None:
            pairs = list(zip(right, reference["right"], strict=True))
            score += f" (+{pairs.count((True, False))} -{pairs.count((False, True))})"
    else:
        score = f"perplexity {row['perplexity']:8.4f}   {row['tokens']:,} tokens"
    print(f"{name:10} {score}   {row['weight_bytes'] / 1e6:7.1f} MB of weights   {row['dtype']}   {row['seconds']:.1f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: the embedded SmolLM2-135M-Instruct)")
    for flag in ("--quantization", "--kv-cache-dtype", "--dtype", "--device"):
        parser.add_argument(flag, help="as for `minivllm serve`")
    parser.add_argument("--tokens", type=int, help=f"of the text (default {TOKENS})")
    parser.add_argument("--window", type=int, help=f"tokens of a prompt (default {WINDOW})")
    parser.add_argument("--task", action="store_true", help="answer the questions of bench/cloze.py instead")
    parser.add_argument("--table", action="store_true", help="the default model in all formats")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=f"rows of the table: {','.join(ROWS)}")
    parser.add_argument("--work", type=Path, default=Path("/tmp/minivllm-perplexity"), help="folder for the table's models, kept")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        print(json.dumps(run(args.job)))
        return
    if args.task and (args.tokens or args.window):
        parser.error("--tokens and --window are of the perplexity: leave them or --task out")
    common: dict[str, Any] = {"kv_cache_memory_bytes": CACHE_BYTES} if args.device == "cuda" else {}
    common |= {name: getattr(args, name) for name in ("quantization", "kv_cache_dtype", "dtype", "device") if getattr(args, name)}
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    print(machine.one_line(machine.describe(args.device or "cpu", threads)))
    if args.table:
        table(args, common)
    else:
        show(args.model or "default", run({"model": args.model, **kind(args), **common}))


if __name__ == "__main__":
    main()
