"""The page in a real browser: headless Chromium, controlled through Playwright. Skipped if one of them is missing.

All tests share one server, whose model reasons before it answers where a test's reply says so.
"""
from __future__ import annotations

import json
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

expect = playwright.expect
expect.set_options(timeout=60_000)
ANSWER = """Two steps:

1. Ask the **pool** for a block
2. Write the keys

```python
block = pool.allocate()
```

| name | bytes |
|---|---:|
| key | 64 |
"""
THOUGHT = "The user wants *steps*."
REASONED = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Pace]]:
    with page_server(tmp_path_factory.mktemp("page"), reasoning_parser="qwen3") as served:
        yield served


@pytest.fixture
def served(shared: tuple[LiveServer, Pace]) -> tuple[LiveServer, Pace]:
    live, pace = shared
    pace.seconds, pace.failure, pace.replies = 0.0, None, {"steps": REASONED}
    live.wait_until(lambda: not live.client._unseen and live.client.stats().num_running == 0)  # the last test's page is closed
    return shared


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A browser page with fresh storage. Script errors and violations of the content security policy fail the test."""
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


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).last.click()


def finished(page: Any, answers: int = 1) -> None:
    """Wait until so many answers are complete."""
    expect(page.locator(".turn.assistant")).to_have_count(answers)
    expect(page.locator(".turn.assistant").last.get_by_role("button", name="Regenerate")).to_be_visible()


def body_of(page: Any, action: Any) -> dict[str, Any]:
    """The body of the chat request that an action sends."""
    with page.expect_request("**/v1/chat/completions") as sent:
        action()
    return sent.value.post_data_json  # type: ignore[no-any-return]


def set_limit(page: Any, tokens: int) -> None:
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer, tokens").fill(str(tokens))


# -- the conversation -------------------------------------------------------------------------------------------------


def test_a_conversation_is_streamed_and_sent_again_with_the_next_message(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    expect(page.locator("#model")).to_contain_text("fox")
    set_limit(page, 20)
    page.get_by_label("System prompt").fill("Be brief.")
    send(page, "first")
    finished(page)
    expect(page.locator(".turn.assistant .note")).to_contain_text("Cut at 20 tokens.")
    expect(page.locator(".turn.assistant .text")).to_contain_text("the quick brown fox")
    body = body_of(page, lambda: send(page, "second"))
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"].startswith("the quick brown fox")
    assert body["max_tokens"] == 20 and body["stream"] is True and body["model"] == "fox"
    finished(page, 2)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert page.evaluate("localStorage.length") == 0


def test_reasoning_stands_above_the_answer_and_is_not_sent_back(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.01
    page.goto(live.url)
    body = body_of(page, lambda: send(page, "steps"))
    assert "max_tokens" not in body, "by default an answer may take the rest of the context"
    thoughts = page.locator(".turn.assistant .reasoning .markdown")
    expect(thoughts).to_be_visible()  # while the model reasons
    expect(page.locator(".turn.assistant .reasoning summary")).to_have_text("Reasoning …")
    pace.seconds = 0.0
    finished(page)
    expect(thoughts).not_to_be_visible()  # closed as soon as the answer begins
    page.get_by_text("Reasoning", exact=True).click()
    expect(thoughts).to_have_text("The user wants steps.")
    answer = page.locator(".turn.assistant .text")
    assert answer.locator("ol li").all_text_contents() == ["Ask the pool for a block", "Write the keys"]
    expect(answer.locator(".code-bar span")).to_have_text("python")
    expect(answer.locator("pre")).to_have_text("block = pool.allocate()")
    expect(answer.locator("tbody td").last).to_have_css("text-align", "right")
    body = body_of(page, lambda: send(page, "more"))
    assert body["messages"][1] == {"role": "assistant", "content": ANSWER}
    finished(page, 2)


def test_reasoning_stands_above_the_answer_also_without_a_reasoning_parser(page: Any, served: tuple[LiveServer, Pace]) -> None:
    replies = [stream({"content": f"<think>\n{THOUGHT}\n</think>\n\nYes, <think> is a tag."}),
               stream({"content": "<think>hm"}, finish="length")]
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=replies.pop(0)))
    page.goto(served[0].url)
    send(page, "go")
    finished(page)
    expect(page.locator(".turn.assistant .text")).to_have_text("Yes, <think> is a tag.")
    page.get_by_text("Reasoning", exact=True).click()
    expect(page.locator(".turn.assistant .reasoning .markdown")).to_have_text("The user wants steps.")
    send(page, "go")
    finished(page, 2)
    expect(page.locator(".turn.assistant .note").last).to_contain_text("before the answer began")
    expect(page.locator(".turn.assistant .reasoning .markdown").last).to_be_visible()


def test_shown_turns_are_not_added_to_the_log_again(page: Any, served: tuple[LiveServer, Pace]) -> None:
    """A screen reader reads out what is added."""
    page.goto(served[0].url)
    send(page, "steps")
    finished(page)
    page.evaluate("""() => {
        window.added = [];
        new MutationObserver((records) => window.added.push(...records.flatMap((r) => [...r.addedNodes].map((n) => n.className))))
            .observe(document.getElementById("turns"), { childList: true });
    }""")
    send(page, "steps")
    finished(page, 2)
    assert page.evaluate("window.added") == ["turn user", "turn assistant"]


def test_a_cut_answer_says_so_and_can_be_continued(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    set_limit(page, 12)  # ends before a space
    send(page, "steps")
    note = page.locator(".turn.assistant .note")
    expect(note).to_contain_text("Cut at 12 tokens, before the answer began.")
    expect(page.locator(".turn.assistant .reasoning .markdown")).to_be_visible()
    page.get_by_label("Longest answer, tokens").fill("40")
    body = body_of(page, lambda: click(page, "Continue"))
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["messages"][-1] == {"role": "assistant", "content": "", "reasoning_content": "The user"}
    expect(note).to_contain_text("Cut at 52 tokens.")
    page.get_by_label("Longest answer, tokens").fill("")
    body = body_of(page, lambda: click(page, "Continue"))
    assert body["messages"][-1]["reasoning_content"] == THOUGHT and ANSWER.startswith(body["messages"][-1]["content"])
    finished(page)
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)
    assert body_of(page, lambda: send(page, "more"))["messages"][1]["content"] == ANSWER
    finished(page, 2)


def test_an_answer_that_fills_the_context_says_so_and_the_meter_shows_it(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    expect(page.locator("#context-text")).to_have_text("0 of 600 tokens")
    send(page, "go")
    finished(page)
    expect(page.locator(".turn.assistant .note")).to_contain_text("the context is full")
    expect(page.locator("#context-text")).to_have_text("600 of 600 tokens")
    assert page.evaluate("document.getElementById('context').value") == 600
    expect(page.get_by_role("button", name="Continue")).to_have_count(0)


def test_copy_regenerate_and_edit(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(live.url)
    send(page, "steps")
    finished(page)
    pasted = "navigator.clipboard.readText()"
    page.locator(".code").get_by_role("button", name="Copy").click()
    expect(page.locator(".code").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate(pasted) == "block = pool.allocate()"
    page.locator(".turn.assistant > .actions").get_by_role("button", name="Copy").click()
    expect(page.locator(".turn.assistant > .actions").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate(pasted) == ANSWER
    pace.replies["steps"] = "Another answer."
    body = body_of(page, lambda: click(page, "Regenerate"))
    assert [m["role"] for m in body["messages"]] == ["user"]
    expect(page.locator(".turn.assistant .text")).to_have_text("Another answer.")
    finished(page)
    click(page, "Edit")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("steps")


def test_copy_works_where_the_clipboards_interface_is_missing(page: Any, served: tuple[LiveServer, Pace]) -> None:
    """A browser offers it on https and on this machine only, so a page from another machine of the home network lacks it."""
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined });"
                         "document.addEventListener('copy', () => { window.copied = getSelection().toString() || "
                         "document.activeElement.value; });")
    page.goto(served[0].url)
    send(page, "steps")
    finished(page)
    page.locator(".code").get_by_role("button", name="Copy").click()
    expect(page.locator(".code").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("window.copied") == "block = pool.allocate()"


def test_stop_and_escape_end_an_answer_in_the_engine_too(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.02
    page.goto(live.url)
    for i, stop in enumerate((lambda: click(page, "Stop"), lambda: page.keyboard.press("Escape"))):
        send(page, "continue")
        expect(page.locator(".turn.assistant .text").nth(i)).to_contain_text("fox")
        stop()
        expect(page.locator(".turn.assistant .note").nth(i)).to_contain_text("Stopped.")
        live.wait_until(lambda: live.client.stats().num_running == 0)
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_history_survives_a_reload_also_in_the_middle_of_an_answer(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    page.goto(live.url)
    page.get_by_text("Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    send(page, "steps")
    finished(page)
    pace.seconds = 0.02
    send(page, "go")
    expect(page.locator(".turn.assistant .text").nth(1)).to_contain_text("fox")
    page.reload()
    finished(page, 2)
    expect(page.locator(".turn.assistant .reasoning .markdown").first).to_have_text("The user wants steps.")
    expect(page.locator(".turn.assistant .text pre")).to_have_text("block = pool.allocate()")
    expect(page.locator(".turn.assistant .text").nth(1)).to_contain_text("fox")
    expect(page.locator(".turn.assistant .note").nth(1)).to_contain_text("Stopped.")
    expect(page.locator("#context-text")).to_contain_text(re.compile(r"[1-9]\d* of 600 tokens"))
    expect(page.locator("#system")).to_have_value("Be brief.")
    live.wait_until(lambda: live.client.stats().num_running == 0)


@pytest.mark.parametrize("stored", ["nonsense", "null", '{"turns": 5}', '{"turns": [{"role": "evil", "content": 3}]}', '{"turns": [null]}',
                                    '{"turns": [{"role": "assistant", "content": "x", "calls": 1}]}', None])
def test_a_page_without_usable_storage_works(page: Any, served: tuple[LiveServer, Pace], stored: str | None) -> None:
    if stored is None:
        off = "throw new DOMException('off', 'SecurityError')"
        page.add_init_script(f"Object.defineProperty(window, 'localStorage', {{ get() {{ {off}; }} }});")
    else:
        page.add_init_script(f"localStorage.setItem('minivllm.chat', {json.dumps(stored)});")
    page.goto(served[0].url)
    expect(page.locator(".turn")).to_have_count(0)
    send(page, "steps")
    finished(page)


def test_stored_history_is_bounded(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    kept = page.evaluate("""async () => {
        const [{ save, load }, { newTurn }] = [await import("/static/storage.js"), await import("/static/turn.js")];
        const turns = Array.from({ length: 40 }, (_, i) => newTurn(i % 2 ? "assistant" : "user", `${i}` + "x".repeat(100_000)));
        save(turns, {});
        const some = load().turns;
        save([newTurn("user", "x".repeat(2_000_000))], {});
        return [some.length, some.at(-1).content.slice(0, 2), localStorage.length];
    }""")
    assert kept == [8, "39", 0]


def test_the_log_stays_at_its_end_unless_the_user_scrolls_up(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.004
    pace.replies["steps"] = f"<think>{THOUGHT * 6}</think>" + ANSWER
    page.set_viewport_size({"width": 375, "height": 500})
    page.goto(live.url)
    distance = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.getElementById('log'))"
    for i in range(2):
        send(page, "steps")
        finished(page, i + 1)
        assert page.evaluate(distance) < 5
    for height in (2000, 500):  # as when a phone is turned, or shows its keyboard
        page.set_viewport_size({"width": 375, "height": height})
        page.evaluate("new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))")
    assert page.evaluate(distance) < 5
    send(page, "go")
    expect(page.locator(".turn.assistant .text").last).to_contain_text("fox")
    page.locator("#log").hover()
    page.mouse.wheel(0, -300)
    click(page, "Stop")
    finished(page, 3)
    assert page.evaluate(distance) > 100


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_is_shown_and_the_message_can_be_sent_again(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    set_limit(page, 5000)
    send(page, "too long")
    expect(page.get_by_role("alert")).to_contain_text("context")
    expect(page.get_by_label("Message", exact=True)).to_have_value("too long")
    expect(page.locator(".turn")).to_have_count(0)


def test_an_error_in_the_middle_of_an_answer_keeps_what_has_arrived(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.02
    page.goto(live.url)
    send(page, "go")
    expect(page.locator(".turn.assistant .text")).to_contain_text("fox")
    pace.failure = RuntimeError("the device is lost")
    expect(page.locator(".turn.assistant .note")).to_contain_text("Broken off:")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator(".turn.assistant .text")).to_contain_text("fox")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_a_failed_regeneration_brings_the_old_answer_back(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    send(page, "steps")
    finished(page)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    click(page, "Regenerate")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    finished(page)
    expect(page.locator(".turn.assistant pre")).to_have_text("block = pool.allocate()")


def stream(*deltas: dict[str, Any], finish: str | None = "stop", done: bool = True) -> str:
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if finish is not None:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + ("data: [DONE]\n\n" if done else "")


@pytest.mark.parametrize("body, shown", [
    (stream({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "weather", "arguments": ""}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]}, finish="tool_calls"),
     'Tool call: weather{"city": "Oslo"}'),
    (stream({"role": "assistant", "content": ""}), "The model ended without an answer."),
    (stream({"reasoning_content": "hm"}), "The model ended without an answer."),
    (stream({"content": "half"}, finish="abort"), "Ended by the server."),
    (stream({"content": "half"}, finish="repetition"), "Ended: repetition."),
    (stream({"content": "half"}, finish=None, done=False), "Broken off: The server closed the connection."),
])
def test_every_end_of_an_answer_is_shown(page: Any, served: tuple[LiveServer, Pace], body: str, shown: str) -> None:
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.goto(served[0].url)
    send(page, "go")
    finished(page)
    expect(page.locator(".turn.assistant")).to_contain_text(shown)


def test_the_page_requests_an_api_key_and_keeps_it_in_memory_only(page: Any, tmp_path: Path) -> None:
    with page_server(tmp_path, names=("fox", "fox-again"), api_key=("secret",)) as (live, _):
        page.goto(live.url)
        field = page.get_by_label("This server requires an API key", exact=False)
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("rejected this key")
        field.fill("sécret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("ASCII")
        field.fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#live-state")).to_have_text("live")
        expect(page.locator("#key-form")).to_be_hidden()
        assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie, location.href.includes('secret')]") == [
            0, 0, "", False]
        page.get_by_label("Model").select_option("fox-again")  # a list of models is a choice
        assert body_of(page, lambda: send(page, "go"))["model"] == "fox-again"
        finished(page)
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        page.evaluate("import('/static/api.js').then(({ setKey }) => setKey('revoked'))")
        send(page, "again")
        expect(field).to_be_visible()
        expect(page.get_by_label("Message", exact=True)).to_have_value("again")
        page.goto("about:blank")


def test_the_page_survives_a_restart_of_the_server(page: Any, tmp_path: Path) -> None:
    page.clock.install()
    with page_server(tmp_path) as (live, pace):
        pace.seconds = 0.02
        page.goto(live.url)
        send(page, "go")
        expect(page.locator(".turn.assistant .text")).to_contain_text("fox")
        expect(page.locator("#step")).to_contain_text(re.compile(r"Steps? \d"))
        live.end(drain=False)
        live.thread.join(30)
    expect(page.locator(".turn.assistant .note")).to_contain_text(re.compile("Ended by the server|Broken off"))
    send(page, "more")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_label("Message", exact=True)).to_have_value("more")
    with page_server(tmp_path, port=int(live.url.rpartition(":")[2])) as (live, _):
        page.clock.fast_forward(10_000)
        expect(page.locator("#live-state")).to_have_text("live")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.locator("#step")).to_have_text("No step yet")
        page.keyboard.press("Enter")
        finished(page, 2)
        page.goto("about:blank")


def test_the_page_works_below_the_root_path_of_a_proxy_and_needs_no_key(page: Any, tmp_path: Path) -> None:
    with page_server(tmp_path, root_path="/llm", api_key=("secret",)) as (live, _):
        assert httpx.get(live.url + "/llm/health").status_code == 200
        assert httpx.get(live.url + "/llm/v1/models").status_code == httpx.get(live.url + "/llm/llm/health").status_code == 401
        page.goto(live.url + "/llm/")
        page.get_by_label("This server requires an API key", exact=False).fill("secret")
        page.keyboard.press("Enter")
        send(page, "go")
        finished(page)
        page.goto("about:blank")


# -- Markdown ---------------------------------------------------------------------------------------------------------

HOSTILE = r"""<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 1"><svg onload="window.pwned = 1"><iframe src="javascript:window.pwned=1"></iframe>
<style>body { display: none }</style><base href="http://evil.test/"><form action="http://evil.test/"><button>go</button></form>

