"""Lesson 5: a long prompt need not be computed in one step. Every step has a budget of tokens, which decodes use first.

The simulated engine of lesson 4, with one counter per request: how many of its tokens are computed. A request may compute a part of its
prompt. First one long prompt meets four running requests, then the size of the chunks is varied.
"""
import math
import random
from dataclasses import dataclass, field

STEP_MS = 1.5  # to read the weights once
TOKEN_MS = 0.004  # for each computed token


@dataclass
class Request:
    name: str
    arrival: float  # ms
    prompt: int  # tokens
    output: int  # tokens
    computed: int = 0  # tokens whose keys and values are stored
    times: list[float] = field(default_factory=list)  # when each output token was made, ms

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and the output so far."""
        return self.prompt + len(self.times)

    @property
    def finished(self) -> bool:
        return len(self.times) == self.output


def tokens_now(request: Request, budget: int) -> int:
    """How many of its tokens a request computes in a step that has room for `budget` tokens."""
    # TASK 1: one formula for a prompt chunk, the rest of a prompt, and a decode
    return min(request.known - request.computed, budget)
    # END


def plan(running: list[Request], waiting: list[Request], max_running: int, max_tokens: int) -> dict[str, int]:
    """The next step: name -> tokens to compute, in total at most `max_tokens`. Moves requests that start from `waiting` to `running`."""
    step: dict[str, int] = {}
    budget = max_tokens
    # TASK 2: first the decodes, then the running prompts, then waiting requests, while there is budget
    decodes = [request for request in running if request.known - request.computed == 1]
    prompts = [request for request in running if request.known - request.computed > 1]
    for request in decodes + prompts:
        if budget:
            step[request.name] = tokens_now(request, budget)
            budget -= step[request.name]
    while budget and waiting and len(running) < max_running:
        running.append(waiting.pop(0))
        step[running[-1].name] = tokens_now(running[-1], budget)
        budget -= step[running[-1].name]
    # END
    return step


def advance(request: Request, tokens: int, now: float) -> None:
    """`tokens` more of the request's tokens are computed at time `now`."""
    # TASK 3: update `computed`. Which step makes an output token?
    request.computed += tokens
    if request.computed == request.known:  # the newest token was computed: its row of logits gives the next one
        request.times.append(now)
    # END


def serve(requests: list[Request], max_running: int, max_tokens: int) -> list[tuple[float, dict[str, int]]]:
    """Serve all requests -> for each step its duration in ms and its plan."""
    coming = sorted(requests, key=lambda request: request.arrival)
    waiting: list[Request] = []
    running: list[Request] = []
    steps: list[tuple[float, dict[str, int]]] = []
    now = 0.0
    while coming or waiting or running:
        while coming and coming[0].arrival <= now:
            waiting.append(coming.pop(0))
        step = plan(running, waiting, max_running, max_tokens)
        if not step:
            now = coming[0].arrival
            continue
        steps.append((STEP_MS + TOKEN_MS * sum(step.values()), step))
        now += steps[-1][0]
        for request in running:
            if request.name in step:
                advance(request, step[request.name], now)
        running = [request for request in running if not request.finished]
    return steps


def quantile(values: list[float], q: float) -> float:
    """The smallest value that is at least as large as the fraction q of all values."""
    return sorted(values)[max(0, math.ceil(len(values) * q) - 1)]


def ttft(request: Request) -> float:
    return request.times[0] - request.arrival


def gaps(requests: list[Request]) -> list[float]:
    """Times between two tokens of a request, over all requests."""
    return [b - a for request in requests for a, b in zip(request.times, request.times[1:], strict=False)]


def mixed_requests(count: int, per_second: float, seed: int = 0) -> list[Request]:
    """Short chats, and a document of 6,000 tokens in every twentieth request."""
    dice, now, requests = random.Random(seed), 0.0, []
    for i in range(count):
        output = max(1, min(1000, round(dice.lognormvariate(5.0, 0.9))))
        requests.append(Request(f"r{i}", now, 6000 if i % 20 == 10 else dice.randint(20, 300), output))
        now += 1000 * dice.expovariate(per_second)
    return requests


def picture(steps: list[tuple[float, dict[str, int]]], names: str) -> None:
    """One line per request, one column per step: the number of tokens that it computes."""
    print("  duration, ms   " + " ".join(f"{ms:5.1f}" for ms, _ in steps))
    for name in names:
        print(f"  request {name}      " + " ".join(f"{step.get(name, ''):5}" for _, step in steps))


def main() -> None:
    for max_tokens in (8192, 512):
        requests = [Request("a", 0.0, 10, 12), Request("b", 0.0, 20, 12), Request("c", 3.5, 2000, 3), Request("d", 3.5, 30, 4)]
        steps = serve(requests, max_running=8, max_tokens=max_tokens)
        print(f"at most {max_tokens} tokens in a step; requests c (2,000 tokens) and d (30 tokens) arrive at 3.5 ms")
        picture(steps[:10], "abcd")
        print(f"  longest gap between two tokens {max(gaps(requests)):.2f} ms; first token after {ttft(requests[2]):.1f} ms (c), "
              f"{ttft(requests[3]):.1f} ms (d)\n")
    print("200 requests, 40 per second, every 20th with 6,000 prompt tokens")
    print("  tokens in a step   gap between tokens: median    99%   longest   first token: chats   documents   all done after")
    for max_tokens in (8192, 2048, 512, 128, 64):
        requests = mixed_requests(200, per_second=40)
        serve(requests, max_running=64, max_tokens=max_tokens)
        all_gaps = gaps(requests)
        chats, documents = ([ttft(request) for request in requests if (request.prompt == 6000) is long] for long in (False, True))
        print(f"  {max_tokens:16d}  {quantile(all_gaps, 0.5):25.2f} ms {quantile(all_gaps, 0.99):5.2f}  {max(all_gaps):6.2f} ms"
              f"  {sum(chats) / len(chats):16.1f} ms  {sum(documents) / len(documents):6.0f} ms"
              f"  {max(request.times[-1] for request in requests) / 1000:12.2f} s")
    tokens = [sum(request.known for request in requests if request.arrival <= now < request.times[-1]) for now in range(0, 5000, 10)]
    print(f"\nrequests that run at the same time are up to {max(tokens):,} tokens long: {max(tokens) * 22.5 / 2**20:.2f} GiB of KV cache "
          "at 22.5 KiB per token")


if __name__ == "__main__":
    main()
