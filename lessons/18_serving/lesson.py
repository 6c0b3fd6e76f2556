"""Lesson 18: from an engine to a service. Text is streamed as events over HTTP, and the load shows what the service can promise.

First the way of a text: tokens' bytes, whole characters, stop strings, server-sent events, a client. Then requests at random times against
an engine with a simulated clock: latencies, objectives, goodput, and the rate at which they break.
"""
import asyncio
import codecs
import json
import random
import time
from dataclasses import dataclass, field

DONE = "[DONE]"


class TextStream:
    """The text of one output, while its tokens arrive. A token is some bytes: a half character, perhaps, or a part of the stop string."""

    def __init__(self, stop: str) -> None:
        self.stop, self.ended = stop, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps the bytes of an incomplete character
        self.held = ""  # text that may become the stop string

    def push(self, token: bytes) -> str:
        """The text that is certain now. The stop string ends the output and is not part of it."""
        # TASK 1: whole characters only; hold back an end of the text that the stop string may begin with
        text = self.held + self.decoder.decode(token)
        before, found, _ = text.partition(self.stop)
        if found:
            self.ended, self.held = True, ""
            return before
        keep = next(n for n in range(len(self.stop) - 1, -1, -1) if text.endswith(self.stop[:n]))
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep]
        # END

    def finish(self) -> str:
        """What was held back, at the end of the output."""
        return "" if self.ended else self.held + self.decoder.decode(b"", final=True)


