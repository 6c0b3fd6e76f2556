"""From a chat request to its prompt, and to the specification of its output.

    messages, tools, reasoning_effort ... ──▶ chat template ──▶ prompt (token ids)
               flags, the end of the prompt ──▶ OutputSpec (reasoning? tool calls, in which format?)

A field that the template would silently leave out is refused. If the field could not change the prompt, it is only reported as ignored.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from minivllm.config import TOOL_CALL_PARSERS, ServerConfig
from minivllm.engine.chat_prompt import GENERIC_FORMAT, takes_tools
from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.conversation import text_of
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput
from minivllm.output_parsers.reasoning import CLOSE, OPEN, output_start
from minivllm.output_parsers.tool_calls import PARSERS, guess_parser
from minivllm.server.chat_protocol import ChatRequest
from minivllm.server.cost import check_length, check_tokens
from minivllm.server.output_spec import OutputSpec
from minivllm.server.tools import ToolSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToolFormat:
    """How the model is told to write calls."""

    name: str  # a key of PARSERS
    has_place: bool  # in the chat template
    known: bool  # the name was set or is shown by the template

    def is_generic(self, tools: ToolSpec | None) -> bool:
        """Whether the generic prompt describes the tools. A forced call has its own format, so any description serves."""
        return not self.has_place or (not self.known and (tools is None or tools.mode == "auto"))


class ChatPreprocessor:
    """Turns chat requests into prompts, as the server's flags and the model's template demand."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None, max_model_len: int) -> None:
        self._config = config
        self._max_model_len = max_model_len
        self._explained: set[int] = set()  # hashes of templates whose format of calls has been logged
        template = None if tokenizer is None else tokenizer.chat_template
        for name in config.default_chat_template_kwargs or ():
            if template is not None and name not in template.variables | template.for_tools().variables:
                log.warning("default_chat_template_kwargs: this model's chat template does not read %s, so it has no effect", name)
        if config.enable_auto_tool_choice and template is not None:
            self._tool_format(template)

    def prompt(self, body: ChatRequest, tokenizer: Tokenizer, ignored: list[str]) -> tuple[list[int], OutputSpec | None]:
        """The prompt's token ids, and the specification of an output that is more than text. Appends to `ignored`.

        Not for the event loop: a template is a program, and its first use tries many conversations.
        """
        template = self._template(body, tokenizer)
        tools = body.tool_spec()
        tool_format = None if tools is None or template is None else self._tool_format(template)
        call_format = None if tools is None or tools.forced else GENERIC_FORMAT if tool_format is None else tool_format.name
        messages = body.conversation(ignored)
        if template is not None:
            messages = _adapt(template, messages, ignored, bool(body.continue_final_message))
        variables = _variables(body, template, self._config.default_chat_template_kwargs or {}, ignored)
        opens_answer = body.add_generation_prompt if body.add_generation_prompt is not None else not body.continue_final_message
        if body.include_reasoning is False and self._config.reasoning_parser is None:
            raise InvalidInput("include_reasoning needs a reasoning parser: start the server with --reasoning-parser, or leave it out",
                               "include_reasoning")

        check_length(sum(len(text_of(message["content"])) for message in messages), self._max_model_len, "messages")
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=opens_answer, continue_final_message=bool(body.continue_final_message),
            tools=None if tools is None else tools.for_template(), chat_template=template, tokenize=False,
            call_format=GENERIC_FORMAT if tool_format is None else tool_format.name,
            generic_tools=tool_format is not None and tool_format.is_generic(tools), **variables,
        )
        assert isinstance(text, str)
        if tools is not None:
            ignored.extend(tools.left_open())
        reasoning = messages[-1].get("reasoning_content")
        continued = (text_of(messages[-1]["content"]) or (OPEN + reasoning if reasoning else "")) if body.continue_final_message else ""
        encode = partial(tokenizer.encode, add_special_tokens=False)
        check_tokens(text, encode, self._max_model_len, "messages")
        return encode(text), self._output_spec(body, tokenizer, tools, call_format, text, continued)

    def _template(self, body: ChatRequest, tokenizer: Tokenizer) -> ChatTemplate | None:
        if body.chat_template is None:
            return tokenizer.chat_template
        if not self._config.trust_request_chat_template:
            raise InvalidInput("chat_template in a request needs a server started with --trust-request-chat-template: leave it out",
                               "chat_template")
        return ChatTemplate(body.chat_template)

    def _tool_format(self, template: ChatTemplate) -> ToolFormat:
        """How calls are written with this template. It is logged once."""
        source, parser = template.for_tools().source, self._config.tool_call_parser
        has_place = takes_tools(template)
        name = parser or (guess_parser(source) if has_place else None)
        found = ToolFormat(name or GENERIC_FORMAT, has_place, known=name is not None)
        if hash(source) not in self._explained and len(self._explained) < 32:  # requests may have their own templates
            self._explained.add(hash(source))
            unknown = f"the chat template's own format is none of {', '.join(TOOL_CALL_PARSERS)}"
            log.info("tool calls: format %s, %s", found.name,
                     "described by a generic prompt: the chat template has no place for tools" if not has_place else
                     f"described by a generic prompt: {unknown}" if name is None else
                     "set by --tool-call-parser" if parser else "as the chat template shows")
        return found

    def check_choice(self, body: ChatRequest) -> None:
        """Refuse "auto" if it is turned off."""
        tools = body.tool_spec()
        if tools is not None and tools.mode == "auto" and self._config.enable_auto_tool_choice is False:
            field = "function_call" if tools.legacy else "tool_choice"
            raise InvalidInput(f"{field} 'auto' is turned off: start the server with --enable-auto-tool-choice, or choose another", field)

    def _output_spec(
        self, body: ChatRequest, tokenizer: Tokenizer, tools: ToolSpec | None, call_format: str | None, prompt: str, continued: str,
    ) -> OutputSpec | None:
        parser = self._config.reasoning_parser
        if parser is None and tools is None:
            return None
        markers = (*(() if parser is None else (OPEN, CLOSE)), *(() if call_format is None else PARSERS[call_format].MARKERS))
        return OutputSpec(
            start="answer" if parser is None else output_start(parser, prompt, continued), splits_reasoning=parser is not None,
            include_reasoning=body.include_reasoning is not False, tools=tools, call_format=call_format,
            formatted=body.structure() is not None,
            special_ids={marker: found for marker in markers if (found := _special_id(tokenizer, marker)) is not None},
        )


