"""From `StructuredOutputsParams` to a grammar in llguidance's own language, and from there to a matcher.

The engine and the trial process (`grammar_trial.py`) both use this module, so it imports neither torch nor numpy.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from minivllm.engine.json_schema import closed
from minivllm.errors import InvalidInput
from minivllm.sampling_params import JSON_WHITESPACE, StructuredOutputsParams

Matcher: TypeAlias = Any  # llguidance.LLMatcher

MAX_LEXER_STATES = 30_000  # of one grammar; a state takes 1 to 2 kB
# Work for one mask. JSON schemas, SQL and expression grammars stay below 1,000 items; llguidance's own limits allow masks of 0.2 s.
MAX_STEP_ITEMS = 4_000  # Earley items: at most about 20 ms
MAX_STEP_FUEL = 50_000  # operations on regular expressions: at most about 5 ms


@dataclass(frozen=True, slots=True)
class VocabularySource:
    """What llguidance's vocabulary is built from. Plain and picklable."""

    tokenizer: str  # the text of a tokenizer.json
    eos_token_ids: tuple[int, ...]

    def build(self) -> Any:
        """llguidance's trie of all tokens. Raises `ValueError` for a tokenizer that it cannot read."""
        from llguidance import LLTokenizer

        return LLTokenizer(self.tokenizer, eos_token=list(self.eos_token_ids) or None)

    def special(self) -> tuple[str, ...]:
        """The texts of special tokens."""
        return tuple(token["content"] for token in json.loads(self.tokenizer).get("added_tokens", ()) if token["special"])


def grammar_text(params: StructuredOutputsParams, special: Sequence[str]) -> str:
    """The grammar in llguidance's own form. special: texts of special tokens. Raises `InvalidInput` that names the field."""
    where = params.where
    try:
        grammar = _translated(params, special)
    except ValueError as error:
        raise InvalidInput(f"{where} is not a valid grammar ({one_line(str(error))}): correct it", where) from None
    plain = grammar.replace("\\", "")  # escapes may hide the text of a special token
    return _unforced(grammar) if any(token in plain for token in special) else grammar


def build_matcher(grammar: str, vocabulary: Any, where: str) -> Matcher:
    """A matcher at the start of a grammar. It may take long; Python's global lock is released meanwhile. where: the field, for errors."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, step_max_items=MAX_STEP_ITEMS, step_lexer_fuel=MAX_STEP_FUEL,
                            verbose_errors=False)
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise InvalidInput(f"{where} cannot be used: {one_line(matcher.get_error())}", where)
    return matcher


def invalid_schema(schema: str) -> str | None:
    """Why the text of a JSON schema cannot be compiled; None if it can, or if llguidance is not installed, which the engine reports."""
    try:
        from llguidance import LLMatcher

        return one_line(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema), None)) or None
    except ImportError:
        return None
    except ValueError as error:
        return str(error)


def _unforced(grammar: str) -> str:
    """The same grammar without "forcing".

    Where a grammar allows only one text, llguidance forces the tokens of that text. It tokenizes the text like a prompt, so "<|im_end|>"
    becomes the special token, which the grammar does not allow.
    """
    if grammar.startswith("{"):
        grammar = "start: %json " + json.dumps(json.loads(grammar)["grammars"][0]["json_schema"])
    return '%llguidance {"no_forcing": true}\n' + grammar


def _translated(params: StructuredOutputsParams, special: Sequence[str]) -> str:
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


def _structural_tag(text: str, special: Sequence[str]) -> str:
    """Free text; where it contains a trigger, it goes on as one of the structures that begin with this trigger."""
    from llguidance import StructTag

    tag = json.loads(text)
    found = [StructTag(trigger=trigger, begin=one["begin"], grammar=closed(one["schema"]), end=one["end"]) for one in tag["structures"]
             for trigger in tag["triggers"] if one["begin"].startswith(trigger)]
    return str(StructTag.to_grammar(found, assume_special=all(trigger in special for trigger in tag["triggers"])))


def _quoted(text: str) -> str:
    """A string literal of Lark, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def matcher_error(matcher: Matcher) -> str:
    """What went wrong after the grammar was compiled."""
    error = one_line(matcher.get_error())
    return "the grammar allows no text here: correct it" if error == "NoExtensionBias" else f"the grammar became too complex: {error}"


def one_line(text: str) -> str:
    """A message of llguidance, shortened."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= 300 else text[:300] + "..."