def event(body: dict | str) -> bytes:
    """A server-sent event: a line that begins with "data: ", and an empty line."""
    return b"data: " + (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode() + b"\n\n"


class EventReader:
    """The client's side. The network delivers bytes in pieces of any size."""

    def __init__(self) -> None:
        self.data = b""

    def push(self, piece: bytes) -> list[dict]:
        """The bodies of the events that are complete now, without DONE."""
        # TASK 2: collect bytes until an empty line ends an event
        self.data += piece
        *complete, self.data = self.data.split(b"\n\n")
        texts = [one.removeprefix(b"data: ").decode() for one in complete]
        return [json.loads(text) for text in texts if text != DONE]
        # END


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server for one kind of request: POST /v1/completions with OpenAI's fields. The "model" writes a fixed text."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length:"))
    request = json.loads(await reader.readexactly(length))
    if not isinstance(request.get("prompt"), str):
        body = json.dumps({"error": {"message": "prompt must be a string", "param": "prompt", "code": 400}}).encode()
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    else:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        stream, data = TextStream(request.get("stop") or "</s>"), "Arr, a 🐙 and 7 pieces of eight!</s>".encode()
        for start in range(0, min(len(data), 3 * request.get("max_tokens", 16)), 3):  # tokens of three bytes
            await asyncio.sleep(0.005)  # a step of the engine
            if text := stream.push(data[start:start + 3]):
                writer.write(event({"choices": [{"index": 0, "text": text, "finish_reason": None}]}))
            if stream.ended:
                break
        reason = "stop" if stream.ended else "length"
        writer.write(event({"choices": [{"index": 0, "text": stream.finish(), "finish_reason": reason}]}) + event(DONE))
    await writer.drain()
    writer.close()


async def complete(port: int, request: dict) -> tuple[int, list[tuple[float, dict]]]:
    """A client: the status, and the events with the milliseconds after which they arrived."""
    start, body = time.perf_counter(), json.dumps(request).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    events, parser = [], EventReader()
    if status != 200:  # an error is one JSON document
        events.append((1e3 * (time.perf_counter() - start), json.loads(await reader.read())))
    while piece := await reader.read(64):
        events += [(1e3 * (time.perf_counter() - start), one) for one in parser.push(piece)]
    writer.close()
    return status, events


@dataclass
class Outcome:
    """One request as its client saw it, in ms. No times: the server refused it."""

    start: float
    times: list[float] = field(default_factory=list)  # of each token

    def ttft(self) -> float:
        return self.times[0] - self.start

    def tpot(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def step_ms(decodes: int, prompts: int) -> float:
    """A step: the weights are read; each decode reads its keys; each prompt of 200 tokens is computed."""
    return 20.0 + 0.15 * decodes + 4.0 * prompts


def simulate(rate: float, rows: int = 64, max_waiting: int | None = None, count: int = 1500, tokens: int = 100) -> list[Outcome]:
    """Requests at random times, `rate` per second on average, whether or not earlier ones have finished. max_waiting: more are refused."""
    dice, clock, due, outcomes, waiting, running = random.Random(0), 0.0, 0.0, [], [], []
    arrivals = [due := due + dice.expovariate(rate) * 1e3 for _ in range(count)]
    while arrivals or waiting or running:
        if not waiting and not running:
            clock = max(clock, arrivals[0])
        while arrivals and arrivals[0] <= clock:
            outcomes.append(Outcome(arrivals.pop(0)))
            if max_waiting is None or len(waiting) < max_waiting:
                waiting.append(outcomes[-1])
        started = [waiting.pop(0) for _ in range(min(len(waiting), rows - len(running), 4))]  # the token budget: 4 prompts
        clock += step_ms(len(running), len(started))
        running += started
        for outcome in running:
            outcome.times.append(clock)
        running = [outcome for outcome in running if len(outcome.times) < tokens]
    return outcomes


def percentile(values: list[float], q: float) -> float:
    """The value below which q percent of all values are, interpolated between neighbors."""
    ordered = sorted(values)
    low, part = divmod(q / 100 * (len(ordered) - 1), 1)
    after = ordered[min(int(low) + 1, len(ordered) - 1)]
    return ordered[int(low)] + part * (after - ordered[int(low)])


def goodput(outcomes: list[Outcome], ttft_ms: float, tpot_ms: float) -> float:
    """Requests per second that met both objectives. The time is that from the first request to the last token."""
    # TASK 3: count requests, not tokens; a refused request did not meet them
    good = sum(bool(o.times) and o.ttft() <= ttft_ms and o.tpot() <= tpot_ms for o in outcomes)
    seconds = (max(o.times[-1] for o in outcomes if o.times) - outcomes[0].start) / 1e3
    return good / seconds
    # END


def settings() -> tuple[int, int | None]:
    """The rows of the engine (at most 64), and how many requests may wait before more are refused."""
    return 64, None


async def show_streaming() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    status, events = await complete(port, {"prompt": "Who are you?", "max_tokens": 40, "stop": "eight"})
    print(f"status {status}, {len(events)} events of an output that ends at the stop string 'eight'")
    for when, one in events:
        print(f"  after {when:5.1f} ms: {json.dumps(one['choices'][0], ensure_ascii=False)}")
    status, events = await complete(port, {"prompt": 7})
    print(f"status {status}: {json.dumps(events[0][1])}")
    server.close()


def main() -> None:
    asyncio.run(show_streaming())
    print("\n1,500 requests of 200 + 100 tokens at random times; 64 rows; objectives: TTFT 500 ms, 40 ms per token")
    print("  requests/s   tokens/s   TTFT p50     p99     ms per token p99   goodput/s")
    for rate in (2, 6, 10, 14, 16, 18, 20, 24):
        found = simulate(rate)
        seconds = (max(o.times[-1] for o in found) - found[0].start) / 1e3
        ttft, tpot = [o.ttft() for o in found], [o.tpot() for o in found]
        print(f"  {rate:10d}{100 * len(found) / seconds:11.0f}{percentile(ttft, 50):9.0f} ms{percentile(ttft, 99):7.0f} ms"
              f"{percentile(tpot, 99):18.1f} ms{goodput(found, 500, 40):10.1f}   {'#' * round(goodput(found, 500, 40))}")


if __name__ == "__main__":
    main()
