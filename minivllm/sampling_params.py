"""The parameters of one request, checked when they are constructed: `SamplingParams`, and vLLM's classes for beam searches and embeddings.

`SamplingParams` contains no tensors. A user may change its fields, and each assignment is checked. A request gets a copy (`clone`), which
goes unchanged to the engine and with the plan to the worker. Field names and defaults are vLLM's. Ranges are those of the OpenAI API where
it states one.
"""
from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import json as jsonlib
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from minivllm.errors import InvalidInput, NotSupportedYet, nearest, refuse_unbuilt, unknown_field

MAX_LOGPROBS = 20  # most alternatives per token (OpenAI's limit; in Python `max_logprobs` of the engine)
GREEDY_EPSILON = 1e-5  # a temperature below this is greedy
MAX_N = 16_384  # completions of one prompt (vLLM's limit)
MAX_TOP_K = 2**31 - 1  # the sampler's columns are int32
# Stop strings and bad words are checked at every token, so their number and size slow down all requests.
MAX_STRINGS = 1024
MAX_STRING = 1024  # characters in one string
MAX_CHARACTERS = 16_384  # characters in all strings together
MAX_STOP_TOKENS = 4096
MAX_ALLOWED_TOKENS = 2**19  # more than any vocabulary has
MAX_BIASES = 4096  # entries of logit_bias, which is added at every token
MAX_GRAMMAR = 1 << 17  # characters of a JSON schema, a grammar, or all choices together
MAX_CHOICES = 16_384  # strings of which an output must be one
MAX_REGEX = 1 << 14  # characters
# Whitespace allowed between the tokens of JSON by default: one space, or a newline and its indentation.
# If any amount were allowed, small models would sometimes generate whitespace until max_tokens.
JSON_WHITESPACE = r"( |\r?\n[ \t]{0,40})?"
MAX_NESTING = 64  # nested objects and arrays in a JSON schema
POOLING_TYPES = ("LAST", "MEAN")

# vLLM's parameters that request nothing with these values. What others request is not built.
NEUTRAL: dict[str, tuple[str, tuple[Any, ...]]] = {
    "best_of": ("more candidates than completions; use n", ()),  # equal to n
    "use_beam_search": ("beam search through SamplingParams; use LLM.beam_search", (False,)),
    "early_stopping": ("beam search through SamplingParams; use LLM.beam_search", (False,)),
    "length_penalty": ("beam search through SamplingParams; use LLM.beam_search", (1.0,)),
    "logits_processors": ("Python logits processors", ([],)),
    "extra_args": ("arguments of plug-ins", ({},)),
    "spaces_between_special_tokens": ("decoding without these spaces", (True,)),
    "thinking_token_budget": ("a limit for the reasoning", (-1,)),
    "repetition_detection": ("ending an output that repeats itself", ()),
    "logprob_token_ids": ("logprobs of chosen tokens", ([],)),
    "skip_reading_prefix_cache": ("a request that does not use the prefix cache; use cache_salt", (False,)),
    "stream_interval": ("outputs for several tokens at a time", (1,)),
    "skip_clone": ("parameters that are not copied", (False,)),
    "flat_logprobs": ("another class for logprobs", (False,)),
}


def _refuse_unless_neutral(name: str, value: Any, n: int) -> None:
    what, neutral = NEUTRAL[name]
    if not (value is None or value in neutral or (name == "best_of" and value == n)):
        raise NotSupportedYet(f"{name}={value!r} ({what}) is not supported yet: leave it out", name)


def whole(name: str, value: Any, low: int, high: int | None, fix: str, field: str | None = None) -> int:
    """The value as an int. Numpy's integers count as whole numbers, booleans do not. `field`: the request's field; by default `name`."""
    field = field or name
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidInput(f"{name} must be a whole number, got {reprlib.repr(value)}: {fix}", field)
    plain = int(value)
    if plain < low:
        raise InvalidInput(f"{name} must be at least {low}, got {reprlib.repr(plain)}: {fix}", field)
    if high is not None and plain > high:
        raise InvalidInput(f"{name} must be at most {high}, got {reprlib.repr(plain)}: {fix}", field)
    return plain


