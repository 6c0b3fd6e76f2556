"""Admission control: refuses a request that can never be served, with the numbers and a fix.

A request is accepted if prompt + max_tokens fit into the context, and their blocks into the empty pool (`block_math` counts
them). Every accepted request finishes: when it has the highest priority, all others can be preempted to make room for it (see
`scheduler`).
"""
from __future__ import annotations

from typing import NoReturn

from minivllm.core.block_math import longest_sequence, max_blocks_held
from minivllm.core.scheduler_config import SchedulerConfig
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput


class QueueFull(InvalidInput):
    """The queue holds `max_queue` waiting requests. The server answers 429; the client may try again later."""


class AdmissionControl:
    """Checks each request once, and returns the maximum length of its sequences."""

    __slots__ = ("_config", "_longest")

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._longest = longest_sequence(config.num_blocks, config.max_model_len, config.block_size, config.kv_windows, config.max_chunk)

    def max_tokens_total(self, new: EngineRequest) -> int:
        """Maximum number of tokens of prompt and output together. Raises `InvalidInput` if the request can never fit."""
        config, prompt, wanted = self._config, len(new.prompt_token_ids), new.params.max_tokens
        if prompt == 0:
            raise InvalidInput("the prompt has no tokens: give it at least one", "prompt")
        if wanted is None:
            total = min(config.max_model_len, self._longest + 1)
            if prompt < total:
                return total
            wanted = 1  # not even one output token fits: the error is raised below
        total = prompt + wanted
        if total > config.max_model_len:
            self._refuse(prompt, wanted, f"max_model_len is {config.max_model_len}", config.max_model_len)
        computed = max(total - 1, prompt)  # the last sampled token is never computed
        if computed > self._longest:
            needed = max_blocks_held(computed, config.block_size, config.kv_windows, config.max_chunk)
            blocks = f"{needed} KV blocks of {config.block_size} tokens are needed and {config.num_blocks - 1} exist"
            self._refuse(prompt, wanted, blocks, self._longest + 1)
        return total

    @staticmethod
    def _refuse(prompt: int, wanted: int, limit: str, max_total: int) -> NoReturn:
        left = max_total - prompt
        fix = f"lower max_tokens to at most {left}" if left > 0 else f"shorten the prompt to fewer than {max_total} tokens"
        raise InvalidInput(f"{prompt} prompt tokens + {wanted} to generate can never fit: {limit}; {fix}",
                           "max_tokens" if left > 0 else "prompt")