[a](javascript:window.pwned=1) [b](JaVaScRiPt&colon;window.pwned=1) [c](java&#x0A;script:window.pwned=1) [d](vbscript:x) [e](file:///etc/passwd)
[f](data:text/html;base64,PHNjcmlwdD4=) [g](blob:x) [h](//evil.test/x) [i](/v1/models) [j](\x01javascript:window.pwned=1)
[k](https://good.test/ "a\" onmouseover=\"window.pwned=1") <javascript:window.pwned=1> <https://good.test/auto> [l][ref]
![beacon](http://evil.test/b.png) ![](data:image/svg+xml;base64,PHN2Zz4=) [![badge](http://evil.test/c.png)](https://good.test/badge)

```html" onload="window.pwned=1
</code></pre><script>window.pwned = 1</script>
```

| <script>window.pwned=1</script> | `<img src=x onerror=1>` |
|:--|--:|
| a | &lt;script&gt; |

# <b onclick=1>Heading</b>

[ref]: javascript:window.pwned=1
"""


def test_hostile_output_neither_runs_nor_fetches_anything(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, _ = served
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    reply = stream({"reasoning": HOSTILE}, {"content": HOSTILE}, *({"content": c} for c in HOSTILE),
                   {"tool_calls": [{"index": 0, "function": {"name": HOSTILE, "arguments": HOSTILE}}]})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=reply))
    page.goto(live.url)
    send(page, HOSTILE)
    finished(page)
    for _ in range(2):  # as it arrived, and from storage
        expect(page.locator(".turn.assistant .text")).to_contain_text("<script>window.pwned = 1</script>")
        assert page.evaluate("window.pwned") is None
        found = page.evaluate("""() => [...document.querySelectorAll("#log *")].map((e) => [e.tagName.toLowerCase(),
            [...e.attributes].map((a) => a.name).sort().join(" ")])""")
        tags = {tag for tag, _ in found}
        assert tags <= {"div", "details", "summary", "p", "span", "a", "br", "pre", "code", "button", "table", "thead", "tbody", "tr", "th",
                        "td", "h3"}
        attributes = {name for _, names in found for name in names.split()}
        assert attributes <= {"id", "class", "href", "rel", "target", "title", "tabindex", "type", "open", "style", "hidden", "aria-live"}
        links = page.evaluate("[...document.querySelectorAll('#log a')].map((a) => [a.href, a.rel, a.target])")
        assert {href for href, _, _ in links} == {
            "https://good.test/", "https://good.test/auto", "https://good.test/badge", "http://evil.test/b.png"}
        assert {tuple(rest) for _, *rest in links} == {("noopener noreferrer", "_blank")}
        page.reload()
        finished(page)
    assert {address.partition("?")[0] for address in addresses if not address.startswith("data:")} <= {
        live.url + path for path in ("/", "/v1/models", "/v1/engine/live", "/v1/chat/completions")} | {
        address for address in addresses if address.startswith(live.url + "/static/")}


STREAMED = [
    ANSWER, HOSTILE, "1. a\n\n2. b\n\n   more\n\n- c\n  - d\n\n\n- e\n\ntext\n\n3) f\n",
    "one\n\n1. a\n\n2. b\n\ntext\n\n- c\n\n- d\n\n  e\n",  # a line of "2" would end the list, "2. b" does not
    "a\n-\nb\n===\n\n---\n\n***\n> q\nlazy\n\n> r\n",
    "see [x][1] and [y][2]\n\ntext\n\n```\ncode\n\nmore\n```\nafter\n\n[1]: https://a.test\n[2]: https://b.test\n",
    "a\r\n\r\nb\rc\n\r\n~~~\r\nd\r\n~~~\r\n\r\ne", "| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 |\n", "    code\n\n    more\n\ntext",
    "```\nnever closed\n\n# x",
    "\u05e9\u05dc\u05d5\u05dd **\u05e2\u05d5\u05dc\u05dd**\n\n\u4f60\u597d\n\n\x00\n\n&amp; &#0; \\* end  \nhard break",
]


GROW = """async (text) => {
    const { MarkdownView } = await import("/static/markdown.js");
    const [growing, whole] = [0, 1].map(() => new MarkdownView(document.createElement("div")));
    let kept = true;
    for (let end = 1; end <= text.length; end++) {
        const settled = [...growing.root.childNodes].slice(0, growing.numSettled);
        growing.text = text.slice(0, end);
        growing.renderEnd();
        kept &&= settled.every((node, i) => node === growing.root.childNodes[i]);
    }
    growing.text = text + "\\n";
    growing.renderEnd();
    whole.finish(text + "\\n");
    return [growing.root.outerHTML, whole.root.outerHTML, kept];
}"""


def test_a_text_that_grows_is_shown_like_the_whole_text_and_its_settled_blocks_stay(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    for text in STREAMED:
        grown, whole, kept = page.evaluate(GROW, text)
        assert kept, text
        late_targets = "[x][1]" in text or "[l][ref]" in text  # known at the end only
        assert late_targets or grown == whole, text


def test_an_answer_is_drawn_at_most_once_per_frame_and_only_its_end(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    frames, longest = page.evaluate("""async () => {
        const { MarkdownView } = await import("/static/markdown.js");
        const view = new MarkdownView(document.createElement("div"));
        const draw = view.renderEnd.bind(view);
        let [count, longest, text] = [0, 0, ""];
        view.renderEnd = () => { count++; longest = Math.max(longest, view.text.length - view.settled); draw(); };
        for (let frame = 0; frame < 10; frame++) {
            for (let i = 0; i < 100; i++) view.update(text += `Paragraph *${i}* of frame ${frame}.\\n\\n`);
            await new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
        }
        return [count, longest];
    }""")
    assert 1 <= frames <= 10, "1,000 updates"
    assert longest < 20_000, "of 34,000 characters"


def test_a_model_that_repeats_itself_does_not_stop_the_page(page: Any, served: tuple[LiveServer, Pace]) -> None:
    """Some parsers need quadratic time or unlimited recursion for such a text."""
    page.goto(served[0].url)
    for unit in ("**a *a", "*a **a ", "[", "> ", "- ", "![", "a_", "`", "| a ", "<a ", "a.", "&#1", "  * a\n"):
        assert page.evaluate("""async (text) => {
            const { MarkdownView } = await import("/static/markdown.js");
            const view = new MarkdownView(document.createElement("div"));
            view.finish(text);
            return view.root.textContent.length > 0 || view.root.children.length > 0;
        }""", unit * 20_000), unit


# -- the live view ----------------------------------------------------------------------------------------------------


def test_the_live_view_follows_several_requests_and_their_shared_blocks(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    pace.seconds = 0.02
    page.goto(live.url)
    expect(page.locator("#live-state")).to_have_text("live")
    body = {"prompt": WORDS * 4, "n": 3, "max_tokens": 400, "stream": True, "temperature": 1.0}
    with httpx.stream("POST", live.url + "/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # keep a reference: a garbage-collected generator closes its connection
        next(lines)
        expect(page.locator("#running")).to_have_text("3")
        expect(page.locator("#requests tr")).to_have_count(3)
        expect(page.locator("#requests")).to_contain_text(re.compile(r"\d\.2"))
        expect(page.locator("#lanes")).to_have_attribute("aria-label", re.compile(r"Steps? \d+.*: 3 rows, 3 decode tokens"))
        expect(page.locator("#blocks")).to_have_attribute("aria-label", re.compile(r"[1-9]\d* squares shared"))
        expect(page.locator("#memory")).to_have_text(re.compile(r"[1-9]\d* in use \(\d+ %\), \d+ cached, \d+ free, of 199 blocks"))
        colors = page.evaluate("""() => {
            const canvas = document.getElementById("blocks");
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const seen = new Set();
            for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 4).join());
            return seen.size;
        }""")
        assert colors >= 3, "free, used and shared"
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#requests")).to_have_text("none")
    page.goto("about:blank")
    live.wait_until(lambda: not live.client._unseen)


def test_a_prefill_stays_visible_while_its_request_decodes(page: Any, served: tuple[LiveServer, Pace]) -> None:
    page.goto(served[0].url)
    expect(page.locator("#live-state")).to_have_text("live")
    send(page, "go")
    finished(page)
    step = page.locator("#step")
    expect(step).to_contain_text(re.compile(r"Steps \d+ to \d+, \d{3} equal ones: 1 row, 1 decode token each, .* ms"))
    box = page.locator("#lanes").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 6 * 9 - 4, box["y"] + 20)  # left of a folded run, which is six units wide
    expect(step).to_contain_text(re.compile(r"Step \d+: 1 row, \d+ prompt tokens \(prefill\), \d+ blocks used, [\d.]+ ms"))
    page.mouse.move(0, 0)
    expect(step).to_contain_text("equal ones")


def test_steps_can_be_paused_scrolled_back_with_the_keyboard_and_resumed(page: Any, served: tuple[LiveServer, Pace]) -> None:
    live, pace = served
    page.goto(live.url)
    expect(page.locator("#live-state")).to_have_text("live")
    for question in ("one", "two"):
        page.locator("#max-tokens").evaluate("(field) => { field.value = 30; }")
        send(page, question)
        expect(page.locator(".turn.assistant .note").last).to_contain_text("Cut at 30 tokens")
    step, scroll = page.locator("#step"), page.get_by_label("Step", exact=True)
    columns = "(count) => { const { min, max } = document.getElementById('scroll'); return max - min + 1 === count; }"
    page.wait_for_function(columns, arg=4)  # for each question its prefill, and its decode steps
    newest = step.text_content()
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    requests = page.locator("#requests").inner_text()
    pace.seconds = 0.02
    page.locator("#max-tokens").evaluate("(field) => { field.value = ''; }")
    send(page, "three")
    expect(page.locator(".turn.assistant .text").last).to_contain_text("fox")
    page.wait_for_function(columns, arg=6)
    expect(step).to_have_text(newest)  # paused: nothing moves, although steps go on
    scroll.focus()
    page.keyboard.press("ArrowLeft")
    expect(step).to_contain_text("prompt tokens (prefill)")
    expect(scroll).to_have_attribute("aria-valuetext", re.compile("prefill"))
    page.keyboard.press("Home")
    assert page.locator("#requests").inner_text() == requests, "paused: the third request is not shown"
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#running")).to_have_text("1")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    pace.seconds = 0.0
    finished(page, 3)


# -- form -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_every_control_has_a_name_and_enough_contrast(
    page: Any, served: tuple[LiveServer, Pace], width: int, scheme: str,
) -> None:
    live, pace = served
    pace.replies["steps"] = REASONED + "\n```\n" + "x" * 60 + "\n```\n\n" + "y" * 60 + "\n\n> quote\n\n[link](https://a.test)\n\n`code`"
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    page.goto(live.url)
    expect(page.locator("#live-state")).to_have_text("live")
    expect(page.locator("#empty")).to_be_visible()
    send(page, "steps")
    finished(page)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("() => [...document.querySelectorAll('.turn')].every((turn) => turn.scrollWidth <= turn.clientWidth)")
    assert page.evaluate("() => [...document.querySelectorAll('input, textarea, meter')].every((field) => field.labels.length === 1)")
    assert page.evaluate("() => [...document.querySelectorAll('button')].every((button) => button.textContent.trim())")
    end = page.evaluate("(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.getElementById('log'))")
    assert end < 5, "the end of the answer is in sight"
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
        return ["h1", "#model", "#empty", "#hint", "dt", "dd", "figcaption p", ".queue th", "summary", "#send", "#clear", ".author",
            ".note", ".text p", ".text a", ".text blockquote", ".text p code", "pre code", ".code-bar span", ".text td",
            ".reasoning .markdown p", ".actions button", "#context-text", "#step", "#memory", "#pause"].map((name) => {
            const element = document.querySelector(name);
            const [a, b] = [light(parse(getComputedStyle(element).color).slice(0, 3)), light(behind(element))].sort((x, y) => y - x);
            return [name, (a + 0.05) / (b + 0.05)];
        });
    }""")
    assert all(contrast >= 4.5 for _, contrast in contrasts), contrasts


# -- the page at /docs ------------------------------------------------------------------------------------------------


def test_docs_shows_every_endpoint_and_every_field_of_the_openapi_document(page: Any, served: tuple[LiveServer, Pace]) -> None:
    url = served[0].url
    page.goto(f"{url}/docs")
    api = httpx.get(f"{url}/openapi.json").json()
    titles = [f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods]
    expect(page.locator("#endpoints h2")).to_have_text(titles)
    for name, schema in api["components"]["schemas"].items():
        shown = page.locator(f"[id='type-{name}'] tbody tr td:first-child code").all_inner_texts()
        assert set(shown) == set(schema["properties"])
    page.get_by_role("link", name="ChatRequest").first.click()
    expect(page.locator("#type-ChatRequest")).to_be_in_viewport()
    command = page.locator("[id='post-/v1/completions'] pre").inner_text()
    assert f"'{url}/v1/completions'" in command and "Authorization" not in command and "The capital of France" in command


def test_docs_takes_the_key_of_a_server_that_needs_one(page: Any, tmp_path: Path) -> None:
    with page_server(tmp_path, api_key=("secret",)) as (live, _):
        page.goto(f"{live.url}/docs")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use key").click()
        expect(page.get_by_role("alert")).to_contain_text("Incorrect API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("[id='get-/v1/models'] pre")).to_contain_text("Authorization: Bearer KEY")
        expect(page.locator("#key-form")).to_be_hidden()
