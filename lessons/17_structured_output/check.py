"""Checks of lesson 17, for `minivllm course check 17`. A failed assert is the explanation that the learner reads."""
import math
import time


def follows(lesson, node, text):
    """Whether a text matches."""
    for letter in text:
        node = lesson.derivative(node, letter)
    return lesson.can_end(node)


def task_1_derivatives(lesson):
    letter = lesson.Letter(frozenset("ab"))
    assert lesson.derivative(letter, "b") == lesson.Empty(), "after one of its letters, a Letter allows only the text \"\": Empty()"
    assert lesson.derivative(letter, "c") == lesson.NOTHING, "c is not allowed here: NOTHING"
    assert lesson.derivative(lesson.Empty(), "a") == lesson.NOTHING, "after the end no letter may follow: NOTHING"
    word = lesson.sequence("ab", letter)
    assert follows(lesson, word, "aba"), "`ab` and then a letter a or b: the text `aba` matches it. After `a`, `b` and the letter are left"
    assert not follows(lesson, word, "ba"), "`ba` does not begin with `ab`"
    choice = lesson.either(lesson.sequence("cat"), lesson.sequence("cow"))
    assert follows(lesson, choice, "cow") and follows(lesson, choice, "cat"), (
        "after `c`, both `cat` and `cow` are still possible: an Either keeps the derivatives of ALL its options")
    many = lesson.sequence(lesson.Repeat(lesson.sequence("ab")), "c")
    assert follows(lesson, many, "c"), (
        "`c` is refused: a Repeat may be empty. If `first` can be empty, the letter may also be the first one of `rest`")
    assert follows(lesson, many, "ababc"), "after one text of a Repeat another one may follow: the Repeat itself stays behind it"
    lesson.RULES["check"] = lesson.either(lesson.Empty(), lesson.sequence("(", lesson.Rule("check"), ")"))
    assert follows(lesson, lesson.Rule("check"), "((()))"), "a Rule stands for RULES[name], which contains itself here"
    assert not follows(lesson, lesson.Rule("check"), "(()"), "`(()` has one bracket that is not closed"


def task_2_masks(lesson):
    vocabulary = [lesson.END, "a", "ab", "b", "abc", "bc", "c", "x", "xyz", "xyw", "cabbage"]
    trie, calls, depth, real = lesson.make_trie(vocabulary), [], [0], lesson.derivative

    def counted(node, letter):  # it calls itself: only the outermost calls count
        calls.extend([letter] * (depth[0] == 0))
        depth[0] += 1
        found = real(node, letter)
        depth[0] -= 1
        return found

    def allowed(state):
        return {vocabulary[token] for token in lesson.allowed_tokens(state, trie)}

    grammar = lesson.sequence("ab", lesson.Repeat(lesson.sequence("b")))
    got = allowed(grammar)
    assert lesson.END not in got, "the output may not end here, so token 0 is not allowed: ask can_end"
    assert "a" in got, "`a` is a beginning of `ab`: a token is allowed if the output can CONTINUE after it, complete or not"
    assert got == {"a", "ab"}, f"before `abb...` the tokens `a` and `ab` are allowed, got {sorted(got)}"
    got = allowed(lesson.derivative(lesson.derivative(grammar, "a"), "b"))
    assert lesson.END in got, "`ab` is complete, so the output may end here: token 0 is allowed"
    assert got == {lesson.END, "b"}, f"after `ab` only `b` or the end may follow, got {sorted(got)}"
    lesson.derivative = counted
    try:
        lesson.allowed_tokens(grammar, trie)
    finally:
        lesson.derivative = real
    assert len(calls) < 8, (
        f"{len(calls)} letters were tried for 10 tokens, of which 2 are allowed. Tokens with the same beginning share a path of the "
        "trie: try its letters once, and leave a path as soon as the derivative is NOTHING")


def task_3_forced_text(lesson):
    word = lesson.either(lesson.Empty(), lesson.sequence("x"))
    got = lesson.forced_text(lesson.sequence("name=", word, ";"))
    assert got not in ("name=;", "name=x;"), "after `name=` an `x` or `;` may follow: that is a choice of the model"
    assert got == "name=", f"every output begins with `name=`, and nothing more is certain: got {got!r}"
    assert lesson.forced_text(lesson.either(lesson.sequence("cat"), lesson.sequence("cow"))) == "c", "`cat` and `cow` share only `c`"
    got = lesson.forced_text(lesson.sequence("a", lesson.either(lesson.Empty(), lesson.sequence("bc"))))
    assert got == "a", f"after `a` the output may END, so `bc` is not forced: got {got!r}"
    assert lesson.forced_text(lesson.Empty()) == "", "at the end nothing is forced"


def task_4_fast_masks(lesson):
    texts, vocabulary, grammar = lesson.example()
    trie = lesson.make_trie(vocabulary)
    for text in texts[:1]:
        state = grammar
        for letter, mask in zip(text, lesson.masks_of(text, grammar, trie), strict=True):
            assert set(mask) == lesson.allowed_tokens(state, trie), f"the mask before {letter!r} in {text} is wrong"
            state = lesson.derivative(state, letter)
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        masks = sum(len(lesson.masks_of(text, grammar, trie)) for text in texts[:10])
        best = min(best, time.process_time() - start)
    return f"{best / masks * 1e3:.3f} ms per mask, in 10 texts with the same grammar ({len(vocabulary)} tokens)"
