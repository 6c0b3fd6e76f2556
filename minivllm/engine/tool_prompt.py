"""Tools for chat models whose template has no place for them: a generic prompt, written as plain messages.

    tools           a part of the system message: the functions, and the format of calls that the output parser looks for
    earlier calls   text of the assistant, in the same format
    results         a message of the user, between <tool_response> and </tool_response>

Such a model was not trained to call functions in this way, but a capable model follows the description.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivllm.engine.conversation import Message, arguments_object, text_of


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # a string is the arguments' text


def _hermes(function: Mapping[str, Any]) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {_json(function["arguments"])}}}\n</tool_call>'


def _llama3(function: Mapping[str, Any]) -> str:
    return f'{{"name": {json.dumps(function["name"])}, "parameters": {_json(function["arguments"])}}}'


def _python(function: Mapping[str, Any]) -> str:
    arguments = arguments_object(function["arguments"])
    listed = arguments if isinstance(arguments, str) else ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{function['name']}({listed})"


@dataclass(frozen=True)
class CallFormat:
    """How calls are written. The keys of `CALL_FORMATS` are the names of the output parsers."""

    how: str  # the description for the model
    write: Callable[[Mapping[str, Any]], str]  # one call
    opening: str = ""
    separator: str = "\n"
    closing: str = ""

    def calls(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return self.opening + self.separator.join(self.write(call["function"]) for call in calls) + self.closing


_EXAMPLE = {"name": "the_function", "arguments": {"argument": "value"}}
CALL_FORMATS = {
    "hermes": CallFormat(f"write a JSON object with its name and its arguments between tags:\n{_hermes(_EXAMPLE)}", _hermes),
    "llama3_json": CallFormat(
        f"write nothing but a JSON object with its name and its arguments:\n{_llama3(_EXAMPLE)}", _llama3, separator="; "),
    "pythonic": CallFormat(f"write nothing but a list of calls in Python's syntax:\n[{_python(_EXAMPLE)}]", _python, "[", ", ", "]"),
}


def tool_description(tools: Sequence[Mapping[str, Any]], call_format: str) -> str:
    """The part of the system message."""
    functions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (f"# Tools\n\nYou can call these functions, described by JSON schemas:\n{functions}\n\nTo call a function, "
            f"{CALL_FORMATS[call_format].how}\nIts result is then shown between <tool_response> and </tool_response>. "
            "Answer without a call if you need none.")


def with_system(chat: Sequence[Message], text: str) -> list[Message]:
    """The conversation with a text at the end of its system message."""
    if chat[0]["role"] != "system":
        return [{"role": "system", "content": text}, *chat]
    return [{**chat[0], "content": f"{text_of(chat[0]['content'])}\n\n{text}".lstrip()}, *chat[1:]]


def without_tool_messages(chat: Sequence[Message], call_format: str) -> list[Message]:
    """Calls as the assistant's text, and results as messages of the user."""
    plain: list[Message] = []
    for message in chat:
        if message.get("tool_calls"):
            written = CALL_FORMATS[call_format].calls(message["tool_calls"])
            message = {**message, "content": f"{text_of(message['content'])}\n{written}".lstrip()}
            del message["tool_calls"]
        plain.append(message)
    return results_as_user(plain)


def results_as_user(chat: Sequence[Message]) -> list[Message]:
    """Results as messages of the user. Consecutive ones, and a question after them, are one message: some templates demand alternation."""
    plain: list[Message] = []
    after_result = False
    for message in chat:
        if message["role"] == "tool":
            text = f"<tool_response>\n{text_of(message['content'])}\n</tool_response>"
        elif message["role"] == "user" and after_result:
            text = text_of(message["content"])
        else:
            plain.append(message)
            after_result = False
            continue
        if after_result:
            plain[-1]["content"] += f"\n{text}"
        else:
            plain.append({"role": "user", "content": text})
            after_result = True
    return plain
