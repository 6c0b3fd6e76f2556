"""From a chat request to its prompt, and to how the answer will be read.

    messages, tools, reasoning_effort ... ──▶ chat template ──▶ prompt (token ids)
                        flags, the end of the prompt ──▶ Reading (reasoning? calls, in which format?)

What a template would leave out in silence is refused, or named among the ignored fields if it could not have changed the text.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.server.config import TOOL_CALL_PARSERS, ServerConfig
from minivllm.server.protocol import ChatRequest
from minivllm.server.reading import Reading
from minivllm.server.reasoning import CLOSE, OPEN, beginning
from minivllm.server.tool_parsers import PARSERS, guess_parser
from minivllm.server.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A chat request, checked; `write` makes the prompt, which may take a while."""

    messages: list[dict[str, Any]]
    tools: ToolUse | None
    size: int  # characters, about
    write: Callable[[], tuple[list[int], Reading | None]]


class Chats:
    """What a server's flags and its model's template make of chat requests."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None) -> None:
        self._config = config
        template = None if tokenizer is None else tokenizer.chat_template
        if config.enable_auto_tool_choice and self._format(template) is None:
            raise InvalidInput("enable_auto_tool_choice needs the format of the model's calls, which its chat template does not tell: add "
                               f"--tool-call-parser {'|'.join(TOOL_CALL_PARSERS)}", "tool_call_parser")

    def draft(self, body: ChatRequest, tokenizer: Tokenizer, ignored: list[str]) -> Draft:
        """Check all that needs no prompt. Adds to `ignored`."""
        template = self._template(body, tokenizer)
        use = body.tool_use()
        call_format = self._auto_format(template, use) if use is not None and use.mode == "auto" else None
        messages = body.conversation(ignored)
        if template is not None:
            messages = _for_template(template, messages, ignored)
        variables = _variables(body, template, ignored)
        opens = body.add_generation_prompt if body.add_generation_prompt is not None else not body.continue_final_message
        if body.include_reasoning is False and self._config.reasoning_parser is None:
            raise InvalidInput("include_reasoning needs reasoning to be told apart: start the server with --reasoning-parser, or leave it "
                               "out", "include_reasoning")

        def write() -> tuple[list[int], Reading | None]:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens, continue_final_message=bool(body.continue_final_message),
                tools=None if use is None else use.for_template(), chat_template=template, tokenize=False, **variables,
            )
            assert isinstance(text, str)
            continued = messages[-1]["content"] if body.continue_final_message else ""
            return tokenizer.encode(text, add_special_tokens=False), self._reading(body, tokenizer, use, call_format, text, continued)

        size = sum(len(message["content"]) for message in messages) + (0 if use is None else len(str(use.functions)))
        return Draft(messages=messages, tools=use, size=size, write=write)

    def _template(self, body: ChatRequest, tokenizer: Tokenizer) -> ChatTemplate | None:
        if body.chat_template is None:
            return tokenizer.chat_template
        if not self._config.trust_request_chat_template:
            raise InvalidInput("chat_template is taken from requests only by a server that was started with --trust-request-chat-template: "
                               "leave it out", "chat_template")
        return ChatTemplate(body.chat_template)

    def _format(self, template: ChatTemplate | None) -> str | None:
        return self._config.tool_call_parser or (None if template is None else guess_parser(template.for_tools().source))

    def _auto_format(self, template: ChatTemplate | None, use: ToolUse) -> str:
        field = "function_call" if use.legacy else "tool_choice"
        if self._config.enable_auto_tool_choice is False:
            raise InvalidInput(f"{field} 'auto' is turned off: start the server with --enable-auto-tool-choice, or choose another", field)
        if template is not None and "tools" not in template.for_tools().variables:
            return "hermes"  # never used: writing the prompt will say that the template has no place for tools
        found = self._format(template)
        if use.strict is not None and found not in (None, "hermes"):
            where = f"functions.{use.strict}.strict" if use.legacy else f"tools.{use.strict}.function.strict"
            raise NotSupportedYet(f"{where} with {field} 'auto' is not supported yet in the format {found}, only in hermes: leave strict "
                                  "out, or require a call", where)
        if found is None:
            raise InvalidInput(f"{field} 'auto' needs the format of the model's calls, which its chat template does not tell: start the "
                               f"server with --enable-auto-tool-choice --tool-call-parser {'|'.join(TOOL_CALL_PARSERS)}, or name a "
                               "function", field)
        return found

    def _reading(
        self, body: ChatRequest, tokenizer: Tokenizer, use: ToolUse | None, call_format: str | None, prompt: str, continued: str,
    ) -> Reading | None:
        name = self._config.reasoning_parser
        if name is None and use is None:
            return None
        marks = (*(() if name is None else (OPEN, CLOSE)), *(() if call_format is None else PARSERS[call_format].MARKERS))
        return Reading(
            begin="answer" if name is None else beginning(name, prompt, continued), splits=name is not None,
            include_reasoning=body.include_reasoning is not False, tools=use, format=call_format,
            special_ids={mark: found for mark in marks if (found := _special_id(tokenizer, mark)) is not None},
        )


def _special_id(tokenizer: Tokenizer, mark: str) -> int | None:
    """The special token that a mark is, if it is one."""
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.is_special(ids[0]) else None


def _for_template(template: ChatTemplate, messages: list[dict[str, Any]], ignored: list[str]) -> list[dict[str, Any]]:
    """Messages as this template knows them: the developer role is OpenAI's newer name of the system role."""
    source = template.for_tools().source
    fitted = []
    for i, message in enumerate(messages):
        if message["role"] == "developer" and "developer" not in source:
            message = {**message, "role": "system"}
        if "reasoning_content" in message and "reasoning_content" not in source:
            message = {name: value for name, value in message.items() if name != "reasoning_content"}
            ignored.append(f"messages.{i}.reasoning_content")
        fitted.append(message)
    return fitted


def _variables(body: ChatRequest, template: ChatTemplate | None, ignored: list[str]) -> dict[str, Any]:
    """What the template is given beside messages and tools."""
    known = frozenset() if template is None else template.variables | template.for_tools().variables
    variables = dict(body.chat_template_kwargs or {})
    ignored += [f"chat_template_kwargs.{name}" for name in variables if name not in known]
    effort = body.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in known:
        return {"reasoning_effort": effort, **variables}
    if effort == "none":
        return {"enable_thinking": False, **variables} if "enable_thinking" in known else variables
    hint = "; chat_template_kwargs takes enable_thinking" if "enable_thinking" in known else ""
    raise InvalidInput(f"reasoning_effort {effort!r} is nothing that this model's chat template takes: leave it out{hint}",
                       "reasoning_effort")