def number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """The value as a finite float in [low, high], or in (low, high]."""
    span = f"{'(' if open_low else '['}{low:g}, {'inf)' if math.isinf(high) else f'{high:g}]'}"
    try:
        finite = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # an int that is too large for a float
        finite = False
    if not finite:
        where = "" if math.isinf(low) and math.isinf(high) else f" in {span}"
        raise InvalidInput(f"{name} must be a finite number{where}, got {reprlib.repr(value)}", name)
    if value < low or value > high or (open_low and value <= low):
        raise InvalidInput(f"{name} must be in {span}, got {value!r}", name)
    return float(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # numpy's are no subclass of bool
        raise InvalidInput(f"{name} must be true or false, got {reprlib.repr(value)}", name)
    return bool(value)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """A constraint on the whole output: exactly one of the first six fields (vLLM's names). Raises `InvalidInput`.

    Type, size and nesting are checked here. The engine compiles the grammar when the request is added, and reports errors then.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema; stored as text
    regex: str | None = None  # the whole output must match; Rust's regex syntax without look-around, \d is 0 to 9
    choice: Sequence[str] | None = None  # the output is one of these strings
    grammar: str | None = None  # in llguidance's variant of Lark, or in GBNF
    json_object: bool | None = None  # any JSON object
    structural_tag: str | Mapping[str, Any] | None = None  # text in which some tags enclose JSON (vLLM's form); stored as text
    disable_any_whitespace: bool = False  # JSON on one line, without spaces
    whitespace_pattern: str | None = None  # a regex for the whitespace between the tokens of JSON
    origin: str = field(default="structured_outputs", repr=False, compare=False)  # its name in error messages: the server accepts several
    # vLLM's fields that request nothing: llguidance compiles every grammar, and there is no other backend to fall back to.
    backend: InitVar[str | None] = None
    disable_fallback: InitVar[bool] = False
    disable_additional_properties: InitVar[bool] = False

    def __post_init__(self, backend: str | None, disable_fallback: bool, disable_additional_properties: bool) -> None:
        if backend is not None and backend.partition(":")[0] not in BACKENDS:
            raise InvalidInput(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}", f"{self.origin}.backend")
        given = self._given()
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise InvalidInput(f"{self.origin} needs exactly one of {', '.join(STRUCTURES)}, got {found}", self.origin)
        where = self.where
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json, where))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _structural_tag_text(self.structural_tag, where))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice, where))
        for name in ("regex", "grammar", "whitespace_pattern"):
            if getattr(self, name) is not None:
                _pattern(getattr(self, name), where if name in given else f"{self.origin}.{name}", _MAX_LENGTH[name])
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise InvalidInput(f"{name} must be true or false, got {getattr(self, name)!r}", f"{self.origin}.{name}")
        if (self.whitespace_pattern is not None or self.disable_any_whitespace) and self.kind not in ("json", "json_object"):
            raise InvalidInput(f"whitespace settings are for JSON, and {self.origin} has {self.kind}: leave them out", self.origin)
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise InvalidInput("whitespace_pattern and disable_any_whitespace exclude each other: leave one out", self.origin)

    @classmethod
    def of(cls, value: StructuredOutputsParams | Mapping[str, Any]) -> StructuredOutputsParams:
        """From an object, or from a dict with the same names."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise InvalidInput(f"structured_outputs must be StructuredOutputsParams or a dict, got {reprlib.repr(value)}",
                               "structured_outputs")
        known = [f.name for f in dataclasses.fields(cls) if f.name != "origin"]
        for name in value:
            if name not in known:
                raise InvalidInput(unknown_field(f"structured_outputs.{name}", str(name), known), "structured_outputs")
        return cls(**value)

    @property
    def kind(self) -> str:
        """The name of the given field, one of `STRUCTURES`."""
        return self._given()[0]

    def _given(self) -> list[str]:
        found = [name for name in STRUCTURES if getattr(self, name) is not None]
        return found if self.json_object is not False else [name for name in found if name != "json_object"]

    @property
    def where(self) -> str:
        """The given field's name in error messages. (A dotted origin, or an older name such as guided_json, is already that name.)"""
        return f"{self.origin}.{self.kind}" if self.origin == "structured_outputs" else self.origin


BACKENDS = ("auto", "guidance", "xgrammar", "outlines", "lm-format-enforcer")
STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_MAX_LENGTH = {"regex": MAX_REGEX, "grammar": MAX_GRAMMAR, "whitespace_pattern": 256}
StructuredOutputs = StructuredOutputsParams
GuidedDecodingParams = StructuredOutputsParams  # vLLM's older name


