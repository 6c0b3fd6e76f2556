"""The page's files and its live view, without a browser."""
from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minivllm.server import page
from minivllm.server.page import FILES
from tests.server.page_server import Pace, page_server
from tests.server.scripted import LiveServer

LIVE = "/v1/engine/live"
KEY = {"authorization": "Bearer secret"}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[LiveServer, Pace]]:
    with page_server(tmp_path, api_key=("secret",)) as served:
        yield served


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def test_the_page_needs_no_key_and_uses_only_its_own_scripts_and_addresses(served: tuple[LiveServer, Pace]) -> None:
    live, _ = served
    for path, (_, media_type) in FILES.items():
        response = httpx.get(live.url + path)
        assert (response.status_code, response.headers["content-type"]) == (200, media_type)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy, "text never becomes HTML or code, whatever a script does"
        if "/vendor/" in path:
            continue
        assert "://" not in response.text
        assert "eval(" not in response.text and "innerHTML" not in response.text and "style=" not in response.text
    page_text = httpx.get(live.url + "/").text
    assert "onclick" not in page_text and page_text.count("<script") == 1


def test_every_file_of_the_page_is_served_and_packaged() -> None:
    folder = Path(page.__file__).parent / "static"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names - {name for name, _ in FILES.values()} == {"vendor/markdown-it.LICENSE.txt"}
    project = tomllib.loads((folder.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["minivllm.server"]
    assert names == {str(path.relative_to(folder)) for pattern in patterns for path in folder.parent.glob(pattern) if path.is_file()}
    licenses = [path.name for pattern in project["project"]["license-files"] for path in folder.parents[2].glob(pattern)]
    assert "markdown-it.LICENSE.txt" in licenses


def test_the_vendored_library_is_the_release_that_its_license_file_names() -> None:
    folder = Path(page.__file__).parent / "static" / "vendor"
    text, code = (folder / "markdown-it.LICENSE.txt").read_text(encoding="utf-8"), (folder / "markdown-it.mjs").read_bytes()
    assert f"SHA-256: {hashlib.sha256(code).hexdigest()}" in text
    version = code.decode().split()[2]
    assert f"markdown-it {version}, unchanged" in text


def test_other_files_are_not_served(served: tuple[LiveServer, Pace]) -> None:
    for path in ("/static/", "/static/index.html", "/static/../config.py", "/static/%2e%2e/config.py", "/static/vendor/",
                 "/static/vendor/markdown-it.LICENSE.txt"):
        assert httpx.get(served[0].url + path, headers=KEY).status_code == 404


def test_the_live_view_needs_a_key(served: tuple[LiveServer, Pace]) -> None:
    assert httpx.get(served[0].url + LIVE).status_code == 401


def test_the_live_view_shows_the_engines_work_and_no_content_of_requests(served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.02
    with httpx.Client(base_url=live.url, headers=KEY, timeout=30) as http, http.stream("GET", LIVE) as watched:
        views = events(watched)
        constant = next(views)
        assert (constant["model"], constant["num_blocks"], constant["block_size"]) == ("fox", 199, 4)
        assert constant["weight_bytes"] == constant["kv_cache_bytes"] == 0, "a fake model has none"
        assert next(views)["running"] == []
        body = {"prompt": "a secret word " * 4, "max_tokens": 300, "n": 2, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            view = next(view for view in views if len(view["running"]) == 2 and view["generation_tokens"] >= 4)
            pace.seconds = 0.0
            request_id, *_ = [event["id"] for event in events(answer)]
        assert [row[:2] for row in view["running"]] == [[1, 0], [1, 1]]
        assert set(view["cells"]) == {0, 1} and view["shared"] != []
        assert view["used_blocks"] == sum(cell > 0 for cell in view["cells"])
        step_id, work, milliseconds, used_blocks = view["steps"][-1]
        assert step_id > 0 and work == [[1, 1, 0], [1, 1, 0]] and milliseconds >= 20 and 0 < used_blocks <= view["used_blocks"]
        text = json.dumps(view)
        assert "secret" not in text and request_id not in text
        last = next(view for view in views if not view["running"])
        assert last["generation_tokens"] == 600 and -1 in last["cells"]


def test_a_closed_live_view_is_noticed_and_the_number_of_live_views_is_limited(
    served: tuple[LiveServer, Pace], monkeypatch: pytest.MonkeyPatch,
) -> None:
    live, _ = served
    monkeypatch.setattr(page, "MAX_VIEWS", 1)
    with httpx.stream("GET", live.url + LIVE, headers=KEY) as first:
        views = events(first)  # keep a reference: a garbage-collected generator closes its connection
        next(views)
        live.wait_until(lambda: live.client._unseen)
        refused = httpx.get(live.url + LIVE, headers=KEY)
        assert refused.status_code == 429 and refused.headers["retry-after"]
    live.wait_until(lambda: not live.client._unseen)
    with httpx.stream("GET", live.url + LIVE, headers=KEY) as second:
        views = events(second)
        next(views)


@pytest.mark.parametrize("drain", [False, True])
def test_live_views_do_not_delay_the_shutdown(tmp_path: Path, drain: bool) -> None:
    with page_server(tmp_path, drain_timeout=1000.0) as (live, _), httpx.stream("GET", live.url + LIVE, timeout=30) as watched:
        views = events(watched)
        next(views)
        live.end(drain=drain)
        assert list(views) is not None  # the stream ends
        live.thread.join(30)
        assert not live.thread.is_alive()
