"""Lesson 14: many variants of a model on one GPU. A LoRA adapter stores how a variant differs from the base model, in 1% of its size.

One batch contains rows of several adapters and of the base model. The base weights are read once for all rows; each row then gets the
product of two thin matrices more. A few slots on the device hold the adapters that run; the scheduler decides which adapter is in which.
"""
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

BASE = -1  # the slot of rows that use no adapter


@dataclass
class Adapter:
    """What a variant adds to one linear layer: y = W x + scaling * B (A x)."""

    a: Tensor  # [rank, inputs]
    b: Tensor  # [outputs, rank]
    scaling: float  # alpha / rank


def read_adapter(folder: Path) -> dict[str, Adapter]:
    """The adapted layers of a folder that PEFT has written, by the layer's name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name.removeprefix("base_model.model.model."): tensor for name, tensor in
               load_file(folder / "adapter_model.safetensors").items()}
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {name: Adapter(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], config["lora_alpha"] / config["r"])
            for name in names}


def merged(weight: Tensor, adapter: Adapter) -> Tensor:
    """The variant's own weight [outputs, inputs]. It is as large as the base weight."""
    return weight + adapter.scaling * (adapter.b @ adapter.a)


def by_merging(x: Tensor, weight: Tensor, slots: Tensor, adapters: list[Adapter]) -> Tensor:
    """Rows x [rows, inputs] -> [rows, outputs], with a whole weight for each variant of the batch. slots [rows]: an adapter, or BASE."""
    y = torch.empty(len(x), len(weight))
    for slot in slots.unique().tolist():
        variant = weight if slot == BASE else merged(weight, adapters[slot])
        y[slots == slot] = x[slots == slot] @ variant.T
    return y


def in_one_batch(x: Tensor, weight: Tensor, slots: Tensor, adapters: list[Adapter]) -> Tensor:
    """The same result. The base weight is read once for all rows."""
    # TASK 1: the base product of all rows; then each adapter's part for its rows, by way of A x [rows of this adapter, rank]
    y = x @ weight.T
    for slot in slots.unique().tolist():
        if slot != BASE:
            rows, adapter = slots == slot, adapters[slot]
            y[rows] += adapter.scaling * ((x[rows] @ adapter.a.T) @ adapter.b.T)
    return y
    # END


