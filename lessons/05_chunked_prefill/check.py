"""Checks of lesson 5, for `minivllm course check 05`. A failed assert is the explanation that the learner reads."""


def task_1_one_formula(lesson):
    cases = [("a new prompt of 100 tokens, budget 512", _request(lesson, 100, 0, 0), 512, 100),
             ("a new prompt of 100 tokens, budget 64", _request(lesson, 100, 0, 0), 64, 64),
             ("a prompt of 100 tokens, of which 64 are computed, budget 64", _request(lesson, 100, 64, 0), 64, 36),
             ("a decode: prompt of 100 tokens, 3 output tokens, 102 tokens computed", _request(lesson, 100, 102, 3), 64, 1)]
    for what, request, budget, right in cases:
        got = lesson.tokens_now(request, budget)
        assert not (got >= 64 and right == 36), f"{what}: the first 64 tokens would be computed again. Subtract what is computed"
        assert not (got < 1 and right == 1), f"{what}: the newest output token is known and not computed yet. Count output tokens too"
        assert got <= budget, f"{what}: {got} tokens are more than the budget allows"
        assert got == right, f"{what}: {right} tokens, got {got}"


def task_2_decodes_come_first(lesson):
    running = [_request(lesson, 500, 100, 0, "p"), _request(lesson, 10, 11, 2, "d"), _request(lesson, 10, 10, 1, "e")]
    waiting = [_request(lesson, 30, 0, 0, "w"), _request(lesson, 50, 0, 0, "x")]
    step = lesson.plan(running, waiting, 8, 64)
    assert sum(step.values()) <= 64, (
        f"the step computes {sum(step.values())} tokens with a limit of 64: take each request's tokens off the budget")
    assert "d" in step and "e" in step, (
        f"the plan is {step}: the long prompt took the whole budget, and the decodes d and e wait. Plan decodes first")
    assert step.get("p") == 62, f"after 2 decodes, 62 tokens are left for the prompt p: the plan is {step}"
    assert "w" not in step and len(waiting) == 2, f"nothing is left for w, so it keeps waiting: the plan is {step}"
    assert all(step.values()), f"a request without tokens is not part of the step: {step}"


def task_2_waiting_requests_use_the_rest(lesson):
    running = [_request(lesson, 10, 11, 2, "d")]
    waiting = [_request(lesson, 30, 0, 0, "w"), _request(lesson, 50, 0, 0, "x"), _request(lesson, 5, 0, 0, "y")]
    step = lesson.plan(running, waiting, 8, 64)
    assert step.get("w") == 30, f"w has 30 tokens and 63 are left: it starts in this step. The plan is {step}"
    assert step.get("x") == 33, f"33 tokens are left for x, which has 50: it starts with a chunk of 33. The plan is {step}"
    assert "y" not in step and [request.name for request in running] == ["d", "w", "x"], "requests that start move to `running`, in order"
    running = [_request(lesson, 10, 11, 2, "d")]
    step = lesson.plan(running, [_request(lesson, 30, 0, 0, "w")], 1, 64)
    assert step == {"d": 1}, f"with max_running = 1, w must wait although there is budget: the plan is {step}"


def task_3_only_the_newest_token_makes_the_next(lesson):
    request = _request(lesson, 100, 0, 0)
    lesson.advance(request, 64, 1.0)
    assert request.computed == 64, f"64 tokens were computed, and `computed` is {request.computed}"
    assert request.times == [], ("a chunk in the middle of the prompt made an output token. Its last row of logits predicts a token of the "
                                 "prompt, which is known already")
    lesson.advance(request, 36, 2.0)
    assert request.times == [2.0], "the prompt is complete: the step that computed its last token makes the first output token"
    assert request.computed == 100, (f"100 tokens are computed, and `computed` is {request.computed}. A token that was just made is known, "
                                     "but its keys and values are computed in the NEXT step")
    lesson.advance(request, 1, 3.0)
    assert request.times == [2.0, 3.0] and request.computed == 101, "a decode computes the newest token and makes the next one"


def task_4_the_best_budget(lesson):
    """`plan` may be changed too: all that counts is what the requests see."""
    max_tokens = getattr(lesson, "MAX_TOKENS", 2048)
    requests = lesson.mixed_requests(200, per_second=40, seed=1)
    steps = lesson.serve(requests, 64, max_tokens)
    assert all(request.finished for request in requests), "every request must get all of its tokens"
    assert all(sum(step.values()) <= max_tokens for _, step in steps), "a step has more tokens than `max_tokens`"
    longest, chats = max(lesson.gaps(requests)), [lesson.ttft(request) for request in requests if request.prompt < 6000]
    return f"max_tokens {max_tokens}: longest gap {longest:.2f} ms, mean time to first token of chats {sum(chats) / len(chats):.1f} ms"


def _request(lesson, prompt, computed, made, name="r"):
    return lesson.Request(name, 0.0, prompt, 50, computed, [0.0] * made)
