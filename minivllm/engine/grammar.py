"""Structured output: the tokens that a grammar allows next.

    StructuredOutputsParams ─▶ GrammarCompiler (compiled grammars are cached) ─▶ one matcher per sequence

    GrammarMasks.fill           while the forward pass runs: one bit per token, for each sample of a sequence with a grammar
    SequenceGrammar.advance     after it: the matcher takes the sampled tokens; if the output is complete, the sequence stops

A matcher belongs to a sequence and not to a row, so preemption does not affect it. It takes confirmed tokens only. Therefore the scheduler
plans nothing past a token whose value is unknown for a request with `structured_outputs`.
EOS is allowed where the output may end. Where only EOS could follow, the sequence ends without it.

The matchers are llguidance's (derivatives of regular expressions and an Earley parser). Its work per token is limited by a count of
operations, so a grammar cannot delay a step for long. llguidance is imported on first use.
"""
from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, TypeAlias

import numpy as np

from minivllm.core.plan import Stop
from minivllm.engine.json_schema import closed
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.sampling.logits_processors import TokenMasks
from minivllm.sampling_params import JSON_WHITESPACE, StructuredOutputsParams

Matcher: TypeAlias = Any  # llguidance.LLMatcher

MAX_CACHED = 32  # compiled grammars; the least recently used one is dropped
MAX_LEXER_STATES = 30_000  # of one grammar; a state takes 1 to 2 kB


class GrammarCompiler:
    """Compiles grammars and caches them. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()  # guards the cache and the vocabulary
        self._cached: OrderedDict[StructuredOutputsParams, Matcher] = OrderedDict()
        self._vocabulary: Any = None  # llguidance's trie of all tokens; built for the first grammar
        self._special: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Bits in a mask. Known after the first `compile`."""
        return int(self._vocabulary.vocab_size)

    def is_cached(self, params: StructuredOutputsParams) -> bool:
        """Whether `compile` returns at once."""
        with self._lock:
            return params in self._cached

    def compile(self, params: StructuredOutputsParams) -> Matcher:
        """A matcher at the start of the grammar; each sequence copies it. Raises `InvalidInput`, which names the field."""
        with self._lock:
            if params in self._cached:
                self._cached.move_to_end(params)
                return self._cached[params]
            vocabulary = self._build_vocabulary(params.origin)
        matcher = _compile(params, vocabulary, self._special)  # may take long, so it runs without the lock
        with self._lock:
            self._cached[params] = matcher
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        return matcher

    def _build_vocabulary(self, origin: str) -> Any:
        if self._vocabulary is None:
            if self._tokenizer is None:
                raise InvalidInput(f"{origin} needs a tokenizer, and this engine has none (skip_tokenizer_init)", origin)
            try:
                from llguidance import LLTokenizer
            except ImportError:
                raise InvalidInput(f"{origin} needs a package that is not installed here: pip install llguidance", origin) from None
            try:
                text = self._tokenizer.serialized()
                self._vocabulary = LLTokenizer(text, eos_token=self._eos_token_ids or None)
            except ValueError as error:
                raise InvalidInput(f"{origin} is not possible with this model's tokenizer ({_one_line(str(error))}): leave it out",
                                   origin) from None
            self._special = tuple(token["content"] for token in json.loads(text).get("added_tokens", ()) if token["special"])
        return self._vocabulary


def _compile(params: StructuredOutputsParams, vocabulary: Any, special: Sequence[str]) -> Matcher:
    from llguidance import LLMatcher, LLParserLimits

    where = params.where
    try:
        grammar = _grammar_text(params, special)
    except ValueError as error:
        raise InvalidInput(f"{where} is not a valid grammar ({_one_line(str(error))}): correct it", where) from None
    plain = grammar.replace("\\", "")  # escapes may hide the text of a special token
    if any(token in plain for token in special):
        grammar = _unforced(grammar)
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise InvalidInput(f"{where} cannot be used: {_one_line(matcher.get_error())}", where)
    return matcher


def _unforced(grammar: str) -> str:
    """The same grammar without "forcing".

    Where a grammar allows only one text, llguidance forces the tokens of that text. It tokenizes the text like a prompt, so "<|im_end|>"
    becomes the special token, which the grammar does not allow.
    """
    if grammar.startswith("{"):
        grammar = "start: %json " + json.dumps(json.loads(grammar)["grammars"][0]["json_schema"])
    return '%llguidance {"no_forcing": true}\n' + grammar


def _structural_tag(text: str, special: Sequence[str]) -> str:
    """Free text; where it contains a trigger, it goes on as one of the structures that begin with this trigger."""
    from llguidance import StructTag

    tag = json.loads(text)
    found = [StructTag(trigger=trigger, begin=one["begin"], grammar=closed(one["schema"]), end=one["end"]) for one in tag["structures"]
             for trigger in tag["triggers"] if one["begin"].startswith(trigger)]
    return str(StructTag.to_grammar(found, assume_special=all(trigger in special for trigger in tag["triggers"])))


