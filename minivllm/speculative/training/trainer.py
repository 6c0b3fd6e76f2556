"""The training loop of a head: distillation of the target's next-token distributions, on the target's own generations."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minivllm.speculative.training.generations import Generation
from minivllm.speculative.training.network import HeadNetwork

STEP_DECAY = 0.8  # weight of each further step of the unrolled draft, as in EAGLE-3
FEATURE_WEIGHT = 0.5  # of the distance between features and the target's hidden states, as in EAGLE
FIRST_ALONE = 0.6  # fraction of the training that unrolls one step only, which takes a third of the time
WARM_UP = 0.05  # fraction of the training in which the learning rate grows
CLIP = 1.0  # norm of a gradient


@dataclass(frozen=True, slots=True)
class TargetTables:
    """What a head shares with its target, in float32 on the training device."""

    embedding: Tensor  # [vocab, hidden]
    norm: Callable[[Tensor], Tensor]  # the target's final norm
    head: Tensor  # [draft vocab, hidden]: rows of the target's output head
    vocabulary: Tensor  # [draft vocab] int64: the token id of each of these rows


@dataclass(frozen=True, slots=True)
class Example:
    """A padded batch of B generations of up to T + 1 tokens."""

    hidden: Tensor  # [B, T + 1, hidden] after the final norm
    tokens: Tensor  # [B, T + 1]
    targets: Tensor  # [B, T + 1] the target's most probable next token
    learned: Tensor  # [B, T + 1] bool: positions of the answer, whose next tokens are to be predicted


def examples(generations: Sequence[Generation], tables: TargetTables, batch_tokens: int, device: torch.device) -> list[Example]:
    """All generations in batches of about `batch_tokens` tokens, those of similar length together."""
    ordered = sorted((g for g in generations if len(g.tokens) > 2), key=lambda g: len(g.tokens))
    batches: list[Example] = []
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end - start + 1) * len(ordered[end].tokens) <= batch_tokens:
            end += 1
        some = ordered[start:end]
        start = end
        length = len(some[-1].tokens)

        def padded(name: str, some: Sequence[Generation] = some, length: int = length) -> Tensor:
            rows = [getattr(g, name) for g in some]
            return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, length - len(row))) for row in rows]).to(device)

        learned = torch.zeros(len(some), length, dtype=torch.bool)
        for i, g in enumerate(some):
            learned[i, g.prompt_len : len(g.tokens)] = True
        hidden = tables.norm(padded("hidden").float())
        batches.append(Example(hidden, padded("tokens").long(), padded("targets").long(), learned.to(device)))
    return batches


class HeadTrainer:
    """Trains one network. `run` yields after each step, so that the caller shows progress."""

    def __init__(self, network: HeadNetwork, tables: TargetTables, *, steps: int, learning_rate: float) -> None:
        """steps: of the unrolled draft."""
        self.network, self.tables, self.steps = network, tables, steps
        self._optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        self._index = torch.full((len(tables.embedding),), -1, device=tables.vocabulary.device)  # token id -> row of the draft vocabulary
        self._index[tables.vocabulary] = torch.arange(len(tables.vocabulary), device=tables.vocabulary.device)

    def run(self, batches: Sequence[Example], epochs: int, seed: int = 0) -> Iterator[tuple[float, float]]:
        """One optimizer step per batch. Yields the part of the training that is done, and the step's loss."""
        total = epochs * len(batches)
        order = torch.Generator().manual_seed(seed)
        rate = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate(step / total))
        done = 0
        for _ in range(epochs):
            for i in torch.randperm(len(batches), generator=order).tolist():
                loss = self.loss(batches[i], 1 if done < FIRST_ALONE * total else self.steps)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
                self._optimizer.step()
                rate.step()
                done += 1
                yield done / total, float(loss.detach())

    def loss(self, example: Example, steps: int) -> Tensor:
        """Cross entropy with the target's distribution over the draft vocabulary, and the distance of the features: a mean over steps."""
        features = self.network.unroll(example.hidden[:, :-1], self.tables.embedding[example.tokens[:, 1:]], steps)
        known = example.learned & (self._index[example.targets] >= 0)
        total, weights = features[0].new_zeros(()), [STEP_DECAY**j for j in range(steps)]
        for j, feature in enumerate(features):
            learned = known[:, 1 + j :]
            true, guess = example.hidden[:, 1 + j :][learned], feature[learned]
            with torch.no_grad():
                wanted = (true @ self.tables.head.T).softmax(-1)
            entropy = F.cross_entropy(guess @ self.tables.head.T, wanted)
            total = total + weights[j] * (entropy + FEATURE_WEIGHT * F.smooth_l1_loss(guess, true))
        return total / sum(weights)

    @torch.inference_mode()
    def acceptance(self, batches: Sequence[Example], steps: int) -> list[float]:
        """The part of drafts at each position that greedy decoding accepts: all earlier drafts are right, and this one too."""
        right, count = torch.zeros(steps), 0
        for example in batches:
            features = self.network.unroll(example.hidden[:, :-1], self.tables.embedding[example.tokens[:, 1:]], steps)
            length = features[-1].shape[1]
            anchors = example.learned[:, steps : steps + length]  # the last draft's position is part of the answer
            so_far = torch.ones(int(anchors.sum()), dtype=torch.bool, device=anchors.device)
            for j, feature in enumerate(features):
                guess = self.tables.vocabulary[(feature[:, :length][anchors] @ self.tables.head.T).argmax(-1)]
                so_far &= guess == example.targets[:, 1 + j : 1 + j + length][anchors]
                right[j] += int(so_far.sum())
            count += len(so_far)
        return [float(r) / max(count, 1) for r in right]


def _rate(done: float) -> float:
    """Factor on the learning rate: a linear warm-up, then a cosine down to a twentieth."""
    if done < WARM_UP:
        return (done + 0.001) / WARM_UP
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))
