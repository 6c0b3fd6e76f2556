"""Plans: exact bytes of weights and cache, the figures that a start uses, verdicts and the smallest change."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine.plan_model import ModelPlan, plan_model
from minivllm.errors import InvalidInput
from minivllm.families import parse_config
from minivllm.planning.advice import Change, smallest_change
from minivllm.planning.gpus import GPU, GPUS, card_here, find_gpu
from minivllm.planning.memory_plan import GIB
from minivllm.planning.what_if import quantization_config
from minivllm.quantization.methods import METHODS
from minivllm.worker.cuda_graphs import graph_bytes
from minivllm.worker.kv_cache import KVLayout
from minivllm.worker.memory import row_bytes

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = MISTRAL | {"architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                       "num_attention_heads": 64, "vocab_size": 128256}
RTX4060 = GPUS["rtx4060"]


def plan(config: dict[str, Any] = MISTRAL, gpu: GPU | None = RTX4060, quantization: str | None = None, **settings: Any) -> ModelPlan:
    return plan_model(EngineConfig(**settings), config, gpu, quantization)


# ---- bytes


def test_distributions_of_sampled_drafts_are_planned(tmp_path: Path) -> None:
    """64 rows and a spare one, 3 drafts: kept as float32; and while they are made, each of the 64 rows has 2 of each draft and 14 more."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL), encoding="utf-8")
    drafts = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    greedy, sampled = (plan(speculative_config={**drafts, "draft_sample_method": way}).memory for way in ("greedy", "probabilistic"))
    assert sampled.rows - greedy.rows == 65 * 3 * 32768 * 4
    assert sampled.step - greedy.step == 64 * 20 * 32768 * 4


def test_the_parts_of_a_plan_are_those_of_a_start() -> None:
    found, spec = plan(quantization="awq").memory, parse_config(MISTRAL)
    layout = KVLayout.of(spec, 16, torch.bfloat16)
    assert (found.block_bytes, found.token_bytes) == (layout.block_bytes, 128 * 1024)
    assert found.graphs == graph_bytes(spec, 256, 8192)
    assert found.rows == row_bytes(layout, 256, 32768, 32768)
    taken = found.weight_bytes + found.step + found.graphs + found.rows + found.other
    assert taken == found.beside_cache and 0 <= int(0.9 * RTX4060.memory) - taken - found.cache < found.block_bytes
    assert found.sequences(2000) == (found.num_blocks - 1) // 125 and found.tokens == 16 * (found.num_blocks - 1)


@pytest.mark.parametrize(("config", "quantization", "gib"), [
    (MISTRAL, None, 13.50), (MISTRAL, "awq", 3.95), (MISTRAL, "Q8_0", 7.17), (MISTRAL, "q4_k_m", 4.16),
])
def test_weights_of_known_models(config: dict[str, Any], quantization: str | None, gib: float) -> None:
    found = plan(config, quantization=quantization).memory
    assert found.weight_bytes / GIB == pytest.approx(gib, abs=0.005)
    assert {kind for kind, _ in found.weights} == {"embedding", "attention", "MLP", "output head", "norms"}


