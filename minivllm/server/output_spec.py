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
    formatted: bool = False  # the request defines the structure of the text
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
        if tools.mode == "required":
            return RequiredCallsParser(tools.names)
        return PARSERS[self.call_format or ""](tools.names, exclusive=self.formatted)

    def apply(self, params: SamplingParams) -> SamplingParams:
        """The sampling parameters for this output: a grammar for enforced calls, and no grammar before the reasoning has ended."""
        structure, tools = params.structured_outputs, self.tools
        if tools is not None and tools.forced:  # a structure of the text waits for a turn without calls
            structure = self._forced_calls(tools)
        elif tools is not None and (structure is not None or tools.first_strict is not None):
            rules = self._calls_or_format(tools, structure) if structure is not None else self._strict_rules(tools)
            structure = self._after_reasoning(rules, tools.field if structure is None else structure.where)
        elif structure is not None and self.start != "answer":
            structure = self._after_reasoning([f"answer: {_structure_rule(structure)}"], structure.where)
        skip = params.skip_special_tokens and not self.special_ids
        return dataclasses.replace(params, structured_outputs=structure, skip_special_tokens=skip)

    def _forced_calls(self, tools: ToolSpec) -> StructuredOutputsParams:
        structure = StructuredOutputsParams(json=tools.schema(), origin=tools.field)  # checks size and nesting
        return structure if self.start == "answer" else self._after_reasoning([f"answer: {_structure_rule(structure)}"], tools.field)

    def _calls_or_format(self, tools: ToolSpec, structure: StructuredOutputsParams) -> list[str]:
        """Rules for an output that is either calls or text of the request's structure."""
        return [f"answer: calls | {_structure_rule(structure)}", *self._call_rules(tools)]

    def _strict_rules(self, tools: ToolSpec) -> list[str]:
        """Rules for free text with calls that match the schemas of the tools. In the Hermes format, a call may follow text."""
        if self.call_format == "hermes":
            return [
                f"answer: (lead GAP call GAP close){'*' if tools.parallel else '?'} TEXT", *self._call_rules(tools),
                self._up_to("lead", HermesParser.OPEN),
                "TEXT: /(.|\n)*/" + ("" if HermesParser.OPEN in self.special_ids else f" & ~/(.|\n)*{HermesParser.OPEN}(.|\n)*/"),
            ]
        parser = PARSERS[self.call_format or ""]
        tag, start = parser.OPEN.replace("|", r"\|"), "\\" + parser.UNMARKED
        text = rf"TEXT: /(.|\n)*/ & ~/[ \t\r\n]*{start}(.|\n)*/ & ~/(.|\n)*{tag}(.|\n)*/"
        return ["answer: calls | TEXT", *self._call_rules(tools), text]

    def _call_rules(self, tools: ToolSpec) -> list[str]:
        """Rules for calls in the model's format."""
        if self.call_format == "pythonic":
            return _python_rules(tools)
        hermes = self.call_format == "hermes"
        schema = StructuredOutputsParams(json=tools.call_schema("arguments" if hermes else "parameters"), origin=tools.field)
        one, gap = ("open GAP call GAP close", "GAP") if hermes else ("call", '";" GAP')
        markers = [f"open: {self._marker(HermesParser.OPEN)}", f"close: {self._marker(HermesParser.CLOSE)}"] if hermes else []
        return [f"calls: {one} " + (f"({gap} {one})*" if tools.parallel else ""), f"call: {_structure_rule(schema)}", *markers]

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


def _python_rules(tools: ToolSpec) -> list[str]:
    """Rules for a list of calls in Python's syntax. A strict function has its parameters in the order of its schema."""
    names = [f"call{i}" for i in range(len(tools.functions))]
    rules = ["calls: \"[\" call " + ('("," GAP call)* ' if tools.parallel else "") + '"]"', f"call: {' | '.join(names)}",
             'argument: NAME "=" %json {}', r"NAME: /[A-Za-z_][A-Za-z0-9_]*/"]
    for name, function, schema in zip(names, tools.functions, tools.enforced_schemas(), strict=True):
        arguments = '(argument ("," GAP argument)*)?'
        if function.strict:
            shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
            properties = schema.get("properties", {})
            required = [key in schema.get("required", ()) for key in properties]
            schemas = [{**shared, **closed(part)} if isinstance(part, dict) else {} for part in properties.values()]
            parts = [f"{json.dumps(key + '=')} %json {json.dumps(part)}" for key, part in zip(properties, schemas, strict=True)]
            more = [f'("," GAP {name}_{j}){"" if required[j] else "?"}' for j in range(len(parts))]
            first = required.index(True) if any(required) else len(parts) - 1  # the last parameter that can come first
            starts = " | ".join(" ".join([f"{name}_{j}", *more[j + 1:]]) for j in range(first + 1))
            arguments = f"({starts})" + ("" if any(required) else "?") if parts else ""
            rules += [f"{name}_{j}: {part}" for j, part in enumerate(parts)]
        rules.append(f"{name}: {json.dumps(function.name + '(')} {arguments} \")\"")
    return rules


def _structure_rule(structure: StructuredOutputsParams) -> str:
    """A structure as a part of a grammar."""
    if structure.kind == "choice":
        return "(" + " | ".join(map(json.dumps, structure.choice or ())) + ")"
    if structure.kind not in ("json", "json_object") or structure.whitespace_pattern is not None:
        raise InvalidInput(f"{structure.where} cannot be combined with reasoning or tools, only a JSON schema or a choice can: send "
                           'no tools, and turn thinking off, for instance with chat_template_kwargs {"enable_thinking": false}',
                           structure.where)
    schema = closed(json.loads(str(structure.json))) if structure.kind == "json" else {"type": "object"}
    space = {"whitespace_flexible": False} if structure.disable_any_whitespace else {"whitespace_pattern": JSON_WHITESPACE}
    return "%json " + json.dumps({**schema, "x-guidance": space})


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

    def push(self, text: str, finish_reason: str | None) -> list[OutputEvent]:
        """The events of a further piece of text, the last one if there is a finish reason."""
        ended = finish_reason is not None
        events = self._reasoning.push(text) + (self._reasoning.finish() if ended else [])
        if self._tools is not None:
            pushed = (self._tools.push(event.text) if isinstance(event, ContentDelta) else [event] for event in events)
            events = [event for group in pushed for event in group] + (self._tools.finish(cut=finish_reason != "stop") if ended else [])
        return [event for event in events if self._is_included(event)]

    def _is_included(self, event: OutputEvent) -> bool:
        if isinstance(event, ReasoningDelta):
            return self._spec.include_reasoning
        return isinstance(event, ContentDelta) or self._spec.max_calls is None or event.index < self._spec.max_calls
