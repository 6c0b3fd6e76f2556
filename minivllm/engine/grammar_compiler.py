"""Compiled grammars: a cache, and what a client's grammar must pass before it gets there.

    compile(params)             for grammars of this program: compiled at once
    GrammarPreparation.run()    for grammars of clients: a trial in another process, with limits; then compiled here

The engine loop runs preparations on its threads (`preparation_queue.py`), so neither steps nor other requests wait for them.
"""
from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from minivllm.engine.grammar_text import Matcher, VocabularySource, build_matcher, grammar_text, one_line
from minivllm.engine.grammar_trial import TrialCanceled, TrialJob, TrialLimits, TrialProcess, TrialReply
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.sampling_params import StructuredOutputsParams

MAX_CACHED = 32  # compiled grammars; the least recently used one is dropped
MAX_CACHED_BYTES = 512 << 20  # of all compiled grammars that were tried out
MAX_REFUSED = 256  # grammars that exceeded a limit, so that a client cannot repeat their trials
DEFAULT_SECONDS = 3.0  # of CPU time; schemas of 100 kB take up to 0.3 s


class Vocabulary:
    """llguidance's trie of all tokens, built once. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos_token_ids = tokenizer, tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._built: Any = None

    @cached_property
    def source(self) -> VocabularySource:
        """Raises `InvalidInput` without a tokenizer."""
        assert self._tokenizer is not None
        return VocabularySource(self._tokenizer.serialized(), self._eos_token_ids)

    @cached_property
    def special(self) -> tuple[str, ...]:
        """The texts of special tokens."""
        return self.source.special()

    def check(self, origin: str) -> None:
        """Raise `InvalidInput` where structured output is not possible. origin: the request's field."""
        if self._tokenizer is None:
            raise InvalidInput(f"{origin} needs a tokenizer, and this engine has none (skip_tokenizer_init)", origin)
        if importlib.util.find_spec("llguidance") is None:
            raise InvalidInput(f"{origin} needs a package that is not installed here: pip install llguidance", origin)

    def build(self, origin: str) -> Any:
        """The trie. The first call takes about a second for 150,000 tokens."""
        with self._lock:
            if self._built is None:
                try:
                    self._built = self.source.build()
                except ValueError as error:
                    raise InvalidInput(f"{origin} is not possible with this model's tokenizer ({one_line(str(error))}): leave it out",
                                       origin) from None
            return self._built

    @property
    def size(self) -> int:
        """Number of tokens. Known after the first `build`."""
        return int(self._built.vocab_size)


class CompiledGrammar(NamedTuple):
    """An entry of the cache."""

    matcher: Matcher
    num_bytes: int  # of memory, as measured by its trial; 0: not known


class GrammarCompiler:
    """Compiles grammars and caches them. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], max_seconds: float = DEFAULT_SECONDS) -> None:
        self._vocabulary = Vocabulary(tokenizer, eos_token_ids)
        self._limits = TrialLimits(max_seconds)
        self._lock = threading.Lock()  # guards everything below
        self._cached: OrderedDict[StructuredOutputsParams, CompiledGrammar] = OrderedDict()
        self._refused: OrderedDict[StructuredOutputsParams, str] = OrderedDict()  # grammars that exceeded a limit -> which one
        self._idle: list[TrialProcess] = []
        self._closed = False

    @property
    def num_tokens(self) -> int:
        """Bits in a mask. Known after the first `compile`."""
        return self._vocabulary.size

    def warm_up(self) -> None:
        """Build the vocabulary, if structured output is possible: Python's global lock is held meanwhile, so no step could run."""
        with contextlib.suppress(InvalidInput):
            self._vocabulary.check("structured_outputs")
            self._vocabulary.build("structured_outputs")

    def is_cached(self, params: StructuredOutputsParams) -> bool:
        """Whether `compile` returns at once."""
        with self._lock:
            return params in self._cached

    def compile(self, params: StructuredOutputsParams, tried: TrialReply | None = None) -> Matcher:
        """A matcher at the start of the grammar; each sequence copies it. Raises `InvalidInput`, which names the field.

        tried: what the trial of this grammar found.
        """
        with self._lock:
            if params in self._cached:
                self._cached.move_to_end(params)
                return self._cached[params].matcher
        self._vocabulary.check(params.origin)
        trie = self._vocabulary.build(params.origin)
        grammar = grammar_text(params, self._vocabulary.special) if tried is None else tried.grammar
        compiled = CompiledGrammar(build_matcher(grammar, trie, params.where), 0 if tried is None else tried.num_bytes)
        with self._lock:
            self._cached[params] = compiled
            while len(self._cached) > 1 and (
                    len(self._cached) > MAX_CACHED or sum(found.num_bytes for found in self._cached.values()) > MAX_CACHED_BYTES):
                self._cached.popitem(last=False)
        return compiled.matcher

    def try_out(self, params: StructuredOutputsParams, ticket: GrammarPreparation) -> TrialReply:
        """Compile a grammar in another process. Raises `InvalidInput`, and `TrialCanceled` after `ticket.cancel()`."""
        self._vocabulary.check(params.origin)
        with self._lock:
            overrun = self._refused.get(params)
        if overrun is None:
            found = self._run_trial(params, ticket)
            if found.error is None:
                return found
            if not found.overran:
                raise InvalidInput(found.error, params.where)
            overrun = found.error
            with self._lock:
                self._refused[params] = overrun
                if len(self._refused) > MAX_REFUSED:
                    self._refused.popitem(last=False)
        raise InvalidInput(f"{params.where} is too complex: compiling {overrun}; make the grammar simpler (fewer patterns that apply "
                           "to one string, smaller repetitions), or raise the server's max_grammar_seconds", params.where)

    def _run_trial(self, params: StructuredOutputsParams, ticket: GrammarPreparation) -> TrialReply:
        with self._lock:
            trial = self._idle.pop() if self._idle else TrialProcess(self._vocabulary.source)
        try:
            trial.start()
            self._vocabulary.build(params.origin)  # meanwhile
            ticket.trial = trial
            return trial.run(TrialJob(params, self._limits), ticket)
        finally:
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(trial)
            if closed:
                trial.close()

    def close(self) -> None:
        """End the trial processes. One that compiles now ends after its job, or when it is canceled."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for trial in idle:
            trial.close()


class GrammarPreparation:
    """The work before a request with a new grammar can be added: its trial, then its compilation here."""

    def __init__(self, compiler: GrammarCompiler, params: StructuredOutputsParams) -> None:
        self._compiler, self._params = compiler, params
        self.trial: TrialProcess | None = None  # the process that has the job, or will get it
        self.canceled = False

    def run(self) -> None:
        """Raises `InvalidInput` for a grammar that is wrong or exceeds a limit, and `TrialCanceled` after `cancel`."""
        if self.canceled:
            raise TrialCanceled
        if not self._compiler.is_cached(self._params):
            self._compiler.compile(self._params, self._compiler.try_out(self._params, self))

    def cancel(self) -> None:
        """The request has gone: end its trial. Any thread may call it, at any time."""
        self.canceled = True
        if (trial := self.trial) is not None:
            trial.cancel(self)
