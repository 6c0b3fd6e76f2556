"""What the server uses of uvicorn beyond its documentation. After an upgrade that fails here, check the named feature before pyproject.toml
allows the new version.
"""
from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

# Class, methods that the server overrides or calls, and the feature that breaks without them.
METHODS = [
    (uvicorn.Server, "startup", "the line that says the server is ready"),
    (uvicorn.Server, "handle_exit", "SIGINT aborts, SIGTERM drains, and the exit status is 0"),
    (HttpToolsProtocol, "send_400_response", "errors of the HTTP parser in OpenAI's shape"),
    (HttpToolsProtocol, "on_headers_complete", "the limit for headers, and disconnects of pipelined requests"),
    (HttpToolsProtocol, "on_message_complete", "the limit for headers"),
    (HttpToolsProtocol, "data_received", "the limit for headers"),
    (HttpToolsProtocol, "_unsupported_upgrade_warning", "bodies of requests with Upgrade, as Java's client sends"),
    (HttpToolsProtocol, "connection_made", "the limit for connections"),
    (HttpToolsProtocol, "pause_writing", "the limit for clients that do not read"),
    (HttpToolsProtocol, "resume_writing", "the limit for clients that do not read"),
    (HttpToolsProtocol, "on_header", "trailers are no headers"),
    (HttpToolsProtocol, "on_body", "the limit for chunk headers and trailers"),
    (HttpToolsProtocol, "on_response_complete", "closing a connection after an early answer"),
    (HttpToolsProtocol, "connection_lost", "disconnects of pipelined requests"),
    (RequestResponseCycle, "send", "streams over HTTP/1.0"),
    (FlowControl, "resume_reading", "disconnects of pipelined requests"),
]

# Class, attributes that its constructor sets, and the feature that breaks without them.
ATTRIBUTES = [
    (uvicorn.Server, ("should_exit", "force_exit", "config"), "draining, and the second signal that ends it"),
    (uvicorn.Config, ("timeout_graceful_shutdown",), "closing the connections of clients that do not read"),
    (HttpToolsProtocol, ("cycle", "flow", "transport", "loop", "server_state"), "all of HttpProtocol"),
    (RequestResponseCycle, ("response_started", "response_complete", "disconnected", "message_event"),
     "errors of the HTTP parser, and disconnects of pipelined requests"),
    (RequestResponseCycle, ("more_body", "keep_alive", "body"), "closing a connection after an early answer"),
    (RequestResponseCycle, ("chunked_encoding", "expected_content_length", "waiting_for_100_continue"), "streams over HTTP/1.0"),
]


@pytest.mark.parametrize("owner, name, feature", METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_uvicorn_still_has_the_methods_that_the_server_uses(owner: type, name: str, feature: str) -> None:
    assert callable(getattr(owner, name, None)), f"{owner.__name__}.{name} is gone: {feature} breaks"


@pytest.mark.parametrize("owner, names, feature", ATTRIBUTES, ids=lambda value: getattr(value, "__name__", ""))
def test_uvicorn_still_sets_the_attributes_that_the_server_uses(owner: type, names: tuple[str, ...], feature: str) -> None:
    source = inspect.getsource(owner.__init__)  # type: ignore[misc]
    missing = [name for name in names if not re.search(rf"self\.{name}\b", source)]
    assert missing == [], f"{owner.__name__} no longer has {missing}: {feature} breaks"


def test_signals_reach_handle_exit() -> None:
    assert "self.handle_exit" in inspect.getsource(uvicorn.Server.capture_signals), "SIGINT and SIGTERM no longer end the server cleanly"


def test_the_installed_version_is_one_that_pyproject_allows() -> None:
    found = re.search(r'"uvicorn>=([\d.]+),<([\d.]+)"', PYPROJECT.read_text())
    assert found, "pyproject.toml must pin uvicorn from both sides"
    low, version, high = (tuple(map(int, text.split(".")[:2])) for text in (found[1], uvicorn.__version__, found[2]))
    assert low <= version < high
