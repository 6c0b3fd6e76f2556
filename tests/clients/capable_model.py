"""A scripted model that is as capable as the clients' tests need, behind the real server.

    conversation, tools ─▶ answers in order of preference ─▶ the first one that the request's grammar allows
                           calls, JSON for a schema, text

It calls each tool that the user's message is about, answers in text once it has the results, and fills schemas with words and numbers of
the conversation. The chat template writes the conversation as JSON, so the model sees exactly what the server gives to a template. The
grammar is the server's and is checked with the engine's compiler: a grammar that excludes the right answer fails the test.

`python -m tests.clients.capable_model PORT` serves it for clients that are tried by hand.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minivllm.engine.chat_template import ChatTemplate
from minivllm.engine.grammar_compiler import GrammarCompiler
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams
from tests.server.scripted import EOS, LiveServer, ScriptedEngine, Steps, scripted_server

MODEL = "capable"
# The comment tells the server the format of calls, and that the template writes tool calls.
TEMPLATE = '{# <tool_call> {"name": ..., "arguments": ...} </tool_call>; tool_calls #}{{ {"messages": messages, "tools": tools} | tojson }}'


class CapableEngine(ScriptedEngine):
    """The scripted engine with this model."""

    verbose = False  # print each conversation with the answer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer.chat_template = ChatTemplate(TEMPLATE)
        self.script = self.capable_script
        self.conversations: list[dict[str, Any]] = []  # what the template wrote, for tests to inspect
        self._compiler = GrammarCompiler(self.tokenizer, [EOS])

    def capable_script(self, prompt: Sequence[int], params: SamplingParams, child: int) -> Steps:
        conversation = _conversation(self.tokenizer.decode(prompt))
        self.conversations.append(conversation)
        text = self._answer(conversation, params.structured_outputs)
        if self.verbose:
            print(json.dumps([conversation, text], indent=1, ensure_ascii=False), flush=True)
        stream = self.tokenizer.stream(prompt)
        return [*(((t,), stream.push(t)) for t in self.tokenizer.encode(text, add_special_tokens=False)), ((EOS,), "")]

    def _answer(self, conversation: dict[str, Any], structure: StructuredOutputsParams | None) -> str:
        answers = _answers(conversation, structure)
        if structure is None:
            return answers[0]
        start = self._compiler.compile(structure)
        for answer in answers:
            matcher = start.deep_copy()
            tokens = self.tokenizer.encode(answer, add_special_tokens=False)
            if matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting():
                return answer
        raise InvalidInput(f"the grammar of {structure.where} allows none of {answers}: {structure}", structure.origin)


def _conversation(prompt: str) -> dict[str, Any]:
    """The JSON that the template wrote, or a completion's prompt as a conversation of one message."""
    with contextlib.suppress(ValueError):
        value = json.loads(prompt)
        if isinstance(value, dict) and "messages" in value:
            return value
    return {"messages": [{"role": "user", "content": prompt}], "tools": None}


# -- what to say ------------------------------------------------------------------------------------------------------


def _answers(conversation: dict[str, Any], structure: StructuredOutputsParams | None) -> list[str]:
    messages = conversation["messages"]
    functions = [tool["function"] for tool in conversation["tools"] or ()]
    asked = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), 0)
    question = _text(messages[asked])
    called = {call["function"]["name"] for message in messages[asked:] for call in message.get("tool_calls") or ()}
    results = [_text(message) for message in itertools.takewhile(lambda message: message["role"] == "tool", reversed(messages))][::-1]

    def fill(schema: dict[str, Any] | None) -> Any:
        return SchemaFiller(question, results).fill(schema or {"type": "object", "properties": {}})

    keys = {key: f"some {key}" for key in re.findall(r"['\"`](\w+)['\"`]", question)}  # for JSON without a schema
    text = [f"The result is {', '.join(results)}." if results else f"You said: {question[:200]}", _json(keys)]
    values = [fill(schema) for schema in _schemas(structure)]
    final = [*((structure and structure.choice) or ()), *(_json(value) for value in values if value and not _is_call(value)),
             *(reversed(text) if keys and "JSON" in question else text)]
    wanted = [f for f in functions if f["name"] not in called and _is_about(f, question)]
    chosen = wanted or [f for f in functions if f["name"] not in called] or functions
    free = [_hermes(f["name"], fill(f.get("parameters"))) for f in chosen]
    required = [{"name": f["name"], "parameters": fill(f.get("parameters"))} for f in chosen]
    calls = ["\n".join(free), *free, _json(required), *(_json([call]) for call in required),
             *(_json(fill(f.get("parameters"))) for f in functions)] if functions else []
    return [*calls, *final] if wanted else [*final, *calls]


