"""Lesson 2: memory for sequences that grow to an unknown length. Reserve the longest possible sequence, or give out small blocks?

Two memories behind one interface serve the same requests. Only bookkeeping happens here: a *slot* is the memory of one token's keys and
values, and nothing is stored in it. First a small memory is drawn step by step, then 300 requests are served.
"""
import math
import random
from collections import deque
from dataclasses import dataclass


@dataclass
class Request:
    """Lengths in tokens. The memory does not know `output` in advance: only the model decides when generation stops."""

    prompt: int
    output: int


class ReservedMemory:
    """Every sequence gets `limit` adjacent slots when it starts, enough for the longest possible sequence."""

    def __init__(self, capacity: int, limit: int) -> None:
        self.limit = limit
        self.free = list(range(0, capacity - limit + 1, limit))  # first slots of the unused intervals
        self.start: dict[str, int] = {}  # sequence -> its first slot
        self.lengths: dict[str, int] = {}  # sequence -> tokens that it has

    def try_admit(self, name: str, prompt: int) -> bool:
        if not self.free:
            return False
        self.start[name] = self.free.pop(0)
        self.lengths[name] = prompt
        return True

    def try_grow(self, name: str) -> bool:
        self.lengths[name] += 1  # the slot is reserved already
        return True

    def release(self, name: str) -> None:
        self.free.append(self.start.pop(name))
        del self.lengths[name]

    def slot(self, name: str, position: int) -> int:
        return self.start[name] + position

    def reserved(self) -> int:
        return len(self.start) * self.limit


class PagedMemory:
    """Blocks of `block_size` slots. Each sequence has a block table: entry i is the block of tokens i * block_size and following."""

    def __init__(self, capacity: int, block_size: int) -> None:
        self.block_size = block_size
        self.free = list(range(capacity // block_size))  # the free list: numbers of unused blocks
        self.tables: dict[str, list[int]] = {}  # sequence -> block table
        self.lengths: dict[str, int] = {}  # sequence -> tokens that it has

    def allocate(self) -> int:
        """Take the first block of the free list."""
        return self.free.pop(0)

    def try_admit(self, name: str, prompt: int) -> bool:
        """Blocks for a new sequence of `prompt` tokens. Without room: False, and nothing changes."""
        # TASK 3: check first whether there are enough blocks; then fill tables[name] and lengths[name]
        needed = math.ceil(prompt / self.block_size)
        if needed > len(self.free):
            return False
        self.tables[name] = [self.allocate() for _ in range(needed)]
        self.lengths[name] = prompt
        return True
        # END

    def try_grow(self, name: str) -> bool:
        """Room for one more token. Without room: False, and nothing changes."""
        # TASK 2: does the next token need a new block? Update the table and the length
        table = self.tables[name]
        if self.lengths[name] == len(table) * self.block_size:  # every slot of the last block is used
            if not self.free:
                return False
            table.append(self.allocate())
        self.lengths[name] += 1
        return True
        # END

    def release(self, name: str) -> None:
        self.free.extend(self.tables.pop(name))
        del self.lengths[name]

    def slot(self, name: str, position: int) -> int:
        """The slot of the token at this position: which block, and where in it."""
        # TASK 1: find the block in the sequence's table, then the slot
        block = self.tables[name][position // self.block_size]
        return block * self.block_size + position % self.block_size
        # END

    def reserved(self) -> int:
        return sum(map(len, self.tables.values())) * self.block_size


@dataclass
class Usage:
    """What `serve` reports. All means are over steps."""

    steps: int
    running: float  # sequences at the same time
    waste: float  # fraction of the reserved slots that hold no token
    preempted: int  # times a sequence lost its memory and had to wait again


def serve(memory: ReservedMemory | PagedMemory, requests: list[Request]) -> Usage:
    """Serve requests first come, first served. In each step every running sequence grows by one token.

    If one cannot grow, the youngest sequence loses its memory and waits again, with the tokens it has (lesson 6 is about this).
    """
    waiting = deque((f"r{i}", request.prompt, request.prompt + request.output) for i, request in enumerate(requests))
    running: dict[str, int] = {}  # sequence -> its final length, oldest first
    steps = preempted = 0
    sum_running = sum_waste = 0.0
    while waiting or running:
        while waiting and memory.try_admit(waiting[0][0], waiting[0][1]):
            name, _, final = waiting.popleft()
            running[name] = final
        for name in list(running):
            while name in running and not memory.try_grow(name):
                youngest, final = running.popitem()
                waiting.appendleft((youngest, memory.lengths[youngest], final))
                memory.release(youngest)
                preempted += 1
        steps += 1
        sum_running += len(running)
        sum_waste += 1 - sum(memory.lengths.values()) / memory.reserved()
        for name in [name for name, final in running.items() if memory.lengths[name] == final]:
            memory.release(name)
            del running[name]
    return Usage(steps, sum_running / steps, sum_waste / steps, preempted)


def chat_requests(count: int, limit: int, seed: int = 0) -> list[Request]:
    """Log-normal lengths: most are short, a few are very long. Means as in ShareGPT: prompts 161, outputs 338 tokens."""
    dice = random.Random(seed)

    def length(mean: float, longest: int) -> int:
        return max(1, min(longest, round(dice.lognormvariate(math.log(mean) - 0.9**2 / 2, 0.9))))

    requests = []
    for _ in range(count):
        prompt = length(161, limit - 1)
        requests.append(Request(prompt, length(338, limit - prompt)))
    return requests


def draw(memory: PagedMemory, num_blocks: int) -> str:
    """One line: each block with the name of its sequence once per token, and a dot per empty slot."""
    content = {}
    for name, table in memory.tables.items():
        for i, block in enumerate(table):
            used = min(memory.block_size, memory.lengths[name] - i * memory.block_size)
            content[block] = name * used + "." * (memory.block_size - used)
    return " ".join(f"[{content.get(block, ' ' * memory.block_size)}]" for block in range(num_blocks))


def film() -> None:
    memory = PagedMemory(capacity=32, block_size=4)
    for name, prompt in (("a", 3), ("b", 6), ("c", 2)):
        memory.try_admit(name, prompt)
    print("8 blocks of 4 slots. Three sequences grow, b ends, d takes its place:")
    for step in range(7):
        if step == 3:
            memory.release("b")
            memory.try_admit("d", 5)
        print(f"  step {step}  {draw(memory, 8)}   a: {memory.tables['a']}")
        for name in memory.tables:
            memory.try_grow(name)
    print(f"token 6 of a is in slot {memory.slot('a', 6)}\n")


def main(count: int = 300, capacity: int = 16384, limit: int = 2048) -> None:
    film()
    requests = chat_requests(count, limit)
    mean = sum(request.prompt + request.output for request in requests) / count
    print(f"{count} requests of {mean:.0f} tokens on average (at most {limit}), in a memory of {capacity} slots:")
    print("                        at the same time   empty slots    steps   preempted")
    memories = {f"reserve {limit} slots": ReservedMemory(capacity, limit)}
    memories |= {f"blocks of {size:3d} slots": PagedMemory(capacity, size) for size in (1, 16, 64, 256)}
    for name, memory in memories.items():
        usage = serve(memory, requests)
        print(f"  {name:20s}  {usage.running:16.1f}  {usage.waste:12.1%}  {usage.steps:7d}  {usage.preempted:10d}")
    print(f"\na sequence of 2,000 tokens is now in {math.ceil(2000 / 16)} blocks of 16, anywhere in memory")


if __name__ == "__main__":
    main()
