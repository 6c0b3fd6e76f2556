"""`trust_remote_code`: with it, code in a model's folder runs behind this engine's paged attention. Without it, no line of it runs."""
from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minivllm import LLM, AsyncLLM, SamplingParams
from minivllm.cli.main import main
from minivllm.config import EngineConfig
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, ModelError
from minivllm.models.hub import find_model
from minivllm.models.remote_code import announce, references
from minivllm.models.transformers_spec import read_spec
from minivllm.quantization.methods import METHODS
from tests.conftest import write_tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CONFIGURATION = """
from transformers import LlamaConfig
class TinyConfig(LlamaConfig):
    model_type = "tiny_of_a_folder"
"""
MODELING = """
import os, pathlib
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from .configuration_tiny import TinyConfig

with open(os.environ["RAN"], "a") as file:
    file.write(f"{os.getpid()}\\n")

class NegativeMLP(LlamaMLP):
    def forward(self, x):
        return -super().forward(x)

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = NegativeMLP(config)
        self.post_init()
"""
TOKENIZATION = """
import os
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

with open(os.environ["RAN"], "a") as file:
    file.write(f"{os.getpid()} tokenizer\\n")

class TinyTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"vocab_file": "vocab.json"}

    def __init__(self, vocab_file=None, **others):
        super().__init__(tokenizer_object=Tokenizer.from_file(vocab_file), **others)
"""
AUTO_MAP = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1,
         "pad_token_id": 1}
