"""Checks of lesson 11, for `minivllm course check 11`. A failed assert is the explanation that the learner reads."""
import torch


def task_1_a_graph_with_enough_rows(lesson):
    sizes = (1, 2, 4, 8)
    got = [lesson.padded(rows, sizes) for rows in (1, 3, 4, 8)]
    assert got != [8, 8, 8, 8], "always the largest graph: 1 sequence would compute 8 rows. Take the smallest that has room"
    assert got != [1, 2, 4, 8], "3 sequences do not fit into a graph of 2 rows: round UP, the other rows are padding"
    assert got == [1, 4, 4, 8], f"1, 3, 4 and 8 sequences need graphs of 1, 4, 4 and 8 rows, got {got}"
    assert lesson.padded(9, sizes) is None, "no graph has 9 rows: return None, so that the step runs eagerly"
    assert lesson.padded(1, ()) is None, "without graphs every step runs eagerly"


def task_2_fixed_memory(lesson):
    device, model = lesson.Device(), lesson.Model(2, 16, 50)
    runner, eager = lesson.Runner(model, device, (1, 2, 4)), lesson.Runner(model, device, ())
    memory = runner.tokens.data_ptr()
    first, second = torch.tensor([7, 8, 9]), torch.tensor([20, 30, 40])
    right = eager.step(first).clone(), eager.step(second).clone()
    got = runner.step(first)
    assert runner.tokens.data_ptr() == memory, (
        "`self.tokens` is another tensor now. The graph still reads the old one, whose address was recorded: copy INTO it")
    assert len(got) == 3, f"3 sequences get 3 tokens, and {len(got)} were returned: leave the padding out"
    assert torch.equal(got, right[0]), "the graph did not read these tokens: write them into `self.tokens` before the replay"
    later = runner.step(second)
    assert torch.equal(later, right[1]), "the second step is wrong: was the graph replayed again?"
    assert torch.equal(got, right[0]), (
        "the result of the first step changed during the second one: it is a view of the graph's output. Return a copy")
    before = device.host_us
    runner.step(first)
    assert device.host_us - before < 2 * lesson.REPLAY_US, "the kernels were started one by one: replay the recorded graph"


def task_3_plan_ahead(lesson):
    line = lesson.decode(5, 0, 100.0, 300.0)
    assert line.times == [400.0, 800.0, 1200.0, 1600.0, 2000.0], (
        f"depth 0: 100 us of the host, 300 us of the device, one after the other: tokens at 400, 800, ... us, got {line.times}")
    assert len(line.host) == 5 and line.surplus == 0, "depth 0 plans a step only after the token before it was read: nothing is surplus"
    line = lesson.decode(5, 1, 100.0, 300.0)
    assert line.times != [400.0, 800.0, 1200.0, 1600.0, 2000.0], (
        "depth 1 makes no difference: a second step must be launched BEFORE the host waits for the first one")
    assert all(a[1] <= b[0] for a, b in zip(line.device, line.device[1:], strict=False)), (
        "two steps run on the device at the same time. The second one starts when the first one has ended, because it needs its token")
    assert line.times == [400.0, 700.0, 1000.0, 1300.0, 1600.0], (
        f"depth 1: the device works without a gap, 300 us per token after the first: 400, 700, 1000, ... us, got {line.times}")
    assert line.surplus == 1, "when the last token is read, one more step is on its way: its token is dropped"
    slow = lesson.decode(4, 1, 500.0, 300.0)
    assert slow.times == [1000.0, 1500.0, 2000.0, 2500.0], (
        f"a host of 500 us is the limit: it plans two steps, then reads the first token, and so on: 1000, 1500, ... us, got {slow.times}")


def task_4_which_sizes(lesson):
    dice = torch.Generator().manual_seed(0)
    rows = (1 + 90 * torch.rand(400, generator=dice) ** 3).int().tolist()  # most steps have few sequences
    sizes = lesson.choose_sizes(rows, 8)
    assert len(sizes) <= 8, f"at most 8 graphs: each takes memory, and time at the start. Got {len(sizes)}"
    assert list(sizes) == sorted(set(sizes)) and sizes[0] >= 1, f"sizes must be in rising order, got {sizes}"
    return f"{lesson.padding(rows, sizes):.1%} of the computed rows are padding, with the sizes {sizes}"
