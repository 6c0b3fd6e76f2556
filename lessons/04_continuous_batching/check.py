"""Checks of lesson 4, for `minivllm course check 04`. A failed assert is the explanation that the learner reads."""


def task_1_entering_and_leaving(lesson):
    policy = lesson.ContinuousBatching()
    running = [_request(lesson, "a", output=2, made=2), _request(lesson, "b", output=3, made=1), _request(lesson, "c", output=1, made=0)]
    admitted = policy.num_to_admit(running, 8)
    assert admitted != 0, "nothing starts while other requests run: that is static batching. A free row can be used in every step"
    assert admitted != 8, "8 more requests would make 11, with 8 rows: 3 rows are in use"
    assert admitted == 5, f"3 of 8 rows are in use, so 5 requests may start: got {admitted}"
    leaving = [request.name for request in policy.leaving(running)]
    assert leaving != [], "a is finished and must leave now. Its row would compute padding until the others end"
    assert leaving == ["a"], f"only a has all of its output tokens, so only a leaves: got {leaving}"


def task_2_a_step(lesson):
    a, b, c = (_request(lesson, name, output, 0, prompt) for name, output, prompt in (("a", 1, 10), ("b", 3, 20), ("c", 2, 30)))
    steps = lesson.serve(lesson.ContinuousBatching(), [a, b, c], 2)
    rows = [[name for name, _ in step.rows] for step in steps]
    assert rows[0] == ["a", "b"], f"with 2 rows the first step computes a and b, got {rows[0]}"
    assert len(rows) < 2 or rows[1] != ["a", "b"], (
        "a needs one token and is still there in the second step: the step that computes a prompt also makes the first token")
    assert len(a.times) == 1 and len(b.times) == 3 and len(c.times) == 2, (
        f"the requests got {len(a.times)}, {len(b.times)} and {len(c.times)} tokens, expected 1, 3 and 2: each step gives every unfinished "
        "request exactly one token, also the step that computes its prompt")
    assert rows[1:] != [["b"], ["b", "c"], ["c"]], "a's row stays empty for one step: admit requests BEFORE the step is computed"
    assert rows == [["a", "b"], ["b", "c"], ["b", "c"]], f"expected a and b, then twice b and c: got {rows}"
    first = lesson.STEP_MS + lesson.TOKEN_MS * 30
    assert a.times[0] > 0, (
        f"a's first token has the time at which the step ENDS, {first:.3f} ms; yours has {a.times[0]:.3f}: advance the clock before you "
        "write `times`")
    assert abs(a.times[0] - lesson.STEP_MS) > 1e-9, "the time of the step does not depend on its tokens: add TOKEN_MS for each of them"
    assert abs(a.times[0] - lesson.STEP_MS - 2 * lesson.TOKEN_MS) > 1e-9, "a first step computes all tokens of the prompt, not one per row"
    assert abs(a.times[0] - first) < 1e-9, (
        f"the first step computes two prompts of 10 and 20 tokens, so a's first token has the time {first:.3f} ms: yours has "
        f"{a.times[0]:.3f}")
    assert abs(steps[1].end - steps[1].start - lesson.STEP_MS - lesson.TOKEN_MS * 31) < 1e-9, (
        "the second step computes c's prompt (30 tokens) and one token of b. Ask for `tokens_to_compute` before the token is appended")


def task_2_a_batch_that_stays_together(lesson):
    class Ending(lesson.StaticBatching):
        """Ends the batch after a surplus token, which would make it endless."""

        def leaving(self, running):
            return list(running) if any(len(request.times) > request.output for request in running) else super().leaving(running)

    a, b = _request(lesson, "a", 1, 0), _request(lesson, "b", 3, 0)
    steps = lesson.serve(Ending(), [a, b], 2)
    for request in (a, b):
        assert len(request.times) == request.output, (
            f"with StaticBatching, {request.name} got {len(request.times)} tokens and needs {request.output}: "
            "a finished request that keeps its row gets no more tokens")
    assert len(steps) == 3, (
        f"with StaticBatching, outputs of 1 and 3 tokens took {len(steps)} steps instead of 3: both leave after step 3. Do not remove from "
        "`running` while you iterate over it: `leaving` may return that same list")


def task_2_time_passes_without_work(lesson):
    a, b = _request(lesson, "a", 2, 0), _request(lesson, "b", 2, 0)
    b.arrival = 500.0
    lesson.serve(lesson.ContinuousBatching(), [a, b], 4)
    assert b.times[0] >= 500.0, f"b arrives at 500 ms and got its first token at {b.times[0]:.1f} ms"
    assert b.times[0] < 502.0, "b arrives at 500 ms in an idle engine, so its first step starts at once"


def task_3_latencies(lesson):
    a, b = _request(lesson, "a", 3, 0), _request(lesson, "b", 2, 0)
    a.arrival, a.times, b.arrival, b.times = 1.0, [11.0, 13.0, 17.0], 100.0, [102.0, 110.0]
    got = lesson.report([a, b])
    assert got.mean_ttft != 56.5, "this is the mean TIME of the first tokens. The time TO the first token counts from the request's arrival"
    assert abs(got.mean_ttft - 6.0) < 1e-9, f"first tokens after 10 and 2 ms: their mean is 6 ms, got {got.mean_ttft}"
    assert got.longest_gap < 80, "the gap between the last token of one request and the first of the next is no inter-token latency"
    assert got.longest_gap != 10.0, "the time to the first token is no gap between two tokens: they have different causes and limits"
    assert (got.median_gap, got.longest_gap) == (4.0, 8.0), (
        f"the gaps are 2, 4 and 8 ms: got the median {got.median_gap} and the longest {got.longest_gap}")


def task_4_a_better_order(lesson):
    """`output` is hidden from `pick`: an engine does not know it."""
    true_output = {}
    order = lesson.pick

    def blind(waiting):
        hidden = [lesson.Request(request.name, request.arrival, request.prompt, 0) for request in waiting]
        index = order(hidden)
        assert isinstance(index, int) and 0 <= index < len(waiting), f"`pick` must return an index of the list, got {index!r}"
        return index

    lesson.pick = blind
    try:
        requests = lesson.chat_requests(120, per_second=200, seed=1)
        true_output.update({request.name: request.output for request in requests})
        lesson.serve(lesson.ContinuousBatching(), requests, 8)
    finally:
        lesson.pick = order
    assert all(len(request.times) == true_output[request.name] for request in requests), "every request must get all of its tokens"
    waits = sorted(request.times[0] - request.arrival for request in requests)
    return (f"time to first token: mean {sum(waits) / len(waits):.0f} ms, longest {waits[-1]:.0f} ms "
            "(120 requests, 200 per second, 8 rows: more load than in the README's table)")


def _request(lesson, name, output, made, prompt=5):
    return lesson.Request(name, 0.0, prompt, output, [float(i) for i in range(made)])
