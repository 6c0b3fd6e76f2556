"""The load generator's client against servers that send prepared bytes, cut into pieces as a network might."""
from __future__ import annotations

import asyncio
import json

import pytest

from minivllm.benchmarks.address import ServerAddress
from minivllm.benchmarks.client import HttpError, LoadClient
from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.errors import InvalidInput

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def text(words: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": words, "finish_reason": finish}]})


def chat(delta: dict[str, object], finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})
DONE = b"data: [DONE]\n\n"


def outcomes_of(*answers: bytes, cut: int = 1 << 20, times: int | None = None) -> list[RequestOutcome]:
    """The client's outcomes with a server that sends these responses, one for each request, in pieces of `cut` bytes."""

    async def main() -> list[RequestOutcome]:
        waiting = list(answers)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while waiting:
                try:
                    await reader.readuntil(b"END")
                except asyncio.IncompleteReadError:
                    break
                answer = waiting.pop(0)
                for i in range(0, len(answer), cut):
                    writer.write(answer[i:i + cut])
                    await writer.drain()
                    await asyncio.sleep(0)
                if answer.endswith(b"CLOSE"):
                    break
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = LoadClient(ServerAddress("127.0.0.1", server.sockets[0].getsockname()[1]))
        outcomes = [await client.post(client.prepare("/x", b"{} END")) for _ in range(times or len(answers))]
        client.close()
        server.close()
        return outcomes

    return asyncio.run(main())


@pytest.mark.parametrize("cut", [1, 2, 7, 1 << 20])
def test_a_stream_gives_the_same_outcome_however_it_is_cut(cut: int) -> None:
    stream = HEAD + chunked(text(" a"), text(' "b"\n'), text(" é", "length"), USAGE, DONE)
    [outcome] = outcomes_of(stream, cut=cut)
    assert (outcome.error, len(outcome.times), outcome.tokens, outcome.prompt_tokens) == (None, 3, 3, 7)
    assert outcome.start < outcome.times[0] <= outcome.times[-1] == outcome.end


def test_events_without_text_do_not_count_as_tokens() -> None:
    opening, ending = chat({"role": "assistant", "content": ""}), chat({}, "stop")
    [outcome] = outcomes_of(HEAD + chunked(opening, chat({"content": "one"}), chat({"content": " two"}), ending, DONE))
    assert (len(outcome.times), outcome.tokens) == (2, 2)


def test_several_events_in_one_chunk_and_one_event_in_several_count_once_each() -> None:
    both = text("a") + text("b")
    [outcome] = outcomes_of(HEAD + chunked(both[:20], both[20:], DONE))
    assert len(outcome.times) == 2


def test_text_that_looks_like_syntax_is_text() -> None:
    words = ['[]', '{}', '""', '[DONE]', '_tokens"', '"error"', "data: x", "0\r\n\r\n"]
    [outcome] = outcomes_of(HEAD + chunked(*map(text, words), DONE))
    assert (outcome.error, len(outcome.times)) == (None, len(words))


def test_a_complete_response_has_token_counts() -> None:
    body = json.dumps({"choices": [{"text": "abc"}], "usage": {"prompt_tokens": 2, "completion_tokens": 5}}).encode()
    plain = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    for outcome in outcomes_of(plain, HEAD.replace(b"text/event-stream", b"application/json") + chunked(body[:9], body[9:])):
        assert (outcome.error, outcome.tokens, outcome.prompt_tokens, len(outcome.times)) == (None, 5, 2, 0)
        assert outcome.end > outcome.start


def test_an_error_has_status_and_message_and_does_not_affect_the_next_request() -> None:
    body = json.dumps({"error": {"message": "too many", "type": "x"}}).encode()
    refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    refused, answered = outcomes_of(refusal, HEAD + chunked(text("a"), DONE))
    assert refused.error == "HTTP 429: too many"
    assert (answered.error, len(answered.times)) == (None, 1)


def test_an_error_event_in_a_stream_is_an_error() -> None:
    [outcome] = outcomes_of(HEAD + chunked(text("a"), event({"error": {"message": "the step failed"}}), DONE))
    assert outcome.error == "the step failed"


def test_a_connection_lost_during_a_response_is_an_error_and_is_replaced() -> None:
    lost, answered = outcomes_of(HEAD + b"20\r\nabCLOSE", HEAD + chunked(text("a"), DONE))
    assert lost.error is not None and "connection was lost" in lost.error
    assert answered.error is None


def test_a_request_is_repeated_if_its_idle_connection_was_closed() -> None:
    answer = HEAD + chunked(text("a"), DONE) + b"CLOSE"
    assert [outcome.error for outcome in outcomes_of(answer, answer)] == [None, None]


def test_a_response_that_is_not_http_is_an_error() -> None:
    [outcome] = outcomes_of(b"SSH-2.0-OpenSSH\r\n\r\nCLOSE")
    assert outcome.error is not None and "not valid HTTP/1.1" in outcome.error


def test_a_missing_server_is_an_error() -> None:
    async def main() -> None:
        client = LoadClient(ServerAddress("127.0.0.1", 1))
        assert (await client.post(client.prepare("/", b""))).error
        with pytest.raises((OSError, HttpError)):
            await client.get("/")

    asyncio.run(main())


@pytest.mark.parametrize(("url", "address"), [
    ("http://127.0.0.1:8000", ServerAddress("127.0.0.1", 8000)),
    ("http://localhost:8000/v1/", ServerAddress("localhost", 8000)),
    ("localhost:9", ServerAddress("localhost", 9)),
    ("https://example.org/llm/v1", ServerAddress("example.org", 443, True, "/llm")),
    ("http://[::1]:80", ServerAddress("::1", 80)),
])
def test_a_base_url_may_have_several_forms(url: str, address: ServerAddress) -> None:
    assert ServerAddress.of(url) == address


@pytest.mark.parametrize(("host", "authority"), [("localhost", "localhost:80"), ("::1", "[::1]:80")])
def test_the_host_header_has_brackets_around_an_ipv6_address(host: str, authority: str) -> None:
    assert f"\r\nHost: {authority}\r\n" in LoadClient(ServerAddress(host, 80)).prepare("/x", b"").decode()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://x?y=1", ""])
def test_an_invalid_base_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidInput, match="base_url"):
        ServerAddress.of(url)
