"""Checks of lesson 18, for `minivllm course check 18`. A failed assert is the explanation that the learner reads."""


def pieces_of(lesson, tokens, stop="stop!"):
    stream = lesson.TextStream(stop)
    return [stream.push(token) for token in tokens], stream


def task_1_text_of_tokens(lesson):
    pieces, stream = pieces_of(lesson, [b"a ", b"\xf0\x9f", b"\x90\x99", b" b"])
    assert "\ufffd" not in "".join(pieces), (
        f"got {pieces}: the second token is the first half of a character. Its bytes must wait for the other half, and not become U+FFFD")
    assert pieces[0] == "a ", f"the first token is whole text that cannot be a part of 'stop!': send it at once, got {pieces[0]!r}"
    assert "".join(pieces) + stream.finish() == "a 🐙 b", f"expected the text 'a 🐙 b', got {pieces}"
    pieces, stream = pieces_of(lesson, [b"one st", b"ep, two st", b"op! three"])
    assert not pieces[0].endswith("st"), (
        f"got {pieces}: 'st' was sent, although 'stop!' begins with it. The client cannot be told to forget it: hold it back")
    assert pieces[1].startswith("step"), f"got {pieces}: 'st' was no stop string, so it comes with the next text"
    assert stream.ended, "the text contains 'stop!', which came in two tokens: set `ended`"
    assert "three" not in "".join(pieces), f"got {pieces}: what follows the stop string in the same token is not part of the output"
    assert "".join(pieces) == "one step, two ", f"the stop string is not part of the output: expected 'one step, two ', got {pieces}"
    assert stream.finish() == "", "after a stop string nothing was held back"
    pieces, stream = pieces_of(lesson, [b"almost sto"])
    assert "".join(pieces) + stream.finish() == "almost sto", "the output ended without the stop string: `finish` gives what was held back"


def task_2_events_of_pieces(lesson):
    texts = ["a", "b\n\nc", "é"]
    data = b"".join(lesson.event({"text": text}) for text in texts) + lesson.event(lesson.DONE)
    got = lesson.EventReader().push(data)
    assert got == [{"text": text} for text in texts], f"three events and DONE came in one piece: all three are complete, got {got}"
    reader, got = lesson.EventReader(), []
    for i in range(len(data)):
        found = reader.push(data[i:i + 1])
        assert found is not None, "return a list, also if no event is complete"
        got += found
    assert got == [{"text": text} for text in texts], (
        f"the same bytes, one at a time, gave {got}: keep the bytes of an incomplete event until the empty line comes")


def task_3_goodput(lesson):
    fast, slow, late = (lesson.Outcome(start, times) for start, times in (
        (0.0, [100.0, 120.0, 140.0]), (0.0, [100.0, 200.0, 2000.0]), (500.0, [1500.0, 1510.0, 1520.0])))
    refused = lesson.Outcome(600.0)
    got = lesson.goodput([fast, slow], 200.0, 50.0)
    assert got != 3 / 2.0, "3 tokens were made in time, but the objectives are of REQUESTS: count those"
    assert abs(got - 0.5) < 1e-9, f"one of two requests met both objectives, in 2 s: 0.5 per second, got {got:.3f}"
    got = lesson.goodput([fast, slow, late], 200.0, 50.0)
    assert abs(got - 1.0) > 1e-9, "the last request waited 1,000 ms for its first token: BOTH objectives must be met"
    assert abs(got - 0.5) < 1e-9, f"expected 0.5 per second, got {got:.3f}"
    got = lesson.goodput([fast, slow, refused], 200.0, 50.0)
    assert abs(got - 0.5) < 1e-9, f"a refused request has no tokens and met nothing: expected 0.5 per second, got {got:.3f}"


def task_4_overload(lesson):
    rows, max_waiting = lesson.settings()
    assert 1 <= rows <= 64, f"the engine has 64 rows at most, got {rows}"
    found = [lesson.goodput(lesson.simulate(rate, rows, max_waiting, 600), 500, 40) for rate in (10, 18, 30)]
    return (f"{sum(found):.1f} good requests/s altogether: {found[0]:.1f} at 10 requests/s, {found[1]:.1f} at 18, {found[2]:.1f} at 30, "
            f"with {rows} rows and {max_waiting} waiting")
