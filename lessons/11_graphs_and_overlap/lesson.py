"""Lesson 11: a fast device waits for a slow host. Record a step's kernels once and replay them; plan the next step before this one ends.

The device is simulated: a "kernel" is a PyTorch call into tensors that exist already, and each launch costs a fixed time of the host. The
second half is a simulated clock with two timelines, host and device.
"""
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LAUNCH_US, REPLAY_US = 4.0, 10.0  # host time to start one kernel, or one recorded graph of kernels
HOST_US = 150.0  # scheduling, packing the batch, and handing out the tokens, for each step
DEVICE_US = 480.0  # a decode step of a model of 0.6 billion parameters, all kernels together


class Device:
    """Runs kernels, counts the host's time for starting them, and records them if asked to."""

    def __init__(self) -> None:
        self.host_us = 0.0
        self.recording: list[tuple[Callable[..., object], tuple[Tensor, ...]]] | None = None

    def launch(self, kernel: Callable[..., object], *tensors: Tensor) -> None:
        self.host_us += LAUNCH_US
        if self.recording is not None:
            self.recording.append((kernel, tensors))  # the tensors themselves: a replay reads and writes the same memory
        kernel(*tensors)

    def replay(self, graph: list[tuple[Callable[..., object], tuple[Tensor, ...]]]) -> None:
        self.host_us += REPLAY_US
        for kernel, tensors in graph:
            kernel(*tensors)


class Model:
    """token -> hidden state -> layers -> next token. Four kernels per layer. All results go into buffers of fixed shape."""

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        dice = torch.Generator().manual_seed(0)
        self.embed = torch.randn(vocabulary, width, generator=dice)
        self.weights = [torch.randn(2, width, width, generator=dice) * width**-0.5 for _ in range(layers)]

    def run(self, device: Device, tokens: Tensor, out: Tensor) -> None:
        """tokens [rows] int64 -> out [rows] int64, the next tokens. Starts every kernel."""
        x = torch.empty(len(tokens), self.embed.shape[1])
        inner, logits = torch.empty_like(x), torch.empty(len(tokens), len(self.embed))
        device.launch(lambda tokens, x: torch.index_select(self.embed, 0, tokens, out=x), tokens, x)
        for up, down in self.weights:
            device.launch(lambda x, inner, up=up: torch.mm(x, up, out=inner), x, inner)
            device.launch(lambda inner: inner.tanh_(), inner)
            device.launch(lambda x, inner, down=down: x.addmm_(inner, down), x, inner)
            device.launch(lambda x: x.div_(x.norm(dim=1, keepdim=True)), x)
        device.launch(lambda x, logits: torch.mm(x, self.embed.T, out=logits), x, logits)
        device.launch(lambda logits, out: torch.argmax(logits, 1, out=out), logits, out)


