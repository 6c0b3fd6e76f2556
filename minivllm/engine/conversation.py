"""Conversations in one form: messages in OpenAI's form are checked and normalized once, for the server and for Python callers.

    role          one of the template's roles; "developer" is OpenAI's newer name of "system"
    content       a string, a list of text parts, or None
    tool_calls    {"id", "type", "function": {"name", "arguments"}}: arguments are an object, or its text as the client sent it
    other keys    as they are; null values are left out

`chat_prompt` then gives each chat template the variant of this form that it can write.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from minivllm.errors import InvalidInput

Message: TypeAlias = dict[str, Any]


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Checked copies of the messages, made of JSON types only. Each call has an id, and each result its call's id and function's name."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidInput('messages must be a non-empty list of {"role": ..., "content": ...}', "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidInput(f'messages[{i}] must be an object with a "role", got {message!r}', f"messages.{i}")
        _check_content(message.get("content"), f"messages.{i}.content")
    try:
        chat = [_normal(plain(dict(message)), f"messages.{i}") for i, message in enumerate(messages)]
    except RecursionError:
        raise InvalidInput("messages are nested too deeply: make them flatter", "messages") from None
    _connect_results(chat)
    return chat


def plain(value: Any) -> Any:
    """The same value, built from JSON types only: the templates' sandbox does not know which methods of other types are safe."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    for kind in (str, int, float):  # an enum or another subclass
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Copies of the tools, made of JSON types only."""
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidInput("tools must be a list of functions", "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None  # flat, or in OpenAI's form
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidInput(f'tools.{i} must be {{"type": "function", "function": {{"name": ...}}}}, got {tool!r}', f"tools.{i}")
    try:
        return [plain(tool) for tool in tools]
    except RecursionError:
        raise InvalidInput("tools are nested too deeply: make them flatter", "tools") from None


def text_of(content: Any) -> str:
    """A message's content as one string. Parts are separate lines, as in vLLM."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def arguments_object(arguments: dict[str, Any] | str) -> dict[str, Any] | str:
    """The arguments of an earlier call as an object, or the text as it is if it is none.

    A call that was cut off by the token limit has incomplete arguments. Clients send it back with the rest of the conversation.
    """
    if isinstance(arguments, dict):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _normal(message: Message, where: str) -> Message:
    content, calls = message.get("content"), message.get("tool_calls")
    message = {**{name: value for name, value in message.items() if value is not None}, "content": content}
    _check_id(message, "tool_call_id", where)
    if calls:
        if not isinstance(calls, list):
            raise InvalidInput(f"{where}.tool_calls must be a list of calls, got {calls!r}", f"{where}.tool_calls")
        message["tool_calls"] = [_call(call, f"{where}.tool_calls.{j}") for j, call in enumerate(calls)]
    else:
        message.pop("tool_calls", None)
    return message


def _check_content(content: Any, where: str) -> None:
    if not isinstance(content, (str, list, tuple, type(None))):
        raise InvalidInput(f"{where} must be a string, a list of text parts or null, got {content!r}", where)
    for j, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidInput(f'{where}.{j} must be {{"type": "text", "text": ...}}: this model takes text only', f"{where}.{j}")


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidInput(f'{where} must be {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r}', where)
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, (dict, str)):
        where += ".function.arguments"
        raise InvalidInput(f"{where} must be a JSON object or its text, got {arguments!r}", where)
    _check_id(call, "id", where)
    call = {name: value for name, value in call.items() if value is not None}
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _check_id(value: Mapping[str, Any], name: str, where: str) -> None:
    if not isinstance(value.get(name), (str, type(None))):
        raise InvalidInput(f"{where}.{name} must be a string, got {value[name]!r}", f"{where}.{name}")


def _connect_results(chat: Sequence[Message]) -> None:
    """Give calls without an id one, and results the id and the function's name of their call.

    A result names its call by id or, in OpenAI's form of 2023, by the function. Otherwise results are in the order of the calls.
    """
    open_calls: list[dict[str, Any]] = []
    for i, message in enumerate(chat):
        for j, call in enumerate(message.get("tool_calls", ())):
            call.setdefault("id", f"call_{i}_{j}")
            open_calls.append(call)
        if message["role"] != "tool":
            continue
        call_id, name = message.get("tool_call_id"), message.get("name")
        by_id = call_id is not None
        found = [call for call in open_calls if (call["id"] == call_id if by_id else name in (None, call["function"]["name"]))]
        if found:
            message.setdefault("tool_call_id", found[0]["id"])
            message.setdefault("name", found[0]["function"]["name"])
            open_calls.remove(found[0])
