"""What a chat template can write, found by trying: short conversations are rendered, and their texts looked for in the result.

A template is a program, and reading it does not show what it does. Trying shows it, whatever its style:

    content      `{{ m.content }}` writes a string; `{% for part in m.content %}` writes nothing of it, and needs a list of parts;
                 `{{ m.content[0].text }}` writes the first part only
    arguments    `{{ call.arguments | tojson }}` needs an object; `+ call.arguments +` needs its JSON text
    null         `{% if m.content is none %}` needs None beside calls; `+ m.content +` needs ""
    ids          some templates refuse ids of calls that are not nine letters or digits
    roles        some templates refuse or leave out system messages, results of tools, tools, or calls

The texts are numbers, so a template that changes case or trims does not hide them. Traits are cached by the template's source.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from minivllm.engine.conversation import Message

Form: TypeAlias = Literal["text", "parts", "part"]  # a string, a list of parts, or a list of one part
Render: TypeAlias = Callable[[Sequence[Message]], str | None]  # None: the template refuses the messages

LONG_ID, SHORT_ID = "call_b7c1d09e4f2a48c6a3d58e10", "b7c1d09e4"
_USER, _SYSTEM, _ANSWER, _RESULT, _VALUE, _NAME = "73109465", "48120937", "91836504", "60274918", "27590416", "fn85039271"
_KEY = "arg50683917"
PROBE_TOOL: dict[str, Any] = {"type": "function", "function": {"name": _NAME, "description": "A function", "parameters": {
    "type": "object", "properties": {_KEY: {"type": "string", "description": "A text"}}, "required": [_KEY]}}}


@dataclass(frozen=True, kw_only=True)
class CallTraits:
    """How a template writes calls, and their results."""

    arguments: Literal["object", "text"]
    null_content: bool  # a message without text has the content None, not ""
    short_ids: bool  # nine letters or digits
    results: bool  # messages of role "tool"
    several: bool = True  # calls in one message
    beside_text: Literal["kept", "split", "dropped"] = "kept"  # text in a message with calls: written, needs its own message, or lost
    raw_arguments: bool = True  # arguments that are no JSON, as their text


@dataclass(frozen=True, kw_only=True)
class TemplateTraits:
    """What a template writes."""

    user: Form
    assistant: Form
    system: Form | None  # None: no system messages
    tool: Form
    tools: bool  # descriptions of functions
    calls: CallTraits | None  # None: no calls
    several_systems: bool = True  # more than one system message at the start

    def form(self, role: str) -> Form:
        """The form of a message's content."""
        found: Form | None = {"user": self.user, "assistant": self.assistant, "system": self.system, "tool": self.tool}.get(role)
        return found or self.user


def content_in(form: Form, text: str) -> Any:
    return text if form == "text" else [{"type": "text", "text": text}]


def probe(render: Render, with_tools: bool) -> TemplateTraits:
    """The traits of a template. `with_tools`: `render` passes `PROBE_TOOL`."""
    def shows(messages: Sequence[Message], *texts: str) -> bool:
        text = render(messages)
        return text is not None and all(part in text for part in texts)

    def form(role: str, text: str, before: list[Message], after: list[Message]) -> Form | None:
        one, other = content_in("part", text), content_in("part", _KEY)
        variants: dict[Form, Any] = {"text": text, "parts": one + other, "part": one}
        return next((form for form, content in variants.items()
                     if shows([*before, {"role": role, "content": content}, *after], text, *([_KEY] if form == "parts" else []))), None)

    user_form = form("user", _USER, [], []) or form("user", _USER, [{"role": "system", "content": _SYSTEM}], []) or "text"
    user: Message = {"role": "user", "content": content_in(user_form, _USER)}
    system_form = form("system", _SYSTEM, [], [user])
    answer_form = form("assistant", _ANSWER, [user], [user]) or form("assistant", _ANSWER, [user], []) or user_form
    calls, result_form = _probe_calls(render, user, answer_form, user_form)
    systems: list[Message] = [{"role": "system", "content": content_in(system_form or "text", text)} for text in (_SYSTEM, _VALUE)]
    starts = [[user], *([] if system_form is None else [[systems[0], user]])]
    return TemplateTraits(
        several_systems=shows([*systems, user], _SYSTEM, _VALUE, _USER),
        user=user_form, assistant=answer_form, system=system_form, tool=result_form, calls=calls,
        tools=with_tools and any(shows(start, _NAME, _USER) for start in starts),
    )


def _call(call_id: str, arguments: Any, value: str = _VALUE) -> dict[str, Any]:
    if arguments in ("object", "text"):
        arguments = {_KEY: value} if arguments == "object" else f'{{"{_KEY}": "{value}"}}'
    return {"id": call_id, "type": "function", "function": {"name": _NAME, "arguments": arguments}}


def _result(call_id: str, form: Form) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "name": _NAME, "content": content_in(form, _RESULT)}


def _probe_calls(render: Render, user: Message, answer_form: Form, user_form: Form) -> tuple[CallTraits | None, Form]:
    """Render a call in every combination of the variants, and choose the one that is written best."""
    def written(form: Form, *messages: Message) -> str:
        return render([user, *messages]) or render([user, *messages, {"role": "assistant", "content": content_in(answer_form, "1")}]) or ""

    best: tuple[tuple[Any, ...], dict[str, Any], Form] | None = None
    for short, null, arguments, has_result, form in itertools.product(
        (False, True), (True, False), ("object", "text"), (True, False), dict.fromkeys(("text", user_form)),
    ):
        call_id = SHORT_ID if short else LONG_ID
        message = {"role": "assistant", "content": None if null else "", "tool_calls": [_call(call_id, arguments)]}
        text = written(form, message, _result(call_id, form)) if has_result else written(form, message)
        if _NAME not in text or _VALUE not in text or _KEY not in text:
            continue
        is_json = f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text  # neither Python's form of an object nor JSON inside a JSON string
        score = (_RESULT in text, is_json, -text.count("None"), not short, null, arguments == "object")
        if best is None or score > best[0]:
            traits = {"arguments": arguments, "null_content": null, "short_ids": short, "results": score[0]}
            best = score, traits, form
    if best is None:
        return None, "text"
    _, traits, form = best
    call_id = SHORT_ID if traits["short_ids"] else LONG_ID
    empty = None if traits["null_content"] else ""
    results = [_result(call_id, form)] if traits["results"] else []
    other_id = call_id[::-1]
    others = [_result(other_id, form)] if traits["results"] else []

    def writes(messages: list[Message], *texts: str) -> bool:
        text = written(form, *messages)
        return all(part in text for part in texts)

    def calling(*calls: Any, content: Any = empty) -> Message:
        return {"role": "assistant", "content": content, "tool_calls": list(calls)}

    call, answer = _call(call_id, traits["arguments"]), content_in(answer_form, _ANSWER)
    kept = writes([calling(call, content=answer), *results], _VALUE, _ANSWER)
    rest = [*results, {"role": "assistant", "content": answer}, user]  # a template may count the messages
    split = not kept and writes([{"role": "assistant", "content": answer}, calling(call), *rest], _VALUE, _ANSWER)
    return CallTraits(
        **traits, beside_text="kept" if kept else "split" if split else "dropped",
        several=writes([calling(call, _call(other_id, traits["arguments"], _SYSTEM)), *results, *others], _VALUE, _SYSTEM),
        raw_arguments=writes([calling(_call(call_id, f'{{"{_VALUE}')), *results], _VALUE),
    ), form
