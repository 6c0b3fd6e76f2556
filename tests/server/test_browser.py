"""The page in a real browser: headless Chromium, controlled through Playwright. Skipped if one of them is missing."""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.page_server import WORDS, Pace, page_server
from tests.server.scripted import LiveServer

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or set CHROMIUM")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[LiveServer, Pace]]:
    with page_server(tmp_path) as served:
        yield served


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A browser page. Script errors and violations of the content security policy fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if "Content Security Policy" in message.text else None)
    yield page
    page.close()
    assert errors == []


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def test_a_conversation_is_streamed_and_sent_again_with_the_next_message(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, _ = served
    page.goto(live.url)
    expect = playwright.expect
    expect(page.locator("#model")).to_contain_text("fox")
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer, tokens").fill("20")
    page.get_by_label("System prompt").fill("Be brief.")
    with page.expect_request("**/v1/chat/completions"):
        send(page, "first")
    answers = page.locator(".turn.assistant .text")
    expect(page.locator(".turn .note").nth(1)).to_contain_text("20 out", timeout=60_000)
    expect(answers.first).to_contain_text("the quick brown fox")
    with page.expect_request("**/v1/chat/completions") as second:
        send(page, "second")
    body = second.value.post_data_json
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == answers.first.text_content()
    assert body["max_tokens"] == 20 and body["stream"] is True
    expect(answers).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_stop_and_escape_end_an_answer_in_the_engine_too(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.02
    page.goto(live.url)
    expect = playwright.expect
    for i, stop in enumerate((lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape"))):
        send(page, "continue")
        expect(page.locator(".turn.assistant .text").nth(i)).to_contain_text("fox")
        stop()
        expect(page.locator(".turn.assistant .note").nth(i)).to_have_text("stopped")
        live.wait_until(lambda: live.client.stats().num_running == 0)
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_the_live_view_follows_several_requests_and_their_shared_blocks(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.02
    page.goto(live.url)
    expect = playwright.expect
    expect(page.locator("#live-state")).to_have_text("live")
    body = {"prompt": WORDS * 4, "n": 3, "max_tokens": 400, "stream": True, "temperature": 1.0}
    with httpx.stream("POST", live.url + "/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # keep a reference: a garbage-collected generator closes its connection
        next(lines)
        expect(page.locator("#running")).to_have_text("3", timeout=60_000)
        expect(page.locator("#requests tr")).to_have_count(3)
        expect(page.locator("#requests")).to_contain_text("1.2")
        expect(page.locator("#lanes")).to_have_attribute("aria-label", re.compile(r"Step \d+: 3 sequences"), timeout=60_000)
        expect(page.locator("#blocks")).to_have_attribute("aria-label", re.compile(r"[1-9]\d* squares shared"), timeout=60_000)
        colors = page.evaluate("""() => {
            const canvas = document.getElementById("blocks");
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const seen = new Set();
            for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 4).join());
            return seen.size;
        }""")
        assert colors >= 3, "free, used and shared"
    expect(page.locator("#running")).to_have_text("0", timeout=60_000)
    expect(page.locator("#requests")).to_have_text("none")
    page.goto("about:blank")
    live.wait_until(lambda: live.client._num_watchers == 0)


def test_the_page_requests_an_api_key_and_keeps_it_in_memory_only(page: Any, tmp_path: Path) -> None:
    with page_server(tmp_path, api_key=("secret",)) as (live, _):
        page.goto(live.url)
        expect = playwright.expect
        field = page.get_by_label("This server requires an API key", exact=False)
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("rejected this key")
        field.fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#live-state")).to_have_text("live")
        expect(page.locator("#key-form")).to_be_hidden()
        assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie, location.href.includes('secret')]") == [
            0, 0, "", False]
        page.goto("about:blank")


def test_an_error_is_shown_and_the_message_can_be_sent_again(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, _ = served
    page.goto(live.url)
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer, tokens").fill("5000")
    send(page, "too long")
    playwright.expect(page.get_by_role("alert")).to_contain_text("context")
    playwright.expect(page.get_by_label("Message", exact=True)).to_have_value("too long")


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_every_control_has_a_name_and_enough_contrast(
    page: Any, served: tuple[LiveServer, Pace], width: int, scheme: str,
) -> None:
    live, _ = served
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    page.goto(live.url)
    playwright.expect(page.locator("#live-state")).to_have_text("live")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("() => [...document.querySelectorAll('input, textarea')].every((field) => field.labels.length === 1)")
    assert page.evaluate("() => [...document.querySelectorAll('button')].every((button) => button.textContent.trim())")
    contrasts = page.evaluate("""() => {
        const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const parse = (text) => text.match(/[\\d.]+/g).map(Number);
        const behind = (element) => {
            for (let e = element; e; e = e.parentElement) {
                const c = parse(getComputedStyle(e).backgroundColor);
                if (c.length === 3 || c[3] > 0) return c.slice(0, 3);
            }
            return [255, 255, 255];
        };
        return ["h1", "#model", "#empty", "#hint", "dt", "dd", "figcaption p", "th", "summary", "#send", "#clear"].map((name) => {
            const element = document.querySelector(name);
            const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(behind(element))].sort((x, y) => y - x);
            return [name, (a + 0.05) / (b + 0.05)];
        });
    }""")
    assert all(contrast >= 4.5 for _, contrast in contrasts), contrasts
