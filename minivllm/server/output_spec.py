"""How the text of one chat request's output is parsed, and the grammar that keeps the model to it.

    text ─▶ ReasoningParser ─▶ ReasoningDelta
                            ─▶ ContentDelta ─▶ ToolParser ─▶ ContentDelta, ToolCallStart, ToolCallArguments, ToolCallEnd
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from minivllm.engine.json_schema import closed
from minivllm.errors import InvalidInput
from minivllm.output_parsers.events import ContentDelta, OutputEvent, ReasoningDelta
from minivllm.output_parsers.reasoning import CLOSE, OPEN, OutputStart, ReasoningParser
from minivllm.output_parsers.tool_calls import PARSERS, HermesParser, NamedCallParser, RequiredCallsParser, ToolParser
from minivllm.sampling_params import JSON_WHITESPACE, SamplingParams, StructuredOutputsParams
from minivllm.server.tools import ToolSpec


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What the output of one request may consist of."""

    start: OutputStart = "answer"
    splits_reasoning: bool = False
    include_reasoning: bool = True
    tools: ToolSpec | None = None
    call_format: str | None = None  # of calls that the model chooses to make: a key of PARSERS
    # Markers that are special tokens, with their ids: the text must keep them, and grammars refer to them by id.
    special_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def max_calls(self) -> int | None:
        return None if self.tools is None or self.tools.parallel else 1

    def tool_parser(self) -> ToolParser | None:
        tools = self.tools
        if tools is None:
            return None
        if tools.mode == "named":
            return NamedCallParser(tools.named or "")
        return RequiredCallsParser(tools.names) if tools.mode == "required" else PARSERS[self.call_format or ""](tools.names)

    def apply(self, params: SamplingParams) -> SamplingParams:
        """The sampling parameters for this output: a grammar for enforced calls, and no grammar before the reasoning has ended."""
        structure = params.structured_outputs
        if self.tools is not None:
            if structure is not None:
                raise InvalidInput(f"{structure.where} and tools request different outputs: send one of them, or set tool_choice to 'none'",
                                   structure.where)
            structure = self._calls_grammar(self.tools)
        elif structure is not None and self.start != "answer":
            structure = self._after_reasoning([f"answer: %json {_json_rule(structure)}"], structure.where)
        skip = params.skip_special_tokens and not self.special_ids
        return dataclasses.replace(params, structured_outputs=structure, skip_special_tokens=skip)

    def _calls_grammar(self, tools: ToolSpec) -> StructuredOutputsParams | None:
        """The grammar that enforces calls; None if the model is free."""
        if tools.first_strict is not None:
            structure = StructuredOutputsParams(json=tools.call_schema("arguments"), origin=tools.field)  # checks size and nesting
            return self._after_reasoning(self._strict_rules(tools, _json_rule(structure)), tools.field)
        schema = tools.schema()
        if schema is None:
            return None
        structure = StructuredOutputsParams(json=schema, origin=tools.field)
        return structure if self.start == "answer" else self._after_reasoning([f"answer: %json {_json_rule(structure)}"], tools.field)

    def _strict_rules(self, tools: ToolSpec, call: str) -> list[str]:
        """Rules for free text in which each opening marker is followed by a valid call."""
        return [
            f"answer: (lead GAP call close){'*' if tools.parallel else '?'} TEXT",
            self._up_to("lead", HermesParser.OPEN),
            f"call: %json {call}",
            f"close: GAP {self._marker(HermesParser.CLOSE)}",
            "TEXT: /(.|\n)*/" + ("" if HermesParser.OPEN in self.special_ids else f" & ~/(.|\n)*{HermesParser.OPEN}(.|\n)*/"),
        ]

    def _after_reasoning(self, answer: list[str], origin: str) -> StructuredOutputsParams:
        """A grammar that first allows reasoning of any length. `answer`: rules in llguidance's dialect of Lark."""
        start = {"answer": "answer", "undecided": "(opening thought GAP)? answer"}.get(self.start, "thought GAP answer")
        lines = [f"start: {start}", r"GAP: /[ \t\r\n]{0,4}/", *answer]
        if self.start != "answer":
            lines.append(self._up_to("thought", CLOSE))
        if self.start == "undecided":
            lines.append(f"opening: {self._marker(OPEN)}")
        return StructuredOutputsParams(grammar="\n".join(lines), origin=origin)

    def _marker(self, marker: str) -> str:
        return f"<[{self.special_ids[marker]}]>" if marker in self.special_ids else json.dumps(marker)

    def _up_to(self, rule: str, marker: str) -> str:
        """A rule for everything up to the first marker. A special token is not text, so it cannot occur before the marker."""
        if marker in self.special_ids:
            return rf"{rule}: /(.|\n)*/ {self._marker(marker)}"
        return rf"{rule}[lazy]: /(.|\n)*{marker.replace('/', chr(92) + '/')}/"


def _json_rule(structure: StructuredOutputsParams) -> str:
    """A JSON structure as a part of a grammar."""
    if structure.kind not in ("json", "json_object") or structure.whitespace_pattern is not None:
        raise InvalidInput(f"{structure.where} cannot follow reasoning, only a JSON schema can: turn thinking off, for instance with "
                           'chat_template_kwargs {"enable_thinking": false}', structure.where)
    schema = closed(json.loads(str(structure.json))) if structure.kind == "json" else {"type": "object"}
    space = {"whitespace_flexible": False} if structure.disable_any_whitespace else {"whitespace_pattern": JSON_WHITESPACE}
    return json.dumps({**schema, "x-guidance": space})


class OutputParser:
    """Parses one output while it arrives. Leaves out calls and reasoning that the request excludes."""

    def __init__(self, spec: OutputSpec) -> None:
        self._spec = spec
        self._reasoning = ReasoningParser(spec.start)
        self._tools = spec.tool_parser()

    @property
    def in_reasoning(self) -> bool:
        """Whether reasoning has started and not ended."""
        return self._reasoning.in_reasoning

    def push(self, text: str, ended: bool) -> list[OutputEvent]:
        """The events of a further piece of text, the last one if the output has ended."""
        events = self._reasoning.push(text) + (self._reasoning.finish() if ended else [])
        if self._tools is not None:
            pushed = (self._tools.push(event.text) if isinstance(event, ContentDelta) else [event] for event in events)
            events = [event for group in pushed for event in group] + (self._tools.finish() if ended else [])
        return [event for event in events if self._is_included(event)]

    def _is_included(self, event: OutputEvent) -> bool:
        if isinstance(event, ReasoningDelta):
            return self._spec.include_reasoning
        return isinstance(event, ContentDelta) or self._spec.max_calls is None or event.index < self._spec.max_calls
