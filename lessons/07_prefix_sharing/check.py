"""Checks of lesson 7, for `minivllm course check 07`. A failed assert is the explanation that the learner reads."""
import time


def task_1_only_full_blocks(lesson):
    counts = [len(lesson.block_hashes(list(range(n)), 4)) for n in (0, 3, 4, 7, 8)]
    assert counts != [0, 1, 1, 2, 2], "a block that is not full got a hash. Its next token is not known, so its content is not final"
    assert counts == [0, 0, 1, 1, 2], f"0, 3, 4, 7 and 8 tokens in blocks of 4 have 0, 0, 1, 1 and 2 full blocks: got {counts} hashes"


def task_1_a_hash_covers_everything_before(lesson):
    same = [7, 7, 7, 7]
    first, second = (lesson.block_hashes([start, 2, 3, 4, *same], 4)[1] for start in (1, 9))
    assert first != second, (
        "two blocks with the same tokens after DIFFERENT beginnings got the same hash. Their keys and values differ, because attention "
        "mixed the beginning into them: a hit would continue another text. Let each hash cover the one before it")
    one, two = (lesson.block_hashes([*start, 7, 7, 7, 7], 4) for start in ([1, 23, 4, 5], [12, 3, 4, 5]))
    assert one != two, "[1, 23, 4, 5] and [12, 3, 4, 5] got the same hash: separate the tokens before you hash them"
    again, longer = lesson.block_hashes([1, 2, 3, 4, *same], 4), lesson.block_hashes([1, 2, 3, 4, *same, 5, 5, 5, 5], 4)
    assert longer[:2] == again, "what comes after a block changed its hash. Two prompts that differ later can share their beginning"


def task_2_the_longest_prefix(lesson):
    memory = lesson.Memory(20, 4)
    sequence, _ = memory.start(list(range(14)))  # blocks 0, 1, 2 are full
    assert memory.match([50, 51, 52, 53, 54]) == [], "nothing of this prompt is stored"
    got = memory.match([*range(8), 99, 98, 97, 96, 95])
    assert got == sequence.table[:2], f"the first 8 tokens are in blocks {sequence.table[:2]}, and then the prompts differ: got {got}"
    other = [99, 1, 2, 3, *range(4, 12), 60]
    memory.start(other)
    memory.block_of.pop(memory.hash_of.pop(sequence.table[0]))
    got = memory.match([*range(12), 60])
    assert got == [], (f"block {sequence.table[0]} of the prefix was evicted, and the match is {got}. Without the first block the second "
                       "one is useless: stop at the first miss")


def task_2_the_last_token_is_computed(lesson):
    memory = lesson.Memory(20, 4)
    memory.start(list(range(8)))
    got = memory.match(list(range(8)))
    assert len(got) != 2, ("all 8 tokens were found, so none is computed, and there are no logits for the next token. Leave out at least "
                           "the last token of the prompt, which means its whole block")
    assert len(got) == 1, f"7 of 8 tokens may be found, in blocks of 4: one block. The match has {len(got)}"


def task_3_copy_before_a_write(lesson):
    memory = lesson.Memory(20, 4)
    a, _ = memory.start([1, 2, 3, 4, 5, 6])
    b = memory.fork(a)
    shared = a.table[1]
    memory.append(a, 10)
    assert a.table[1] != shared, (
        "a wrote into a block that b owns too: b will read a's token. A block with more than one owner must be copied before a write")
    assert b.table[1] == shared and a.table[0] == b.table[0], "only the writer's last block changes: full blocks stay shared"
    memory.append(b, 20)
    assert memory.copies != 2, "b copied too, although it is the only owner of the block now: give up your share of the old block"
    assert memory.copies == 1 and b.table[1] == shared, f"one copy is enough for two sequences, and there were {memory.copies}"
    assert memory.keys[a.table[1]] is not memory.keys[shared], (
        "both blocks are the same Python list, so a write into one changes the other: copy it with list(...)")
    for name, sequence in (("a", a), ("b", b)):
        try:
            memory.check(sequence)
        except AssertionError as error:
            raise AssertionError(f"{name} reads wrong keys ({error}). A copy needs the CONTENT of the shared block") from None
    assert memory.owners[a.table[1]] == memory.owners[shared] == 1, "after the copy each of the two blocks has one owner"


def task_3_no_block_is_lost(lesson):
    memory = lesson.Memory(12, 4)
    a, _ = memory.start([1, 2, 3, 4, 5, 6])
    forks = [a, memory.fork(a), memory.fork(a)]
    for turn in range(5):
        for i, sequence in enumerate(forks):
            memory.append(sequence, 100 * i + turn)
            memory.check(sequence)
    for sequence in forks:
        memory.finish(sequence)
    assert sorted(memory.free) == list(range(12)), f"all sequences are finished, and only blocks {sorted(memory.free)} of 12 are free"


def task_4_a_better_eviction(lesson):
    """`release` and `allocate` decide what is evicted. The content of every sequence must stay correct."""
    turns = lesson.chats(40, seed=3)
    memory = lesson.Memory(200, 16)
    start = time.process_time()
    computed = lesson.serve(memory, turns)
    seconds = time.process_time() - start
    assert sorted(memory.free) == list(range(200)), "all requests are finished, so all blocks must be free"
    sequence, _ = memory.start(turns[-1][0])
    memory.check(sequence)
    prompts = sum(len(prompt) for prompt, _ in turns)
    return f"{computed:,} of {prompts:,} prompt tokens computed, {1 - computed / prompts:.1%} found, in {seconds:.2f} s"