def test_the_published_size_of_a_gguf_file_follows_from_llama_cpp_s_mixture() -> None:
    """Llama 3.1 8B: 4,920,734,272 bytes as Q4_K_M, of which the metadata takes 8 MB. The mixture gives each tensor's type."""
    config = MISTRAL | {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
    spec, per_weight = parse_config(config), {"Q4_K": 144 / 256, "Q6_K": 210 / 256}
    types = quantization_config("Q4_K_M", spec, METHODS)["types"]
    sizes = {"q_proj": 4096 * 4096, "k_proj": 1024 * 4096, "v_proj": 1024 * 4096, "o_proj": 4096 * 4096, "gate_proj": 14336 * 4096,
             "up_proj": 14336 * 4096, "down_proj": 14336 * 4096, "embed_tokens": 128256 * 4096, "lm_head": 128256 * 4096}
    total = sum(sizes[name.rpartition(".")[2]] * per_weight[kind] for name, kind in types.items())
    assert total + 65 * 4096 * 4 == pytest.approx(4_920_734_272 - 8e6, rel=1e-3)


def test_claims_about_memory() -> None:
    """70B: 320 KiB of keys and values a token, so 40 GiB for 128K tokens and 625 MiB for 2,000."""
    found = plan(LLAMA_70B, GPUS["h200"]).memory
    assert found.token_bytes == 320 * 1024
    assert found.token_bytes * 2**17 == 40 * GIB and found.token_bytes * 2000 == 625 * 2**20


def test_an_8_bit_cache_holds_nearly_twice_the_tokens() -> None:
    wide, narrow = (plan(quantization="awq", kv_cache_dtype=kind).memory for kind in ("auto", "fp8"))
    assert narrow.kv_dtype == "float8_e4m3fn" and 1.85 < narrow.tokens / wide.tokens < 2
    assert narrow.token_bytes == 64 * 1024 + 32 * 8 * 2 * 2  # and a scale of 2 bytes per head of each key and value
    with pytest.raises(InvalidInput, match=r"kv_cache_dtype 'fp8' needs .* RTX 3060 has 8.6: use 'int8'"):
        plan(gpu=GPUS["rtx3060"], kv_cache_dtype="fp8")


def test_a_smaller_cache_comes_before_smaller_weights() -> None:
    card = GPU("a card", 18.0, arch=86)
    assert flags(plan(gpu=card, max_model_len=12000)) == ["--kv-cache-dtype int8"]
    assert flags(plan(gpu=GPU("a card", 18.0, arch=89), max_model_len=12000)) == ["--kv-cache-dtype fp8"]


def test_windows_bound_what_a_sequence_holds() -> None:
    full, window = (plan(MISTRAL | {"sliding_window": size}, GPUS["rtx4090"]).memory for size in (None, 4096))
    assert window.sequences(32768) > full.sequences(32768) and window.token_bytes == full.token_bytes


def test_the_dtype_is_the_one_of_a_start_on_that_card() -> None:
    assert plan(gpu=GPUS["t4"]).memory.dtype == "float16"  # no bfloat16 before Ampere
    assert plan(MISTRAL | {"torch_dtype": "float32"}).memory.dtype == "bfloat16"
    assert plan(dtype="float32").memory.weight_bytes == 2 * plan().memory.weight_bytes


def test_a_plan_of_the_cpu_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivllm.engine import plan_model as module

    monkeypatch.setattr(module, "available_host_memory", lambda: 64 * GIB)
    found = plan(gpu=None, dtype="bfloat16")
    assert found.memory.fits and found.roofline is None and (found.memory.step, found.memory.graphs) == (0, 0)
    assert found.memory.cache == pytest.approx(found.memory.weight_bytes, rel=0.01)  # as much as the weights
    monkeypatch.setattr(module, "available_host_memory", lambda: 8 * GIB)
    assert not plan(gpu=None, dtype="bfloat16").memory.fits


# ---- verdicts


def flags(found: ModelPlan) -> list[str] | None:
    return None if found.change is None else [change.flags for change in found.change]


def test_what_fits_says_so_and_needs_no_change() -> None:
    found = plan(quantization="awq")
    assert found.memory.fits and found.change == () and found.memory.missing == 0
    assert found.advice().startswith("fits: ") and "max_model_len is lowered from 32,768 to" in found.advice()
    assert plan(gpu=GPUS["h200"]).advice().endswith("tokens of KV cache")


def test_a_16_bit_7b_model_does_not_fit_8_gb_and_a_4_bit_one_does() -> None:
    found = plan()
    assert not found.memory.fits and "8.5" in found.memory.verdict()
    assert found.change is not None and "4-bit AWQ" in flags(found)[-1]  # type: ignore[index]
    assert "The smallest change that makes it fit: a 4-bit AWQ" in found.advice()
    assert plan(quantization="awq").memory.fits
    nothing = plan(LLAMA_70B)
    assert nothing.change is None or not nothing.memory.fits


def test_a_shorter_length_or_smaller_steps_come_before_smaller_weights() -> None:
    card = GPU("a card", 18.0)
    found = plan(gpu=card, max_model_len=16384)
    assert not found.memory.fits
    assert all("4-bit" not in flag for flag in flags(found))  # type: ignore[union-attr]
    settings = {name: value for change in found.change or () for name, value in change.settings.items()}
    again = plan(gpu=card, **{"max_model_len": 16384, **settings})
    assert again.memory.fits, "the suggested settings make it fit"


def test_settings_that_fix_the_cache_must_fit_the_card() -> None:
    assert plan(quantization="awq", num_gpu_blocks_override=300).memory.fits
    found = plan(quantization="awq", num_gpu_blocks_override=3000).memory
    assert not found.fits and found.missing > 3 * GIB


def test_a_cache_that_a_setting_keeps_small_misses_its_blocks_and_not_the_cards_memory() -> None:
    found = plan(quantization="awq", num_gpu_blocks_override=101, max_model_len=3200).memory
    assert not found.fits and found.missing == 100 * found.block_bytes


def test_a_length_beyond_the_models_is_refused() -> None:
    with pytest.raises(InvalidInput, match="max_model_len 40000 exceeds the model's context length of 32768"):
        plan(max_model_len=40000)


class Sized:
    """A plan that fits if enough is saved."""

    def __init__(self, saved: int, needed: int) -> None:
        self.fits, self.missing = saved >= needed, (needed - saved) * GIB


@pytest.mark.parametrize(("needed", "found"), [
    (0, []), (1, ["a"]), (2, ["b"]), (3, ["a", "b"]), (4, ["b", "c"]), (5, ["a", "b", "c"]), (6, ["small"]), (7, ["smaller"]),
    (11, ["smaller"]), (12, ["smaller"]), (13, ["a", "smaller"]), (17, ["a", "b", "c", "smaller"]), (30, None),
])
def test_the_smallest_change_is_the_first_that_fits_without_what_is_not_needed(needed: int, found: list[str] | None) -> None:
    saves = {"a": 1, "b": 2, "c": 2, "small": 6, "smaller": 12}
    changes = {name: Change(name) for name in saves}
    result = smallest_change(lambda some: Sized(sum(saves[change.flags] for change in some), needed),  # type: ignore[arg-type,return-value]
                             [changes["a"], changes["b"], changes["c"]], [changes["small"], changes["smaller"]], offload=False)
    assert (None if result is None else [change.flags for change in result]) == found


# ---- cards


@pytest.mark.parametrize("name", ["rtx4060", "RTX 4060", "NVIDIA GeForce RTX 4060", "rtx-4060"])
def test_a_card_is_found_in_any_spelling(name: str) -> None:
    assert find_gpu(name) == RTX4060


def test_an_unknown_card_lists_the_known_ones_and_how_to_describe_another() -> None:
    with pytest.raises(InvalidInput, match=r"gpu 'rtx4061' is not known; did you mean 'rtx4060'\?; known: rtx3060, .*h200.*--memory-gib"):
        find_gpu("rtx4061")


def test_this_machines_card_has_the_memory_that_its_driver_reports() -> None:
    found = card_here("NVIDIA GeForce RTX 4060", int(7.5 * GIB), 89)
    assert (found.memory_gib, found.bandwidth) == (7.5, 272)
    assert card_here("NVIDIA GeForce RTX 4060 Ti", int(15.6 * GIB), 89).bandwidth == 288
    assert card_here("A new card", 10 * GIB, 130) == GPU("A new card", 10.0, arch=130)


def test_every_card_is_plausible() -> None:
    for name, gpu in GPUS.items():
        assert find_gpu(name) == gpu == find_gpu(gpu.title)
        assert gpu.bandwidth is not None and gpu.tflops is not None and 100 <= gpu.bandwidth <= 10_000 and 20 <= gpu.tflops <= 3000
        assert (gpu.fp8_tflops is not None) == (gpu.arch >= 89) and 4 <= gpu.memory_gib <= 200


# ---- speed


def test_predictions_agree_with_what_was_measured_on_an_h200() -> None:
    """docs/performance.md: Mistral-7B bs1 3.715, bs8 4.698, bs32 4.726 ms with 256 tokens, ttft8000 202.5 ms."""
    speed = plan(gpu=GPUS["h200"]).roofline
    assert speed is not None
    for batch, measured in ((1, 3.715), (8, 4.698), (32, 4.726)):
        assert speed.tpot(batch, 256).expected == pytest.approx(measured, rel=0.1)
        assert speed.tpot(batch, 256).floor < measured
    assert speed.ttft(8000).expected == pytest.approx(202.5, rel=0.1) and speed.ttft(8000).floor < 202.5


def test_a_decode_reads_the_experts_that_its_tokens_choose() -> None:
    config = {**MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    dense, experts = plan(gpu=GPUS["h200"]).roofline, plan(config, GPUS["h200"]).roofline
    assert dense is not None and experts is not None
    assert experts.expert_bytes == 32 * 8 * 3 * 4096 * 14336 * 2
    one = experts.tpot(1).floor - dense.tpot(1).floor  # two experts instead of one MLP, and the router
    assert one == pytest.approx(experts.expert_bytes / 8 / 4.8e9, rel=0.01)
    assert experts.tpot(64).floor > 3 * experts.tpot(1).floor  # nearly all experts


def test_a_step_takes_longer_for_more_bytes_and_never_less_than_its_arithmetic() -> None:
    dense, packed = plan().roofline, plan(quantization="awq").roofline
    assert dense is not None and packed is not None
    assert dense.tpot(1).floor == pytest.approx((13.25 * GIB + 2**17 * 1000) / 272e6, rel=1e-3)  # all weights but the embedding table
    assert packed.tpot(1).floor < dense.tpot(1).floor / 3
    assert packed.tpot(4096, 1).floor == pytest.approx(dense.tpot(4096, 1).floor, rel=1e-6)  # bound by the tensor cores
    assert packed.ttft(8000).floor > 7.5 * packed.ttft(1000).floor


def test_the_plan_of_a_folder_with_only_a_config_is_printed_as_json(tmp_path: Path, capsys: Any) -> None:
    from minivllm.cli.main import main

    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    assert main(["plan", str(tmp_path), "--gpu", "rtx4060", "--quantization", "awq", "--max-num-seqs", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["weight_bytes"] == sum(weight["bytes"] for weight in found["weights"])
    assert found["tpot_ms"]["1"]["floor"] < found["tpot_ms"]["1"]["expected"] < found["tpot_ms"]["32"]["expected"]
    assert found["num_blocks"] * found["block_bytes"] == found["kv_cache_bytes"] and found["notes"]


def test_the_plan_fits_a_terminal(tmp_path: Path, capsys: Any) -> None:
    from minivllm.cli.main import main

    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    assert main(["plan", str(tmp_path), "--memory-gib", "24", "--bandwidth", "900", "--tflops", "100"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown[1:])) <= 100 and len(shown) <= 30
    assert shown[1] == "  bfloat16 on a GPU: 21.60 of 24.00 GiB may be used"
    assert main(["plan", str(tmp_path), "--gpu", "cpu", "--bandwidth", "900"]) == 1
    assert "bandwidth describes a GPU, and gpu is 'cpu': leave it out" in capsys.readouterr().err


def test_weights_in_host_memory_are_saved_and_cost_their_copies() -> None:
    found, whole = plan(cpu_offload_gb=9.0), plan()
    assert 9 * GIB <= found.memory.offloaded < 9.5 * GIB and found.memory.weight_bytes == whole.memory.weight_bytes
    assert found.memory.fits and found.roofline is not None and whole.roofline is not None
    assert found.roofline.streamed > found.memory.offloaded  # the buffers on the GPU hold two of the layers
    assert found.roofline.tpot(1).floor == pytest.approx(found.roofline.streamed / 16e6)  # ms at 16 GB/s
    assert found.roofline.tpot(1).expected > 5 * whole.roofline.tpot(1).expected
    with pytest.raises(InvalidInput, match="the plan is for a CPU: leave it out"):
        plan(gpu=None, cpu_offload_gb=1.0)
    with pytest.raises(InvalidInput, match="cpu_offload_gb is 20"):
        plan(cpu_offload_gb=20.0)


def test_a_70b_model_fits_a_large_card_only_with_weights_in_host_memory() -> None:
    found = plan(LLAMA_70B, GPU("a card", 56.0, arch=80))
    assert flags(found) is not None and "--cpu-offload-gb" not in str(flags(found))  # 4 bits are enough
    small = plan(LLAMA_70B, GPU("a card", 24.0, arch=80))
    assert small.change is not None and [c.quantization or list(c.settings) for c in small.change] == ["Q4_K_M", ["cpu_offload_gb"]]
    again = plan(gpu=GPU("a card", 4.5, 272, 30.2, None, 16, 89), quantization="awq", cpu_offload_gb=0.1)  # too little
    (more,) = [change.settings["cpu_offload_gb"] for change in again.change or () if "cpu_offload_gb" in change.settings]
    assert more > 0.1 and plan(gpu=GPU("a card", 4.5, 272, 30.2, None, 16, 89), quantization="awq",
                               **{k: v for change in again.change or () for k, v in change.settings.items()}).memory.fits
    assert plan(LLAMA_70B, GPU("a card", 24.0, arch=80), "Q4_K_M", **small.change[-1].settings).memory.fits