ENGINE: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_gpu_blocks_override": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Transformers copies code to before it imports it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("modules")
        patch.setenv("HF_MODULES_CACHE", str(folder))  # for other processes
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", [*sys.path])
        yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def ran(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code writes when it runs. No question on the terminal is allowed."""
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("a question on the terminal"))
    return tmp_path / "ran"


def write_model(folder: Path, modeling: str = MODELING, **config: Any) -> Path:
    """A folder with a random model and its own code."""
    folder.mkdir()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(f"# {folder}: code that was imported is not run again\n{modeling}")
    found = json.loads((folder / "config.json").read_text())
    found |= {"model_type": "tiny_of_a_folder", "architectures": ["TinyForCausalLM"], "auto_map": AUTO_MAP, **config}
    (folder / "config.json").write_text(json.dumps(found))
    write_tiny_tokenizer(folder)
    return folder


def use_own_tokenizer(folder: Path) -> None:
    """Leave the folder's tokenizer only to its own code."""
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (folder / "tokenization_tiny.py").write_text(TOKENIZATION)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TinyTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_folders_own_code_gives_the_tokens_that_it_gives_in_transformers(tmp_path: Path, ran: Path,
                                                                         capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    prefix = list(range(3, 21))
    prompts = [[*prefix, 5, 6], [*prefix, 7], prefix[:9], [*prefix, 5, 6]]
    with LLM(str(folder), trust_remote_code=True, block_size=4, max_num_batched_tokens=7, **ENGINE) as llm:
        printed = capsys.readouterr().err
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
    line = f"minivllm: trust_remote_code: running code of the model's author, TinyForCausalLM in {folder / 'modeling_tiny.py'}\n"
    assert printed.count(line) == 1 and printed.count("configuration_tiny.py") == 1
    assert "TinyForCausalLM runs in Transformers' modeling code" in printed
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
    plain = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    expected, others = ([model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(p):].tolist()
                         for p in prompts] for model in (theirs, plain))
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected != others
    assert ran.read_text().count(str(os.getpid())) >= 1


def test_without_the_flag_no_code_runs_and_the_error_names_it(tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    says = ("the architecture TinyForCausalLM exists only as Python code in the model's folder (auto_map), which is not run: read that "
            "code, and set trust_remote_code (--trust-remote-code) if you trust it")
    for settings in ({}, {"model_impl": "transformers"}, {"hf_overrides": {"_name_or_path": str(folder)}}, {"trust_remote_code": False}):
        with pytest.raises(ModelError) as error:
            LLM(str(folder), **ENGINE, **settings)
        assert says in str(error.value)
    for command in (["serve"], ["complete", "x", "--model"], ["plan", "--gpu", "l4"], ["pull"]):
        assert main([*command, str(folder)]) == 1
        assert says in capsys.readouterr().err
    use_own_tokenizer(folder)
    with pytest.raises(ModelError, match=r"needs Python code from its folder, which is not run: .* set trust_remote_code"):
        Tokenizer(folder)
    assert not ran.exists()


def test_a_plan_with_the_flag_runs_it(tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m")
    assert main(["plan", str(folder), "--gpu", "l4", "--dtype", "float32", "--trust-remote-code", "--json"]) == 0
    weights = load_file(folder / "model.safetensors").values()
    assert json.loads(capsys.readouterr().out)["weight_bytes"] == sum(4 * weight.numel() for weight in weights)
    assert ran.exists()
    assert main(["pull", str(folder), "--trust-remote-code"]) == 0


def test_an_engine_in_another_process_runs_the_models_and_the_tokenizers_code(tmp_path: Path, ran: Path, capfd: Any) -> None:
    folder = write_model(tmp_path / "m")
    expected = Tokenizer(folder).encode("the cat and the hat")
    use_own_tokenizer(folder)

    async def run() -> list[Any]:
        llm = AsyncLLM(str(folder), trust_remote_code=True, process=True, **ENGINE)
        try:
            return [type(await llm.get_tokenizer()).__name__, *[output async for output in llm.generate("the cat and the hat", GREEDY)]]
        finally:
            llm.shutdown()

    name, *outputs = asyncio.run(run())
    assert name.startswith("TinyTokenizer")
    assert list(outputs[-1].prompt_token_ids) == expected and len(outputs[-1].outputs[0].token_ids) == 8
    lines = ran.read_text().split("\n")
    assert f"{os.getpid()} tokenizer" in lines and str(os.getpid()) not in lines  # this process has the tokenizer only
    assert f"TinyTokenizer in {folder / 'tokenization_tiny.py'}" in capfd.readouterr().err


def test_an_architecture_with_a_row_does_not_run_the_folders_code(tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m", architectures=["LlamaForCausalLM"], model_type="llama")
    with LLM(str(folder), trust_remote_code=True, **ENGINE) as llm:
        llm.generate(["the cat"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err.count(
        "trust_remote_code: 'modeling_tiny.TinyForCausalLM' in the model's folder does not run, because 'LlamaForCausalLM' is known") == 1
    assert not ran.exists()


OWN_ATTENTION = MODELING + """
class Attention(torch.nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.qkv = torch.nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states, **others):
        q, k, v = self.qkv(hidden_states).chunk(3, dim=-1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), None

class TinyForCausalLM(TinyForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(config, i)
""".replace("class Attention", "import torch\nclass Attention")
MIXES_ROWS = MODELING + """
class TinyForCausalLM(TinyForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean(dim=1, keepdim=True),))
"""


@pytest.mark.parametrize(("modeling", "config", "says"), [
    (OWN_ATTENTION, {}, "TinyForCausalLM is not supported: its attention does not go through Transformers' AttentionInterface"),
    (MIXES_ROWS, {}, "its code computes other logits"),
    (MODELING + "TinyForCausalLM._is_stateful = True", {}, "TinyForCausalLM is not supported: it has state-space"),
    (MODELING + "class TinyForCausalLM: pass", {}, "TinyForCausalLM is not supported: its class is not one of Transformers' models"),
    ("import no_such_package", {}, "modeling_tiny.py cannot be loaded (ImportError: This modeling file requires the following packages"),
    ("raise SystemExit('no')", {}, "modeling_tiny.py cannot be loaded (SystemExit: no)"),
    ("x = (", {}, "modeling_tiny.py cannot be loaded (SyntaxError"),
    ("", {}, "modeling_tiny.py cannot be loaded (AttributeError"),
    (MODELING, {"auto_map": AUTO_MAP | {"AutoModelForCausalLM": "other/code--modeling_tiny.TinyForCausalLM"}},
     "code of another repository is not run: save it in this folder"),
    (MODELING, {"auto_map": AUTO_MAP | {"AutoModelForCausalLM": "../m/modeling_tiny.TinyForCausalLM"}}, "expected FILE.CLASS"),
    (MODELING, {"auto_map": AUTO_MAP | {"AutoModelForCausalLM": "modeling_big.BigForCausalLM"}}, "there is no modeling_big.py"),
    (MODELING, {"auto_map": {"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]}},
     "model_type 'tiny_of_a_folder' of TinyForCausalLM is not one of Transformers'"),
    (MODELING, {"hidden_size": "x"}, "config.json is not one of TinyForCausalLM"),
])
def test_code_that_cannot_run_here_is_refused_with_the_reason(tmp_path: Path, modeling: str, config: dict[str, Any], says: str) -> None:
    folder = write_model(tmp_path / "m", modeling, **config)
    with pytest.raises(InvalidInput) as error:
        LLM(str(folder), trust_remote_code=True, **ENGINE)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_settings_that_own_code_does_not_work_with_are_refused_before_it_runs(tmp_path: Path, ran: Path) -> None:
    folder = write_model(tmp_path / "m")
    with pytest.raises(InvalidInput, match="tensor_parallel_size 2 does not work with TinyForCausalLM"):
        LLM(str(folder), trust_remote_code=True, tensor_parallel_size=2, **ENGINE)
    assert not ran.exists()


def test_a_file_outside_the_folder_does_not_run(tmp_path: Path, ran: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "modeling_tiny.py").rename(tmp_path / "outside.py")
    (folder / "modeling_tiny.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(ModelError, match=r"outside the model's folder, and is not followed"):
        LLM(str(folder), trust_remote_code=True, **ENGINE)
    assert not ran.exists()


def test_the_folder_of_the_code_is_the_models_and_not_one_that_config_json_names(tmp_path: Path, ran: Path) -> None:
    """`_name_or_path` is a key that config.json files have."""
    other = write_model(tmp_path / "other", "raise RuntimeError('the code of another folder')")
    folder = write_model(tmp_path / "m", _name_or_path=str(other))
    spec = read_spec(config := EngineConfig(model=str(folder), trust_remote_code=True), find_model(config, dict).config, METHODS)
    assert spec.architecture == "TinyForCausalLM" and ran.exists()


def test_a_tokenizer_of_python_code_alone_is_refused(tmp_path: Path, ran: Path) -> None:
    folder = write_model(tmp_path / "m")
    use_own_tokenizer(folder)
    (folder / "tokenization_tiny.py").write_text("""
from transformers import PreTrainedTokenizer
class TinyTokenizer(PreTrainedTokenizer):
    vocab_size = 3
    def get_vocab(self): return {"a": 0, "b": 1, "c": 2}
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return self.get_vocab().get(token, 0)
    def _convert_id_to_token(self, index): return "abc"[index]
""")
    with pytest.raises(ModelError, match="exists only as Python code and has no fast form"):
        Tokenizer(folder, trust_remote_code=True)


@pytest.mark.parametrize(("config", "found"), [
    ({}, []), ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, ["a.B"]), ({"auto_map": ["a.B", "c.D"]}, ["a.B", "c.D"]),
    ({"auto_map": {"AutoTokenizer": "a.B"}}, ["a.B"]), ({"auto_map": 3}, []), ({"auto_map": {"AutoTokenizer": {"x": 1}}}, []),
])
def test_entries_of_auto_map(config: dict[str, Any], found: list[str]) -> None:
    assert references(config, "AutoTokenizer") == found


@pytest.mark.parametrize("reference", ["", "a", "a.b.c", ".a", "/etc/x.A", "a/b.C", "..x.A", "a.B\n", "a b.C", "é.A"])
def test_an_entry_that_names_no_file_is_an_error(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ModelError, match="auto_map in"):
        announce(tmp_path, reference, "model")
