"""Structured output: OpenAI's `response_format`, vLLM's `structured_outputs`, and vLLM's older `guided_*` fields.

    response_format      {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}},
                         {"type": "structural_tag", "structures": [{"begin": ..., "schema": ..., "end": ...}], "triggers": [...]}
    structured_outputs   {"json": schema} or regex, choice, grammar, json_object: the fields of `StructuredOutputsParams`
    guided_json ...      one field each

A request may use one of them. Each becomes a `StructuredOutputsParams` that keeps the client's field name for errors. A schema is always
enforced, so `strict` has no effect.
"""
from __future__ import annotations

import types
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, StringConstraints, WithJsonSchema

from minivllm.errors import InvalidInput
from minivllm.sampling_params import StructuredOutputsParams
from minivllm.server.strict import StrictModel

SchemaField: TypeAlias = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]})]


class JsonSchemaFormat(StrictModel):
    """The schema of a `response_format`."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: Any = None
    triggers: Any = None

    def structure(self, where: str) -> StructuredOutputsParams | None:
        """`where`: the name of the field in errors. `/v1/responses` has the schema in `text.format` itself."""
        inner = f"{where}.json_schema" if where == "response_format" else where
        if (self.json_schema is not None) != (self.type == "json_schema"):
            problem = "is required with" if self.json_schema is None else "is only for"
            raise InvalidInput(f"{inner} {problem} type json_schema", inner)
        if self.type == "structural_tag":
            tag = {"structures": self.structures, "triggers": self.triggers}
            return StructuredOutputsParams(structural_tag=tag, origin=where)
        for name in ("structures", "triggers"):
            if getattr(self, name) is not None:
                raise InvalidInput(f"{where}.{name} is only for type structural_tag: leave it out", f"{where}.{name}")
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.json_schema, origin=f"{inner}.schema")
        return None if self.type == "text" else StructuredOutputsParams(json_object=True, origin=where)


class StructuredOutputsFields(StrictModel):
    """`structured_outputs`. `StructuredOutputsParams` checks the values."""

    json_: Any = Field(default=None, alias="json")
    regex: Any = None
    choice: Any = None
    grammar: Any = None
    json_object: Any = None
    structural_tag: Any = None
    disable_any_whitespace: Any = None
    whitespace_pattern: Any = None
    UNSUPPORTED = types.MappingProxyType({
        "disable_fallback": (), "disable_additional_properties": (), "backend": (),
    })

    def structure(self) -> StructuredOutputsParams:
        names = {field.alias or name: getattr(self, name) for name, field in type(self).model_fields.items()}
        return StructuredOutputsParams.of({name: value for name, value in names.items() if value is not None})
