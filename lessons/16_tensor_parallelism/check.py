"""Checks of lesson 16, for `minivllm course check 16`. A failed assert is the explanation that the learner reads."""
from queue import Empty

import torch
import torch.nn.functional as F

WEIGHT = torch.arange(24.0).view(6, 4)


def ranks(lesson, size, work):
    """Results of all ranks. A rank that waits for ever is explained."""
    try:
        return lesson.run_ranks(size, work)
    except Empty:
        raise AssertionError(
            "a rank waited for a message that never came: every rank must make the same exchanges in the same order") from None


def task_1_parts_of_a_matrix(lesson):
    for part, whole_shape, name, dim in ((lesson.outputs_of, [3, 4], "outputs", 0), (lesson.inputs_of, [6, 2], "inputs", 1)):
        got = [part(WEIGHT, rank, 2) for rank in range(2)]
        assert list(got[0].shape) == whole_shape, (
            f"a weight is [outputs, inputs]. Half of the {name} of [6, 4] has the shape {whole_shape}, got {list(got[0].shape)}")
        assert torch.equal(torch.cat(got, dim), WEIGHT), (
            f"the parts of ranks 0 and 1 side by side must be the whole matrix: got {torch.cat(got, dim).tolist()}. A head needs "
            "neighboring rows")


def example_layer(lesson):
    weights, layers, tokens = lesson.example()
    return layers[0], weights["embed"][tokens]


def task_2_one_exchange(lesson):
    layer, x = example_layer(lesson)
    right = F.linear(F.silu(F.linear(x, layer["gate"])) * F.linear(x, layer["up"]), layer["down"])
    for size in (1, 2, 4):
        results, groups = ranks(lesson, size, lambda group: lesson.mlp(group, layer, x))
        shapes = [list(result.shape) for result in results]
        assert shapes == [list(right.shape)] * size, f"each rank returns [12, 64], got {shapes}"
        assert groups[0].exchanges, "without an exchange each rank has only its own summand of the outputs: add them with `all_reduce`"
        assert groups[0].exchanges == 1, (
            f"{groups[0].exchanges} exchanges: the inner numbers of a rank are exactly the inputs that its part of `down` needs, so only "
            "the end must be exchanged")
        assert torch.allclose(results[0], right, atol=1e-4), (
            f"with {size} ranks the results differ by {float((results[0] - right).abs().max()):.3f}. The sum comes after the last product, "
            "and silu before it: silu of a sum is not the sum of silus")
        assert all(torch.equal(result, results[0]) for result in results), "the ranks have different results"


def task_3_the_embedding(lesson):
    table, tokens = torch.randn(11, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 10, 5, 6, 5])
    for size in (1, 2, 4):
        results, groups = ranks(lesson, size, lambda group: lesson.embed(group, table, tokens))
        assert groups[0].exchanges == 1, f"one exchange adds the rows of all ranks: there were {groups[0].exchanges}"
        wrong = [i for i in range(len(tokens)) if not torch.allclose(results[0][i], table[tokens[i]])]
        if wrong:
            token = int(tokens[wrong[0]])
            holders = -(-11 // size)
            raise AssertionError(
                f"with {size} ranks the row of token {token} is wrong. Rank {token // holders} holds it, at place {token % holders} of its "
                "part; all others must contribute zeros")
        ranks(lesson, size, lambda group: lesson.embed(group, _Watched(table), tokens))


class _Watched:
    """A table that only `vocabulary_of` may cut."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        assert isinstance(index, slice), "take the rows from `part`: a rank holds no other rows of the table"
        return self.table[index]


def task_4_fewer_numbers(lesson):
    shown, size = [], 8
    for count in (1, 10, 4096):
        parts = torch.randn(size, 3, count, generator=torch.Generator().manual_seed(count))
        results, groups = ranks(lesson, size, lambda group, parts=parts: group.all_reduce(parts[group.rank]))
        assert torch.allclose(results[0], parts.sum(0), atol=1e-4), f"the sum of {3 * count} numbers over 8 ranks is wrong"
        assert all(torch.equal(result, results[0]) for result in results), (
            "the ranks have sums that differ in the last bits: then they may sample different tokens. Let one rank add each number")
        shown.append(f"{max(group.sent for group in groups):,} of {3 * count:,} numbers")
    return f"the busiest of 8 ranks sends {', '.join(shown)}; each to all others: {7 * 3 * 4096:,} of the last"
