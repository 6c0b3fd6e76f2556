"""What a model takes of a device's memory, and what fits beside it: calculated before anything is downloaded, loaded or measured.

    |<--------------------- gpu_memory_utilization --------------------->|
    | weights | peak of  | CUDA graphs | row tables | driver,   | KV cache |
    |         | one step | (set aside) |            | libraries |          |
      exact     estimate   exact         exact        estimate    the rest

The same columns as the memory ledger that a start prints (`worker/memory.py`), where the two estimates are measured. The exact ones come
from the code that allocates them; `engine/plan_model.py` asks it. This module is plain Python.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minivllm.core.block_math import longest_sequence, max_blocks_held
from minivllm.families import ModelSpec, MoESpec
from minivllm.quantization.methods import ResidentWeight

MIB, GIB = 1 << 20, 1 << 30
TYPICAL_REQUEST = 2000  # tokens of prompt and output
UNLIMITED = 1 << 31  # tokens
KINDS: Mapping[str, str] = {  # of our modules, by the last part of their names; others are norms
    "embed": "embedding", "positions": "embedding", "qkv": "attention", "o": "attention", "gate_up": "MLP", "up": "MLP", "down": "MLP",
    **dict.fromkeys(("q", "q_a", "q_b", "kv_a", "kv_b", "sinks"), "attention"),
    "head": "output head", "project_in": "projections", "project_out": "projections",
    "experts_gate_up": "experts", "experts_down": "experts", "router": "experts", "shared_gate_up": "experts", "shared_down": "experts",
    "shared_gate": "experts", "parameters": "weights",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory goes, in bytes, and what fits."""

    device: str
    total: int  # of the device; of a CPU, what is available
    usable: int  # the part of it that this engine may take
    dtype: str  # of weights and activations
    kv_dtype: str  # of cached keys and values
    weights: Mapping[tuple[str, str], int]  # (kind, type) -> bytes
    offloaded: int = 0  # of the weights, in host memory
    step: int = 0
    graphs: int = 0
    rows: int = 0
    other: int = 0
    block_bytes: int
    block_size: int  # tokens
    num_blocks: int
    windows: tuple[int | None, ...]  # of the KV groups
    chunk: int  # maximum number of tokens of one sequence in one step
    max_model_len: int  # the model's or the user's
    length_is_explicit: bool  # max_model_len is the user's, so a sequence of it must fit

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def cache(self) -> int:
        """Bytes of the KV cache."""
        return self.num_blocks * self.block_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return len(self.windows) * self.block_bytes // self.block_size

    @property
    def tokens(self) -> int:
        """Tokens that the cache holds, as one sequence."""
        return longest_sequence(self.num_blocks, UNLIMITED, self.block_size, self.windows, self.chunk)

    @property
    def served(self) -> int:
        """max_model_len as the engine would serve it: lowered to what the cache holds."""
        return min(self.max_model_len, self.tokens)

    def sequences(self, tokens: int) -> int:
        """Sequences of so many tokens that the cache holds at a time, without shared prefixes."""
        return max(self.num_blocks - 1, 0) // max_blocks_held(tokens, self.block_size, self.windows, self.chunk)

    @property
    def needed(self) -> int:
        """Tokens that one sequence must be able to have: max_model_len if it was given, else those of a typical request."""
        return self.max_model_len if self.length_is_explicit else min(self.max_model_len, TYPICAL_REQUEST)

    @property
    def beside_cache(self) -> int:
        """Bytes of everything but the KV cache."""
        return self.weight_bytes - self.offloaded + self.step + self.graphs + self.rows + self.other

    @property
    def fits(self) -> bool:
        return self.tokens >= self.needed and self.beside_cache + self.cache <= self.total

    @property
    def missing(self) -> int:
        """Bytes that are missing for one sequence of `needed` tokens; 0: it fits."""
        if self.fits:
            return 0
        blocks = max_blocks_held(self.needed, self.block_size, self.windows, self.chunk) + 1
        missing = self.beside_cache + max(blocks, self.num_blocks) * self.block_bytes - self.usable
        return missing if missing > 0 else (blocks - self.num_blocks) * self.block_bytes  # or a setting keeps the cache small

    def verdict(self) -> str:
        """One line."""
        if not self.fits:
            return f"does not fit: {self.missing / GIB:.2f} GiB are missing for one sequence of {self.needed:,} tokens"
        if self.served == self.max_model_len:
            return f"fits: {self.tokens:,} tokens of KV cache"
        return f"fits: {self.tokens:,} tokens of KV cache, and max_model_len is lowered from {self.max_model_len:,} to {self.served:,}"


def weights_by_kind(weights: Sequence[ResidentWeight], dtype: str) -> dict[tuple[str, str], int]:
    """(kind, type) -> bytes, in the order of the model. dtype: of the model."""
    found: dict[tuple[str, str], int] = {}
    for kind in (*dict.fromkeys(KINDS.values()), "norms"):
        for weight in weights:
            if KINDS.get(weight.name.rpartition(".")[2], "norms") == kind:
                key = kind, weight.type_name or dtype
                found[key] = found.get(key, 0) + weight.num_bytes
    return found


def step_peak(spec: ModelSpec, itemsize: int, max_num_batched_tokens: int, max_model_len: int, max_num_seqs: int,
              sampling: int, unpacked: int = 0, ordered: int = 0) -> int:
    """Estimated bytes that the largest step allocates beyond the weights: a model of what `worker/memory.py` measures on a GPU.

    The largest step is a prompt of as many tokens as the budget allows. Its peak is in the attention or the MLP of one layer, or, for a
    large vocabulary, in the sampler. sampling: bytes of logits and their copies. unpacked: bytes of the largest piece of a packed weight
    that a prompt's products unpack. ordered: bytes of the keys and values that attention of prompts copies in order.
    """
    length = min(max_model_len, max_num_batched_tokens)
    tokens = length * max(1, min(max_num_batched_tokens // max_model_len, max_num_seqs))
    hidden = tokens * spec.hidden_size * itemsize
    layer = max(max(tokens * _attention_numbers(spec, i) * itemsize + ordered, tokens * _mlp_numbers(spec, i, True) * itemsize,
                    tokens * _mlp_numbers(spec, i, False) * itemsize + unpacked) for i in range(spec.num_layers))
    rotations = len({(layer.attention.rope, layer.attention.head_dim) for layer in spec.layers})
    inputs = tokens * (4 + 8 + 8 + 2 * rotations * spec.layers[0].attention.head_dim * itemsize)
    previous = hidden if tokens == length else 0  # the measurement holds the result of one more step
    return max(layer + previous, hidden + sampling) + inputs


def _attention_numbers(spec: ModelSpec, layer: int) -> int:
    """Numbers per token that exist at a time: x, the fused projection, rotated queries and keys, the heads' outputs."""
    a = spec.layers[layer].attention
    return spec.hidden_size + (a.q_size + 2 * a.kv_size) + (a.q_size + a.kv_size) + a.q_size


def _mlp_numbers(spec: ModelSpec, layer: int, activated: bool) -> int:
    """x, its norm, the first product, and its activation if that is computed already. Of experts: all that a token's experts compute."""
    mlp = spec.layers[layer].mlp
    if isinstance(mlp, MoESpec):
        return 2 * spec.hidden_size + mlp.top_k * (mlp.intermediate_size + spec.hidden_size)
    return 2 * spec.hidden_size + (1 + mlp.gated + activated) * mlp.intermediate_size
