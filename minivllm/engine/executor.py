"""What the engine needs of whatever runs its plans. `minivllm.worker.worker.Worker` does it in this process, on one device."""
from __future__ import annotations

from typing import Any, Protocol

from minivllm.core.plan import StepPlan, StepResult
from minivllm.sampling.logits_processors import TokenMasks


class PendingStep(Protocol):
    """A launched and sampled step whose result has not arrived yet."""

    def wait(self) -> StepResult: ...


class Executor(Protocol):
    """Runs plans in the order in which they are launched. `sample` of one plan comes before `launch` of the next."""

    num_blocks: int
    num_host_blocks: int

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, step: Any, masks: TokenMasks | None = None) -> PendingStep: ...

    def close(self) -> None: ...
