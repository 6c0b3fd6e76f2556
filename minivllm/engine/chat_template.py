"""Chat templates: they write a conversation as the text that the model was trained on.

A template is a Jinja program that comes with the model. It runs in Jinja's sandbox and gets only plain data. It has the helpers that
templates on the hub use: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls, and the `{% generation %}` tag,
which marks the assistant's words for training and has no effect here.

Some models have a second template, "tool_use", for conversations with tools. If a template ignores tools or tool calls, a conversation
with them is refused.
"""
from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.errors import InvalidInput

if TYPE_CHECKING:
    import jinja2

BUILT_IN = ("tool_chatml",)  # templates that are part of this package
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of the final message in the rendered text


def built_in_template(name: str) -> str:
    """The source of one of `BUILT_IN`."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


class ChatTemplate:
    """A template, compiled on first use. `tool_use` is the source of the second template, for conversations with tools."""

    def __init__(self, source: str, tool_use: str | None = None) -> None:
        self.source = source
        self._tool_use = None if tool_use is None else ChatTemplate(tool_use)

    def for_tools(self) -> ChatTemplate:
        """The template that is used for conversations with tools."""
        return self._tool_use or self

    @cached_property
    def variables(self) -> frozenset[str]:
        """Every name that the template reads."""
        from jinja2 import TemplateError, nodes

        try:
            tree = _environment().parse(self.source)
        except TemplateError:
            return frozenset()  # `render` raises the error
        return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")

    @cached_property
    def _compiled(self) -> jinja2.Template:
        from jinja2 import TemplateError

        try:
            return _environment().from_string(self.source)
        except TemplateError as error:
            raise InvalidInput(f"the chat template is not valid Jinja: {error}", "chat_template") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
        continue_final_message: bool = False, tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        `add_generation_prompt` opens the assistant's answer; `continue_final_message` leaves the last message open instead.
        """
        from jinja2 import TemplateError

        if self._tool_use is not None and (tools or any(message.get("tool_calls") for message in _messages(messages))):
            return self._tool_use.render(
                messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
                tools=tools, variables=variables,
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidInput(
                "add_generation_prompt opens a new message and continue_final_message continues the last one: set one of them",
                "continue_final_message",
            )
        chat = _messages(messages)
        self._check_tools(chat, tools)
        if continue_final_message:
            chat[-1] = {**chat[-1], "content": _with_tag(chat[-1].get("content"))}
        try:
            text: str = self._compiled.render(
                messages=chat, tools=_plain(list(tools)) if tools else None, documents=None,
                add_generation_prompt=add_generation_prompt, **_plain(dict(variables or {})),
            )
        except TemplateError as error:  # the template called raise_exception, since the model does not take such a conversation
            raise InvalidInput(f"the chat template refused the messages: {error}", "messages") from None
        except RecursionError:
            raise InvalidInput("the chat template cannot write these messages: they, or the template, are nested too deeply",
                               "messages") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidInput(f"the chat template cannot write these messages: {error}", "messages") from None
        return _cut_at_tag(text) if continue_final_message else text

    def _check_tools(self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> None:
        fix = 'use a model that was trained with tools, or a template for them, such as the built-in chat template "tool_chatml"'
        if tools and "tools" not in self.variables:
            raise InvalidInput(f"this model's chat template does not support tools: {fix}", "tools")
        for i, message in enumerate(chat):
            if message.get("tool_calls") and "tool_calls" not in self.source:
                where = f"messages.{i}.tool_calls"
                raise InvalidInput(f"{where}: this model's chat template cannot write tool calls: {fix}", where)


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidInput('messages must be a non-empty list of {"role": ..., "content": ...}', "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidInput(f'messages[{i}] must be an object with a "role", got {message!r}', f"messages.{i}")
    try:
        return [_plain(dict(message)) for message in messages]
    except RecursionError:
        raise InvalidInput("messages are nested too deeply: make them flatter", "messages") from None


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, changed to the form that templates expect: text parts joined, arguments of calls as objects."""
    plain = _messages(messages)
    for i, message in enumerate(plain):
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(_part_text(part, f"messages.{i}.content.{j}") for j, part in enumerate(message["content"]))
        if message.get("tool_calls"):
            message["tool_calls"] = [_with_object(call, f"messages.{i}.tool_calls.{j}") for j, call in enumerate(message["tool_calls"])]
    return plain


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidInput(f'{where} must be {{"type": "text", "text": ...}}: this model takes text only', where)
    text: str = part["text"]
    return text


def _with_object(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidInput(f'{where} must be {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r}', where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        where += ".function.arguments"
        raise InvalidInput(f"{where} must be a JSON object or its text, got {function.get('arguments')!r}", where)
    return {**call, "function": {**function, "arguments": arguments}}


def _with_tag(content: Any) -> Any:
    if isinstance(content, str):
        return content + _TAG
    if isinstance(content, list):
        for i in reversed(range(len(content))):
            if isinstance(content[i], dict) and isinstance(content[i].get("text"), str):
                return [*content[:i], {**content[i], "text": content[i]["text"] + _TAG}, *content[i + 1:]]
    raise InvalidInput("continue_final_message needs a final message with text to continue", "messages")


def _cut_at_tag(text: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0:
        raise InvalidInput(
            "the chat template does not write the final message as it is, so it cannot be continued", "continue_final_message",
        )
    kept_spacing = text[at: at + len(_TAG)] == _TAG
    return text[:at] if kept_spacing else text[:at].rstrip()  # the template trims messages, and has trimmed this one too


def _plain(value: Any) -> Any:
    """The same value, built from JSON types only: the sandbox does not know which methods of other types are safe."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    for kind in (str, int, float):  # an enum or another subclass
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  as its base class declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
