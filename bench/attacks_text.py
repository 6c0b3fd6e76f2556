"""Attacks of `bench.hostile` with grammars, schemas of tools, and lists that are looked at for every token."""
from __future__ import annotations

import asyncio
from typing import Any

from bench.hostile_client import Attack, Target, tally


def intersected(count: int) -> dict[str, Any]:
    """A schema that takes about three times as long to compile for each further pattern: 14 take 9 s, 20 take hours."""
    return {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(count)]}


def ambiguous(rules: int = 40) -> str:
    """A grammar in which every letter can be read in many ways."""
    lines = [f"r{i}: /[a-z]/ r{(i + 1) % rules} | /[a-z]/ r{(i * 3 + 1) % rules} | /[a-z ]/ | /[a-z]/ s" for i in range(rules)]
    return "\n".join(["start: s", "s: " + " | ".join(f"r{i}" for i in range(rules)), *lines])


async def _all(target: Target, path: str, bodies: list[dict[str, Any]]) -> str:
    return tally([status for status, _ in await asyncio.gather(*(target.post(path, body) for body in bodies))])


async def slow_grammars(target: Target) -> str:
    """Three grammars that take hours to compile, and two that the client leaves at once."""
    wanted = [{"prompt": "x", "max_tokens": 4, "structured_outputs": {"json": intersected(18 + i)}} for i in range(5)]
    await asyncio.gather(*(target.leave("/v1/completions", body, 0.2) for body in wanted[:2]))
    return await _all(target, "/v1/completions", wanted[2:])


async def slow_masks(target: Target) -> str:
    """An ambiguous grammar for many children."""
    body = {"prompt": "x", "n": 128, "max_tokens": 200, "temperature": 1.5, "structured_outputs": {"grammar": ambiguous()}}
    return await _all(target, "/v1/completions", [body] * 2)


async def slow_tools(target: Target) -> str:
    """Tools whose schemas take hours to check."""
    tools = [{"type": "function", "function": {"name": f"f{i}", "strict": True, "parameters": {
        "type": "object", "properties": {"a": intersected(18 + i)}}}} for i in range(6)]
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required", "max_tokens": 4}
    return await _all(target, "/v1/chat/completions", [body] * 3)


async def long_lists(target: Target) -> str:
    """1,024 stop strings and bad words for many children, new ones in each request."""
    bodies = [{"prompt": "x", "n": 128, "max_tokens": 100, "ignore_eos": True, "stop": [f"{i} stop {k} here" for k in range(1024)],
               "bad_words": [f"{i} bad {k}" for k in range(1024)]} for i in range(4)]
    return await _all(target, "/v1/completions", bodies)


ATTACKS = (
    Attack("slow grammars", "CPU seconds and memory of a trial", slow_grammars, ("--max-grammar-seconds", "1"), 60.0, r"400 x 3"),
    Attack("slow masks", "operations per mask, seconds per step", slow_masks, seconds=60.0, expected=r"[45]\d\d x 2"),
    Attack("slow tools", "CPU seconds per request", slow_tools, seconds=60.0, expected=r"400 x 3"),
    Attack("long lists", "entries times n", long_lists, seconds=60.0, expected=r"400 x 4"),
)
