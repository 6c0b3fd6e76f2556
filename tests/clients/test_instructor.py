"""instructor in each of its modes for OpenAI."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

instructor = pytest.importorskip("instructor", reason="instructor is not installed: pip install -e '.[clients]'")

import openai
from instructor import Mode
from pydantic import BaseModel

from tests.clients.conftest import ClientServer


class Report(BaseModel):
    city: str
    days: int


MESSAGES: Any = [{"role": "user", "content": "The weather in Paris for 3 days."}]
WANTED = {"city": "Paris", "days": 3}


def client(server: ClientServer, mode: Mode) -> Any:
    api = openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0)
    return instructor.from_openai(api, mode=mode, model=server.model)


@pytest.mark.parametrize("mode", [
    Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS, Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS,
], ids=lambda mode: mode.name)
def test_a_model_is_filled_complete_and_streamed(capable: ClientServer, mode: Mode) -> None:
    made = client(capable, mode)
    assert made.create(response_model=Report, messages=MESSAGES, max_retries=0).model_dump() == WANTED
    partial = list(made.create_partial(response_model=Report, messages=MESSAGES, max_retries=0))
    assert partial[-1].model_dump() == WANTED and len(partial) > 1


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA], ids=lambda mode: mode.name)
def test_an_iterable_of_models(capable: ClientServer, mode: Mode) -> None:
    made = client(capable, mode).create_iterable(response_model=Report, messages=MESSAGES, max_retries=0)
    assert [report.model_dump() for report in made] == [WANTED]


def test_parallel_tools(capable: ClientServer) -> None:
    class Clock(BaseModel):
        """Time in a city."""

        city: str

    made = client(capable, Mode.PARALLEL_TOOLS)
    question: Any = [{"role": "user", "content": "Report the weather in Paris for 3 days and the clock in Rome."}]
    assert {type(value).__name__ for value in made.create(response_model=Iterable[Report | Clock], messages=question, max_retries=0)} \
        == {"Report", "Clock"}


def test_a_refused_value_is_asked_for_again(capable: ClientServer) -> None:
    """instructor sends the failed call and its error back, which must be a valid history."""
    class Never(BaseModel):
        city: str

        def __init__(self, **data: Any) -> None:
            super().__init__(**data)
            raise ValueError("no city is good enough")

    with pytest.raises(Exception, match="no city is good enough"):
        client(capable, Mode.TOOLS).create(response_model=Never, messages=MESSAGES, max_retries=2)