def padded(rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest recorded size that has room for `rows`. None: there is none, so the step must run eagerly."""
    # TASK 1: choose from the sizes, which are in rising order
    return next((size for size in sizes if size >= rows), None)
    # END


class Runner:
    """Runs decode steps: replayed if a graph with enough rows was recorded, else kernel by kernel (eagerly)."""

    def __init__(self, model: Model, device: Device, sizes: tuple[int, ...]) -> None:
        self.model, self.device, self.sizes = model, device, sizes
        self.tokens = torch.zeros(max(sizes, default=0), dtype=torch.int64)  # what the graphs read: the first `size` rows
        self.out = torch.zeros_like(self.tokens)  # what they write
        self.graphs = {}
        for size in sizes:
            device.recording = []
            model.run(device, self.tokens[:size], self.out[:size])
            self.graphs[size] = device.recording
            device.recording = None

    def step(self, tokens: Tensor) -> Tensor:
        """The newest token of each sequence [rows] -> the next ones [rows]."""
        size = padded(len(tokens), self.sizes)
        if size is None:
            out = torch.empty_like(tokens)
            self.model.run(self.device, tokens, out)
            return out
        # TASK 2: a graph reads and writes fixed memory. Give it the tokens, replay it, and return a result that a later step cannot change
        self.tokens[:len(tokens)] = tokens
        self.device.replay(self.graphs[size])
        return self.out[:len(tokens)].clone()
        # END


@dataclass
class Timeline:
    host: list[tuple[float, float]]  # when the host worked on each step, us
    device: list[tuple[float, float]]  # when the device computed it
    times: list[float]  # when the host had each token
    surplus: int = 0  # steps that were launched for nothing


def decode(tokens: int, depth: int, host_us: float, device_us: float) -> Timeline:
    """One sequence. Its last token ends it, and the host notices that only when it has the token's value.

    depth 0: a step is planned after the token before it was read. depth 1: while the step before it is still running. The device takes the
    newest token from its own memory, so planning needs only the number of tokens.
    """
    line, launched, now, device_free = Timeline([], [], []), deque(), 0.0, 0.0
    while len(line.times) < tokens:
        # TASK 3: plan and launch until depth + 1 steps are on their way, then wait for the oldest one
        while len(launched) <= depth:
            line.host.append((now, now + host_us))
            now += host_us
            start = max(now, device_free)  # the device computes one step after another
            device_free = start + device_us
            line.device.append((start, device_free))
            launched.append(device_free)
        now = max(now, launched.popleft())
        line.times.append(now)
        # END
    line.surplus = len(launched)
    return line


def choose_sizes(rows: list[int], count: int) -> tuple[int, ...]:
    """At most `count` sizes to record, for steps with these numbers of rows: powers of two up to the largest."""
    sizes = [2**i for i in range(count) if 2 ** (i - 1) < max(rows)]
    return (*sizes[:-1], max(sizes[-1], max(rows)))


def padding(rows: list[int], sizes: tuple[int, ...]) -> float:
    """The fraction of computed rows that are padding. Steps that fit no size run eagerly and count as four times their rows."""
    computed = sum(padded(n, sizes) or 4 * n for n in rows)
    return 1 - sum(rows) / computed


def picture(line: Timeline, us: float, width: int = 100) -> None:
    for name, spans in (("host", line.host), ("device", line.device)):
        row = [" "] * width
        for i, (start, end) in enumerate(spans):
            for x in range(int(start / us), min(width, max(int(end / us), int(start / us) + 1))):
                row[x] = "0123456789"[i % 10]
        print(f"    {name:7s}|{''.join(row)}|")


def main() -> None:
    torch.set_num_threads(1)
    device, model = Device(), Model(layers=28, width=16, vocabulary=50)
    eager, graphs = Runner(model, device, ()), Runner(model, device, (1, 2, 4, 8))
    for rows in (1, 3, 8, 9):
        tokens, used = torch.arange(rows), []
        for runner in (eager, graphs):
            before, out = device.host_us, tokens
            for _ in range(5):
                out = runner.step(out)
            used.append(((device.host_us - before) / 5, out))
        assert torch.equal(used[0][1], used[1][1])
        print(f"{rows} sequences: {used[0][0]:4.0f} us of the host to start the kernels of a step, {used[1][0]:4.0f} us with graphs; "
              "equal tokens")
    launches = 2 + 1 + 5 * 28  # kernels of a real step: five per layer
    print(f"\na step: {DEVICE_US:.0f} us of kernels, {HOST_US:.0f} us of the host, and {launches} kernels or one graph to start")
    # A kernel runs while the host starts the next ones, so an eager step lasts as long as the slower of the two.
    for name, depth, host_us, device_us in (("eager", 0, HOST_US, max(launches * LAUNCH_US, DEVICE_US)),
                                            ("graph", 0, HOST_US + REPLAY_US, DEVICE_US),
                                            ("graph, planned ahead", 1, HOST_US + REPLAY_US, DEVICE_US)):
        line = decode(200, depth, host_us, device_us)
        busy = 200 * DEVICE_US / line.times[-1]
        print(f"  {name:22s}{line.times[-1] / 200:5.0f} us per token, kernels run {busy:4.0%} of the time, surplus steps: {line.surplus}")
        picture(line, 45)
    line = decode(200, 1, 600.0, DEVICE_US)
    print(f"\nif the host needs 600 us, overlap gives {line.times[-1] / 200:.0f} us per token: now the host is the limit")
    print("a step still reads all weights to make one token of each sequence. Can one step make more of them?")


if __name__ == "__main__":
    main()
