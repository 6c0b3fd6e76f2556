"""n-gram lookup on a GPU: the same drafts as the host's index (`ngram.py`), found by comparing the end of each text with all of it.

The index takes one lookup per token and needs the token's value. So the next step could not be planned before the host has read it. The
comparison takes time in proportion to the text, but it stays on the device, where the token table has the tokens of every row: prompts,
cached prefixes and outputs alike.
"""
from __future__ import annotations

from minivllm.kernels import Ops
from minivllm.speculative.base import DraftTokens, ProposalInput
from minivllm.speculative_config import SpeculativeConfig


class NgramLookup:
    """A `DeviceProposer`."""

    needs_hidden = stores = False

    def __init__(self, config: SpeculativeConfig, ops: Ops) -> None:
        self.num_drafts, self._lookup, self._find = config.num_speculative_tokens, config.lookup, ops.find_ngrams

    def propose(self, x: ProposalInput) -> DraftTokens:
        """See `DeviceProposer`."""
        return DraftTokens(self._find(x.text, x.rows, x.lengths, *self._lookup, self.num_drafts))

    def store(self, x: ProposalInput) -> None:
        """See `DeviceProposer`."""
