"""The settings of `minivllm train-draft`. Imports without torch."""
from __future__ import annotations

from dataclasses import dataclass

from minivllm.config import check_types, option
from minivllm.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class TrainDraftConfig:
    """Raises `InvalidInput` that names the field, the value and the allowed values."""

    prompts: str | None = option(None,
        "prompts like those that the model will see: one per line, or .jsonl with a field prompt (default: questions and tasks about many "
        "topics, in English)", metavar="FILE")
    num_prompts: int = option(400, "number of prompts that the model answers, and that the head is trained on")
    max_tokens: int = option(160, "maximum number of tokens of an answer")
    temperature: float = option(0.6, "temperature of every third answer, and of further answers to a prompt; the others are greedy")
    draft_vocab_size: int = option(8192,
        "tokens that the head can propose, those that the model chooses most often; 0: all, for other programs that read EAGLE heads")
    epochs: int = option(4, "how often each answer is used")
    learning_rate: float = option(3e-4, "largest step size of AdamW")
    steps: int = option(3, "drafts in a row that the head is trained for")
    batch_tokens: int = option(384, "tokens of one training step")
    store: str = option("bfloat16", "type of the written weights; int8: half the size", choices=("bfloat16", "int8"))
    seed: int = option(0, "of sampling, and of the order of the answers")

    def __post_init__(self) -> None:
        check_types(self)
        limits = {"num_prompts": (2, 10**6), "max_tokens": (8, 10**5), "temperature": (0, 10), "draft_vocab_size": (0, 2**26),
                  "epochs": (1, 10**4), "learning_rate": (1e-8, 1), "steps": (1, 8), "batch_tokens": (64, 10**7), "seed": (0, 2**31 - 1)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise InvalidInput(f"{name} must be in {low} .. {high}, got {getattr(self, name)}", name)
        if self.max_tokens <= self.steps + 2:
            raise InvalidInput(f"max_tokens {self.max_tokens} is too short for {self.steps} drafts in a row: raise it", "max_tokens")
