"""What takes long before a client's request can be added: it is done on a thread of `preparation_queue.py`, not between two steps.

    grammar      a trial in another process, then the compilation (`grammar_compiler.py`)
    stop         16,384 characters of stop strings: 25 ms
    bad_words    1,024 words: 0.1 s
    adapter      its files are read (`adapters.py`)

Results are cached where the engine looks for them when it adds the request. Short lists are left to the engine.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from minivllm.engine import stop_strings
from minivllm.engine.grammar_compiler import GrammarCompiler, GrammarPreparation
from minivllm.engine.prompts import bad_word_ids
from minivllm.engine.tokenizer import Tokenizer
from minivllm.sampling_params import SamplingParams

FEW_WORDS = 16
FEW_CHARACTERS = 512


class RequestPreparation:
    """The work of one request."""

    def __init__(self, steps: Sequence[Callable[[], object]], grammar: GrammarPreparation | None) -> None:
        self._steps, self._grammar = steps, grammar

    @classmethod
    def of(cls, params: SamplingParams, tokenizer: Tokenizer | None, compiler: GrammarCompiler,
           read_adapter: Callable[[], object] | None = None) -> RequestPreparation | None:
        """None: nothing takes long."""
        steps: list[Callable[[], object]] = [] if read_adapter is None else [read_adapter]
        if tokenizer is not None and params.bad_words and len(params.bad_words) > FEW_WORDS:
            steps.append(partial(bad_word_ids, tuple(params.bad_words), tokenizer))
        if params.stop and sum(map(len, params.stop)) > FEW_CHARACTERS:
            steps.append(partial(stop_strings.compiled, tuple(params.stop)))
        wanted = params.structured_outputs
        grammar = None if wanted is None or compiler.is_cached(wanted) else GrammarPreparation(compiler, wanted)
        return cls(steps, grammar) if steps or grammar is not None else None

    def run(self) -> None:
        """Raises `InvalidInput` for a grammar that is wrong or exceeds a limit."""
        for step in self._steps:
            step()
        if self._grammar is not None:
            self._grammar.run()

    def cancel(self) -> None:
        """The request has gone."""
        if self._grammar is not None:
            self._grammar.cancel()