def _pattern(value: Any, where: str, max_length: int) -> None:
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{where} must be a non-empty string, got {reprlib.repr(value)}", where)
    if len(value) > max_length:
        raise InvalidInput(f"{where} has {len(value)} characters, and at most {max_length} are allowed: make it shorter", where)
    _unicode(value, where)


def _unicode(value: str, where: str) -> None:
    if not value.isascii() and any(0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise InvalidInput(f"{where} holds a lone surrogate, which is not Unicode text: correct it", where)


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not value:
        raise InvalidInput(f"{where} must be a non-empty list of strings, got {reprlib.repr(value)}", where)
    for choice in value:
        if not isinstance(choice, str) or not choice:
            raise InvalidInput(f"{where} must hold non-empty strings, got {reprlib.repr(choice)}", where)
        _unicode(choice, where)
    if len(value) > MAX_CHOICES:
        raise InvalidInput(f"{where} has {len(value)} strings, and at most {MAX_CHOICES} are allowed: leave some out", where)
    size = sum(map(len, value))
    if size > MAX_GRAMMAR:
        raise InvalidInput(f"{where} has {size} characters, and at most {MAX_GRAMMAR} are allowed: leave some out", where)
    return tuple(value)


def _schema_text(value: Any, where: str) -> str:
    """The schema as JSON text. The order of its keys is kept, because generated objects follow it."""
    if isinstance(value, str):
        if len(value) > MAX_GRAMMAR:
            raise InvalidInput(f"{where} has {len(value)} characters, and at most {MAX_GRAMMAR} are allowed: make it shorter", where)
        try:
            value = jsonlib.loads(value)
        except (ValueError, RecursionError):
            raise InvalidInput(f"{where} is not valid JSON: correct it", where) from None
    if not isinstance(value, Mapping):
        raise InvalidInput(f"{where} must be a JSON schema (an object), got {reprlib.repr(value)}", where)
    if nested_deeper(value, MAX_NESTING):
        raise InvalidInput(f"{where} is nested deeper than {MAX_NESTING} levels: use $defs and $ref, or make it flatter", where)
    try:
        text = jsonlib.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{where} is not plain JSON ({error}): correct it", where) from None
    _pattern(text, where, MAX_GRAMMAR)
    return text


def nested_deeper(value: Mapping[str, Any], levels: int) -> bool:
    """Whether objects and lists are nested in more than so many levels, the value itself included."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [item for part in level for item in (part.values() if isinstance(part, Mapping) else part)
                 if isinstance(item, (Mapping, list, tuple))]
    return bool(level)


class RequestOutputKind(enum.Enum):
    """What one output of a running request contains (vLLM's names)."""

    CUMULATIVE = 0  # all of its output so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # one output, at the end


def _structural_tag_text(value: Any, where: str) -> str:
    """{"structures": [{"begin": ..., "schema": {...}, "end": ...}], "triggers": [...]} as JSON text."""
    text = _schema_text(value, where)
    tag = jsonlib.loads(text)
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list) or not triggers:
        raise InvalidInput(f'{where} must have "structures" (each with "begin", "schema" and "end") and "triggers" (texts), both not '
                           "empty; other forms are not supported", where)
    for i, structure in enumerate(structures):
        texts = [structure.get(name) for name in ("begin", "end")] if isinstance(structure, dict) else [None]
        if not all(isinstance(part, str) for part in texts) or not isinstance(structure.get("schema"), dict):
            raise InvalidInput(f'{where}.structures.{i} must be {{"begin": text, "schema": a JSON schema, "end": text}}', where)
        if not any(isinstance(trigger, str) and trigger and structure["begin"].startswith(trigger) for trigger in triggers):
            raise InvalidInput(f"{where}.structures.{i}.begin {structure['begin']!r} begins with none of the triggers: add one", where)
    return text


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Settings of a beam search. Raises `InvalidInput` naming the field."""

    beam_width: int  # number of sequences that are kept, and that are returned
    max_tokens: int  # of each output
    ignore_eos: bool = False  # treat EOS like any other token
    length_penalty: float = 1.0  # above 0 favors long outputs, below 0 short ones; 0 compares the sums
    temperature: InitVar[float] = 0.0  # vLLM's; other values are refused
    include_stop_str_in_output: InitVar[bool] = False

    def __post_init__(self, temperature: float, include_stop_str_in_output: bool) -> None:
        for name in ("beam_width", "max_tokens"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1, None, "it counts sequences or tokens"))
        object.__setattr__(self, "length_penalty", number("length_penalty", self.length_penalty, -math.inf, math.inf))
        refuse_unbuilt(temperature=temperature, include_stop_str_in_output=include_stop_str_in_output)


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How the final hidden states of a prompt become one vector (vLLM's class; `pooling_type` is this project's).

    Raises `InvalidInput` naming the field, the value and the range. A field that is None has the engine's default (`pooler_config`).
    """

    truncate_prompt_tokens: int | None = None  # keep only this many of the prompt's last tokens; -1: as many as the context holds
    dimensions: int | None = None  # keep only the first entries of the vector; None: all
    use_activation: bool | None = None  # scale the vector to length 1, after `dimensions` has shortened it
    normalize: bool | None = None  # older name of `use_activation`
    task: str | None = None  # "embed", the only task
    pooling_type: str | None = None  # "LAST": the state of the last token; "MEAN": the mean over all tokens

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.dimensions is not None:
            put("dimensions", whole("dimensions", self.dimensions, 1, None, "leave it out for all"))
        for name in ("use_activation", "normalize"):
            if getattr(self, name) is not None:
                put(name, _boolean(name, getattr(self, name)))
        if self.normalize is not None:
            if self.use_activation not in (None, self.normalize):
                raise InvalidInput("normalize is an older name of use_activation: give one of them", "normalize")
            put("use_activation", self.normalize)
            put("normalize", None)
        if self.task not in (None, "embed"):
            raise NotSupportedYet(f"the pooling task {self.task!r} is not supported yet: use 'embed', or leave task out", "task")
        if self.pooling_type is not None:
            kind = str(self.pooling_type).upper()
            if kind not in POOLING_TYPES:
                raise InvalidInput(f"pooling_type must be one of {', '.join(POOLING_TYPES)}, got {self.pooling_type!r}", "pooling_type")
            put("pooling_type", kind)

    @property
    def needs_all(self) -> bool:
        """Whether the hidden states of all prompt tokens are needed, so that no cached prefix can be used."""
        return self.pooling_type == "MEAN"

    def complete(self, defaults: PoolingParams) -> PoolingParams:
        """The same with the defaults of an engine."""
        names = ("dimensions", "use_activation", "pooling_type")
        chosen: dict[str, Any] = {name: value if (value := getattr(self, name)) is not None else getattr(defaults, name) for name in names}
        return dataclasses.replace(self, task="embed", **chosen)

    def sampling(self) -> SamplingParams:
        """The parameters of a request that computes its prompt and samples nothing."""
        keep = self.truncate_prompt_tokens
        return SamplingParams(temperature=0, max_tokens=0, detokenize=False, truncate_prompt_tokens=keep, pooling=self)


@dataclass(kw_only=True)
class SamplingParams:
    """Sampling settings of one request. Raises `InvalidInput` naming the field, the value and the range."""

    n: int = 1  # completions per prompt; children share the prompt's KV blocks
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling (Holtzman et al., 2020), (0, 1]
    top_k: int = 0  # keep the k most probable tokens; 0 or -1 keeps all
    min_p: float = 0.0  # drop tokens below min_p x the highest probability, [0, 1]
    presence_penalty: float = 0.0  # subtracted once from tokens already in the output, [-2, 2]
    frequency_penalty: float = 0.0  # subtracted per occurrence in the output, [-2, 2]
    repetition_penalty: float = 1.0  # divides (positive) or multiplies (negative) logits of tokens in prompt + output, above 0
    seed: int | None = None  # the same seed gives the same tokens in any batch; None or -1: derived from the engine's seed
    stop: Sequence[str] | str | None = None  # strings that end the output
    stop_token_ids: Sequence[int] | None = None  # token ids that end the output
    include_stop_str_in_output: bool = False  # keep the stop string at the end of the text
    ignore_eos: bool = False  # continue after EOS
    max_tokens: int | None = 16  # of the output, which also ends at the context's limit; None: only there
    min_tokens: int = 0  # EOS and stop tokens are masked until then
    logprobs: int | None = None  # 0: of the sampled token only; k: also of the k most probable tokens; -1: of all tokens
    prompt_logprobs: int | None = None  # as logprobs, for the prompt's tokens
    logit_bias: Mapping[int, float] | None = None  # token id -> bias, clamped to [-100, 100]
    bad_words: Sequence[str] | str | None = None  # strings whose token sequences must not be generated
    allowed_token_ids: Sequence[int] | None = None  # only these may be generated
    skip_special_tokens: bool = True  # leave special tokens out of the text
    detokenize: bool = True  # False: outputs have token ids and no text
    structured_outputs: StructuredOutputsParams | None = None  # a dict with its fields is accepted too
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE  # what `LLMEngine.step` and `AsyncLLM` return while a request runs
    truncate_prompt_tokens: int | None = None  # keep only this many of the prompt's last tokens; -1: as many as leave room for the output

    # Token sequences of `bad_words`, filled in by the engine, which has the tokenizer.
    bad_words_token_ids: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    pooling: PoolingParams | None = field(default=None, repr=False)  # set by `PoolingParams.sampling`

    guided_decoding: InitVar[Any] = None  # vLLM's older name of `structured_outputs`

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        """Report an unknown name with the nearest known one. (The generated __init__ would raise an error without a hint.)"""
        for name in kwargs:
            if name not in cls.__dataclass_fields__ and name not in NEUTRAL:
                raise TypeError(f"SamplingParams has no parameter {name!r}{nearest(name, cls.__dataclass_fields__)}")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: object) -> None:
        """Check the new value with all others, as the constructor does."""
        if "_checked" not in self.__dict__:  # while the constructor runs
            object.__setattr__(self, name, value)
            return
        if name in NEUTRAL:
            _refuse_unless_neutral(name, value, self.n)
            return
        if name not in self.__dataclass_fields__:
            raise AttributeError(f"SamplingParams has no parameter {name!r}{nearest(name, self.__dataclass_fields__)}")
        change: dict[str, Any] = {name: value}
        self.__dict__.update(dataclasses.replace(self, **change).__dict__)

    def clone(self) -> SamplingParams:
        """A copy that later assignments do not change."""
        return copy.copy(self)

    def __post_init__(self, guided_decoding: Any) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if guided_decoding is not None:
            if self.structured_outputs is not None:
                raise InvalidInput("guided_decoding is an older name of structured_outputs: give one of them", "guided_decoding")
            put("structured_outputs", guided_decoding)
        put("n", whole("n", self.n, 1, MAX_N, "the number of completions"))
        for name, low, high in (
            ("temperature", 0.0, math.inf), ("min_p", 0.0, 1.0), ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0),
        ):
            put(name, number(name, getattr(self, name), low, high))
        put("top_p", number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True))
        put("top_k", min(max(whole("top_k", self.top_k, -1, None, "0 or -1 keeps all tokens"), 0), MAX_TOP_K))
        if self.seed is not None:
            seed = whole("seed", self.seed, -(2**63), 2**63 - 1, "a seed is a 64-bit integer")
            put("seed", None if seed == -1 else seed)
        put("stop", self._strings("stop", self.stop))
        put("bad_words", self._strings("bad_words", self.bad_words))
        put("stop_token_ids", self._token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", self._token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKENS))
            if not self.allowed_token_ids:
                raise InvalidInput("allowed_token_ids is empty, so no token could be generated: leave it out to allow all",
                                   "allowed_token_ids")
        self._check_counts(put)
        if self.stop and not self.detokenize:
            raise InvalidInput("stop strings need detokenize=True: use stop_token_ids, or turn detokenize on", "stop")
        if self.structured_outputs is not None:
            put("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
        if self.logit_bias is not None:
            put("logit_bias", self._bias(self.logit_bias))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            put(name, _boolean(name, getattr(self, name)))
        if not isinstance(self.output_kind, RequestOutputKind):
            kinds = ", ".join(f"RequestOutputKind.{kind.name}" for kind in RequestOutputKind)
            raise InvalidInput(f"output_kind must be one of {kinds}, got {self.output_kind!r}", "output_kind")
        put("_checked", True)

    def _check_counts(self, put: Callable[[str, object], None]) -> None:
        """Numbers of tokens and of log-probabilities."""
        if self.max_tokens is not None:
            low = 1 if self.prompt_logprobs is None and self.pooling is None else 0
            put("max_tokens", whole("max_tokens", self.max_tokens, low, None, "the number of tokens to generate"))
        put("min_tokens", whole("min_tokens", self.min_tokens, 0, None, "0 turns it off"))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidInput(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}): lower it", "min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(name, whole(name, getattr(self, name), -1, None, "-1 is the whole vocabulary"))
        keep = self.truncate_prompt_tokens
        if keep is not None:
            fix = "it is at least 1, or -1 for as many as leave room for the output"
            put("truncate_prompt_tokens", keep := whole("truncate_prompt_tokens", keep, -1, None, fix))
            if keep == 0:
                raise InvalidInput(f"truncate_prompt_tokens is 0: {fix}", "truncate_prompt_tokens")

    @staticmethod
    def _strings(name: str, value: Any) -> tuple[str, ...]:
        """One string or several, as a tuple without repetitions."""
        if value is None:
            return ()
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
            raise InvalidInput(f"{name} must be a list of non-empty strings, got {reprlib.repr(value)}", name)
        strings = tuple(value)
        if not all(isinstance(s, str) and s for s in strings):
            raise InvalidInput(f"{name} must be a list of non-empty strings, got {reprlib.repr(value)}", name)
        if len(strings) > MAX_STRINGS:
            raise InvalidInput(f"{name} has {len(strings)} strings, and at most {MAX_STRINGS} are allowed: leave some out", name)
        longest, total = max(map(len, strings), default=0), sum(map(len, strings))
        if longest > MAX_STRING or total > MAX_CHARACTERS:
            raise InvalidInput(f"{name} has strings of up to {longest} characters, {total} in all, and {MAX_STRING} each and "
                               f"{MAX_CHARACTERS} in all are allowed: shorten them", name)
        for string in strings:
            if not string.isprintable() and any(0xD800 <= ord(c) <= 0xDFFF for c in string):
                raise InvalidInput(f"{name} holds {string!r}, which is not Unicode text (a lone surrogate): correct it", name)
        return tuple(dict.fromkeys(strings))

    @staticmethod
    def _token_ids(name: str, value: Any, most: int) -> tuple[int, ...]:
        if value is None:
            return ()
        if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
            raise InvalidInput(f"{name} must be a list of token ids, got {reprlib.repr(value)}", name)
        value = tuple(value)
        if len(value) > most:  # before each of them is checked
            raise InvalidInput(f"{name} has {len(value)} tokens, and at most {most} are allowed: leave some out", name)
        return tuple(dict.fromkeys(whole(name, token, 0, None, "token ids start at 0") for token in value))

    @staticmethod
    def _bias(value: Any) -> dict[int, float]:
        clean: dict[int, float] = {}
        if not isinstance(value, Mapping):
            raise InvalidInput(f"logit_bias must map token ids to numbers, as {{50256: -100}} does, got {reprlib.repr(value)}",
                               "logit_bias")
        if len(value) > MAX_BIASES:
            raise InvalidInput(f"logit_bias has {len(value)} entries, and at most {MAX_BIASES} are allowed: leave some out", "logit_bias")
        for key, bias in value.items():
            token: Any = key
            if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20:  # keys of JSON objects are strings
                token = int(key)
            token = whole("a key of logit_bias", token, 0, None, "keys are token ids", field="logit_bias")
            if token in clean:
                raise InvalidInput(f"logit_bias has the token {token} twice, as {key!r} and in another form: keep one", "logit_bias")
            clean[token] = max(-100.0, min(100.0, number("logit_bias", bias, -math.inf, math.inf)))
        return clean

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen. Then top_p, top_k and min_p have no effect."""
        return self.temperature < GREEDY_EPSILON

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @classmethod
    def from_optional(cls, **kwargs: Any) -> SamplingParams:
        """Like the constructor; None stands for the default (vLLM's method)."""
        return cls(**{name: value for name, value in kwargs.items() if value is not None})

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SamplingParams:
        """Like the constructor, but an unknown name raises `InvalidInput`."""
        known = [f.name for f in dataclasses.fields(cls) if f.name not in ("bad_words_token_ids", "pooling")]
        for name in kwargs:
            if name in NEUTRAL:
                raise NotSupportedYet(f"{name} ({NEUTRAL[name][0]}) is not supported yet: leave it out", name)
            if name not in known:
                raise InvalidInput(f"unknown sampling parameter {name!r}{nearest(name, known)}", name)
        return cls(**kwargs)


def _accept_neutral(generated: Callable[..., None]) -> Callable[..., None]:
    """The generated `__init__`, which also takes the names in `NEUTRAL`."""
    @functools.wraps(generated)
    def __init__(self: SamplingParams, **kwargs: Any) -> None:
        others = {name: kwargs.pop(name) for name in NEUTRAL if name in kwargs}
        generated(self, **kwargs)
        for name, value in others.items():
            _refuse_unless_neutral(name, value, self.n)

    return __init__


SamplingParams.__init__ = _accept_neutral(SamplingParams.__init__)  # type: ignore[method-assign]
