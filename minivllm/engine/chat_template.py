"""Chat templates: they write a conversation as the text that the model was trained on.

A template is a Jinja program that comes with the model. It runs in Jinja's sandbox and gets only plain data. It has the helpers that
templates on the hub use: `raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls, and the `{% generation %}` tag,
which marks the assistant's words for training and has no effect here.

Some models have a second template, "tool_use", for conversations with tools. `chat_prompt` decides which one is used, and in which form
it gets the messages.
"""
from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.engine.conversation import plain
from minivllm.errors import InvalidInput

if TYPE_CHECKING:
    import jinja2

BUILT_IN = ("tool_chatml",)  # templates that are part of this package
MAX_PRODUCT = 2**32  # of numbers, or characters of a repeated text
MAX_POWER = 64  # base and exponent
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of the final message in the rendered text


def built_in_template(name: str) -> str:
    """The source of one of `BUILT_IN`."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


class ChatTemplate:
    """A template. It is compiled on first use. `tool_use` is the source of the second template, for conversations with tools."""

    def __init__(self, source: str, tool_use: str | None = None) -> None:
        self.source = source
        self.tool_use = None if tool_use is None else ChatTemplate(tool_use)

    def for_tools(self) -> ChatTemplate:
        """The template for conversations with tools."""
        return self.tool_use or self

    @cached_property
    def variables(self) -> frozenset[str]:
        """Every name that the template reads."""
        from jinja2 import TemplateError, nodes

        try:
            tree = _environment().parse(self.source)
        except TemplateError:
            return frozenset()  # `render` raises the error
        return frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None, variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The messages as text, exactly as they are given.

        `add_generation_prompt` opens the assistant's answer; `continue_final_message` leaves the last message open instead, in its
        reasoning if it has nothing else.
        """
        from jinja2 import TemplateError

        chat = list(messages)
        if continue_final_message:
            field = "reasoning_content" if chat[-1].get("reasoning_content") and not chat[-1].get("content") else "content"
            chat[-1] = {**chat[-1], field: _with_tag(chat[-1].get(field))}
        names = {"messages": chat, "add_generation_prompt": add_generation_prompt, **plain(dict(variables or {}))}
        template = _compiled(self.source)
        try:
            try:
                text = template.render(tools=plain(list(tools)) if tools else None, documents=None, **names)  # None, as in Transformers
            except TypeError:
                if tools:
                    raise
                text = template.render(names)  # `tools is defined` was taken for a list
        except TemplateError as error:  # the template called raise_exception, since the model does not take such a conversation
            raise InvalidInput(f"the chat template refused the messages: {error}", "messages") from None
        except RecursionError:
            raise InvalidInput("the chat template cannot write these messages: they, or the template, are nested too deeply",
                               "messages") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidInput(f"the chat template cannot write these messages: {error}", "messages") from None
        return _cut_at_tag(text) if continue_final_message else text


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    from jinja2 import TemplateError

    try:
        return _environment().from_string(source)
    except TemplateError as error:
        raise InvalidInput(f"the chat template is not valid Jinja: {error}", "chat_template") from None


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


def _environment() -> jinja2.Environment:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    import jinja2.runtime
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

    class BoundedEnvironment(ImmutableSandboxedEnvironment):
        """A sandbox in which no single operation makes a huge value. Time is limited where the template is used."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if isinstance(value, (str, list, tuple)) else abs(value) if isinstance(value, int) else 1
                     for value in (left, right)]
            if (operator == "*" and sizes[0] * sizes[1] > MAX_PRODUCT) or (operator == "**" and max(sizes) > MAX_POWER):
                raise OverflowError(f"{operator} of large values")
            return super().call_binop(context, operator, left, right)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
