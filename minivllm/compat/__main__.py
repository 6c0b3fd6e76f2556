"""`python -m minivllm.compat`: print `docs/from_vllm.md`, made from the tables of this package."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from minivllm.compat.environment import HONORED, INERT
from minivllm.compat.imports import MODULES, UNBUILT
from minivllm.compat.settings import (
    ENGINE_ALIASES,
    ENGINE_SETTINGS,
    LLM_METHODS,
    LLM_SETTINGS,
    SERVER_ALIASES,
    SERVER_SETTINGS,
    SHORT_FLAGS,
    VALUES,
    VllmSetting,
)
from minivllm.config import EngineConfig, ServerConfig
from minivllm.sampling_params import NEUTRAL

INTRODUCTION = """# Programs and launch lines written for vLLM

This page is printed by `python -m minivllm.compat` from the tables in `minivllm/compat`, and the tests check every row.

A Python program changes one word, `vllm` to `minivllm`. A launch line changes `vllm serve` to `minivllm serve`.

- **same**: it means what it means in vLLM.
- **inert**: it cannot change the output here. It is accepted, and one line on stderr says that it has no effect.
- **refused**: it would change the output or the use of the machine and is not built. The error names it.

A value that requests nothing is accepted without a line: `None`, vLLM's default, and the values in the last column.

These differ from vLLM without a line:

- Metrics have the prefix `minivllm:` in place of `vllm:`.
- Web pages of other origins may not call the server unless `--allowed-origins` names them (vLLM's default is `*`).
- `create_engine_config()` gives this project's `EngineConfig`. `model_config` has `max_model_len`, `dtype`, `vocab_size` and the other
  constants of `EngineInfo`, and no Transformers configuration.
- `stop`, `stop_token_ids` and `bad_words` of `SamplingParams` are tuples: assign a new list in place of `append`.

## What holds for greedy outputs

In float32 the tokens of a request do not depend on the batch, on chunks, or on the prefix cache (`tests/engine/test_metamorphic.py`).
In bfloat16 they can. A prompt whose beginning is cached is computed in other pieces: prompt attention (and for some shapes a matrix
product) then adds its terms in another order, rounds differently, and decides a near tie between two tokens the other way. The same
happens in vLLM. There is no batch-invariant mode: use `dtype="float32"` where two runs must agree in every token.
"""


def render() -> str:
    """The page."""
    parts = [INTRODUCTION, *(f"## {title}\n\n{body}\n" for title, body in _sections())]
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, str]]:
    yield "Settings of this project", "Those that vLLM has too mean the same.\n\n" + "\n\n".join(
        f"{what}: {', '.join(f'`{f.name}`' for f in dataclasses.fields(config))}."
        for what, config in (("Keywords of `LLM(...)` and flags of `serve`", EngineConfig), ("Flags of `serve`", ServerConfig)))
    aliases = [(f"`{a.name}`", f"`{a.here}`" + (f', entry `{a.key}`' if a.key else ", negated" if a.negated else ""))
               for a in (*ENGINE_ALIASES, *SERVER_ALIASES)]
    values = [(f"`{name}={theirs!r}`", "the default" if ours is None else f"`{ours!r}`")
              for name, pairs in VALUES.items() for theirs, ours in pairs.items()]
    short = [(f"`{flag}`", f"`--{name.replace('_', '-')}`") for name, flags in SHORT_FLAGS.items() for flag in flags]
    yield "Other spellings", _table(("vLLM", "here"), [*aliases, *values, *short])
    yield "Settings of the engine that only vLLM has", _settings(ENGINE_SETTINGS)
    yield "Settings of the server that only vLLM has", _settings(SERVER_SETTINGS)
    yield "Keywords of `LLM(...)` that are settings of the server", _settings(LLM_SETTINGS)
    yield "Parameters of `SamplingParams` that must request nothing", _table(("parameter", "not built", "requests nothing"), [
        (f"`{name}`", what, ", ".join(f"`{value!r}`" for value in neutral) or "`None`") for name, (what, neutral) in NEUTRAL.items()])
    yield "Methods of `LLM`, `LLMEngine` and `AsyncLLM` that are refused", _table(("method", "feature"), [
        (f"`{name}`", what) for name, what in LLM_METHODS.items()])
    yield "Module paths", _table(("module", "names"), [
        (f"`{module}`", ", ".join(f"`{name}`" for name in names)) for module, names in MODULES.items() if names])
    yield "Modules that are refused", _table(("module", "feature"), [(f"`{module}`", what) for module, what in UNBUILT.items()])
    yield "Environment variables", _table(("variable", "behavior"), [
        *((f"`{name}`", f"same: {what}") for name, what in HONORED.items()),
        *((f"`{name}`", "inert, without a line") for name in sorted(INERT)),
        ("any other `VLLM_...`", "not read; one warning at the start names it")])


def _settings(settings: Iterable[VllmSetting]) -> str:
    return _table(("setting", "behavior", "because", "requests nothing"), [
        (f"`{s.name}`", "inert" if s.built else "refused", s.why if s.built else f"not built: {s.why}",
         ", ".join(f"`{value!r}`" for value in (s.default, *s.neutral) if value is not None) or "`None`") for s in settings])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


if __name__ == "__main__":
    print(render(), end="")
