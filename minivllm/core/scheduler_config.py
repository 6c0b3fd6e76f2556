"""The scheduler's settings: what the control plane must know about the machine, and what the user chose."""
from __future__ import annotations

from dataclasses import dataclass

from minivllm.errors import InvalidInput
from minivllm.scheduling_policy import POLICIES


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Settings of one scheduler. Raises `InvalidInput` naming the field, the value and what is allowed."""

    num_blocks: int  # device blocks, including the null block
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    kv_windows: tuple[int | None, ...] = (None,)  # one per KV group; None: full attention
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # maximum number of tokens in one chunk; 0: only the token budget limits it
    policy: str = "fcfs"
    max_queue: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # of the model; they end every output that does not ignore them
    planning_depth: int = 0  # 1: asynchronous scheduling, which plans a step while the previous one runs
    num_device_drafts: int = 0  # drafts per sequence that the worker proposes, and can verify before the host knows them
    free_tokens: int = 12  # a step of T tokens takes as long as 1 + T / free_tokens empty ones; used to share steps between owners
    num_host_blocks: int = 0  # including host block 0, which is never used; 0: no CPU KV offload
    max_loras: int = 0  # slots for LoRA adapters, so many may take part in one step; 0: no request has an adapter
    # A preempted sequence is either recomputed or swapped out to host memory and back, whichever costs less. The unit of cost is
    # the computation of one token. A swap costs swap_fixed_cost (the sequence resumes one step later) plus swap_cost_per_token
    # for each slot of its blocks (out and in together). The defaults are estimates, not measurements: copying a token's KV is
    # cheaper than computing it.
    swap_fixed_cost: float = 32.0
    swap_cost_per_token: float = 0.06

    def __post_init__(self) -> None:
        _at_least("num_blocks", self.num_blocks, 2, "one is the null block")
        _at_least("block_size", self.block_size, 1, "tokens per block")
        _at_least("max_num_seqs", self.max_num_seqs, 1, "sequences in one step")
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1, "tokens in one step")
        _at_least("max_model_len", self.max_model_len, 1, "tokens of prompt and output")
        _at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, "0 turns it off")
        _at_least("num_device_drafts", self.num_device_drafts, 0, "0: the worker proposes none")
        _at_least("free_tokens", self.free_tokens, 1, "tokens that double the time of an empty step")
        _at_least("num_host_blocks", self.num_host_blocks, 0, "0 turns CPU KV offload off")
        _at_least("max_loras", self.max_loras, 0, "0: no LoRA adapters")
        if self.max_queue is not None:
            _at_least("max_queue", self.max_queue, 1, "leave it out for no limit")
        if not self.kv_windows or any(w is not None and w < 1 for w in self.kv_windows):
            raise InvalidInput(f"kv_windows needs one entry per KV group, None or at least 1, got {self.kv_windows}", "kv_windows")
        if self.policy not in POLICIES:
            raise InvalidInput(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}", "policy")
        if self.planning_depth not in (0, 1):
            raise InvalidInput(f"planning_depth must be 0 or 1, got {self.planning_depth}", "planning_depth")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise InvalidInput(
                f"without chunked prefill a prompt is computed in one step, so max_num_batched_tokens ({self.max_num_batched_tokens}) must "
                f"be at least max_model_len ({self.max_model_len}): raise it, or enable chunked prefill", "max_num_batched_tokens")
        if not self.enable_chunked_prefill and self.long_prefill_token_threshold:
            raise InvalidInput("long_prefill_token_threshold cuts prompts into chunks, which enable_chunked_prefill=False forbids: "
                               "leave one of them out", "long_prefill_token_threshold")

    @property
    def max_running(self) -> int:
        """Number of rows. At most the token budget, so that every row can decode in every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def max_chunk(self) -> int:
        """Maximum number of tokens of one sequence in one step."""
        return min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)

    def swap_is_cheaper(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether swapping `num_blocks` blocks out and in costs less than recomputing `num_tokens` tokens."""
        num_slots = num_blocks * self.block_size / len(self.kv_windows)
        return self.swap_fixed_cost + self.swap_cost_per_token * num_slots < num_tokens


def _at_least(name: str, value: int, low: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidInput(f"{name} must be a whole number of at least {low} ({meaning}), got {value!r}", name)
