"""How the text of one chat's output is to be read: reasoning first, then content and calls.

    text ─▶ ReasoningSplitter ─▶ Reasoning
                              ─▶ Content ─▶ ToolParser ─▶ Content, CallStart, CallArguments, CallEnd
"""
from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from minivllm.errors import InvalidInput
from minivllm.sampling_params import JSON_WHITESPACE, SamplingParams, StructuredOutputsParams
from minivllm.server.reasoning import CLOSE, OPEN, Beginning, ReasoningSplitter
from minivllm.server.tool_parsers import PARSERS, Content, Event, Named, Required, ToolParser
from minivllm.server.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One request's."""

    begin: Beginning = "answer"  # whether the output begins with reasoning
    splits: bool = False  # whether reasoning is split off at all
    include_reasoning: bool = True
    tools: ToolUse | None = None
    format: str | None = None  # of calls that the model writes by itself
    show_special: bool = False  # marks of reasoning or calls are special tokens, which must not be left out of the text
    think_ids: tuple[int | None, int | None] = (None, None)  # of <think> and </think>, where they are special tokens

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
            schema = self.tools.schema()
            wanted = None if schema is None else StructuredOutputsParams(json=schema, origin=self.tools.field)
        if wanted is not None and self.begin != "answer":
            wanted = after_reasoning(wanted, self.begin, self.think_ids)
        skip = params.skip_special_tokens and not self.show_special
        return dataclasses.replace(params, structured_outputs=wanted, skip_special_tokens=skip)


def after_reasoning(wanted: StructuredOutputsParams, begin: Beginning, think_ids: tuple[int | None, int | None]) -> StructuredOutputsParams:
    """A grammar that first lets the model think, as long as it likes."""
    if wanted.kind not in ("json", "json_object") or wanted.whitespace_pattern is not None:
        raise InvalidInput(f"{wanted.where} cannot follow reasoning, only a JSON schema can: turn thinking off, for instance with "
                           'chat_template_kwargs {"enable_thinking": false}', wanted.where)
    schema = json.loads(str(wanted.json)) if wanted.kind == "json" else {"type": "object"}
    space = {"whitespace_flexible": False} if wanted.disable_any_whitespace else {"whitespace_pattern": JSON_WHITESPACE}
    opening, closing = think_ids
    lines = [
        "start: thought gap answer" if begin == "inside" else "start: (opening thought gap)? answer",
        f"opening: {json.dumps(OPEN) if opening is None else f'<[{opening}]>'}",
        # Everything up to the first closing tag; a special token is no text.
        rf"thought[lazy]: /(.|\n)*{CLOSE.replace('/', chr(92) + '/')}/" if closing is None else rf"thought: /(.|\n)*/ <[{closing}]>",
        r"gap: /[ \t\r\n]{0,4}/",
        f"answer: %json {json.dumps({**schema, 'x-guidance': space})}",
    ]
    if begin == "inside":
        del lines[1]
    return StructuredOutputsParams(grammar="\n".join(lines), origin=wanted.where)


class OutputReader:
    """Reads one output as it comes."""

    def __init__(self, reading: Reading) -> None:
        self._splitter = ReasoningSplitter(reading.begin)
        self._parser = reading.parser()

    def push(self, text: str) -> list[Event]:
        return self._pass_on(self._splitter.push(text))

    def finish(self) -> list[Event]:
        events = self._pass_on(self._splitter.finish())
        return events if self._parser is None else events + self._parser.finish()

    def _pass_on(self, events: list[Event]) -> list[Event]:
        if self._parser is None:
            return events
        return [found for event in events for found in (self._parser.push(event.text) if isinstance(event, Content) else (event,))]
