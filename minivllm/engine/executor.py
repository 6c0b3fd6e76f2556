"""Interface of the object that runs the engine's plans. A `Worker` implements it on one device, and a `LeadingWorker` on several."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from minivllm.core.plan import StepPlan, StepResult
from minivllm.sampling.logits_processors import TokenMasks


class PendingStep(Protocol):
    """A launched and sampled step whose result has not arrived yet."""

    def wait(self) -> StepResult: ...


class Executor(Protocol):
    """Runs plans in the order in which they are launched. `sample` of one plan comes before `launch` of the next.

    The methods for LoRA adapters are called only if the engine takes adapters.
    """

    num_blocks: int
    num_host_blocks: int

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, step: Any, masks: TokenMasks | None = None) -> PendingStep: ...

    def prepare_ahead(self) -> bool:
        """Do one short piece of work that later steps would otherwise wait for. False: nothing is left. It is called between steps."""

    def read_adapter(self, folder: str) -> Any: ...

    def add_adapter(self, adapter_id: int, packed: Any) -> None: ...

    def remove_adapter(self, adapter_id: int) -> None: ...

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        """Call this, from another thread, if the executor cannot go on although no step runs."""

    def close(self) -> None: ...
