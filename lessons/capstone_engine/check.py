"""Checks of the capstone, for `minivllm course check capstone-engine`. A failed assert is the explanation that the learner reads.

The checks of the whole engine are metamorphic, as those of the package: they compare two runs that must give the same tokens.
"""
from collections import Counter

import torch


def requests_of(lesson, count=7):
    """Requests of different lengths, temperatures and seeds. Some begin alike, and some have a block in common at another place."""
    dice, shared = torch.Generator().manual_seed(5), list(range(20, 30))
    found = []
    for i in range(count):
        own = torch.randint(0, 64, (2 + 4 * (i % 3),), generator=dice).tolist()
        prompt = (shared if i % 2 else own[:4] + shared[4:8] if i % 4 == 2 and len(own) >= 4 else []) + own
        temperature, top_k = ((0.0, 0), (0.8, 0), (1.5, 5))[i % 3]
        found.append((prompt, lesson.Sampling(max_tokens=3 + 4 * (i % 3), temperature=temperature, top_k=top_k, seed=i)))
    return found


def check_memory(lesson, engine):
    """Each block is either free or has as many owners as tables contain it."""
    owners = Counter(block for request in [*engine.running, *engine.waiting] for block in request.table)
    for block, count in enumerate(engine.pool.owners):
        assert count == owners[block], (
            f"block {block} has the reference count {count}, and {owners[block]} tables contain it: each of these tables is one owner, and "
            "a request that leaves releases all of its blocks")
        free = engine.pool.free.count(block)
        assert free == (count == 0), f"block {block} has {count} owners and is {free} times in the free list: free means no owner"


def run(lesson, load, **settings):
    """The outputs of all requests, and the engine. The memory and the limits are checked after every step."""
    engine = lesson.Engine(lesson.Model.random(), lesson.Settings(**settings))
    requests = [engine.add(prompt, sampling) for prompt, sampling in load]
    for _ in range(600):
        if not engine.waiting and not engine.running:
            break
        plan = engine.schedule()
        assert plan, (f"schedule returned an empty plan while {len(engine.running)} requests run and {len(engine.waiting)} wait: no later "
                      "step would change anything")
        for request, count in plan:
            left = len(request.tokens) - request.computed
            assert 1 <= count <= left, f"request {request.number} has {left} tokens to compute, and the plan has {count} of it"
            assert count <= engine.settings.max_chunk, f"{count} tokens of one request: max_chunk is {engine.settings.max_chunk}"
            assert len(request.table) * engine.settings.block_size >= request.computed + count, (
                f"request {request.number} computes tokens up to {request.computed + count}, and its {len(request.table)} blocks hold "
                "fewer: call grow before it is in the plan")
            assert request in engine.running, f"request {request.number} is in the plan, and does not run (any more)"
        total = sum(count for _, count in plan)
        assert total <= engine.settings.token_budget, f"the step has {total} tokens: the token budget is {engine.settings.token_budget}"
        rows = engine.settings.max_rows
        assert len(engine.running) <= rows, f"{len(engine.running)} requests run: max_rows is {rows}"
        engine.steps.append([(request.number, count) for request, count in plan])
        engine.update(plan, engine.execute(plan))
        check_memory(lesson, engine)
    else:
        raise AssertionError("the requests did not finish within 600 steps: does each step compute tokens that no later step drops again?")
    assert all(request.finished for request in requests), "all requests have left, but not all are `finished`"
    return [request.output for request in requests], engine


def alone(lesson, load, **settings):
    return [run(lesson, [one], **settings)[0][0] for one in load]


def task_1_blocks_and_owners(lesson):
    pool = lesson.BlockPool(3)
    a, b = pool.allocate(), pool.allocate()
    assert a != b and pool.num_free == 1, f"two blocks were allocated of 3: got {a} and {b}, and {pool.num_free} are free"
    pool.register(a, b"key")
    pool.share(a)
    assert pool.owners[a] == 2, f"block {a} has two owners after `share`, the count is {pool.owners[a]}"
    pool.release(a)
    assert a not in pool.free, "the block was released by one of TWO owners: the other one still uses it"
    pool.release(a)
    pool.release(b)
    assert sorted(pool.free) == [0, 1, 2], f"all blocks are free again, each once: got {list(pool.free)}"
    assert pool.free[-1] == a, "a block whose content can be found is allocated last: it belongs at the end of the queue"
    pool.share(a)
    assert a not in pool.free, "a shared block has an owner: it must leave the free list, or it is overwritten while it is read"
    pool.release(a)
    for _ in range(3):
        pool.allocate()
    assert b"key" not in pool.block_of, "the block was allocated again, so its old content is lost: its hash must be forgotten"


