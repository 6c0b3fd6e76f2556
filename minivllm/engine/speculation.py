"""Drafts of all requests: n-gram proposals, how many drafts each request verifies, and how many were accepted.

    result of a step ─▶ observe: the newest tokens test the last guess ─▶ propose: a new guess, cut to the length that pays ─▶ the scheduler

A guess is tested also if it was not verified: the next tokens show whether it would have been right. So drafts of a request stop while
they do not pay, and start again when they would, without a step that is spent on the question. A proposer on the device takes time for
each guess. While no request's drafts pay, it makes one guess in PROBE_STEPS steps (`core/step_planner.py`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from minivllm.outputs import DraftCounts
from minivllm.speculative.adaptive import Acceptance, cost_of, most_speculative_seqs
from minivllm.speculative.ngram import NgramIndex
from minivllm.speculative_config import SpeculativeConfig

FIRST_RIGHT = 0.7  # assumed share of right drafts of a request whose drafts were not tested yet


@dataclass(slots=True)
class SequenceDrafts:
    """What is known for the drafts of one sequence."""

    prompt: Sequence[int]
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(FIRST_RIGHT))
    index: NgramIndex | None = None  # of prompt and output; None: not made yet, or not needed
    guess: tuple[int, ...] = ()  # for the tokens after the newest one
    promising: bool = False  # whether the newest tested draft was right
    counts: DraftCounts = field(default_factory=DraftCounts)

    def observe(self, tokens: Sequence[int]) -> None:
        """Test the guess with the tokens that were sampled."""
        guess = self.guess
        for at, token in enumerate(tokens[:len(guess)]):
            self.promising = token == guess[at]
            self.acceptance.tested(self.promising)
            if not self.promising:
                break


class Speculation:
    """The policy of one engine."""

    def __init__(self, config: SpeculativeConfig, device: str, waits: bool, on_host: bool = True) -> None:
        """waits: whether asynchronous scheduling is on, so that a sequence whose drafts are found on the host must wait for its values.
        on_host: False: the worker proposes the drafts."""
        self._config = config
        self._on_host = on_host
        self._waits = waits and self._on_host
        self._cost = cost_of(device)
        self._most_seqs = most_speculative_seqs(config, device)
        self.counts = DraftCounts()

    def start(self, prompt: Sequence[int]) -> SequenceDrafts:
        return SequenceDrafts(prompt)

    def prepare(self, drafts: SequenceDrafts) -> None:
        """Index the prompt. Call it while the device computes it."""
        if self._on_host and drafts.index is None:
            drafts.index = NgramIndex(*self._config.lookup)
            drafts.index.extend(drafts.prompt)

    def count(self, drafts: SequenceDrafts, num_planned: int, num_accepted: int) -> None:
        """A step had room for `num_planned` drafts of this sequence. There were fewer if the worker found none after the step before."""
        num_drafts = num_planned if self._on_host else max(min(num_planned, len(drafts.guess)), num_accepted)
        if num_drafts == 0:
            return
        drafts.counts.add(num_drafts, num_accepted)
        self.counts.add(num_drafts, num_accepted)

    def propose(
        self, drafts: SequenceDrafts, tokens: Sequence[int], num_seqs: int, proposed: tuple[int, ...] | None,
    ) -> tuple[int, ...] | None:
        """A step of `num_seqs` sequences sampled `tokens` for this one: drafts for its next step.

        proposed: by the worker; None: it has no proposer. The result None: drafts do not pay, so the sequence does not wait for any, and
        the worker need not propose them. It proposes as long as the newest tested draft was right, because they may soon pay.
        """
        self.prepare(drafts)
        drafts.observe(tokens)
        most = self._config.num_speculative_tokens
        if drafts.index is not None:
            drafts.index.extend(tokens)
            proposed = drafts.index.propose(most)
        drafts.guess = guess = proposed or ()
        length = 0 if num_seqs > self._most_seqs else drafts.acceptance.length(num_seqs, most, self._cost)
        if self._on_host and not (guess or self._waits):
            return None
        return guess[:length] if length or (drafts.promising and not self._on_host) else None
