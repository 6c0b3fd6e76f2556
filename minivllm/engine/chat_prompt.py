"""From a conversation to the text of a prompt: the chat template gets the messages in the form that it can write.

    conversation ─▶ tools: the template's own place, or the generic prompt
                 ─▶ calls, roles and content as the template's traits say ─▶ render ─▶ is the text of every message there?

If something is missing, or the template refuses the conversation, it is written in another way: system messages in the user's, or a generic
prompt for tools and calls. What no way can write is refused by name: the model would answer something else than the client sent.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.conversation import Message, arguments_object, checked_tools, conversation, plain, text_of
from minivllm.engine.template_traits import PROBE_TOOL, CallTraits, TemplateTraits, content_in, probe
from minivllm.engine.tool_prompt import results_as_user, tool_description, with_system, without_tool_messages
from minivllm.errors import InvalidInput

GENERIC_FORMAT = "hermes"  # of calls in the generic tool prompt, if no other is requested
MAX_CACHED_OUTLINE = 32_768  # characters
SYSTEM_ROLES = ("system", "developer")
log = logging.getLogger(__name__)
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What is written beside the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    call_format: str = GENERIC_FORMAT  # of the generic tool prompt, and of earlier calls that the template cannot write
    generic_tools: bool = False  # generic prompt and calls as text even if the template has a place for them
    add_generation_prompt: bool = True  # open the assistant's answer
    continue_final_message: bool = False  # leave the last message open
    fold: Literal["nothing", "later", "all"] = "nothing"  # these system messages become a part of the user's (later: not at the start)
    developer_as_system: bool = False  # even if the template knows the role
    variables: Mapping[str, Any]


def write_chat(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
    """The conversation as text."""
    if options.add_generation_prompt and options.continue_final_message:
        raise InvalidInput(
            "add_generation_prompt opens a new message and continue_final_message continues the last one: set one of them",
            "continue_final_message",
        )
    chat = conversation(messages)
    options = replace(options, tools=checked_tools(options.tools))
    refusal: InvalidInput | None = None
    for way in _ways(chat, options):
        try:
            _check_complete(template, chat, way)
            text = _write(template, chat, way)
        except InvalidInput as error:
            if error.param == "chat_template":  # not valid Jinja
                raise
            refusal = refusal or error
        else:
            if way.generic_tools and not options.generic_tools and refusal is not None:
                log.info("a generic prompt for the tools and calls of a request, because: %s", refusal.message)
            return text
    assert refusal is not None
    raise refusal


def _ways(chat: Sequence[Message], options: ChatOptions) -> Iterator[ChatOptions]:
    """Ways to write the conversation: first as it is, then with more and more changes, as far as they could change anything."""
    roles = [message["role"] for message in chat]
    has_tools = bool(options.tools) or any(message.get("tool_calls") for message in chat)
    folds: list[Literal["nothing", "later", "all"]] = ["nothing"]
    folds += ["later"] if any(role in SYSTEM_ROLES for role in roles[_leading(chat):]) else []
    folds += ["all"] if options.tools or any(role in SYSTEM_ROLES for role in roles) else []
    for generic in (False, True) if has_tools and not options.generic_tools else (options.generic_tools,):
        for fold in folds:
            for renamed in (False, True) if "developer" in roles else (False,):
                yield replace(options, generic_tools=generic, fold=fold, developer_as_system=renamed)


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
    if template.tool_use is not None and has_calls and not options.tools and not options.generic_tools:  # earlier calls
        traits = template_traits(template.tool_use.source, False)
        if traits.calls is not None:
            return template.tool_use, traits
    return template, template_traits(template.source, False)


def _write(template: ChatTemplate, chat: Sequence[Message], options: ChatOptions) -> str:
    chosen, traits = _choose(template, any(message.get("tool_calls") for message in chat), options)
    call_format = options.call_format
    if options.developer_as_system or "developer" not in chosen.source:
        chat = [{**message, "role": "system"} if message["role"] == "developer" else message for message in chat]
    if options.tools and not traits.tools:
        chat = without_tool_messages(with_system(chat, tool_description(options.tools, call_format)), call_format)
    elif traits.calls is None or options.generic_tools:
        chat = without_tool_messages(chat, call_format)
    else:
        chat = _calls_for(traits.calls, chat)
    start = 0 if traits.system is None or options.fold == "all" else _leading(chat)
    if start == 0 or options.fold == "later":
        chat = [*chat[:start], *_without_system(chat[start:])]
    if start and not traits.several_systems:
        chat = _with_one_system(chat)
    return chosen.render(
        [_with_content(message, traits) for message in chat], tools=options.tools if traits.tools else None,
        add_generation_prompt=options.add_generation_prompt, continue_final_message=options.continue_final_message,
        variables=options.variables,
    )


def _with_content(message: Message, traits: TemplateTraits) -> Message:
    """The message with content of the form that the template takes from its role."""
    content = message["content"]
    if content is None and traits.calls is not None and traits.calls.null_content and message.get("tool_calls"):
        return message
    form = traits.form(message["role"])
    if form == "text":
        return {**message, "content": text_of(content)}
    if form == "part" and content:
        content = text_of(content)
    if isinstance(content, list) or (not content and message.get("tool_calls")):
        return message
    return {**message, "content": content_in("parts", content or "")}


def _without_system(chat: Sequence[Message]) -> list[Message]:
    """The system messages as the beginning of the next user message, for templates that refuse them or leave them out."""
    folded: list[Message] = []
    system: list[str] = []
    for message in chat:
        if message["role"] == "system":
            system += _texts([message])
        elif system and message["role"] == "user":
            folded.append({**message, "content": "\n\n".join([*system, text_of(message["content"])])})
            system = []
        else:
            folded.append(message)
    if system and folded and folded[-1]["role"] == "user":  # some templates demand alternation
        folded[-1] = {**folded[-1], "content": "\n\n".join([text_of(folded[-1]["content"]), *system])}
    elif system:
        folded.append({"role": "user", "content": "\n\n".join(system)})
    return folded


def _leading(chat: Sequence[Message]) -> int:
    """How many system messages are at the start."""
    return next((i for i, message in enumerate(chat) if message["role"] not in SYSTEM_ROLES), len(chat))


def _with_one_system(chat: Sequence[Message]) -> list[Message]:
    """The system messages at the start as one. Agents send several, and some templates refuse all but the first message."""
    start = list(itertools.takewhile(lambda message: message["role"] == "system", chat))
    return [{"role": "system", "content": "\n\n".join(_texts(start))}, *chat[len(start):]] if start else list(chat)


def _texts(chat: Sequence[Message]) -> list[str]:
    """The texts of messages that are not empty."""
    return [text for message in chat if (text := text_of(message["content"])).strip()]


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


# -- what the template leaves out --------------------------------------------------------------------------------------


def _check_complete(template: ChatTemplate, chat: Sequence[Message], options: ChatOptions) -> None:
    """Refuse what would not be in the prompt, by trying: the conversation is rendered with numbers as texts, arguments and names of tools.

    (The real texts may be trimmed or shortened on purpose, as reasoning is, and may occur in the template too.)
    """
    wanted: dict[str, str] = {}  # the numbers, and what they stand for

    def number(where: str) -> str:
        new = f"7{len(wanted):09d}9"
        wanted[new] = where
        return new

    outline = {
        "chat": [_numbered(message, f"messages.{i}", number) for i, message in enumerate(chat)],
        "tools": [_numbered_tool(tool, number) for tool in options.tools], "variables": plain(dict(options.variables)),
        "fold": options.fold, "generic_tools": options.generic_tools, "developer_as_system": options.developer_as_system,
        "add_generation_prompt": options.add_generation_prompt, "call_format": options.call_format,
    }
    key = json.dumps({"wanted": wanted, **outline})
    find = _missing if len(key) <= MAX_CACHED_OUTLINE else _missing.__wrapped__
    where = find(template.source, None if template.tool_use is None else template.tool_use.source, key)
    if where == "tools":
        raise InvalidInput("tools: this model's chat template leaves some of them out of the prompt: send other tools, or none", where)
    if where is not None:
        role = chat[int(where.split(".")[1])]["role"]
        raise InvalidInput(f"{where}: this model's chat template leaves this message (role {role!r}) out of the prompt: "
                           "leave it out, or send it in another role", where)


def _numbered(message: Message, where: str, number: Callable[[str], str]) -> Message:
    """A message of the same form whose text and calls are numbers. Its other keys are kept: a template may look at them."""
    content = message["content"]
    if not text_of(content).strip():
        content = None if content is None else ""
    elif isinstance(content, list):
        content = [{"type": "text", "text": number(f"{where}.content")} for _ in content]
    else:
        content = number(f"{where}.content")
    of_call = ("tool_call_id", "name") if message["role"] == "tool" else ()  # `conversation` fills them in
    other = {name: "1" if isinstance(value, str) and len(value) > 32 else value for name, value in message.items() if name not in of_call}
    at = f"{where}.tool_calls"
    calls = [{"id": f"{at}.{j}", "function": {"name": "f", "arguments": {"value": number(at)}}}
             for j, _ in enumerate(message.get("tool_calls", ()))]
    return {**other, "content": content, "tool_calls": calls}


def _numbered_tool(tool: Mapping[str, Any], number: Callable[[str], str]) -> dict[str, Any]:
    name = {"name": f"f{number('tools')}"}
    return {**tool, "function": {**tool["function"], **name}} if "function" in tool else {**tool, **name}


@lru_cache(maxsize=256)
def _missing(source: str, tool_use: str | None, outline: str) -> str | None:
    """What stands for the first number that is not written."""
    options = json.loads(outline)
    wanted, chat = options.pop("wanted"), conversation(options.pop("chat"))
    try:
        text = _write(ChatTemplate(source, tool_use), chat, ChatOptions(**options))
    except InvalidInput:
        return None  # the real conversation is refused too, or the template looks at its texts
    written = set(re.findall(r"(?=(7\d{9}9))", text))  # one pass: there may be as many numbers as the request has room for
    return next((where for number, where in wanted.items() if number not in written), None)