def task_2_prefix_sharing(lesson):
    first, second = lesson.block_hashes([1, 2, 3, 4, 5], 2), lesson.block_hashes([9, 9, 3, 4], 2)
    assert len(first) == 2, f"5 tokens fill 2 blocks of 2: two hashes, got {len(first)}"
    assert first[1] != second[1], "the blocks [3, 4] follow different tokens, so their keys differ: the hash must cover everything before"
    assert first == lesson.block_hashes([1, 2, 3, 4], 2), "the same tokens must have the same hashes"
    engine = lesson.Engine(lesson.Model.random(), lesson.Settings())
    tokens = list(range(8))
    blocks = [engine.pool.allocate() for _ in range(2)]
    for block, key in zip(blocks, lesson.block_hashes(tokens, 4), strict=True):
        engine.pool.register(block, key)
    longer, same = engine.add([*tokens, 50, 51], lesson.Sampling()), engine.add(tokens, lesson.Sampling())
    engine.match(longer)
    assert longer.table == blocks, f"both full blocks of the prompt are known: the table is {blocks}, got {longer.table}"
    assert longer.computed == 8, f"the keys of 8 tokens exist already: computed is 8, got {longer.computed}"
    assert engine.pool.owners[blocks[0]] == 2, "a second table contains the block: share it, or the first request's end frees it"
    engine.match(same)
    assert same.computed < 8, "all tokens were taken from the cache, so no step gives the logits of the next one: compute at least the last"
    assert same.table == blocks[:1], f"only the first block can be taken: expected {blocks[:1]}, got {same.table}"


def task_3_reproducible_sampling(lesson):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert lesson.sample(logits, lesson.Sampling(), 3) == 0, "temperature 0 takes the most probable token"
    warm = lesson.Sampling(temperature=1.0, seed=1)
    tokens = [lesson.sample(logits, warm, position) for position in range(3000)]
    assert tokens == [lesson.sample(logits, warm, position) for position in range(3000)], (
        "the same request, seed and position gave another token the second time: take the noise from gumbel_noise, which depends on these "
        "only, or the result depends on what else was sampled before")
    assert len(set(tokens)) > 1, "temperature 1 always gives the same token: add noise, which differs from position to position"
    shares, right = torch.bincount(torch.tensor(tokens), minlength=4) / 3000, logits.softmax(0)
    assert torch.allclose(shares, right, atol=0.04), f"the tokens have the shares {shares.tolist()}, and the softmax is {right.tolist()}"
    few = [lesson.sample(logits, lesson.Sampling(temperature=2.0, top_k=2, seed=1), position) for position in range(500)]
    assert set(few) == {0, 1}, f"top_k = 2 leaves the two most probable tokens, 0 and 1: got {sorted(set(few))}"


def task_4_preemption(lesson):
    engine = lesson.Engine(lesson.Model.random(), lesson.Settings(num_blocks=8))
    first, second, third = (engine.add([i, 1, 2], lesson.Sampling()) for i in range(3))
    for request in (first, second):
        engine.running.append(engine.waiting.popleft())
        request.table, request.computed = [engine.pool.allocate()], 3
        request.tokens.append(9)
    engine.preempt(second)
    check_memory(lesson, engine)
    assert second not in engine.running, "a preempted request does not run"
    assert second.tokens == [1, 1, 2, 9], f"the sampled token 9 must stay: the client has seen it. Tokens are {second.tokens}"
    assert second.computed == 0 and not second.table, "its blocks are gone, so none of its tokens is computed any more"
    assert engine.waiting[0] is second, "it arrived before the request that waits: put it at the front, or later requests overtake it"
    assert list(engine.waiting) == [second, third], "the waiting requests are the preempted one and the third one"


def task_5_the_plan(lesson):
    engine = lesson.Engine(lesson.Model.random(), lesson.Settings(token_budget=8, max_chunk=6))
    for length in (2, 9, 5):
        engine.add(list(range(length)), lesson.Sampling())
    plan = [(request.number, count) for request, count in engine.schedule()]
    assert plan != [(0, 2), (1, 9)] and plan != [(0, 2)], (
        f"got {plan}: the second prompt has 9 tokens, of which max_chunk allows 6 in this step. Compute a part of it: chunked prefill")
    assert plan == [(0, 2), (1, 6)], f"budget 8: the first prompt's 2 tokens and 6 of the second one, in the order of arrival; got {plan}"
    engine.running[0].computed, engine.running[1].computed = 2, 6
    engine.running[0].tokens.append(3)
    plan = [(request.number, count) for request, count in engine.schedule()]
    assert plan[:1] == [(0, 1)], f"got {plan}: a running request comes before waiting ones, and a decode needs 1 token"
    assert plan == [(0, 1), (1, 3), (2, 4)], f"a decode, the rest of the second prompt, and 4 tokens of the third; got {plan}"


