"""An engine inside the command's own process, for `chat` and `complete`: one request at a time, text as it comes."""
from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minivllm.cli.flags import add_config_file, add_config_flags, build, given
from minivllm.config import LOG_LEVELS, EngineConfig
from minivllm.errors import EngineDead
from minivllm.sampling_params import SamplingParams
from minivllm.server.terminal import configure_logging, print_status

if TYPE_CHECKING:
    from minivllm.engine.engine import LLMEngine

# Flag, type, help. What is left out comes from the model's generation_config.json.
SAMPLING = (
    ("max_tokens", int, "longest answer in tokens; as long as the context allows if left out"),
    ("temperature", float, "0: always the most probable token"),
    ("top_p", float, "choose among the most probable tokens that add up to this"),
    ("top_k", int, "choose among this many"),
    ("min_p", float, "choose among tokens at least this fraction as probable as the best"),
    ("repetition_penalty", float, "above 1: fewer repetitions"),
)
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NOT_FOR_ONE = ("skip_tokenizer_init", "scheduling_policy", "max_queue")  # settings that mean nothing with one request and text


class Interrupt:
    """Whether Ctrl-C was pressed. A step of the engine is never cut in the middle."""

    def __init__(self) -> None:
        self.pressed = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        self.pressed = False
        previous = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _press(self, signum: int, frame: object) -> None:
        self.pressed = True


def add_flags(parser: argparse.ArgumentParser, max_tokens_help: str | None = None) -> None:
    add_config_file(parser)
    group = parser.add_argument_group("sampling")
    for name, kind, text in SAMPLING:
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X",
                           default=argparse.SUPPRESS, help=max_tokens_help if name == "max_tokens" and max_tokens_help else text)
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="how much to log (default: warning)")
    add_config_flags(parser, EngineConfig, "engine", skip=NOT_FOR_ONE)


class Local:
    """One engine, asked one thing at a time. Use as a context manager."""

    def __init__(self, engine: LLMEngine, overrides: Mapping[str, Any]) -> None:
        self.engine = engine
        self.interrupt = Interrupt()
        self._numbers = itertools.count()
        defaults = engine.info().generation_config
        own = {name: defaults[name] for name in MODEL_DEFAULTS if defaults.get(name) is not None}
        self.sampling = own | {"max_tokens": None} | dict(overrides)

    @classmethod
    @contextlib.contextmanager
    def start(cls, args: argparse.Namespace, max_tokens: int | None = None) -> Iterator[Local]:
        """`max_tokens`: when no flag says it; None: as the context allows."""
        overrides = {name: getattr(args, name) for name, _, _ in SAMPLING if name in vars(args)}
        SamplingParams(**overrides)  # a wrong value is told before the model is loaded
        config = build(EngineConfig, given(args, EngineConfig))
        configure_logging(args.log_level)
        print_status(f"loading {config.model or 'the default model'} ...")
        from minivllm.engine.engine import LLMEngine

        engine = LLMEngine.from_config(config)
        try:
            yield cls(engine, {"max_tokens": max_tokens} | overrides)
        finally:
            engine.close()

    def stream(self, prompt_token_ids: Sequence[int]) -> Iterator[str]:
        """The answer in pieces. Ends early, with `interrupt.pressed` set, when the user presses Ctrl-C."""
        request_id = f"cli-{next(self._numbers)}"
        self.engine.add_request(request_id, {"prompt_token_ids": tuple(prompt_token_ids)}, SamplingParams(**self.sampling))
        with self.interrupt.listening():
            while self.engine.has_unfinished_requests():
                for delta in self.engine.step():
                    if delta.finish_reason == "error":
                        raise EngineDead(f"a step of the engine failed: {delta.error or 'see the log'}")
                    if delta.text:
                        yield delta.text
                if self.interrupt.pressed:
                    self.engine.abort_request(request_id)
                    return
