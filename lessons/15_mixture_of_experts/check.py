"""Checks of lesson 15, for `minivllm course check 15`. A failed assert is the explanation that the learner reads."""
import time

import torch


def right_weights(x, router, top_k):
    """Experts and weights by another formula: a softmax over the logits of the chosen experts only."""
    logits, ids = (x @ router.T).topk(top_k)
    return ids, logits.softmax(-1)


def task_1_the_router(lesson):
    x, router, _ = lesson.example(40)
    ids, weights = lesson.route(x, router, 3)
    assert not ids.is_floating_point(), "`route` returns (experts, weights), in this order: the first one has fractions"
    assert ids.shape == weights.shape == (40, 3), f"each of 40 tokens has 3 experts: the shapes are [40, 3], got {list(ids.shape)}"
    right_ids, right = right_weights(x, router, 3)
    assert not torch.equal(ids, (-x @ router.T).topk(3).indices), "these are the experts with the SMALLEST scores"
    assert torch.equal(ids.sort(-1).values, right_ids.sort(-1).values), (
        f"token 0 was sent to {ids[0].tolist()}, and its largest scores are those of {right_ids[0].tolist()}")
    assert torch.equal(ids, right_ids), f"the best expert comes first: {right_ids[0].tolist()} for token 0, got {ids[0].tolist()}"
    sums = weights.sum(-1)
    assert torch.allclose(sums, torch.ones(40), atol=1e-5), (
        f"the weights of token 0 add up to {sums[0]:.3f}: divide those of the chosen experts by their sum, or the output becomes too small")
    assert torch.allclose(weights, right, atol=1e-5), (
        f"token 0 has the weights {[round(w, 3) for w in weights[0].tolist()]} instead of {[round(w, 3) for w in right[0].tolist()]}: they "
        "are probabilities, the exponentials of the scores")


def task_2_groups(lesson):
    ids = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])
    order, begins = lesson.group_by_expert(ids, 5)
    order, begins = order.tolist(), begins.tolist()
    assert sorted(order) == list(range(8)), f"the order has each of the 8 assignments once, got {order}"
    experts = [ids.flatten()[a].item() for a in order]
    assert experts != sorted(experts, reverse=True), f"the experts must be in ascending order, 0 first: got {experts}"
    assert experts == sorted(experts), f"sorted by expert the assignments belong to {experts}: each expert's must be next to each other"
    assert len(begins) == 6, f"5 experts have 5 beginnings, and the end is the sixth entry: got {len(begins)}. An expert may have none"
    assert begins[0] == 0, f"the first group begins at 0, got {begins}: `cumsum` alone gives the ENDS"
    assert begins == [0, 3, 3, 6, 8, 8], f"the groups have 3, 0, 3, 2 and 0 assignments, so they begin at [0, 3, 3, 6, 8, 8]: got {begins}"
    assert order == [1, 2, 6, 0, 4, 7, 3, 5], f"assignments of one expert stay in order: [1, 2, 6, 0, 4, 7, 3, 5], got {order}"
    order, _ = lesson.group_by_expert(torch.zeros(300, 2, dtype=torch.long), 2)
    assert order.tolist() == list(range(600)), "600 assignments to one expert were reordered: use a STABLE sort"


def task_3_one_product_per_expert(lesson):
    x, router, experts = lesson.example(30)
    ids, weights = right_weights(x, router, 2)
    seen, compute = [], lesson.Experts.compute
    lesson.Experts.compute = lambda self, expert, rows: seen.append((expert, len(rows))) or compute(self, expert, rows)
    try:
        got = lesson.grouped(x, experts, ids, weights)
    finally:
        lesson.Experts.compute = compute
    rows, used = sum(count for _, count in seen), len(ids.unique())
    assert rows <= 60, f"the experts computed {rows} rows for 60 assignments: only the rows of an expert's own tokens are needed"
    assert len(seen) <= len(experts), f"an expert was called {len(seen)} times in total: {used} experts need one call each"
    assert torch.isfinite(got).all(), "the result is not finite: some places of `outputs` were never written"
    right = lesson.one_by_one(x, experts, ids, weights)
    assert torch.allclose(got, right, atol=1e-4), (
        f"the results differ from the definition by {float((got - right).abs().max()):.3f}. The token of assignment a is a // k, and its "
        "result belongs at place a")
    some = lesson.grouped(x[:1], experts, ids[:1], weights[:1])
    assert torch.allclose(some, right[:1], atol=1e-4), "a single token has another result: experts without tokens must be left out"


def task_4_speed(lesson):
    x, router, experts = lesson.example(512)
    ids, weights = right_weights(x, router, 2)
    right = lesson.grouped(x, experts, ids, weights)
    for count in (1, 3, 512):
        found = lesson.fastest(x[:count], experts, ids[:count], weights[:count])
        assert found.shape == (count, x.shape[1]) and torch.allclose(found, right[:count], atol=1e-4), (
            f"with {count} tokens the results differ from those of `grouped`: faster must not mean another result")
    shown = []
    for count in (8, 512):
        times = []
        for way in (lesson.fastest, lesson.every_expert):
            def once(way=way, count=count):
                begin = time.process_time()
                way(x[:count], experts, ids[:count], weights[:count])
                return (time.process_time() - begin) * 1e3
            times.append(min(once() for _ in range(9)))
        shown.append(f"{count} tokens: {times[0]:.2f} ms, every expert for every token {times[1]:.2f} ms")
    return "; ".join(shown)
