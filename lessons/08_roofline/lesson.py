"""Lesson 8: how fast can a step be? A machine has two limits: bytes that it reads per second, and multiply-adds per second.

A step needs a number of bytes and a number of operations (FLOPs). The larger of the two times is a lower bound of its duration. The lesson
calculates both for real models and cards. Then it measures both limits of this CPU, and how close matrix products come to them.
"""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Machine:
    name: str
    bandwidth: float  # GB/s, of the memory
    tflops: float  # 10^12 FLOP/s: dense products of 16-bit numbers

    def ridge(self) -> float:
        """FLOPs per byte at which both limits take the same time."""
        return self.tflops * 1000 / self.bandwidth


@dataclass
class Model:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    bytes_per_number: int = 2

    def weights(self) -> int:
        """Numbers that a token is multiplied with. (The embedding table is the output head too; looking up a row costs nothing.)"""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)  # q and o, k and v
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden

    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_number


QWEN = Model("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151936)
MISTRAL = Model("Mistral-7B", 32, 4096, 32, 8, 128, 14336, 32000)
CARDS = (Machine("RTX 4060", 272, 30.2), Machine("A100", 2039, 312), Machine("H200", 4800, 989.4))


def decode_bytes(model: Model, sequences: int, context: int) -> int:
    """Bytes that a decode step reads, if each of its sequences has `context` tokens."""
    # TASK 1: weights and keys. Which of the two are read once for all sequences?
    return model.weights() * model.bytes_per_number + sequences * context * model.kv_bytes()
    # END


def decode_flops(model: Model, sequences: int, context: int) -> int:
    """FLOPs of a decode step. One multiply-add is 2 of them."""
    # TASK 1: products with weights, and attention: queries times keys, weights times values, for each query head
    attention = 2 * 2 * context * model.layers * model.heads * model.head_dim
    return sequences * (2 * model.weights() + attention)
    # END


def step_ms(machine: Machine, num_bytes: float, flops: float) -> float:
    """The lower bound of a step's duration: reading and arithmetic happen at the same time, and the slower one decides."""
    # TASK 2: both times in ms, from GB/s and TFLOP/s
    return max(num_bytes / (machine.bandwidth * 1e6), flops / (machine.tflops * 1e9))
    # END


def reached(machine: Machine, flops_per_byte: float) -> float:
    """The roof: the most TFLOP/s that work of this intensity can reach."""
    # TASK 2: below the ridge the bandwidth limits it, above it the arithmetic
    return min(machine.tflops, flops_per_byte * machine.bandwidth / 1000)
    # END


def break_even(machine: Machine, model: Model, context: int) -> float:
    """The number of sequences from which on arithmetic is the limit. Infinity if reading is it for any number."""
    # TASK 3: each sequence adds a reading time and an arithmetic time; the weights are read once. When are both sums equal?
    weights_ms = model.weights() * model.bytes_per_number / (machine.bandwidth * 1e6)
    keys_ms = context * model.kv_bytes() / (machine.bandwidth * 1e6)  # per sequence
    flops_ms = decode_flops(model, 1, context) / (machine.tflops * 1e9)  # per sequence
    return weights_ms / (flops_ms - keys_ms) if flops_ms > keys_ms else math.inf
    # END


def prepare(weight: torch.Tensor) -> torch.Tensor:
    """The form in which `product` wants a weight [out, in] of float32. It is computed once."""
    return weight


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, in] times a prepared weight [out, in] -> [rows, out]."""
    return x @ weight.T


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """The shortest of some runs."""
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measure(out: int = 2048, inner: int = 4096) -> tuple[Machine, list[tuple[int, float, float]]]:
    """This CPU with one thread, and for several numbers of rows: FLOPs per byte, measured TFLOP/s."""
    weight, square = torch.randn(out, inner), torch.randn(768, 768)
    flat = weight.flatten()
    bandwidth = weight.nbytes / seconds(lambda: flat @ flat, 5) / 1e9  # reads each number once
    peak = 2 * 768**3 / seconds(lambda: square @ square) / 1e12
    prepared, points = prepare(weight), []
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        x = torch.randn(rows, inner)
        flops = 2 * rows * weight.numel()
        points.append((rows, flops / weight.nbytes, flops / seconds(lambda x=x: product(x, prepared)) / 1e12))
    return Machine("this CPU, 1 thread", bandwidth, peak), points


def draw(machine: Machine, points: list[tuple[int, float, float]], height: int = 10) -> None:
    """FLOP/s over FLOPs per byte, both logarithmic: `-` the roof, `o` measured."""
    top = math.log2(machine.tflops) + 0.5
    for line in range(height):
        level = top - line * 0.7
        row = f"  {2**level * 1000:7.1f} GFLOP/s |"
        for _, intensity, tflops in points:
            roof = abs(math.log2(reached(machine, intensity)) - level) <= 0.35
            row += "   o   " if abs(math.log2(tflops) - level) <= 0.35 else " ----- " if roof else "       "
        print(row)
    print(" " * 19 + "+" + "".join(f"{f'{intensity:.1f}':^7s}" for _, intensity, _ in points) + "  FLOPs per byte")
    print(" " * 20 + "".join(f"{rows:^7d}" for rows, _, _ in points) + "  rows")


def main() -> None:
    torch.set_num_threads(1)
    a100, context = CARDS[1], 1000
    print(f"a decode step of {QWEN.name} ({QWEN.weights() / 1e6:.0f} M numbers) on an A100, {context} tokens of context per sequence")
    print("  sequences   weights, GB   keys, GB   GFLOP   FLOPs per byte   reading   arithmetic   tokens/s at most")
    for n in (1, 8, 64, 256):
        num_bytes, flops = decode_bytes(QWEN, n, context), decode_flops(QWEN, n, context)
        weights = decode_bytes(QWEN, 0, 0)
        rate = n / step_ms(a100, num_bytes, flops) * 1000
        print(f"  {n:9d}  {weights / 1e9:12.2f}  {(num_bytes - weights) / 1e9:9.2f}  {flops / 1e9:6.0f}  {flops / num_bytes:15.1f}"
              f"  {step_ms(a100, num_bytes, 0):5.2f} ms  {step_ms(a100, 0, flops):8.2f} ms  {rate:17,.0f}")
    print(f"a prompt token: {step_ms(a100, 0, 2 * QWEN.weights()):.4f} ms of arithmetic; the weights: "
          f"{step_ms(a100, decode_bytes(QWEN, 0, 0), 0):.2f} ms to read")
    print(f"\n{MISTRAL.name}: from which number of sequences on is arithmetic the limit of a decode step?")
    print("                  GB/s   TFLOP/s   ridge, FLOPs per byte     without keys  100 tokens each   1,000 tokens each")
    for card in CARDS:
        counts = [break_even(card, MISTRAL, tokens) for tokens in (0, 100, 1000)]
        columns = "".join(f"{'never' if n == math.inf else f'{n:.0f}':>17s}" for n in counts)
        print(f"  {card.name:12s}  {card.bandwidth:6.0f}  {card.tflops:8.1f}  {card.ridge():22.0f}{columns}")
    machine, points = measure()
    print(f"\n{machine.name}: {machine.bandwidth:.1f} GB/s, {machine.tflops * 1000:.0f} GFLOP/s, "
          f"ridge at {machine.ridge():.1f} FLOPs per byte")
    draw(machine, points)
    n, context = 64, 8000
    share = 1 - decode_bytes(QWEN, 0, 0) / decode_bytes(QWEN, n, context)
    print(f"\nwith {n} sequences of {context:,} tokens, {share:.0%} of the bytes of a step are keys and values")


if __name__ == "__main__":
    main()
