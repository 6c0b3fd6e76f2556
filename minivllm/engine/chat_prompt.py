"""From a conversation to the text of a prompt: the chat template gets the messages in the form that it can write.

    conversation ─▶ tools: the template's own place, or the generic prompt
                 ─▶ calls, roles and content as the template's traits say ─▶ render ─▶ is the text of every message there?

A message whose text the template leaves out is refused by name, because the model would answer something else than the client sent.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.conversation import Message, arguments_object, conversation, plain, text_of
from minivllm.engine.template_traits import PROBE_TOOL, CallTraits, TemplateTraits, content_in, probe
from minivllm.engine.tool_prompt import results_as_user, tool_description, with_system, without_tool_messages
from minivllm.errors import InvalidInput

GENERIC_FORMAT = "hermes"  # of calls in the generic tool prompt, if no other is requested
MAX_CACHED_MESSAGES = 64  # of a conversation whose outline is cached
log = logging.getLogger(__name__)
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What is written beside the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    call_format: str = GENERIC_FORMAT  # of the generic tool prompt, and of earlier calls that the template cannot write
    generic_tools: bool = False  # describe tools by the generic prompt even if the template has a place for them
    add_generation_prompt: bool = True  # open the assistant's answer
    continue_final_message: bool = False  # leave the last message open
    fold_system: bool = False  # system messages become a part of the user's
    variables: Mapping[str, Any]


def write_chat(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
    """The conversation as text."""
    if options.add_generation_prompt and options.continue_final_message:
        raise InvalidInput(
            "add_generation_prompt opens a new message and continue_final_message continues the last one: set one of them",
            "continue_final_message",
        )
    chat = conversation(messages)
    try:
        text = _write(template, chat, options)
    except InvalidInput as error:  # some templates take only functions with a description, or only parameters with one type
        if not options.tools or options.generic_tools:
            raise
        log.info("these tools are described by a generic prompt: %s", error.message)
        try:
            return write_chat(template, chat, replace(options, generic_tools=True))
        except InvalidInput:
            raise error from None
    lost = _lost(template, chat, options)
    if lost is not None and chat[lost]["role"] == "system":  # some templates have a place for it only while the last message is a user's
        options = replace(options, fold_system=True)
        text, lost = _write(template, chat, options), _lost(template, chat, options)
    if lost is not None:
        where = f"messages.{lost}.content"
        raise InvalidInput(f"{where}: this model's chat template leaves this message (role {chat[lost]['role']!r}) out of the prompt: "
                           "leave it out, or send it in another role", where)
    return text


def takes_tools(template: ChatTemplate) -> bool:
    """Whether the template has a place for tools."""
    return template_traits(template.for_tools().source, True).tools


@lru_cache(maxsize=64)
def template_traits(source: str, with_tools: bool) -> TemplateTraits:
    """What a template can write."""
    template = ChatTemplate(source)

    def render(messages: Sequence[Message]) -> str | None:
        try:
            return template.render(messages, tools=[PROBE_TOOL] if with_tools else None, variables=_TOKENS)
        except InvalidInput as error:
            if error.param == "chat_template":  # not valid Jinja
                raise
            return None

    return probe(render, with_tools)


def _choose(template: ChatTemplate, has_calls: bool, options: ChatOptions) -> tuple[ChatTemplate, TemplateTraits]:
    """The template that is used. Its trait `tools` is whether it writes the request's tools itself."""
    if options.tools and not options.generic_tools:
        traits = template_traits(template.for_tools().source, True)
        if traits.tools:
            return template.for_tools(), traits
    if template.tool_use is not None and has_calls and not options.tools:  # earlier calls
        traits = template_traits(template.tool_use.source, False)
        if traits.calls is not None:
            return template.tool_use, traits
    return template, template_traits(template.source, False)


def _write(template: ChatTemplate, chat: Sequence[Message], options: ChatOptions) -> str:
    chosen, traits = _choose(template, any(message.get("tool_calls") for message in chat), options)
    call_format = options.call_format
    if "developer" not in chosen.source:
        chat = [{**message, "role": "system"} if message["role"] == "developer" else message for message in chat]
    if options.tools and not traits.tools:
        chat = without_tool_messages(with_system(chat, tool_description(options.tools, call_format)), call_format)
    elif traits.calls is None:
        chat = without_tool_messages(chat, call_format)
    else:
        chat = _calls_for(traits.calls, chat)
    if traits.system is None or options.fold_system:
        chat = _without_system(chat)
    elif not traits.several_systems:
        chat = _with_one_system(chat)
    return chosen.render(
        [_with_content(message, traits) for message in chat], tools=plain(list(options.tools)) if traits.tools else None,
        add_generation_prompt=options.add_generation_prompt, continue_final_message=options.continue_final_message,
        variables=options.variables,
    )


def _with_content(message: Message, traits: TemplateTraits) -> Message:
    """The message with content of the form that the template takes from its role."""
    content = message["content"]
    if content is None and traits.calls is not None and traits.calls.null_content and message.get("tool_calls"):
        return message
    if traits.form(message["role"]) == "text":
        return {**message, "content": text_of(content)}
    if isinstance(content, list) or (not content and message.get("tool_calls")):
        return message
    return {**message, "content": content_in("parts", content or "")}


