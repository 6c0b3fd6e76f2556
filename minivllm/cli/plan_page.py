"""`python -m minivllm.cli.plan_page`: print `docs/8gb.md`, made from plans."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from minivllm.config import EngineConfig
from minivllm.engine.plan_model import ModelPlan, plan_model
from minivllm.planning.gpus import GPUS
from minivllm.planning.memory_plan import GIB, TYPICAL_REQUEST
from minivllm.planning.suggested_models import model_named

CARD = "rtx4060"
SETTINGS = {"max_num_seqs": 32, "max_num_batched_tokens": 2048}
FLAGS = "--max-num-seqs 32 --max-num-batched-tokens 2048"
SIZES = {  # of models -> those compared
    "7B and 8B": ("mistralai/Mistral-7B-Instruct-v0.3", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B"),
    "13B and 14B": ("meta-llama/Llama-2-13b-chat-hf", "Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen3-14B"),
}
STORAGES = {"16 bits": None, "fp8": "fp8", "Q8_0": "Q8_0", "AWQ": "awq", "Q4_K_M": "Q4_K_M"}


class Worth(NamedTuple):
    """A model worth running on 8 GB."""

    served: str  # what `minivllm serve` gets
    model: str  # its row of sizes
    storage: str | None = None


WORTH_RUNNING = (  # best first
    Worth("Qwen/Qwen3-8B-GGUF:Q4_K_M", "Qwen/Qwen3-8B", "Q4_K_M"),
    Worth("bartowski/Meta-Llama-3.1-8B-Instruct-GGUF:Q4_K_M", "meta-llama/Llama-3.1-8B-Instruct", "Q4_K_M"),
    Worth("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "meta-llama/Llama-3.1-8B-Instruct", "awq"),
    Worth("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct", "awq"),
    Worth("solidrust/Mistral-7B-Instruct-v0.3-AWQ", "mistralai/Mistral-7B-Instruct-v0.3", "awq"),
    Worth("Qwen/Qwen3-4B-Instruct-2507 --quantization fp8", "Qwen/Qwen3-4B-Instruct-2507", "fp8"),
    Worth("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
    Worth("HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    Worth("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
)


def plan_of(model: str, storage: str | None, kv_cache_dtype: str = "auto") -> ModelPlan:
    """The plan of a model in a storage on the page's card, with the page's settings."""
    return plan_model(EngineConfig(**SETTINGS, kv_cache_dtype=kv_cache_dtype), model_named(model).config, GPUS[CARD], storage)  # type: ignore[arg-type]


def render() -> str:
    """The page."""
    card = GPUS[CARD]
    large = plan_model(EngineConfig(), model_named("meta-llama/Llama-3.1-70B-Instruct").config, GPUS["h200"]).memory
    lines = [
        "# Models on 8 GB", "",
        "This page is printed by `python -m minivllm.cli.plan_page`. Its figures are those of `minivllm plan`, which reads only a model's "
        "config.json and the headers of its files:", "",
        "```bash", f"minivllm plan MODEL --gpu {CARD} {FLAGS} --quantization awq", "```", "",
        f"They are calculated, not measured: for an {card.title} with {card.memory_gib:g} GiB that no other program uses, of which 0.9 may "
        f"be used, {card.bandwidth:g} GB/s, and at most {SETTINGS['max_num_seqs']} sequences and {SETTINGS['max_num_batched_tokens']:,} "
        "tokens in a step. Weights and the bytes of a token are exact. The peak of a step and the driver's context are estimates, and so "
        "are times: weights and keys are read once per token, at the part of the card's bandwidth that the kernels for 16 bits reached on "
        "an H200. Whole models with packed weights have not been timed there yet.", "",
        "- **weights**: GiB on the GPU. AWQ and fp8 leave the embedding table and the output head in 16 bits, so a large vocabulary costs "
        "more; GGUF files pack both.",
        "- **KV tokens**: that fit beside the weights, for all sequences together. The first number is for keys and values in 16 bits, the "
        "second for `--kv-cache-dtype fp8`.",
        f"- **sequences**: of {TYPICAL_REQUEST:,} tokens that fit at a time.",
        "- **ms per token**: expected for 1 and for 8 sequences with 1,000 tokens before the next one.", ""]
    for title, models in SIZES.items():
        lines += [f"## {title}", "", *_table(
            ("model", "storage", "weights", "KiB per token", "KV tokens", "sequences", "verdict", "ms per token: 1", "8"),
            (_row(model, storage, name) for model in models for name, storage in STORAGES.items())), ""]
    lines += [
        "A model of 13B or 14B parameters in 4 bits leaves no memory for a KV cache. With `--cpu-offload-gb` some of its layers can stay "
        f"in host memory, and each step copies them to the GPU: {_offloaded()}", "",
        "## Worth running", "", "The best first. Each command starts with the settings of this page.", "",
        *_table(("command", "weights", "KV tokens", "ms per token: 1", "8"), (_worth(row) for row in WORTH_RUNNING)), "",
        "A desktop on the same card takes some hundred MB. Lower `--gpu-memory-utilization` by as much, or `--max-num-batched-tokens`, "
        "which sets the peak of a step.", "",
        "## A 70B model", "",
        f"Llama 3.1 70B stores {large.token_bytes // 1024} KiB of keys and values per token: {large.token_bytes * 2**17 / GIB:.0f} GiB for "
        f"131,072 tokens, and {large.token_bytes * TYPICAL_REQUEST / 2**20:.0f} MiB for {TYPICAL_REQUEST:,}.", ""]
    return "\n".join(lines)


def _offloaded() -> str:
    model, saved = "Qwen/Qwen3-14B", 4.0
    plan = plan_model(EngineConfig(**SETTINGS, cpu_offload_gb=saved),  # type: ignore[arg-type]
                      model_named(model).config, GPUS[CARD], "Q4_K_M")
    return (f"with `--cpu-offload-gb {saved:g}`, {model.split('/')[1]} as Q4_K_M has {plan.memory.tokens:,} KV tokens, and a token takes "
            f"{_times(plan)[0]} ms.")


def _row(model: str, storage: str | None, name: str) -> Sequence[str]:
    plan, fp8 = plan_of(model, storage), plan_of(model, storage, "fp8")
    m = plan.memory
    verdict = "fits" if m.fits else "fits with fp8 keys" if fp8.memory.fits else f"{m.missing / GIB:.1f} GiB missing"
    return (model.split("/")[1], name, f"{m.weight_bytes / GIB:.2f}", f"{m.token_bytes / 1024:g}", f"{m.tokens:,}; {fp8.memory.tokens:,}",
            str(m.sequences(TYPICAL_REQUEST)), verdict, *(_times(plan if m.fits else fp8) if fp8.memory.fits else ("", "")))


def _worth(row: Worth) -> Sequence[str]:
    plan, fp8 = plan_of(row.model, row.storage), plan_of(row.model, row.storage, "fp8")
    return (f"`minivllm serve {row.served} {FLAGS}`", f"{plan.memory.weight_bytes / GIB:.2f}",
            f"{plan.memory.tokens:,}; {fp8.memory.tokens:,}", *_times(plan))


def _times(plan: ModelPlan) -> tuple[str, str]:
    assert plan.roofline is not None
    one, eight = (plan.roofline.tpot(batch).expected for batch in (1, 8))
    return f"{one:.1f}", f"{eight:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    return (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print(render(), end="")
