"""What answers `chat` and `complete`, one request at a time, streamed: an engine in the command's own process, or a server."""
from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.cli import remote
from minivllm.cli.flags import add_config_file, add_config_flags, build, given
from minivllm.cli.interrupt import Interrupt
from minivllm.cli.numbers import real_number, whole_number
from minivllm.cli.remote import RemoteServer, find_server
from minivllm.config import LOG_LEVELS, MODEL_DEFAULTS, EngineConfig
from minivllm.engine_request import LoRARequest
from minivllm.errors import EngineDead, InvalidInput
from minivllm.lora.peft_config import PeftConfig
from minivllm.sampling_params import SamplingParams
from minivllm.server.terminal import configure_logging, print_status

if TYPE_CHECKING:
    from minivllm.engine.engine import EngineCore
    from minivllm.engine.tokenizer import Tokenizer

# Flag, type (how its value is written), help. Defaults come from the model's generation_config.json.
SAMPLING = (
    ("max_tokens", whole_number, "maximum number of tokens of an answer (default: as many as the context allows)"),
    ("temperature", real_number, "0: always choose the most probable token"),
    ("top_p", real_number, "choose among the most probable tokens whose probabilities add up to this"),
    ("top_k", whole_number, "choose among this many most probable tokens"),
    ("min_p", real_number, "choose among tokens with at least this fraction of the highest probability"),
    ("repetition_penalty", real_number, "values above 1 reduce repetitions"),
)
UNUSED = ("skip_tokenizer_init", "scheduling_policy", "max_queue")  # engine settings without effect for one text request


def add_flags(parser: argparse.ArgumentParser, max_tokens_help: str | None = None) -> None:
    add_config_file(parser)
    group = parser.add_argument_group("sampling")
    for name, kind, text in SAMPLING:
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is whole_number else "X",
                           default=argparse.SUPPRESS, help=max_tokens_help if name == "max_tokens" and max_tokens_help else text)
    parser.add_argument("--lora", metavar="ADAPTER", help="answer with this LoRA adapter, a folder that PEFT has saved or a hub id (a "
                        "server's adapter is a model: --url URL --model NAME)")
    remote.add_flags(parser)
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="lowest level of log messages (default: warning)")
    add_config_flags(parser, EngineConfig, "engine", skip=UNUSED)


class LocalEngine:
    """An engine that runs one request at a time."""

    def __init__(self, engine: EngineCore, overrides: Mapping[str, Any], lora: str | None = None) -> None:
        """lora: folder of the LoRA adapter that answers."""
        self.engine = engine
        self._lora_request = None if lora is None else LoRARequest("lora", 1, lora)
        if self._lora_request is not None:
            engine.load_adapter(self._lora_request)
        self.interrupt = Interrupt()
        self._numbers = itertools.count()
        defaults = engine.info().generation_config
        own = {name: defaults[name] for name in MODEL_DEFAULTS if defaults.get(name) is not None}
        self.sampling = own | {"max_tokens": None} | dict(overrides)

    def check_chat(self) -> None:
        """Raise unless the model has a chat template."""
        if self._tokenizer.chat_template is None:
            raise InvalidInput("this model has no chat template: use a chat model, or `minivllm complete`", "model")

    @property
    def _tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None  # the commands have no flag skip_tokenizer_init
        return self.engine.tokenizer

    def chat(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """The answer in pieces. Ctrl-C ends it early and sets `interrupt.pressed`."""
        prompt = self._tokenizer.apply_chat_template(messages)
        assert isinstance(prompt, list)
        return self._stream(prompt)

    def complete(self, text: str) -> Iterator[str]:
        """The continuation in pieces."""
        return self._stream(self._tokenizer.encode(text))

    def _stream(self, prompt_token_ids: Sequence[int]) -> Iterator[str]:
        request_id = f"cli-{next(self._numbers)}"
        self.engine.add_request(request_id, {"prompt_token_ids": tuple(prompt_token_ids)}, SamplingParams(**self.sampling),
                                lora_request=self._lora_request)
        with self.interrupt.recording():
            while self.engine.has_unfinished_requests():
                for delta in self.engine.step():
                    if delta.finish_reason == "error":
                        raise EngineDead(f"a step of the engine failed: {delta.error or 'see the log'}")
                    if delta.text:
                        yield delta.text
                if self.interrupt.pressed:
                    self.engine.abort_request(request_id)
                    return


@contextlib.contextmanager
def start(args: argparse.Namespace, max_tokens: int | None = None) -> Iterator[LocalEngine | RemoteServer]:
    """The running server that `args` name or that is there, else an engine. max_tokens: the default of that flag; None: no limit."""
    overrides = {name: getattr(args, name) for name, _, _ in SAMPLING if name in vars(args)}
    SamplingParams(**overrides)  # refuse wrong values before the model is loaded
    settings = given(args, EngineConfig)
    if args.lora is not None:
        from minivllm.models.hub import find_adapter

        settings = {"enable_lora": True, "max_loras": 1} | settings
        args.lora = str(find_adapter(args.lora, build(EngineConfig, settings)))  # before the model is loaded
        settings = {"max_lora_rank": PeftConfig.read(Path(args.lora)).max_rank} | settings
    config = build(EngineConfig, settings)
    configure_logging(args.log_level)
    if (server := find_server(args, settings)) is not None:
        server.sampling |= ({} if max_tokens is None else {"max_tokens": max_tokens}) | overrides
        yield server
        return
    print_status(f"loading {config.model or 'the default model'} ...")
    from minivllm.engine import compose

    engine = compose.build_engine(config)
    try:
        yield LocalEngine(engine, {"max_tokens": max_tokens} | overrides, args.lora)
    finally:
        engine.close()
