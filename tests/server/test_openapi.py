"""The served OpenAPI document is complete and correct: schemathesis tests the server against it with generated requests."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.server.openapi import OTHER_MEDIA, RESPONSES
from tests.server.scripted import LiveServer, ScriptedEngine, scripted_server


@pytest.fixture(scope="module")
def live(tokenizer_folder: Path) -> Iterator[LiveServer]:
    engine = ScriptedEngine(tokenizer_folder, max_model_len=4096)
    with scripted_server(engine, api_key=("key",), max_choices=64) as live:
        yield live


@pytest.fixture(scope="module")
def document(live: LiveServer) -> dict[str, Any]:
    return dict(httpx.get(live.url + "/openapi.json", headers={"authorization": "Bearer key"}).json())


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_reference_exists(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert found and all(name.removeprefix("#/components/schemas/") in document["components"]["schemas"] for name in found), found


def test_every_path_describes_its_responses_and_errors(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {*RESPONSES, *OTHER_MEDIA}
    for methods in document["paths"].values():
        for operation in methods.values():
            assert {"200", "404", "405", "500", "503"} <= set(operation["responses"]) and "422" not in operation["responses"]


def test_every_path_except_health_requires_the_key(document: dict[str, Any]) -> None:
    open_paths = {path for path, methods in document["paths"].items() for operation in methods.values() if "security" not in operation}
    assert open_paths == {"/health"}


def test_a_requests_schema_lists_fields_of_all_classes(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "temperature", "user", "prediction"} <= set(schema["properties"])
    assert schema["additionalProperties"] == {"type": "null"}
    assert schema["properties"]["prediction"]["enum"] == [None]


def test_schemathesis_finds_no_crash_and_no_undocumented_response(live: LiveServer) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    headers = {"authorization": "Bearer key"}
    schema = schemathesis.openapi.from_url(live.url + "/openapi.json", headers=headers)
    # Valid data may still be too long for the context or contain unknown tokens. The response is 400 then, which is correct.
    leave_out = [schemathesis.checks.CHECKS.get_one(name) for name in ("positive_data_acceptance", "ignored_auth")]
    tested = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
            def check(case: Any) -> None:
                case.call_and_validate(headers=headers, timeout=30, excluded_checks=leave_out)

            if mode is schemathesis.GenerationMode.POSITIVE or operation.body:
                check()
                tested += 1
    assert tested > 12


def test_the_example_of_every_body_is_accepted(live: LiveServer, document: dict[str, Any]) -> None:
    seen = 0
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if "requestBody" in operation:
                seen += 1
                body = operation["requestBody"]["content"]["application/json"]["example"]
                answer = httpx.post(live.url + path, json=body, headers={"authorization": "Bearer key"})
                assert answer.status_code == (403 if "lora_adapter" in path else 200), answer.text  # for administrators
    assert seen == 11