def _hermes(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_call(value: Any) -> bool:
    """Whether a value is the server's form of calls, and not an answer."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and first.keys() in ({"name", "arguments"}, {"name", "parameters"})


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text", "") for part in content)


def _is_about(function: dict[str, Any], question: str) -> bool:
    """Whether a word of the function's name or description is in the question."""
    words = re.findall(r"[a-z]{4,}", f"{function['name']} {function.get('description') or ''}".lower())
    return bool(set(words) & set(re.findall(r"[a-z]{4,}", question.lower())))


def _schemas(structure: StructuredOutputsParams | None) -> list[dict[str, Any]]:
    """The JSON schemas of a structure. A grammar has them after `%json`."""
    if structure is None:
        return []
    if structure.json is not None:
        return [json.loads(structure.json) if isinstance(structure.json, str) else structure.json]
    grammar = structure.grammar or ""
    return [json.JSONDecoder().raw_decode(grammar, match.end())[0] for match in re.finditer(r"%json\s*(?=\{)", grammar)]


class SchemaFiller:
    """Values for a JSON schema. Numbers and names come from the question, other strings from the tools' results."""

    def __init__(self, question: str, results: Sequence[str]) -> None:
        self._question = question
        self._numbers = iter(re.findall(r"-?\d+(?:\.\d+)?", question))
        self._names = iter([*re.findall(r"'([^']+)'", question), *re.findall(r"(?<=[a-z:,] )[A-Z]\w+", question)])
        self._results = results
        self._root: dict[str, Any] = {}

    def fill(self, schema: dict[str, Any]) -> Any:
        self._root = schema
        return self._value(schema, "value")

    def _value(self, schema: Any, name: str) -> Any:
        if not isinstance(schema, dict):
            return None
        if "$ref" in schema:
            target: Any = self._root
            for key in schema["$ref"].removeprefix("#").strip("/").split("/") if schema["$ref"] != "#" else ():
                target = target[key]
            return self._value(target, name)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return next((value for value in schema["enum"] if str(value).lower() in self._question.lower()), schema["enum"][0])
        for key in ("anyOf", "oneOf", "allOf"):
            if key in schema:
                options = [option for option in schema[key] if option.get("type") != "null"]
                return self._value({**schema, key: None, **options[0]} if key == "allOf" else options[0], name)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        return self._of_type(next(k for k in kind if k != "null") if isinstance(kind, list) else kind, schema, name)

    def _of_type(self, kind: str, schema: dict[str, Any], name: str) -> Any:
        if kind == "object":
            return {key: self._value(value, key) for key, value in schema.get("properties", {}).items()}
        if kind == "array":
            return [self._value(schema.get("items", {}), name) for _ in range(max(1, schema.get("minItems", 1)))]
        if kind in ("integer", "number"):
            number = float(next(self._numbers, max(schema.get("minimum", 1), 1)))
            return int(number) if kind == "integer" or number.is_integer() else number
        if kind in ("boolean", "null"):
            return True if kind == "boolean" else None
        formats = {"date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z", "uuid": "123e4567-e89b-12d3-a456-426614174000",
                   "email": "a@b.org", "uri": "https://example.org/"}
        found = formats.get(schema.get("format", "")) or next(self._names, None)
        return found or (self._results[-1] if self._results else f"some {name}")


@contextlib.contextmanager
def capable_server(folder: Path, **settings: Any) -> Iterator[tuple[CapableEngine, LiveServer]]:
    """`folder`: of a tokenizer that has all bytes."""
    engine = CapableEngine(folder, max_model_len=100_000)
    with scripted_server(engine, served_model_name=(MODEL,), **settings) as live:
        yield engine, live


def main() -> None:
    from tests.conftest import write_tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_tokenizer(Path(folder))
        with capable_server(Path(folder), port=int(sys.argv[1])) as (engine, live):
            engine.verbose = True
            print(live.url, flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
