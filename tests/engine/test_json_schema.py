"""What is enforced of a JSON schema: declared keys only, annotations left out, and what cannot be enforced left open in tools."""
from __future__ import annotations

import json
from typing import Any

import pytest

from minivllm.engine.json_schema import FORMATS, closed, map_parts
from minivllm.engine.tool_schema import relaxed, why_not

pytest.importorskip("llguidance")

A, B = {"properties": {"a": {}}}, {"properties": {"b": {}}}
CLOSED_A, CLOSED_B = ({**part, "additionalProperties": False} for part in (A, B))


@pytest.mark.parametrize("schema, wanted", [
    (A, CLOSED_A),
    ({"properties": {"x": A, "m": {"type": "object"}}},
     {"properties": {"x": CLOSED_A, "m": {"type": "object"}}, "additionalProperties": False}),
    ({**A, "additionalProperties": True}, {**A, "additionalProperties": True}),
    ({**A, "unevaluatedProperties": False}, CLOSED_A),
    ({**A, "unevaluatedProperties": True}, {**A, "additionalProperties": True}),
    ({"items": A}, {"items": CLOSED_A}),
    ({"patternProperties": {"^x": A}}, {"patternProperties": {"^x": CLOSED_A}, "additionalProperties": False}),
    ({"anyOf": [A, B]}, {"anyOf": [CLOSED_A, CLOSED_B]}),
    ({"allOf": [A]}, {"allOf": [CLOSED_A]}),
    ({"allOf": [A, B]}, {"allOf": [A, B]}),  # each would forbid the keys of the other
    ({**A, "anyOf": [B, {"type": "object"}]}, {**A, "anyOf": [B, {"type": "object"}]}),
    ({**A, "anyOf": [{"required": ["a"]}, {}]}, {**CLOSED_A, "anyOf": [{"required": ["a"]}, {}]}),
    ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED_A}}),
    ({"allOf": [{"$ref": "#/$defs/x"}, B], "$defs": {"x": A, "y": B}},
     {"allOf": [{"$ref": "#/$defs/x"}, B], "$defs": {"x": A, "y": CLOSED_B}}),
    ({"allOf": [{"$ref": "#/$defs/x"}, B], "$defs": {"x": {"$ref": "#/$defs/y"}, "y": A}},
     {"allOf": [{"$ref": "#/$defs/x"}, B], "$defs": {"x": {"$ref": "#/$defs/y"}, "y": A}}),
    ({"properties": {"left": {"$ref": "#"}}}, {"properties": {"left": {"$ref": "#"}}, "additionalProperties": False}),
    ({"enum": [A], "default": A, "const": A}, {"enum": [A], "default": A, "const": A}),
    ({"properties": {"properties": A, "enum": B}},
     {"properties": {"properties": CLOSED_A, "enum": CLOSED_B}, "additionalProperties": False}),
], ids=lambda value: json.dumps(value)[:60])
def test_objects_with_declared_keys_have_no_others_unless_the_schema_says_so(schema: Any, wanted: Any) -> None:
    own = json.loads(json.dumps(schema))
    assert closed(own) == wanted and why_not(wanted) is None
    assert own == schema, "the client's schema stays as it is"


def test_formats_that_are_only_annotations_are_left_out_and_the_others_are_enforced() -> None:
    for name in FORMATS:
        assert closed({"type": "string", "format": name}) == {"type": "string", "format": name} and why_not({"format": name}) is None
    for name in ("path", "binary", "password", "byte", "color", "int32", "idn-email", "json-pointer", "made-up"):
        for kind in ("string", ["string", "null"]):
            assert closed({"type": kind, "format": name}) == {"type": kind}
        assert closed({"format": name}) == {} and why_not({"type": "string", "format": name}) is not None
    assert closed({"type": "integer", "format": "int32"}) == {"type": "integer", "format": "int32"}
    assert closed({"$schema": "made up", "properties": {"format": {}}}) == {"properties": {"format": {}}, "additionalProperties": False}


@pytest.mark.parametrize("schema, wanted", [
    ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, {"properties": {"a": {"type": "string"}}}),
    ({"properties": {"a": {"oneOf": [{"type": "string"}, {"minLength": 1}]}}},
     {"properties": {"a": {"anyOf": [{"type": "string"}, {"minLength": 1}]}}}),
    ({"properties": {"a": {"pattern": "(?=x)"}, "b": {"type": "null"}}, "required": ["b"]},
     {"type": "object", "properties": {"a": {}, "b": {"type": "null"}}, "required": ["b"]}),
    ({"properties": {"a": {"type": "null", "required": True}}, "required": True, "$id": "no uri"}, {"properties": {"a": {"type": "null"}}}),
    ({"properties": {"a": {"$ref": "#/nowhere"}, "b": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "null"}}},
     {"$defs": {"x": {"type": "null"}}, "type": "object", "properties": {"a": {}, "b": {"$ref": "#/$defs/x"}}}),
    ({"properties": {"a": {}}, "required": ["a"], "minProperties": "x"}, {"type": "object", "properties": {"a": {}}, "required": ["a"]}),
    ({"properties": 5, "minProperties": "x"}, {"type": "object"}),
], ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_enforced_in_a_tool_is_left_open_and_the_rest_is_enforced(schema: Any, wanted: Any) -> None:
    found, why = relaxed(schema)
    assert found == wanted and why and why_not(closed(found)) is None


def test_a_schema_that_can_be_enforced_stays_as_it_is() -> None:
    for schema in (A, {**A, "properties": {"a": {"type": "string", "format": "path"}}}, {"anyOf": [A, B]}, {}):
        assert relaxed(schema) == (schema, None)


def test_each_part_of_a_schema_is_changed_once_and_no_value() -> None:
    seen: list[Any] = []
    schema = {"properties": {"p": {"x": 1}}, "items": {"x": 2}, "anyOf": [{"x": 3}], "enum": [{"x": 4}], "$defs": {"d": {"x": 5}}}
    map_parts(schema, seen.append)
    assert seen == [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 5}]
