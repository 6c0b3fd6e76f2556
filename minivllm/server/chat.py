"""From a chat request to its prompt, and to the specification of its output.

    messages, tools, reasoning_effort ... ──▶ chat template ──▶ prompt (token ids)
               flags, the end of the prompt ──▶ OutputSpec (reasoning? tool calls, in which format?)

A field that the template would silently leave out is refused. If the field could not change the prompt, it is only reported as ignored.
"""
from __future__ import annotations

from typing import Any

from minivllm.config import TOOL_CALL_PARSERS, ServerConfig
from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.tokenizer import Tokenizer
from minivllm.errors import InvalidInput, NotSupportedYet
from minivllm.server.errors import context_error
from minivllm.server.frontend import off_loop
from minivllm.server.output_spec import OutputSpec
from minivllm.server.protocol import ChatRequest
from minivllm.server.reasoning import CLOSE, OPEN, output_start
from minivllm.server.tool_parsers import PARSERS, guess_parser
from minivllm.server.tools import ToolSpec

MAX_TOKEN_CHARACTERS = 256  # no vocabulary has longer tokens


class ChatPreprocessor:
    """Turns chat requests into prompts, as the server's flags and the model's template demand."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None, max_model_len: int) -> None:
        self._config = config
        self._max_model_len = max_model_len
        template = None if tokenizer is None else tokenizer.chat_template
        if config.enable_auto_tool_choice and self._call_format(template) is None:
            raise InvalidInput("enable_auto_tool_choice needs the format of the model's calls, and the chat template does not show it: add "
                               f"--tool-call-parser {'|'.join(TOOL_CALL_PARSERS)}", "tool_call_parser")

    async def prompt(self, body: ChatRequest, tokenizer: Tokenizer, ignored: list[str]) -> tuple[list[int], OutputSpec | None]:
        """The prompt's token ids, and the specification of an output that is more than text. Appends to `ignored`."""
        template = self._template(body, tokenizer)
        tools = body.tool_spec()
        call_format = self._auto_format(template, tools) if tools is not None and tools.mode == "auto" else None
        messages = body.conversation(ignored)
        if template is not None:
            messages = _adapt(template, messages, ignored)
        variables = _variables(body, template, ignored)
        opens_answer = body.add_generation_prompt if body.add_generation_prompt is not None else not body.continue_final_message
        if body.include_reasoning is False and self._config.reasoning_parser is None:
            raise InvalidInput("include_reasoning needs a reasoning parser: start the server with --reasoning-parser, or leave it out",
                               "include_reasoning")

        def write() -> tuple[list[int], OutputSpec | None]:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens_answer, continue_final_message=bool(body.continue_final_message),
                tools=None if tools is None else tools.for_template(), chat_template=template, tokenize=False, **variables,
            )
            assert isinstance(text, str)
            continued = messages[-1]["content"] if body.continue_final_message else ""
            return tokenizer.encode(text, add_special_tokens=False), self._output_spec(body, tokenizer, tools, call_format, text, continued)

        size = sum(len(message["content"]) for message in messages)
        check_length(size, self._max_model_len, "messages")
        return await off_loop(size + (0 if tools is None else len(str(tools.functions))), write)

    def _template(self, body: ChatRequest, tokenizer: Tokenizer) -> ChatTemplate | None:
        if body.chat_template is None:
            return tokenizer.chat_template
        if not self._config.trust_request_chat_template:
            raise InvalidInput("chat_template in a request needs a server started with --trust-request-chat-template: leave it out",
                               "chat_template")
        return ChatTemplate(body.chat_template)

    def _call_format(self, template: ChatTemplate | None) -> str | None:
        return self._config.tool_call_parser or (None if template is None else guess_parser(template.for_tools().source))

    def _auto_format(self, template: ChatTemplate | None, tools: ToolSpec) -> str:
        """The format of the calls that the model chooses to make."""
        field = "function_call" if tools.legacy else "tool_choice"
        if self._config.enable_auto_tool_choice is False:
            raise InvalidInput(f"{field} 'auto' is turned off: start the server with --enable-auto-tool-choice, or choose another", field)
        if template is not None and "tools" not in template.for_tools().variables:
            return "hermes"  # never used: rendering fails, because the template does not support tools
        found = self._call_format(template)
        if tools.first_strict is not None and found not in (None, "hermes"):
            where = f"functions.{tools.first_strict}.strict" if tools.legacy else f"tools.{tools.first_strict}.function.strict"
            raise NotSupportedYet(f"{where} with {field} 'auto' is not supported yet in the format {found}, only in hermes: leave strict "
                                  "out, or require a call", where)
        if found is None:
            raise InvalidInput(f"{field} 'auto' needs the format of the model's calls, and the chat template does not show it: start the "
                               f"server with --enable-auto-tool-choice --tool-call-parser {'|'.join(TOOL_CALL_PARSERS)}, or name a "
                               "function", field)
        return found

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
            special_ids={marker: found for marker in markers if (found := _special_id(tokenizer, marker)) is not None},
        )


def check_length(characters: int, max_model_len: int, param: str) -> None:
    """Refuse a text that cannot fit the context whatever its tokens are, before it is tokenized."""
    if characters > max_model_len * MAX_TOKEN_CHARACTERS:
        raise context_error(characters, max_model_len, param, unit="characters")


def _special_id(tokenizer: Tokenizer, marker: str) -> int | None:
    """The id of a marker that is a special token."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.is_special(ids[0]) else None


def _adapt(template: ChatTemplate, messages: list[dict[str, Any]], ignored: list[str]) -> list[dict[str, Any]]:
    """Messages without what this template does not handle. The developer role is OpenAI's newer name of the system role."""
    source = template.for_tools().source
    adapted = []
    for i, message in enumerate(messages):
        if message["role"] == "developer" and "developer" not in source:
            message = {**message, "role": "system"}
        if "reasoning_content" in message and "reasoning_content" not in source:
            message = {name: value for name, value in message.items() if name != "reasoning_content"}
            ignored.append(f"messages.{i}.reasoning_content")
        adapted.append(message)
    return adapted


def _variables(body: ChatRequest, template: ChatTemplate | None, ignored: list[str]) -> dict[str, Any]:
    """The template's variables beside messages and tools."""
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
    raise InvalidInput(f"reasoning_effort {effort!r}: this model's chat template has no such setting: leave it out{hint}",
                       "reasoning_effort")