def _without_system(chat: Sequence[Message]) -> list[Message]:
    """The system messages as the beginning of the next user message, for templates that refuse them or leave them out."""
    folded: list[Message] = []
    system: list[str] = []
    for message in chat:
        if message["role"] == "system":
            system.append(text_of(message["content"]))
        elif system and message["role"] == "user":
            folded.append({**message, "content": "\n\n".join([*system, text_of(message["content"])])})
            system = []
        else:
            folded.append(message)
    return [*folded, {"role": "user", "content": "\n\n".join(system)}] if system else folded


def _with_one_system(chat: Sequence[Message]) -> list[Message]:
    """The system messages at the start as one. Agents send several, and some templates refuse all but the first message."""
    rest = list(itertools.dropwhile(lambda message: message["role"] == "system", chat))
    texts = [text_of(message["content"]) for message in chat[:len(chat) - len(rest)]]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


# -- calls ------------------------------------------------------------------------------------------------------------


def _calls_for(traits: CallTraits, chat: Sequence[Message]) -> list[Message]:
    """The conversation with calls and results as a template with these traits takes them."""
    written: list[Message] = []
    for message in chat:
        calls = [_call_for(traits, call) for call in message.get("tool_calls", ())]
        if message["role"] == "tool" and traits.short_ids and "tool_call_id" in message:
            message = {**message, "tool_call_id": short_id(message["tool_call_id"])}
        elif calls and traits.beside_text != "kept" and text_of(message["content"]):
            if traits.beside_text == "split":  # two messages, so that neither the text nor the calls are lost
                written.append({name: value for name, value in message.items() if name != "tool_calls"})
            message = {"role": message["role"], "content": None}
        if not calls:
            written.append(message)
        elif traits.several or len(calls) == 1:
            written.append({**message, "tool_calls": calls})
        else:
            written += _one_by_one(message, calls)
    if not traits.several:
        written = _results_after_calls(written)
    return written if traits.results else results_as_user(written)


def _call_for(traits: CallTraits, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = arguments_object(function["arguments"]) if traits.arguments == "object" else function["arguments"]
    if traits.arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str) and not traits.raw_arguments:  # no JSON, and the template takes objects only
        arguments = {"arguments": arguments}
    call_id = short_id(call["id"]) if traits.short_ids else call["id"]
    return {**call, "id": call_id, "function": {**function, "arguments": arguments}}


def short_id(call_id: str) -> str:
    """An id of nine letters and digits, as some templates demand. The same id always becomes the same one."""
    return call_id if re.fullmatch("[A-Za-z0-9]{9}", call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _one_by_one(message: Message, calls: Sequence[dict[str, Any]]) -> list[Message]:
    """A message with the first call, and one message for each further call."""
    return [{**message, "content": message["content"] if i == 0 else None, "tool_calls": [call]} for i, call in enumerate(calls)]


def _results_after_calls(chat: Sequence[Message]) -> list[Message]:
    """The conversation with each result directly after its call. Ids may occur again in later turns."""
    ordered: list[Message] = []
    for message in chat:
        at = i = len(ordered)
        while message["role"] == "tool" and i and (ordered[i - 1]["role"] == "tool" or ordered[i - 1].get("tool_calls")):
            i -= 1
            if any(call["id"] == message.get("tool_call_id") for call in ordered[i].get("tool_calls", ())):
                at = i + 1
                break
        ordered.insert(at, message)
    return ordered


# -- lost messages ----------------------------------------------------------------------------------------------------


Outline: TypeAlias = tuple[tuple[str, int, int], ...]  # role, number of parts, and number of calls of each message


def _lost(template: ChatTemplate, chat: Sequence[Message], options: ChatOptions) -> int | None:
    """Index of the first message whose text would not be in the prompt."""
    def parts(message: Message) -> int:
        """-1: a string. 0: no text that must be written."""
        content = message["content"]
        if message.get("tool_calls") or not text_of(content).strip():  # some templates leave out text beside calls, as in training
            return 0
        return len(content) if isinstance(content, list) else -1

    outline = tuple((message["role"], parts(message), len(message.get("tool_calls", ()))) for message in chat)
    find = _lost_number if len(outline) <= MAX_CACHED_MESSAGES else _lost_number.__wrapped__
    tool_use = None if template.tool_use is None else template.tool_use.source
    return find(template.source, tool_use, outline, bool(options.tools), options.generic_tools, options.fold_system)


@lru_cache(maxsize=256)
def _lost_number(
    source: str, tool_use: str | None, outline: Outline, with_tools: bool, generic_tools: bool, fold_system: bool,
) -> int | None:
    """`_lost` by trying: a conversation of the same outline, whose texts are numbers, is rendered. A number that is missing was lost.

    (The real texts may be trimmed or shortened on purpose, as reasoning is, and may occur in the template too.)
    """
    chat: list[Message] = []
    for i, (role, parts, calls) in enumerate(outline):
        numbers = [f"7{i:06d}{j:03d}9" for j in range(abs(parts))]
        content: Any = [{"type": "text", "text": number} for number in numbers] if parts > 0 else "".join(numbers)
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        chat.append({"role": role, "content": content, **({"tool_calls": [call] * calls} if calls else {})})
    tools = [PROBE_TOOL] if with_tools else ()
    options = ChatOptions(tools=tools, generic_tools=generic_tools, fold_system=fold_system, variables=_TOKENS)
    try:
        text = _write(ChatTemplate(source, tool_use), conversation(chat), options)
    except InvalidInput:
        return None  # the template looks at more than the outline
    return next((i for i, (_, parts, _) in enumerate(outline) if any(f"7{i:06d}{j:03d}9" not in text for j in range(abs(parts)))), None)
