"""Lesson 7: two sequences that start with the same tokens have the same keys and values there. So they can share blocks.

Full blocks are found by a hash of everything before their end, also after their sequence has finished. The last, partly filled block is
shared too if a sequence is forked, and copied before one of the owners writes into it (copy-on-write).
"""
import random
from dataclasses import dataclass, field
from hashlib import sha256


def block_hashes(tokens: list[int], block_size: int) -> list[bytes]:
    """One hash per FULL block. The keys in a block depend on all tokens up to its end, so the hash must too."""
    # TASK 1: chain them: each hash covers the hash of the block before it, and the tokens of this block
    hashes, parent = [], b""
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = sha256(parent + repr(tokens[start:start + block_size]).encode()).digest()
        hashes.append(parent)
    return hashes
    # END


def key_of(before: int, token: int) -> int:
    """A stand-in for a key and value: it depends on the token and on all tokens before it. `before` is the key of the token before."""
    return hash((before, token))


@dataclass
class Sequence:
    tokens: list[int]
    table: list[int] = field(default_factory=list)  # block table
    stored: int = 0  # tokens whose keys are in the blocks


class Memory:
    """Blocks with reference counts. A block without references keeps its content until it is allocated again."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.keys = [[0] * block_size for _ in range(num_blocks)]
        self.owners = [0] * num_blocks  # reference counts: the number of tables that contain the block
        self.free = list(range(num_blocks))  # the block that is evicted first comes first
        self.block_of: dict[bytes, int] = {}  # hash -> block with this content
        self.hash_of: dict[int, bytes] = {}
        self.copies = 0

    def allocate(self) -> int:
        """A block with new content. What it contained cannot be found any more."""
        block = self.free.pop(0)
        if block in self.hash_of:
            del self.block_of[self.hash_of.pop(block)]
        self.owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner. A block without owners leaves the free list."""
        if self.owners[block] == 0:
            self.free.remove(block)
        self.owners[block] += 1

    def release(self, block: int) -> None:
        """One owner less. A block without owners can be allocated again: at once, or if its content can be found, as late as possible."""
        self.owners[block] -= 1
        if self.owners[block] == 0:
            self.free.insert(len(self.free) if block in self.hash_of else 0, block)

    def match(self, tokens: list[int]) -> list[int]:
        """The blocks of the longest stored prefix. At least the last token stays to be computed: its logits give the next token."""
        # TASK 2: look up hashes until one is missing
        found = []
        for block_hash in block_hashes(tokens[:-1], self.block_size):
            if block_hash not in self.block_of:
                break
            found.append(self.block_of[block_hash])
        return found
        # END

    def start(self, tokens: list[int], caching: bool = True) -> tuple[Sequence, int]:
        """A new sequence, and how many of its tokens had to be computed."""
        sequence = Sequence(list(tokens))
        for block in self.match(tokens) if caching else []:
            self.share(block)
            sequence.table.append(block)
        sequence.stored = found = len(sequence.table) * self.block_size
        self.compute(sequence)
        return sequence, len(tokens) - found

    def compute(self, sequence: Sequence) -> None:
        """Store the keys of all tokens that have none yet, and make full blocks findable."""
        full_before = sequence.stored // self.block_size
        while sequence.stored < len(sequence.tokens):
            index, offset = divmod(sequence.stored, self.block_size)
            block = self.writable(sequence, index)
            before = self.key_at(sequence, sequence.stored - 1) if sequence.stored else 0
            self.keys[block][offset] = key_of(before, sequence.tokens[sequence.stored])
            sequence.stored += 1
        if sequence.stored // self.block_size == full_before:
            return
        for block, block_hash in zip(sequence.table, block_hashes(sequence.tokens, self.block_size), strict=False):
            if block_hash not in self.block_of and block not in self.hash_of:
                self.block_of[block_hash], self.hash_of[block] = block, block_hash

    def writable(self, sequence: Sequence, index: int) -> int:
        """The block for entry `index` of the table, which the sequence may write into."""
        # TASK 3: a new block at the end of the table; a copy if the block has other owners; else the block itself
        if index == len(sequence.table):
            sequence.table.append(self.allocate())
        elif self.owners[sequence.table[index]] > 1:
            shared, own = sequence.table[index], self.allocate()
            self.keys[own] = list(self.keys[shared])
            self.release(shared)
            sequence.table[index] = own
            self.copies += 1
        return sequence.table[index]
        # END

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens. Only the table is copied."""
        for block in sequence.table:
            self.share(block)
        return Sequence(list(sequence.tokens), list(sequence.table), sequence.stored)

    def append(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        self.compute(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Release all blocks, the last one first: the beginning of a sequence is shared more often, so it is evicted last."""
        for block in reversed(sequence.table):
            self.release(block)
        sequence.table = []

    def key_at(self, sequence: Sequence, position: int) -> int:
        return self.keys[sequence.table[position // self.block_size]][position % self.block_size]

    def check(self, sequence: Sequence) -> None:
        """Assert that the sequence's blocks contain what computing all its tokens would give."""
        key = 0
        for position, token in enumerate(sequence.tokens):
            key = key_of(key, token)
            assert self.key_at(sequence, position) == key, f"token {position}: the block has keys of other tokens"


def show_sharing() -> None:
    memory = Memory(num_blocks=16, block_size=4)
    system = [1, 2, 3, 4, 5, 6, 7, 8]
    print("three prompts with the same first 8 tokens, blocks of 4:")
    for name, rest in (("a", [20, 21, 22]), ("b", [30, 31, 32, 33, 34]), ("c", [20, 21, 22, 23, 24])):
        sequence, computed = memory.start(system + rest)
        print(f"  {name}: table {sequence.table}, {computed} of {len(sequence.tokens)} tokens computed, "
              f"owners {[memory.owners[block] for block in sequence.table]}")
        if name == "a":
            a = sequence
    d = memory.fork(a)
    print(f"d is a fork of a: table {d.table}, owners {[memory.owners[block] for block in d.table]}, {memory.copies} copies")
    for sequence, name, token in ((a, "a", 40), (d, "d", 50), (a, "a", 41), (d, "d", 51)):
        memory.append(sequence, token)
        memory.check(sequence)
        print(f"  {name} writes token {len(sequence.tokens) - 1}: table {sequence.table}, copies so far: {memory.copies}")


def chats(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each turn of some chats at the same time. A turn's prompt has all turns before it. 3 system prompts."""
    dice, turns, histories = random.Random(seed), [], {}
    for _ in range(count):
        chat = dice.randrange(12)
        history = histories.get(chat) or [-(chat % 3) - 1] * 400
        prompt = history + [dice.randrange(10**6) for _ in range(dice.randint(10, 120))]
        answer = [dice.randrange(10**6) for _ in range(dice.randint(20, 200))]
        histories[chat] = prompt + answer if len(prompt) < 1800 else []  # a long chat ends, and a new one begins
        turns.append((prompt, answer))
    return turns


def serve(memory: Memory, turns: list[tuple[list[int], list[int]]], caching: bool = True) -> int:
    """One request after another -> prompt tokens computed."""
    total = 0
    for prompt, answer in turns:
        sequence, computed = memory.start(prompt, caching)
        total += computed
        for token in answer[:-1]:  # the last token is never an input
            memory.append(sequence, token)
        memory.finish(sequence)
    return total


def main() -> None:
    show_sharing()
    turns = chats(60)
    prompts = sum(len(prompt) for prompt, _ in turns)
    print(f"\n60 turns of 12 chats with 3 system prompts of 400 tokens: {prompts:,} prompt tokens")
    print("  memory, blocks of 16   computed   found   mean prefill")
    for num_blocks, caching in ((1024, False), (1024, True), (512, True), (256, True), (160, True)):
        computed = serve(Memory(num_blocks, 16), turns, caching)
        name = f"{num_blocks:5d}{'' if caching else ', no sharing'}"
        print(f"  {name:20s}  {computed:9,d}  {1 - computed / prompts:6.1%}  {1.5 + 0.004 * computed / 60:9.2f} ms")
    print("\nprefills were 1.5 ms per step and 0.004 ms per token. Where do these two numbers come from?")


if __name__ == "__main__":
    main()
