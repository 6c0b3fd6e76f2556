"""`{"method": "eagle"}` without a model: the head that comes with the package, for its own target only."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm import LLM, SamplingParams
from minivllm.config import EngineConfig
from minivllm.errors import InvalidInput
from minivllm.kernels.tuning import SPECULATION, SpeculationCost
from minivllm.models.hub import ModelFiles
from minivllm.speculative import packaged
from minivllm.speculative.load import describe_draft, find_draft
from minivllm.speculative.training.prompts import held_out_prompts
from tests.models.tiny import make_hf, read_spec
from tests.speculative.heads import SIZES, write_head


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("target")
    make_hf("Llama", num_key_value_heads=2).save_pretrained(out)
    return out


@pytest.fixture
def head(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A head for the tiny target stands for the one of the package."""
    monkeypatch.setattr(packaged, "HEADS", tmp_path)
    write_head(tmp_path / "tiny", **{packaged.TARGET: packaged.record_of(read_spec(target), "tiny", target)})
    return tmp_path / "tiny"


def with_another_norm(target: Path, out: Path) -> Path:
    """A model of the same sizes."""
    shutil.copytree(target, out)
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"] += torch.linspace(0, 0.1, 48)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def eagle(target: Path, **entries: object) -> EngineConfig:
    return EngineConfig(model=str(target), speculative_config={"method": "eagle", **entries})


def test_its_own_target_gets_it(target: Path, head: Path) -> None:
    spec = read_spec(target)
    for draft in (find_draft(eagle(target), spec, target), describe_draft(eagle(target), spec)):
        assert draft is not None and draft.folder == head and draft.settings.num_speculative_tokens == 3
    more = find_draft(eagle(target, num_speculative_tokens=6), spec, target)
    assert more is not None and more.settings.num_speculative_tokens == 6


def test_the_storage_of_the_target_does_not_matter(target: Path, head: Path, tmp_path: Path) -> None:
    half = shutil.copytree(target, tmp_path / "half")
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    assert find_draft(eagle(half), read_spec(half), half) is not None


@pytest.mark.usefixtures("head")
def test_another_target_is_an_error_with_the_fix(target: Path, tmp_path: Path) -> None:
    other, smaller = with_another_norm(target, tmp_path / "other"), tmp_path / "smaller"
    make_hf("Llama", num_key_value_heads=2, num_hidden_layers=2).save_pretrained(smaller)
    for folder in (other, smaller):
        says = f"was trained for SmolLM2-135M-Instruct, and the target is {folder}: set model to"
        with pytest.raises(InvalidInput, match=says) as caught:
            find_draft(eagle(folder), read_spec(folder), folder)
        assert caught.value.param == "speculative_config"


def test_a_head_that_is_named_is_used_with_a_warning(
    target: Path, head: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    assert find_draft(eagle(target, model=str(head), num_speculative_tokens=2), read_spec(target), target) is not None
    assert not caplog.messages
    other = with_another_norm(target, tmp_path / "other")
    assert find_draft(eagle(other, model=str(head), num_speculative_tokens=2), read_spec(other), other) is not None
    assert "was trained for another model" in caplog.text
    (head / "config.json").write_text(json.dumps(SIZES), encoding="utf-8")  # a published head has no record
    caplog.clear()
    assert find_draft(eagle(other, model=str(head), num_speculative_tokens=2), read_spec(other), other) is not None
    assert not caplog.messages


def test_the_head_of_the_default_model_drafts_well_and_changes_no_token(
    default_model: ModelFiles, one_torch_thread: None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On prompts about topics that it was not trained on. All drafts are verified, whether they pay or not."""
    monkeypatch.setitem(SPECULATION, "cpu", SpeculationCost(1e9, 0.0, 16))
    params, found = SamplingParams(temperature=0, max_tokens=32), []
    for config in (None, {"method": "eagle"}):
        with LLM(max_model_len=256, num_gpu_blocks_override=96, speculative_config=config) as llm:
            outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in held_out_prompts(4)], params, use_tqdm=False)
            counts = llm.llm_engine.stats().drafts
        found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1] and counts is not None and counts.num_steps > 30
    accepted = [n / counts.num_steps for n in counts.accepted_per_position]
    print("accepted by position:", [f"{a:.0%}" for a in accepted])
    assert len(accepted) == 3 and accepted[0] > 0.4 and accepted[1] > 0.18


@pytest.mark.parametrize("entry", ["revision", "quantization"])
def test_entries_about_a_named_draft_need_one(entry: str) -> None:
    with pytest.raises(InvalidInput, match="revision and quantization have no effect without model"):
        EngineConfig(speculative_config={"method": "eagle", entry: "int8"})
