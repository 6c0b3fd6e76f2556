"""How the text of one chat's output is to be read: reasoning first, then content and calls.

    text ─▶ ReasoningSplitter ─▶ Reasoning
                              ─▶ Content ─▶ ToolParser ─▶ Content, CallStart, CallArguments, CallEnd
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from minivllm.errors import InvalidInput
from minivllm.sampling_params import JSON_WHITESPACE, SamplingParams, StructuredOutputsParams
from minivllm.server.reasoning import CLOSE, OPEN, Beginning, ReasoningSplitter
from minivllm.server.tool_parsers import PARSERS, Content, Event, Hermes, Named, Required, ToolParser
from minivllm.server.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One request's."""

    begin: Beginning = "answer"  # whether the output begins with reasoning
    splits: bool = False  # whether reasoning is split off at all
    include_reasoning: bool = True
    tools: ToolUse | None = None
    format: str | None = None  # of calls that the model writes by itself
    # Marks of reasoning or calls that are special tokens: they must not be left out of the text, and a grammar knows them by id.
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def parser(self) -> ToolParser | None:
        use = self.tools
        if use is None:
            return None
        if use.mode == "named":
            return Named(use.named or "")
        return Required(use.names) if use.mode == "required" else PARSERS[self.format or ""](use.names)

    def apply(self, params: SamplingParams) -> SamplingParams:
        """The sampling parameters that this needs: a grammar for calls that are enforced; none before the reasoning has ended."""
        wanted = params.structured_outputs
        if self.tools is not None:
            if wanted is not None:
                raise InvalidInput(f"{wanted.where} and tools ask for different outputs: send one of them, or set tool_choice to 'none'",
                                   wanted.where)
            wanted = self._calls()
        elif wanted is not None and self.begin != "answer":
            wanted = self._after_reasoning([f"answer: %json {_json_rule(wanted)}"], wanted.where)
        skip = params.skip_special_tokens and not self.special_ids
        return dataclasses.replace(params, structured_outputs=wanted, skip_special_tokens=skip)

    def _calls(self) -> StructuredOutputsParams | None:
        """The grammar of the calls, if one enforces them."""
        use = self.tools
        assert use is not None
        if use.strict is not None:
            wanted = StructuredOutputsParams(json=use.call_schema(), origin=use.field)  # checked: size, nesting
            return self._after_reasoning(self._strict_rules(_json_rule(wanted)), use.field)
        schema = use.schema()
        if schema is None:
            return None
        wanted = StructuredOutputsParams(json=schema, origin=use.field)
        return wanted if self.begin == "answer" else self._after_reasoning([f"answer: %json {_json_rule(wanted)}"], use.field)

    def _strict_rules(self, call: str) -> list[str]:
        """Text with calls in it: free until a call opens, and then a call of one of the tools."""
        return [
            "answer: (lead GAP call close)* TEXT" if self.tools is None or self.tools.parallel else "answer: (lead GAP call close)? TEXT",
            self._up_to("lead", Hermes.OPEN),
            f"call: %json {call}",
            f"close: GAP {self._mark(Hermes.CLOSE)}",
            "TEXT: /(.|\n)*/" + ("" if Hermes.OPEN in self.special_ids else f" & ~/(.|\n)*{Hermes.OPEN}(.|\n)*/"),
        ]

    def _after_reasoning(self, answer: list[str], origin: str) -> StructuredOutputsParams:
        """A grammar that first lets the model think, as long as it likes. `answer`: rules in llguidance's dialect of Lark."""
        start = {"answer": "answer", "inside": "thought GAP answer", "undecided": "(opening thought GAP)? answer"}[self.begin]
        lines = [f"start: {start}", r"GAP: /[ \t\r\n]{0,4}/", *answer]
        if self.begin != "answer":
            lines.append(self._up_to("thought", CLOSE))
        if self.begin == "undecided":
            lines.append(f"opening: {self._mark(OPEN)}")
        return StructuredOutputsParams(grammar="\n".join(lines), origin=origin)

    def _mark(self, mark: str) -> str:
        return f"<[{self.special_ids[mark]}]>" if mark in self.special_ids else json.dumps(mark)

    def _up_to(self, rule: str, mark: str) -> str:
        """A rule for everything up to the first mark; a special token is no text."""
        if mark in self.special_ids:
            return rf"{rule}: /(.|\n)*/ {self._mark(mark)}"
        return rf"{rule}[lazy]: /(.|\n)*{mark.replace('/', chr(92) + '/')}/"


def _json_rule(wanted: StructuredOutputsParams) -> str:
    """A JSON structure as a part of a grammar."""
    if wanted.kind not in ("json", "json_object") or wanted.whitespace_pattern is not None:
        raise InvalidInput(f"{wanted.where} cannot follow reasoning, only a JSON schema can: turn thinking off, for instance with "
                           'chat_template_kwargs {"enable_thinking": false}', wanted.where)
    schema = json.loads(str(wanted.json)) if wanted.kind == "json" else {"type": "object"}
    space = {"whitespace_flexible": False} if wanted.disable_any_whitespace else {"whitespace_pattern": JSON_WHITESPACE}
    return json.dumps({**schema, "x-guidance": space})


class OutputReader:
    """Reads one output as it comes."""

    def __init__(self, reading: Reading) -> None:
        self._splitter = ReasoningSplitter(reading.begin)
        self._parser = reading.parser()

    @property
    def thinking(self) -> bool:
        """Whether reasoning has begun and not ended."""
        return self._splitter.thinking

    def push(self, text: str) -> list[Event]:
        return self._pass_on(self._splitter.push(text))

    def finish(self) -> list[Event]:
        events = self._pass_on(self._splitter.finish())
        return events if self._parser is None else events + self._parser.finish()

    def _pass_on(self, events: list[Event]) -> list[Event]:
        if self._parser is None:
            return events
        return [found for event in events for found in (self._parser.push(event.text) if isinstance(event, Content) else (event,))]
