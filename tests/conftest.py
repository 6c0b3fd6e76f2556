"""Shared by all tests: Hypothesis profiles, the `gpu` marker, and models.

    default_model    ModelFiles of the embedded default model, downloaded once into the user's cache; its weights are packed
    default_float32  a folder with its dequantized weights, for Transformers
    one_torch_thread PyTorch uses one thread while a module's tests run
    tiny_llama       (**config) -> folder of a tiny random Llama with a tokenizer; the same arguments give the same folder
"""
from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from minivllm.models.hub import ModelFiles

# Set before torch is imported. One thread, so that a test costs the same on every machine and workers have a core each; tests of
# threads set their number. No requests to the hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are very slow on a machine with other work
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background processes so
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of more than 30 s. If a worker started one at the end, the others would wait for it.
LONGEST = ("test_captured_steps.py", "test_triton_sm89.py", "test_query_width.py", "test_quantized_cache.py", "test_numba.py",
           "test_numba_grouped.py", "test_notebooks.py", "test_quantize.py", "test_equals_hf.py", "test_metamorphic.py", "test_drafts.py",
           "test_programs.py", "test_grammar.py", "test_client.py", "test_storm.py", "test_under_attack.py")

IN_CI = bool(os.environ.get("CI"))

# `pytest --hypothesis-profile=long tests/core` is the nightly size: at least 10,000 steps for each state machine.
_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, stateful_step_count=40, derandomize=IN_CI, **_COMMON)
settings.register_profile("long", max_examples=500, stateful_step_count=100, **_COMMON)
settings.load_profile("default")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The workers of `make test` (`-n auto`): one per core and 3 GiB of memory. More than 8 would wait for the longest files."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, psutil.virtual_memory().available // (3 << 30), 8))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a file's tests run in one process, because they share engines. Notebooks share nothing: one test each."""
    from xdist.scheduler import LoadFileScheduling

    class FilesAndNotebooks(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_notebooks.py" in nodeid else super()._split_scope(nodeid)

    return FilesAndNotebooks(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist keeps the order of files, which pytest_collection_modifyitems chooses


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first. Tests marked `gpu` are skipped, with a reason, where there is no CUDA device.

    torch is imported only if there are such tests.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """PyTorch uses one thread: more would slow a tiny model down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The embedded default model. If it is neither cached nor downloadable: an error in CI, elsewhere a skip with a reason."""
    from minivllm.config import EngineConfig
    from minivllm.errors import ModelError
    from minivllm.models.hub import find_model

    try:
        return find_model(EngineConfig())
    except ModelError as error:
        if IN_CI:
            raise
        pytest.skip(f"the default model is not available: {error}")


@pytest.fixture(scope="session")
def default_float32(default_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the default model's weights in float32, which represents the blocks' values exactly."""
    from minivllm.models.gguf import convert
    from minivllm.models.hub import default_gguf

    folder = tmp_path_factory.mktemp("default") / "float32"
    convert(default_gguf(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders with tiny random Llamas: config.json, model.safetensors, tokenizer.json with a chat template."""
    made: dict[str, Path] = {}

    def make(seed: int = 0, **overrides: Any) -> Path:
        key = json.dumps([seed, overrides], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny_llama")
            _write_tiny_llama(made[key], seed, overrides)
        return made[key]

    return make


def _write_tiny_llama(folder: Path, seed: int, overrides: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
             "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).save_pretrained(folder)
    write_tiny_tokenizer(folder)


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE of at most 320 tokens: <s> </s>, every byte, and some merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat and the hat and then that other thing in the end"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = ("{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
                "{% if add_generation_prompt %}<s>assistant: {% endif %}")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
