"""The scheduler's settings, and the door: what can never fit is refused with numbers, not accepted and stuck.

A sequence that fits the empty pool alone always ends: everybody after it can be made to give way (see `scheduler`). So the
door asks one question: do prompt + max_tokens fit the context, and their blocks the pool?

Blocks of one group for a sequence whose last computed position is T - 1, in steps of at most C tokens:

    full attention    ceil(T / block_size)
    window W          at most ceil((W - 1 + C) / block_size) + 1: what the window reaches back, the chunk, and one for the edge
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput

POLICIES = ("fcfs", "priority")


class QueueFull(InvalidInput):
    """The queue holds as many waiting requests as it may. The server answers 429; the client may try again later."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What the control plane must know about the machine and about the user's wishes. Raises `InvalidInput`."""

    num_blocks: int  # device blocks, the null block included
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    kv_windows: tuple[int | None, ...] = (None,)  # one per KV group; None: full attention
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # 0: only the budget limits a chunk
    policy: str = "fcfs"
    max_queue: int | None = None
    eos_token_ids: tuple[int, ...] = ()  # of the model; they end every output that does not ignore them
    planning_depth: int = 0  # 1: plan a step while the one before runs
    num_host_blocks: int = 0  # host block 0, like device block 0, is never used; 0: no host memory
    # A sequence that must give way is computed again later, or its blocks go to host memory and come back: whichever costs less.
    # In units of computing one token, a swap costs swap_fixed_cost (it comes back a step later) and, for each token there is
    # a slot for, swap_cost_per_token (there and back). The defaults are a guess: a link moves a token faster than a GPU computes it.
    swap_fixed_cost: float = 32.0
    swap_cost_per_token: float = 0.06

    def __post_init__(self) -> None:
        _at_least("num_blocks", self.num_blocks, 2, "one is the null block")
        _at_least("block_size", self.block_size, 1, "tokens per block")
        _at_least("max_num_seqs", self.max_num_seqs, 1, "sequences in one step")
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1, "tokens in one step")
        _at_least("max_model_len", self.max_model_len, 1, "tokens of prompt and output")
        _at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, "0 turns it off")
        _at_least("num_host_blocks", self.num_host_blocks, 0, "0 turns the host tier off")
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
        """Rows. No more than the budget, so that every row can decode in every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def max_chunk(self) -> int:
        """Most tokens of one sequence in one step."""
        return min(self.max_num_batched_tokens, self.long_prefill_token_threshold or self.max_num_batched_tokens)

    def swap_pays(self, num_tokens: int, num_blocks: int) -> bool:
        """Whether a sequence with this much computed costs less to move out and in than to compute again."""
        num_slots = num_blocks * self.block_size / len(self.kv_windows)
        return self.swap_fixed_cost + self.swap_cost_per_token * num_slots < num_tokens


def _at_least(name: str, value: int, low: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidInput(f"{name} must be a whole number of at least {low} ({meaning}), got {value!r}", name)


def most_blocks(config: SchedulerConfig, num_computed: int) -> int:
    """Blocks that a sequence alone holds at most on its way to this many computed tokens."""
    size, total = config.block_size, 0
    chunk = min(config.max_chunk, num_computed)
    for window in config.kv_windows:
        blocks = -(-num_computed // size)
        total += blocks if window is None else min(blocks, -(-(window - 1 + chunk) // size) + 1)
    return total


class Door:
    """Decides, once per request, whether it may come in and at how many tokens it ends at the latest."""

    __slots__ = ("_config", "_longest", "_usable_blocks")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._usable_blocks = config.num_blocks - 1
        low, high = 0, config.max_model_len  # the longest computed length that fits, by bisection: blocks grow with length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if most_blocks(config, middle) <= self._usable_blocks else (low, middle - 1)
        self._longest = low

    def max_tokens_total(self, new: EngineRequest) -> int:
        """Prompt + output at most; `InvalidInput` if the request asks for more than can ever fit."""
        config, prompt, wanted = self._config, len(new.prompt_token_ids), new.params.max_tokens
        if prompt == 0:
            raise InvalidInput("the prompt has no tokens: give it at least one", "prompt")
        if wanted is None:
            total = min(config.max_model_len, self._longest + 1)
            if prompt < total:
                return total
            wanted = 1  # not even one token would fit: say so below
        total = prompt + wanted
        if total > config.max_model_len:
            self._refuse(prompt, wanted, f"max_model_len is {config.max_model_len}", config.max_model_len)
        computed = max(total - 1, prompt)  # the last token sampled is never computed
        if computed > self._longest:
            blocks = f"{most_blocks(config, computed)} KV blocks of {config.block_size} tokens are needed and {self._usable_blocks} exist"
            self._refuse(prompt, wanted, blocks, self._longest + 1)
        return total

    @staticmethod
    def _refuse(prompt: int, wanted: int, limit: str, room: int) -> NoReturn:
        left = room - prompt
        fix = f"lower max_tokens to at most {left}" if left > 0 else f"shorten the prompt to fewer than {room} tokens"
        raise InvalidInput(f"{prompt} prompt tokens + {wanted} to generate can never fit: {limit}; {fix}",
                           "max_tokens" if left > 0 else "prompt")