class Slots:
    """Device memory for a few adapters. Adapters are numbers above 0; number 0 is the base model, which needs no slot."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count))
        self.slot_of: dict[int, int] = {}  # adapter -> its slot; the least recently used adapter comes first
        self.users: dict[int, int] = {}  # adapter -> number of running requests that use it
        self.loads = 0  # copies from host memory

    def fits(self, adapter: int) -> bool:
        """Whether a request with this adapter can start now."""
        return not adapter or adapter in self.slot_of or bool(self.free) or any(not self.users.get(other) for other in self.slot_of)

    def acquire(self, adapter: int) -> None:
        """A request with this adapter starts. `fits` is true."""
        if not adapter:
            return
        # TASK 2: a slot for it, if it has none: a free one, or that of the least recently used adapter that no running request uses
        if adapter not in self.slot_of:
            if self.free:
                slot = self.free.pop(0)
            else:
                slot = self.slot_of.pop(next(other for other in self.slot_of if not self.users.get(other)))
            self.slot_of[adapter] = slot
            self.loads += 1
        self.users[adapter] = self.users.get(adapter, 0) + 1
        # END

    def release(self, adapter: int) -> None:
        """A request with this adapter has finished. The adapter stays in its slot."""
        if not adapter:
            return
        # TASK 2: one user less; of all adapters, this one was used most recently
        self.users[adapter] -= 1
        self.slot_of[adapter] = self.slot_of.pop(adapter)  # to the end
        # END


@dataclass(eq=False)
class Request:
    adapter: int
    steps: int  # of decoding, until it ends
    arrived: int = 0
    passes: int = 0  # later requests with adapters that started before it, because its adapter had no slot


def admit(waiting: list[Request], slots: Slots, rows: int, max_passes: int) -> list[Request]:
    """The requests that start now, at most `rows`. waiting: in the order of their arrival."""
    # TASK 3: a request without a slot is passed by later ones: always by those of the base model, `max_passes` times by those with adapters
    started: list[Request] = []
    passed: list[Request] = []
    for request in waiting:
        if len(started) == rows:
            break
        if request.adapter and not (slots.fits(request.adapter) and (not passed or passed[0].passes < max_passes)):
            passed.append(request)
            continue
        slots.acquire(request.adapter)
        started.append(request)
        if request.adapter and passed:
            passed[0].passes += 1
    return started
    # END


def order(waiting: list[Request], slots: Slots) -> list[Request]:
    """The order in which waiting requests are considered for a row. They are given in the order of their arrival."""
    return waiting


def simulate(requests: list[Request], num_slots: int, max_passes: int, rows: int = 8) -> tuple[int, int, int]:
    """Serve all requests, of which one arrives at each step -> steps until all have ended, copies of adapters, longest wait in steps."""
    slots, waiting, running, step, longest = Slots(num_slots), [], [], 0, 0
    while step < len(requests) or waiting or running:
        waiting += [Request(request.adapter, request.steps, step) for request in requests[step:step + 1]]
        for request in admit(order(list(waiting), slots), slots, rows - len(running), max_passes):
            longest = max(longest, step - request.arrived)
            waiting.remove(request)
            running.append((request, step + request.steps))
        step += 1
        for request in [request for request, end in running if end == step]:
            slots.release(request.adapter)
        running = [(request, end) for request, end in running if end > step]
    return step, slots.loads, longest


def mixed_requests(count: int = 300, adapters: int = 12, seed: int = 0) -> list[Request]:
    """Requests for the base model and for adapters, of which a few are popular: the n-th has a share like 1 / n."""
    dice = random.Random(seed)
    names, shares = range(adapters + 1), [1.0] + [1 / n for n in range(1, adapters + 1)]
    return [Request(dice.choices(names, shares)[0], dice.randint(4, 10)) for _ in range(count)]


def seconds(work, repeats: int = 3) -> float:
    """The shortest of some times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    print("32 variants of Mistral-7B (14.2 GB), and a decode step of 32 requests, one per variant, on an A100 (2,039 GB/s)")
    per_rank = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 2  # bytes of A and B of all linear layers
    print("                                one variant    32 variants    bytes of a step   time of a step")
    for name, base, variant in (("whole models", 0.0, 14.2e9), ("adapters of rank 16", 14.2e9, 16 * per_rank),
                                ("adapters of rank 64", 14.2e9, 64 * per_rank)):
        total = base + 32 * variant
        print(f"  {name:26s}{variant / 1e9:11.3f} GB{total / 1e9:12.1f} GB{total / 1e9:16.1f} GB{total / 2039e6:14.1f} ms")
    here = next(folder for parent in Path(__file__).resolve().parents if (folder := parent / "lessons" / "14_multi_lora").is_dir())
    for name in ("sql", "pirate"):
        layers = read_adapter(here / name)
        count = sum(adapter.a.numel() + adapter.b.numel() for adapter in layers.values())
        first = layers["layers.0.self_attn.q_proj"]
        print(f"  {name:7s} {len(layers)} layers, A {list(first.a.shape)}, B {list(first.b.shape)}, scaling {first.scaling:g}: "
              f"{count:,} numbers, {count / 134.5e6:.2%} of its base model's")

    dice, size, rank = torch.Generator().manual_seed(0), 2048, 16
    weight = torch.randn(size, size, generator=dice) / size**0.5
    adapters = [Adapter(torch.randn(rank, size, generator=dice) / size**0.5, torch.randn(size, rank, generator=dice) / rank**0.5, 1.0)
                for _ in range(8)]
    x, slots = torch.randn(16, size, generator=dice), torch.arange(16) // 2 % 8
    variants = [merged(weight, adapter) for adapter in adapters]
    print(f"\none layer of {size} x {size}, 16 rows, 8 adapters of rank {rank}, this CPU")
    print(f"  base model only            {seconds(lambda: x @ weight.T) * 1e3:6.1f} ms")
    print(f"  8 merged weights in turn   {seconds(lambda: [x[slots == i] @ w.T for i, w in enumerate(variants)]) * 1e3:6.1f} ms")
    print(f"  one batch, A and B         {seconds(lambda: in_one_batch(x, weight, slots, adapters)) * 1e3:6.1f} ms")
    same = torch.allclose(in_one_batch(x, weight, slots, adapters), by_merging(x, weight, slots, adapters), atol=1e-4)
    print(f"  the results are {'the same' if same else 'DIFFERENT'}")

    print("\n300 requests for 12 adapters and the base model; 8 rows, one request arrives at each step")
    print("  slots   passing      steps   copies of adapters   longest wait (steps)")
    for num_slots, name, max_passes in ((2, "never", 0), (2, "8 times", 8), (4, "never", 0), (4, "8 times", 8), (12, "8 times", 8)):
        print("  {:5d}   {:10s}{:8d}{:21d}{:23d}".format(num_slots, name, *simulate(mixed_requests(), num_slots, max_passes)))
    unlucky = [Request(3 if i == 9 else 1 + i % 2, 6) for i in range(300)]  # 2 slots, which adapters 1 and 2 always use
    print("  one request of adapter 3 among 299 of adapters 1 and 2, with 2 slots, waits "
          f"{simulate(unlucky, 2, 10**6)[2]} steps if it can always be passed, {simulate(unlucky, 2, 8)[2]} if 8 times")
    print(f"\nan adapter teaches a form, such as SQL. If each of 40 tokens is valid with 99%, {0.99**40:.0%} of the queries are valid.")


if __name__ == "__main__":
    main()