def _grammar_text(params: StructuredOutputsParams, special: Sequence[str]) -> str:
    """The grammar in llguidance's own form. special: texts of special tokens."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if params.kind in ("json", "json_object"):
        schema = '{"type":"object"}' if params.json is None else json.dumps(closed(json.loads(str(params.json))), ensure_ascii=False)
        pattern = "" if params.disable_any_whitespace else params.whitespace_pattern or JSON_WHITESPACE
        options: Any = {"whitespace_pattern": pattern} if pattern else {"whitespace_flexible": False}
        return str(LLMatcher.grammar_from_json_schema(schema, overrides=options))
    if params.kind == "regex":
        return str(LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(params.regex or '', use_ascii='d')}/"))
    if params.kind == "choice":
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, params.choice or ()))))
    if params.kind == "structural_tag":
        return _structural_tag(str(params.structural_tag), special)
    return str(grammar_from("grammar", params.grammar or ""))


def _quoted(text: str) -> str:
    """A string literal of Lark, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _matcher_error(matcher: Matcher) -> str:
    """What went wrong while a sequence was generated."""
    error = _one_line(matcher.get_error())
    return "the grammar allows no text here: correct it" if error == "NoExtensionBias" else f"the grammar became too complex: {error}"


def _one_line(text: str) -> str:
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= 300 else text[:300] + "..."


def fill_masks(pool: Any, work: Sequence[tuple[Matcher, Sequence[int]]], words: np.ndarray[Any, Any]) -> None:
    """Write the masks of all (matcher, drafts) in parallel: 1 + len(drafts) rows of `words` [n, W] int32 for each, in order.

    The first row is the mask of the next token, row i + 1 that of the token after the first i + 1 drafts. Rows after a draft that the
    grammar does not allow are not written: that draft will be rejected, and the tokens after it are not used.
    """
    row = 0
    plain: list[tuple[Matcher, int]] = []
    drafted: list[tuple[Matcher, int, list[int]]] = []
    for matcher, drafts in work:
        if drafts:
            drafted.append((matcher, row, list(drafts)))
        else:
            plain.append((matcher, row))
        row += 1 + len(drafts)
    assert row <= len(words) and words.flags.c_contiguous and words.dtype == np.int32
    width = words.shape[1] * words.itemsize
    if len(plain) == 1:  # a common case that needs no threads
        matcher, row = plain[0]
        matcher.unsafe_compute_mask_ptr(words[row].ctypes.data, width)
    elif plain:
        pool.unsafe_compute_mask_ptr(plain, words.ctypes.data, width, len(words))
    if drafted:
        pool.unsafe_compute_mask_ptr_with_draft_token(drafted, words.ctypes.data, width, len(words))


class SequenceGrammar:
    """The position of one sequence in its grammar."""

    __slots__ = ("_matcher", "_start", "failure")

    def __init__(self, start: Matcher) -> None:
        self._start = start
        self._matcher: Matcher | None = None  # a copy of `start`, made for the first mask
        self.failure: str | None = None  # why the grammar could not be followed: the request must end

    @property
    def matcher(self) -> Matcher:
        if self._matcher is None:
            self._matcher = self._start.deep_copy()
        return self._matcher

    def advance(self, tokens: Sequence[int]) -> Stop | None:
        """Take sampled tokens. Returns a `Stop` if they end the output, or if the grammar could not be followed (see `failure`)."""
        matcher = self._matcher
        if matcher is None:
            return None
        for count, token in enumerate(tokens):
            if matcher.is_error():
                self.failure = _matcher_error(matcher)
                return Stop(keep=count, matched=None)
            if matcher.try_consume_tokens([token]) != 1:
                if matcher.is_error():  # this token exceeded a limit
                    self.failure = _matcher_error(matcher)
                # The request's other settings (bad_words, min_tokens ...) exclude all tokens that the grammar allows.
                elif not matcher.is_accepting():
                    self.failure = "no token is allowed by both structured_outputs and the request's other settings"
                return Stop(keep=count, matched=None)
            if matcher.is_stopped() and not matcher.is_error():
                return Stop(keep=count + 1, matched=None)
        return None


class GrammarMasks:
    """Computes the masks of a step, in parallel."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._pool: Any = None  # llguidance's threads, started on first use
        self._width = 0  # int32 words in a mask

    def fill(self, work: Sequence[tuple[int, SequenceGrammar, Sequence[int]]]) -> TokenMasks:
        """The masks of samples, each given as (first logits row, grammar, drafts): one mask per logits row.

        Logits rows after a draft outside the tokenizer's vocabulary have no mask: that draft is rejected, so they are not used. A matcher
        that exceeds a limit allows only EOS; `advance` then reports it.
        """
        if self._pool is None:
            from llguidance import LLExecutor

            self._pool = LLExecutor()
            self._width = -(-self._compiler.num_tokens // 32)
        known = [list(takewhile(lambda token: token < self._compiler.num_tokens, drafts)) for _, _, drafts in work]
        rows = [row + i for (row, _, _), drafts in zip(work, known, strict=True) for i in range(1 + len(drafts))]
        words = np.zeros((len(rows), self._width), np.int32)
        fill_masks(self._pool, [(grammar.matcher, drafts) for (_, grammar, _), drafts in zip(work, known, strict=True)], words)
        return TokenMasks(np.array(rows, np.int64), words)
