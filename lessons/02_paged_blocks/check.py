"""Checks of lesson 2, for `minivllm course check 02`. A failed assert is the explanation that the learner reads."""
import math
import time


def task_1_the_slot_of_a_token(lesson):
    memory = lesson.PagedMemory(capacity=40, block_size=4)
    memory.tables["a"], memory.lengths["a"] = [7, 2, 5], 11
    got = [memory.slot("a", position) for position in range(11)]
    assert got != list(range(11)), "this is the position itself: block i of the sequence is not block i of the memory. Use its table"
    assert got != [7, 7, 7, 7, 2, 2, 2, 2, 5, 5, 5], "this is the number of the block. A block has several slots, and the token is in one"
    assert got != [7, 8, 9, 10, 2, 3, 4, 5, 5, 6, 7], "block 7 does not start at slot 7: 7 blocks of block_size slots come before it"
    right = [28, 29, 30, 31, 8, 9, 10, 11, 20, 21, 22]
    assert got == right, f"with the table [7, 2, 5] and blocks of 4, tokens 0 to 10 are in slots {right}, got {got}"


def task_2_a_block_when_the_last_one_is_full(lesson):
    memory = _with_sequence(lesson, tokens=3, table=[6], free=[3, 1, 9, 8, 7, 5, 4])
    sizes = []
    for _ in range(6):
        assert memory.try_grow("a") is True, "there are free slots or free blocks, so `try_grow` must return True"
        sizes.append(len(memory.tables["a"]))
    assert memory.lengths["a"] == 9, f"a sequence of 3 tokens grew 6 times, and its length is {memory.lengths['a']}: add 1 per call"
    assert sizes != [2, 2, 2, 2, 3, 3], "this allocates one token too early: with 4 slots, tokens 0 to 3 fit into the first block"
    assert sizes != [1, 1, 2, 2, 2, 2], "this allocates one token too late: token 4 has no slot in a block of 4"
    assert sizes != [2, 3, 4, 5, 6, 7], "every token gets a block. A block has 4 slots: take a new one only if the last one is full"
    assert sizes == [1, 2, 2, 2, 2, 3], (
        f"the table had {sizes} blocks after each token. A new block is needed only if the last one is full: [1, 2, 2, 2, 2, 3]")
    assert memory.tables["a"] == [6, 3, 1], f"new blocks come from the free list and go to the END of the table: {memory.tables['a']}"


def task_2_nothing_changes_without_room(lesson):
    memory = _with_sequence(lesson, tokens=4, table=[6], free=[])
    assert memory.try_grow("a") is False, "the last block is full and the free list is empty, so `try_grow` must return False"
    assert memory.lengths["a"] == 4, "there was no room, but the length changed. The caller will try again: check for room first"


def task_3_all_blocks_of_a_prompt_or_none(lesson):
    memory = lesson.PagedMemory(capacity=20, block_size=4)  # 5 blocks
    assert memory.try_admit("a", 8) is True and memory.lengths["a"] == 8, "8 tokens fit into an empty memory of 20 slots"
    assert len(memory.tables["a"]) != 3, "8 tokens fill exactly 2 blocks of 4: `prompt // block_size + 1` takes one too many"
    assert len(memory.tables["a"]) == 2, f"8 tokens need 2 blocks of 4, and got {len(memory.tables['a'])}"
    assert memory.try_admit("b", 9) is True and len(memory.tables["b"]) == 3, "9 tokens need 3 blocks of 4: round up"
    memory.release("b")
    free = len(memory.free)
    assert memory.try_admit("c", 13) is False, "13 tokens need 4 blocks and only 3 are free: return False"
    assert len(memory.free) == free and "c" not in memory.tables, (
        "a sequence that did not fit kept blocks. Others could use them, and nothing will release them: count first, then allocate")
    assert memory.try_admit("d", 12) is True, "12 tokens need exactly the 3 free blocks: that is enough"


def task_3_the_same_requests(lesson):
    usage = lesson.serve(lesson.PagedMemory(2048, 16), lesson.chat_requests(30, 512))
    assert usage.waste < 0.04, f"{usage.waste:.1%} of the reserved slots are empty: a sequence has at most one block that is not full"


def task_4_a_fast_free_list(lesson):
    memory = lesson.PagedMemory(capacity=2_000_000, block_size=1)
    first = [memory.allocate() for _ in range(300)]
    assert len(set(first)) == 300, "a block was allocated twice while it was in use"
    memory.tables["a"], memory.lengths["a"] = first, 300
    memory.release("a")
    memory.tables["b"], memory.lengths["b"] = [], 0
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        for _ in range(60):
            assert memory.try_grow("b"), "a released block must be allocated again"
        best = min(best, time.process_time() - start)
    return f"{best / 60 * 1e6:.2f} us to grow by one block, with 2,000,000 blocks in the free list"


def _with_sequence(lesson, tokens, table, free):
    memory = lesson.PagedMemory(capacity=40, block_size=4)
    memory.tables["a"], memory.lengths["a"], memory.free = table, tokens, free
    return memory
