"""Lesson 4: which requests share a step? A batch that stays together until its slowest request ends, or one that changes in every step.

A simulated engine with a simulated clock: a step takes a fixed time (to read the weights) and a little more for each token that it
computes. The same requests are served under both policies. First eight requests are drawn, then 200 arrive one after another.
"""
import math
import random
from dataclasses import dataclass, field

STEP_MS = 1.5  # to read the weights once, however many tokens a step computes
TOKEN_MS = 0.004  # of arithmetic for each computed token


@dataclass
class Request:
    name: str
    arrival: float  # ms
    prompt: int  # tokens
    output: int  # tokens; the engine notices it only when the last one has been made
    times: list[float] = field(default_factory=list)  # when each output token was made, ms

    @property
    def finished(self) -> bool:
        return len(self.times) == self.output

    def tokens_to_compute(self) -> int:
        """The first step of a request computes its whole prompt, every later one the token that was made last."""
        return 1 if self.times else self.prompt


class StaticBatching:
    """A batch starts together and ends together. A finished request keeps its row, which computes padding."""

    def num_to_admit(self, running: list[Request], max_running: int) -> int:
        return 0 if running else max_running

    def leaving(self, running: list[Request]) -> list[Request]:
        return running if all(request.finished for request in running) else []


class ContinuousBatching:
    """A finished request leaves after the step in which it finished, and a waiting one takes its row in the next step."""

    def num_to_admit(self, running: list[Request], max_running: int) -> int:
        """How many waiting requests may start now, if there are so many."""
        # TASK 1: the number of free rows
        return max_running - len(running)
        # END

    def leaving(self, running: list[Request]) -> list[Request]:
        """The requests that give their rows back after this step."""
        # TASK 1: which ones?
        return [request for request in running if request.finished]
        # END


def pick(waiting: list[Request]) -> int:
    """Index of the request that starts next. First come, first served."""
    return 0


@dataclass
class Step:
    start: float  # ms
    end: float
    rows: list[tuple[str, bool]]  # name of each row's request, and whether it was already finished


def serve(policy: StaticBatching | ContinuousBatching, requests: list[Request], max_running: int) -> list[Step]:
    """Serve all requests, at most `max_running` at the same time. Writes the time of each output token into the requests."""
    coming = sorted(requests, key=lambda request: request.arrival)
    waiting: list[Request] = []
    running: list[Request] = []
    steps: list[Step] = []
    now = 0.0
    while coming or waiting or running:
        while coming and coming[0].arrival <= now:
            waiting.append(coming.pop(0))
        # TASK 2: one step. Admit, compute, advance the clock, give a token to each unfinished request, remove those that leave
        for _ in range(min(policy.num_to_admit(running, max_running), len(waiting))):
            running.append(waiting.pop(pick(waiting)))
        if not running:  # nothing to do until the next request arrives
            now = coming[0].arrival
            continue
        computed = sum(request.tokens_to_compute() for request in running)
        steps.append(Step(now, now + STEP_MS + TOKEN_MS * computed, [(request.name, request.finished) for request in running]))
        now = steps[-1].end
        for request in running:
            if not request.finished:
                request.times.append(now)
        for request in policy.leaving(running):
            running = [other for other in running if other is not request]
        # END
    return steps


@dataclass
class Report:
    """Times in ms."""

    tokens_per_second: float
    mean_ttft: float  # time to first token: from the arrival of a request to its first token
    mean_latency: float  # from the arrival to the last token
    median_gap: float  # inter-token latency: between two tokens of a request, over all requests
    longest_gap: float


def report(requests: list[Request]) -> Report:
    # TASK 3: two lists over all requests: the times to first token, and the gaps between two tokens
    ttfts = [request.times[0] - request.arrival for request in requests]
    gaps = [b - a for request in requests for a, b in zip(request.times, request.times[1:], strict=False)]
    # END
    latencies = [request.times[-1] - request.arrival for request in requests]
    seconds = (max(request.times[-1] for request in requests) - min(request.arrival for request in requests)) / 1000
    gaps.sort()
    return Report(sum(request.output for request in requests) / seconds, sum(ttfts) / len(ttfts), sum(latencies) / len(latencies),
                  gaps[len(gaps) // 2], gaps[-1])


def gantt(requests: list[Request], steps: list[Step], width: int = 90) -> None:
    """One line per request: `.` waits, `#` computes, `-` finished but its row is not free."""
    scale = steps[-1].end / width
    for request in requests:
        line = ["."] * math.ceil(request.times[-1] / scale) + [" "] * width
        for step in steps:
            for name, finished in step.rows:
                if name == request.name:
                    for x in range(int(step.start / scale), math.ceil(step.end / scale)):
                        line[x] = "-" if finished else "#"
        print(f"  {request.name} {request.output:3d} tokens  {''.join(line)[:width]}")


def chat_requests(count: int, per_second: float, seed: int = 0) -> list[Request]:
    """Requests with random gaps between their arrivals. Most are short, a few are very long."""
    dice, now, requests = random.Random(seed), 0.0, []
    for i in range(count):
        prompt, output = (max(1, min(1000, round(dice.lognormvariate(math.log(mean) - 0.9**2 / 2, 0.9)))) for mean in (161, 338))
        requests.append(Request(f"r{i}", now, prompt, output))
        now += 1000 * dice.expovariate(per_second)
    return requests


def main() -> None:
    for policy in (StaticBatching(), ContinuousBatching()):
        outputs = [31, 128, 12, 55, 240, 19, 77, 34]
        requests = [Request("abcdefgh"[i], 0.0, 20, output) for i, output in enumerate(outputs)]
        steps = serve(policy, requests, max_running=4)
        rows = [finished for step in steps for _, finished in step.rows]
        print(f"{type(policy).__name__}, 4 rows: {len(steps)} steps, {sum(rows) / len(rows):.0%} of the computed rows are padding")
        gantt(requests, steps)
    print("\n200 requests, 40 per second, 32 rows   tokens/s   first token   whole request    between tokens: median   longest")
    for policy in (StaticBatching(), ContinuousBatching()):
        requests = chat_requests(200, per_second=40)
        serve(policy, requests, max_running=32)
        r = report(requests)
        print(f"  {type(policy).__name__:35s}  {r.tokens_per_second:8.0f}  {r.mean_ttft:9.0f} ms  {r.mean_latency:11.0f} ms"
              f"  {r.median_gap:20.2f} ms  {r.longest_gap:5.2f} ms")
    requests = chat_requests(200, per_second=40)
    requests.append(Request("long", requests[100].arrival, 8000, 10))
    serve(ContinuousBatching(), requests, max_running=32)
    print(f"with one prompt of 8,000 tokens among them, the longest gap between two tokens is {report(requests).longest_gap:.1f} ms")
    rates = []
    for rows in (32, 64):
        requests = chat_requests(200, per_second=1000)
        serve(ContinuousBatching(), requests, max_running=rows)
        rates.append(f"{round(report(requests).tokens_per_second, -2):,.0f} tokens/s with {rows} rows")
    print(f"200 requests, 1000 per second: {', '.join(rates)}")


if __name__ == "__main__":
    main()
