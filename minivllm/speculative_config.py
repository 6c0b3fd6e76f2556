"""The settings of speculative decoding, with the names of vLLM's `speculative_config`."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from minivllm.errors import InvalidInput, NotSupportedYet, nearest, shown

METHODS = ("ngram", "draft_model", "eagle")
DRAFT_SAMPLE_METHODS = ("greedy", "probabilistic")
MAX_DRAFTS = 16  # num_speculative_tokens: a step computes one token more for each sequence
PACKAGED_DRAFTS = 3  # default of num_speculative_tokens for the head that comes with the package
MAX_LOOKUP = 32  # prompt_lookup_max
FIELD = "speculative_config"
_NGRAM_MODELS = ("[ngram]", "ngram")  # vLLM's older way to choose n-gram lookup
# Further fields of vLLM, with the values that request nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "draft_tensor_parallel_size": (None, 1), "tensor_parallel_size": (None, 1), "enforce_eager": (None,), "max_model_len": (None,),
    "rejection_sample_method": (None, "standard", "strict"), "disable_padded_drafter_batch": (None, False),
    "parallel_drafting": (None, False),
    "use_heterogeneous_vocab": (None, False), "kv_cache_dtype": (None,), "attention_backend": (None,), "moe_backend": (None,),
    "disable_logprobs": (None, False, True), "disable_mqa_scorer": (None, False), "code_revision": (None,),
    "acceptance_method": (None, "rejection_sampler"),
}


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How drafts are proposed. Raises `InvalidInput` that names the entry, the value and the fix."""

    method: str
    num_speculative_tokens: int  # maximum number of drafts of a sequence in one step
    model: str | None = None  # folder or hub id of the draft; None with method eagle: the head that comes with the package
    revision: str | None = None
    quantization: str | None = None  # of the draft
    prompt_lookup_min: int | None = None  # ngram: shortest and longest end of the text that is searched for
    prompt_lookup_max: int | None = None
    draft_sample_method: str = "greedy"
    disable_by_batch_size: int | None = None  # no drafts from this number of running sequences on; None: as measured costs say

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SpeculativeConfig:
        """From the dict that the user gave."""
        known = [f.name for f in fields(cls)]
        given = {}
        for name, value in values.items():
            if name in known:
                given[name] = value
            elif name not in _NEUTRAL:
                raise _wrong(f"has no entry {name!r}{nearest(str(name), known)}: the entries are {', '.join(known)}")
            elif value not in _NEUTRAL[name]:
                raise NotSupportedYet(f"{FIELD}: {name}={shown(value)} is not supported yet: leave it out", FIELD)
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("model") in _NGRAM_MODELS:
            given["method"] = "ngram"
            del given["model"]
        if "method" not in given:
            given["method"] = "draft_model" if "model" in given else _missing_method()
        if given["method"] == "eagle" and "model" not in given:
            given.setdefault("num_speculative_tokens", PACKAGED_DRAFTS)
        if "num_speculative_tokens" not in given:
            raise _wrong(f"needs num_speculative_tokens, the number of drafts per step (1 to {MAX_DRAFTS}): add it")
        return cls(**given)

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "disable_by_batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise _wrong(f"{name} must be a whole number, got {shown(value)}")
        for name in ("model", "revision", "quantization"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise _wrong(f"{name} must be a string, got {shown(value)}")
        if self.method not in METHODS:
            raise _wrong(f"method must be one of {', '.join(METHODS)}, got {shown(self.method)}{nearest(str(self.method), METHODS)}")
        if self.draft_sample_method not in DRAFT_SAMPLE_METHODS:
            raise _wrong(f"draft_sample_method must be one of {', '.join(DRAFT_SAMPLE_METHODS)}, got {shown(self.draft_sample_method)}")
        self._between("num_speculative_tokens", 1, MAX_DRAFTS)
        self._between("prompt_lookup_min", 1, MAX_LOOKUP)
        self._between("prompt_lookup_max", 1, MAX_LOOKUP)
        self._between("disable_by_batch_size", 2, 2**31 - 1)
        if self.method == "ngram":
            self._check_ngram()
        else:
            self._check_model()

    def _check_ngram(self) -> None:
        for name in ("model", "revision", "quantization"):
            if getattr(self, name) is not None:
                raise _wrong(f"{name} has no effect with method 'ngram', which has no draft model: leave it out")
        if self.draft_sample_method != "greedy":
            raise _wrong("draft_sample_method has no effect with method 'ngram', which samples nothing: leave it out")
        low, high = self.lookup
        if low > high:
            raise _wrong(f"prompt_lookup_min ({low}) must be at most prompt_lookup_max ({high})")

    def _check_model(self) -> None:
        if self.model is None and self.method != "eagle":
            raise _wrong(f"method {self.method!r} needs model, the folder or hub id of the draft: add it")
        if self.model is None and (self.revision is not None or self.quantization is not None):
            raise _wrong("revision and quantization have no effect without model, on the head that comes with the package: leave them out")
        for name in ("prompt_lookup_min", "prompt_lookup_max"):
            if getattr(self, name) is not None:
                raise _wrong(f"{name} has no effect with method {self.method!r}: leave it out, or use method 'ngram'")

    def _between(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is not None and not low <= value <= high:
            raise _wrong(f"{name} must be {f'at least {low}' if value < low else f'at most {high}'}, got {value}")

    @property
    def lookup(self) -> tuple[int, int]:
        """The shortest and the longest n-gram. As in vLLM, one that is given stands for both, and the default is 5."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        return low or high or 5, high or low or 5


def _missing_method() -> str:
    raise _wrong(f"needs method (one of {', '.join(METHODS)}), or model, the folder or hub id of a draft: add one of them")


def _wrong(message: str) -> InvalidInput:
    return InvalidInput(f"{FIELD} {message}" if message.startswith(("has no entry", "needs")) else f"{FIELD}: {message}", FIELD)
