"""The request models. They are strict: a number in quotes is an error, and no field is silently ignored.

Fields fall into four classes:

    honored       the fields of the classes below
    inert         `INERT`: cannot change the output (`user`, `metadata` ...); accepted, and named in a response header
    unsupported   `UNSUPPORTED`: fields of OpenAI or vLLM that are not built here; refused, except for null and for the listed
                  values, which request nothing
    unknown       all others: refused with the nearest known name (null, or any value with `--permissive`: treated as inert)

These classes check types. `SamplingParams` checks ranges, once for the server and for Python callers, unless the HTTP API's are narrower.
"""
from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import FailFast, Field, PlainValidator, StringConstraints
from pydantic_core import PydanticCustomError

from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from minivllm.server.errors import shorten
from minivllm.server.strict import StrictModel
from minivllm.server.structured import ResponseFormat, SchemaField, StructuredOutputsFields

IGNORED_HEADER = "x-minivllm-ignored"
NO_EFFECT = frozenset({  # OpenAI's fields that cannot change an output here, on all generating endpoints
    "user", "client_metadata", "service_tier", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
})

# vLLM's fields that are not built yet, on both endpoints, with the values that request nothing.
VLLM_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,), "length_penalty": (1, 1.0),
    "guided_decoding_backend": ("auto", "guidance"), "logits_processors": (), "spaces_between_special_tokens": (True,),
    "kv_transfer_params": (), "vllm_xargs": (), "repetition_detection": (),
    "thinking_token_budget": (),
}


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names ignored fields. The names come from the client, so characters that a header cannot hold are replaced."""
    if not names:
        return {}
    return {IGNORED_HEADER: ", ".join(re.sub(r"[^A-Za-z0-9_.-]", "?", shorten(name)) for name in [*dict.fromkeys(names)][:50])}


# -- types of fields --------------------------------------------------------------------------------------------------
# Each list is checked as a whole: pydantic would collect one error per element, and a list may have a million elements.


def _accepts(test: Callable[[Any], bool], expected: str, schema: Any) -> PlainValidator:
    """A field whose values are null and what `test` accepts."""
    def check(value: Any) -> Any:
        if value is None or test(value):
            return value
        raise PydanticCustomError("unexpected_value", f"Input should be {expected}")

    return PlainValidator(check, json_schema_input_type=schema)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(element) is kind for element in value)


def _check_prompt(value: Any) -> list[str] | list[list[int]]:
    """A prompt in any of its four forms, as a list of texts or a list of token lists."""
    if isinstance(value, str) or (value and _is_list(value, int)):
        return [value]
    if value and (_is_list(value, str) or (isinstance(value, list) and all(p and _is_list(p, int) for p in value))):
        return value
    raise PydanticCustomError(
        "prompt", "Input should be a string, a list of strings, a list of token ids, or a list of non-empty lists of token ids",
    )


StopField: TypeAlias = Annotated[str | list[str] | None, _accepts(
    lambda value: (isinstance(value, str) and value != "") or _is_list(value, str),
    "a non-empty string, a list of strings, or null for none", str | list[str] | None,
)]
PromptField: TypeAlias = Annotated[
    list[str] | list[list[int]], PlainValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
TokenIds: TypeAlias = Annotated[list[int] | None, _accepts(
    lambda value: _is_list(value, int), "a list of token ids (whole numbers)", list[int] | None,
)]
Strings: TypeAlias = Annotated[list[str] | None, _accepts(lambda value: _is_list(value, str), "a list of strings", list[str] | None)]


# -- what the generating endpoints share ------------------------------------------------------------------------------


class StreamOptions(StrictModel):
    include_usage: bool | None = None  # one more chunk at the end, with the usage of the whole request
    continuous_usage_stats: bool | None = None  # the usage so far in every chunk
    INERT = frozenset({"include_obfuscation"})


class EngineBody(StrictModel):
    """The fields of every request that goes to the engine."""

    model: str | None = None  # a served name or an adapter's name; default: the served model
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)  # lower runs first; with --scheduling-policy priority
    # cached prefixes are shared only by requests with the same salt
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    # The response's id without its prefix. `/abort_requests` takes it.
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None


class SharedFields(EngineBody):
    """The fields that all generating endpoints take under the same name."""

    stream: bool | None = None  # send the answer as server-sent events while it is generated
    stream_options: StreamOptions | None = None  # for streams only
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: StopField = None
    stop_token_ids: TokenIds = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputsFields | None = None
    truncate_prompt_tokens: int | None = None  # keep only the last so many prompt tokens; -1: as many as leave room for the output

    def check(self) -> None:
        """Rules between fields."""
        if self.stream_options is not None and not self.stream:
            raise InvalidInput("stream_options is for streams only: leave it out, or set stream to true", "stream_options")


class GenerationRequest(SharedFields):
    """The common part of completions and chat completions."""

    n: int | None = Field(default=None, ge=1)
    include_stop_str_in_output: bool | None = None
    bad_words: Strings = None
    allowed_token_ids: TokenIds = None
    response_format: ResponseFormat | None = None  # type text, json_object or json_schema (OpenAI's form of structured output)
    guided_json: SchemaField = None  # older name of structured_outputs.json
    guided_regex: str | None = None  # older name of structured_outputs.regex
    guided_choice: Strings = None  # older name of structured_outputs.choice
    guided_grammar: str | None = None  # older name of structured_outputs.grammar
    guided_whitespace_pattern: str | None = None  # belongs to guided_json
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None  # also respond with token ids of prompt and output

    INERT = NO_EFFECT | {"metadata", "store"}
    UNSUPPORTED = types.MappingProxyType(VLLM_UNSUPPORTED)

    # Fields that go to `SamplingParams` under the same name.
    SAMPLING: ClassVar[tuple[str, ...]] = (
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
        "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logit_bias", "bad_words", "allowed_token_ids",
        "skip_special_tokens", "prompt_logprobs", "truncate_prompt_tokens",
    )

    FORMAT: ClassVar[str] = "response_format"  # that field's name in errors

    def check(self) -> None:
        super().check()
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidInput("prompt_logprobs cannot be streamed: leave it out, or set stream to false", "prompt_logprobs")

    def num_logprobs(self) -> int | None:
        """Alternatives per token. None: no log-probabilities; 0: those of the sampled tokens only."""
        raise NotImplementedError

    def output_limit(self) -> tuple[int | None, str]:
        """The requested maximum of output tokens, and the name of its field."""
        raise NotImplementedError

    def structure(self) -> StructuredOutputsParams | None:
        """The structure that the output must have; None if it is free text. Several fields can define it, but only in the same way."""
        found = {
            self.FORMAT: None if self.response_format is None else self.response_format.structure(self.FORMAT),
            "structured_outputs": None if self.structured_outputs is None else self.structured_outputs.structure(),
        }
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if (value := getattr(self, name)) is not None:
                pattern = self.guided_whitespace_pattern if name == "guided_json" else None
                found[name] = StructuredOutputsParams(**{name.removeprefix("guided_"): value}, whitespace_pattern=pattern, origin=name)
        names = [name for name, structure in found.items() if structure is not None]
        for name in names[1:]:  # the same value under two names is one value
            if found[name] != found[names[0]]:
                raise InvalidInput(f"{names[0]} and {name} both define the structure of the output: send one of them", name)
        if self.guided_whitespace_pattern is not None and "guided_json" not in names:
            raise InvalidInput("guided_whitespace_pattern belongs to guided_json: leave it out", "guided_whitespace_pattern")
        return found[names[0]] if names else None

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        """The engine's parameters. `defaults`: the model's own sampling defaults, and the request's `structure`."""
        chosen = {name: value for name in self.SAMPLING if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**defaults, **chosen, "logprobs": self.num_logprobs(), "max_tokens": max_tokens})


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: PromptField  # one prompt or several, as texts or token ids
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None  # put the prompt's text in front of the output
    logprobs: int | None = Field(default=None, ge=-1)
    best_of: int | None = None  # must equal n
    add_special_tokens: bool | None = None  # put a BOS token in front of a text prompt, if the model uses one

    UNSUPPORTED = types.MappingProxyType({**VLLM_UNSUPPORTED, "suffix": ("",), "prompt_embeds": ()})

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise NotSupportedYet(f"best_of ({self.best_of}) other than n ({self.n or 1}) is not supported: leave it out", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidInput("max_tokens is 0, so there would be no output: request 1 or more, or set echo to true", "max_tokens")

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def output_limit(self) -> tuple[int | None, str]:
        return self.max_tokens, "max_tokens"

    def sampling(self, defaults: Mapping[str, Any], max_tokens: int) -> SamplingParams:
        # With echo, logprobs covers the prompt too. An output of 0 tokens is possible only together with prompt log-probabilities.
        if self.echo and self.prompt_logprobs is None and (self.logprobs is not None or max_tokens == 0):
            defaults = {**defaults, "prompt_logprobs": self.logprobs or 0}
        return super().sampling(defaults, max_tokens)


# -- other endpoints --------------------------------------------------------------------------------------------------


class DetokenizeRequest(StrictModel):
    """`POST /detokenize`."""

    model: str | None = None  # a served name
    tokens: Annotated[list[Annotated[int, Field(json_schema_extra={"minimum": 0})]], FailFast()]  # token ids


class LoadAdapterRequest(StrictModel):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str  # the name that requests use
    lora_path: str  # a folder that PEFT has saved, below --lora-folders
    load_inplace: bool | None = None  # replace a loaded adapter of this name


class UnloadAdapterRequest(StrictModel):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str  # a loaded adapter
    lora_int_id: int | None = None  # vLLM's number of the adapter; its name is enough


class AbortRequest(StrictModel):
    """`POST /abort_requests`: the requests with these response ids, or all."""

    request_ids: Strings = None  # ids of responses
    all: bool | None = None  # true: every request of this key, or of all keys for an administrator

    def check(self) -> None:
        if bool(self.request_ids) == bool(self.all):
            raise InvalidInput("send request_ids (a non-empty list), or all: true", "request_ids")