def _special_id(tokenizer: Tokenizer, marker: str) -> int | None:
    """The id of a marker that is a special token."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.is_special(ids[0]) else None


def _adapt(template: ChatTemplate, messages: list[dict[str, Any]], ignored: list[str], continued: bool) -> list[dict[str, Any]]:
    """Messages without reasoning, if this template does not handle it. If the output continues reasoning, it becomes content."""
    source = template.for_tools().source
    adapted = []
    for i, message in enumerate(messages):
        if "reasoning_content" in message and "reasoning_content" not in source:
            message = dict(message)
            reasoning = message.pop("reasoning_content")
            if continued and i == len(messages) - 1 and not message["content"]:
                message["content"] = f"{OPEN}\n{reasoning}"
            else:
                ignored.append(f"messages.{i}.reasoning_content")
        adapted.append(message)
    return adapted


def _variables(body: ChatRequest, template: ChatTemplate | None, defaults: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """The template's variables beside messages and tools. `defaults`: the server's."""
    known = frozenset() if template is None else template.variables | template.for_tools().variables
    ignored += [f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs or () if name not in known]
    variables = {**defaults, **(body.chat_template_kwargs or {})}
    effort = body.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort, **variables}
    if effort == "none":
        return {"enable_thinking": False, **variables} if "enable_thinking" in known else variables
    hint = "; chat_template_kwargs takes enable_thinking" if "enable_thinking" in known else ""
    raise InvalidInput(f"reasoning_effort {effort!r}: this model's chat template has no such setting: leave it out{hint}",
                       "reasoning_effort")