def task_6_the_engine(lesson):
    load = requests_of(lesson)
    engine = lesson.Engine(lesson.Model.random(), lesson.Settings(max_chunk=3))
    long = engine.add(list(range(9)), lesson.Sampling(max_tokens=2))
    engine.step()
    assert not long.output, "only 3 of 9 prompt tokens are computed: the logits after the third one are no choice of the next token"
    right = alone(lesson, load, prefix_caching=False)
    for prompt, output in zip([prompt for prompt, _ in load], right, strict=True):
        assert output, f"the prompt {prompt} has no output"
    lengths = [sampling.max_tokens for _, sampling in load]
    assert [len(output) for output in right] == lengths, f"outputs have {[len(o) for o in right]} tokens: max_tokens are {lengths}"
    stop = lesson.Sampling(max_tokens=10, stop_token=right[2][1], temperature=load[2][1].temperature, top_k=5, seed=2)
    assert alone(lesson, [(load[2][0], stop)])[0] == right[2][:2], "the stop token ends an output, and is its last token"
    dense = dense_outputs(lesson, load)
    assert right == dense, f"alone and without sharing, the outputs are {right}, and those without any cache {dense}: a wrong token is read"
    batch, engine = run(lesson, load, prefix_caching=False)
    assert batch == right, "the same requests give other tokens in a batch than alone: something of another request is used"
    assert len(engine.steps) < sum(lengths), "the requests run one after the other: start waiting requests while others run"
    rows = run(lesson, load, prefix_caching=False, max_rows=2)[1]
    assert any(rows.steps[i][-1][0] > 1 and rows.steps[i][0][0] <= 1 for i in range(len(rows.steps))), (
        "with 2 rows, no request started while one of the first two was still running: a finished request's row is free at once")
    computed = sum(count for step in run(lesson, load + load, max_rows=1)[1].steps for _, count in step)
    without = sum(count for step in run(lesson, load + load, max_rows=1, prefix_caching=False)[1].steps for _, count in step)
    assert computed < without, f"the prefix cache saved nothing: {computed} tokens were computed. Are full blocks registered?"
    for chunk in (1, 2, 5):
        found = run(lesson, load, max_chunk=chunk, prefix_caching=False)[0]
        assert found == right, f"the tokens differ with chunks of {chunk}: a chunk must see what earlier ones wrote, and go on after them"
    for settings in ({}, {"max_chunk": 2, "max_rows": 3}, {"token_budget": 3}):
        found = run(lesson, load + load, **settings)[0]
        assert found == right + right, f"the tokens differ with the prefix cache ({settings}): a block was found that has other keys"
    twins = [([3], lesson.Sampling(max_tokens=1)), *(([*range(12), i], lesson.Sampling(max_tokens=4)) for i in (40, 41))]
    assert run(lesson, twins, max_chunk=1, max_rows=2)[0] == alone(lesson, twins, prefix_caching=False), (
        "a request found a block that another one is still filling: it is full of KNOWN tokens, and was not computed yet")
    for blocks in (8, 9, 12):
        few, engine = run(lesson, load, num_blocks=blocks)
        assert few == right, f"with {blocks} blocks the tokens differ: a preempted request computes its tokens again, and goes on as before"
        assert engine.pool.num_free == blocks, f"{engine.pool.num_free} of {blocks} blocks are free at the end: a block leaked"


def dense_outputs(lesson, load):
    """The truth: each token from all tokens before it, without a cache that lives longer than a token."""
    model, outputs = lesson.Model.random(), []
    for prompt, sampling in load:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + sampling.max_tokens:
            places = torch.arange(len(tokens))
            hidden = model.forward(model.new_cache(len(tokens)), torch.tensor(tokens), places, places, [(0, len(tokens), places)])
            tokens.append(lesson.sample(model.logits(hidden[-1:])[0], sampling, len(tokens)))
        outputs.append(tokens[len(prompt):])
    return outputs


def task_7_cost(lesson):
    load = lesson.mixed_load()
    right, total, shown = alone(lesson, load, prefix_caching=False), 0.0, []
    for settings in ({}, {"num_blocks": 14}, {"token_budget": 8}):
        outputs, engine = run(lesson, load, **settings)
        assert outputs == right, f"with {settings} the tokens differ from those of each request alone: faster must not mean other tokens"
        computed = sum(count for step in engine.steps for _, count in step)
        total += len(engine.steps) * 10 + computed * 0.1
        shown.append(f"{len(engine.steps)} steps and {computed} tokens")
    return f"{total:.0f} ms, at 10 ms per step and 0.1 ms per token: {', '.join(shown)}"
