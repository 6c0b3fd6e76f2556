"""The Python code of the documents about extending the engine runs, and does what they say."""
from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm import LLM, SamplingParams
from tests.quantization.test_linear_method import quantized

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT = {"prompt_token_ids": [5, 6, 7]}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def run(page: str, **names: Any) -> dict[str, Any]:
    """Run the page's Python code with these names defined. Returns its names."""
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    assert code
    names["__name__"] = page
    exec(compile(code, page, "exec", dont_inherit=True), names)
    return names


def plain_answer(folder: Path, max_tokens: int) -> list[int]:
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        return llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0].token_ids


def test_a_kernel_of_ones_own_runs_in_an_engine(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    names = run("adding_a_kernel.md", MODEL=str(folder))
    names["engine"].close()
    assert names["calls"] > 0
    assert names["outputs"][0].outputs[0].token_ids == plain_answer(folder, 4)[:len(names["outputs"][0].outputs[0].token_ids)]


def test_a_quantization_method_outside_the_package_loads_its_checkpoint(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    quantized(tmp_path, "Llama", num_key_value_heads=2)
    shutil.copy(tiny_llama() / "tokenizer.json", tmp_path)
    engine = run("adding_a_quantization_method.md", TOY_INT4_MODEL=str(tmp_path))["engine"]
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=2))
    while engine.has_unfinished_requests():
        engine.step()
    engine.close()


def test_a_proposer_of_ones_own_changes_no_token(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    names = run("adding_a_proposer.md", MODEL=str(folder))
    drafts = names["engine"].stats().drafts
    names["engine"].close()
    assert drafts is not None and drafts.num_drafts > 0
    assert names["outputs"][0].outputs[0].token_ids == plain_answer(folder, 16)
