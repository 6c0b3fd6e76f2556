"""A trace: everything that went into a scheduler and every plan that came out, one JSON object a line.

    {"event":"config","version":2,"scheduler":{...},"about":{...}}        first, once
    {"event":"arrival","new":{...},"seed":7}                              what the scheduler was asked, in the order it was asked:
    {"event":"plan","now":12.25,"plan":{...}}                             its answer; null if there was nothing to plan
    {"event":"update","now":12.31,"result":{...},"stops":[[0,{...}]]}     what the model produced, where the detokenizer stopped
    {"event":"abort","request_id":"r7"}

The scheduler reads no clock and no randomness, so these lines determine it: `replay` feeds them to a fresh one, without a
model, and each plan must come out the same to the last bit. A wrong plan seen once can be looked at for ever.

`RecordingScheduler` is a `Scheduler` that writes the lines as it is called; nothing else in the engine knows about tracing.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOBase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from minivllm.core.plan import BlockCopy, BlockMove, RowAdmission, StepPlan, StepResult, Stop, TokenLogprobs
from minivllm.core.request import Progress
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest
from minivllm.errors import InvalidInput
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams

VERSION = 2

# -- lines -----------------------------------------------------------------------------------------------------------------

_CLASSES: dict[str, Any] = {c.__name__: c for c in (
    SchedulerConfig, EngineRequest, SamplingParams, StructuredOutputsParams, StepPlan, RowAdmission, BlockCopy, BlockMove, StepResult,
    TokenLogprobs, Stop)}
_DEFAULTS = {name: {f.name: f.default for f in dataclasses.fields(c)} for name, c in _CLASSES.items()}


def _as_object(value: Any) -> dict[str, Any]:
    """A dataclass as its name and the fields that differ from their defaults: most columns of most plans are empty."""
    name = type(value).__name__
    line: dict[str, Any] = {"_": name}
    for key, default in _DEFAULTS[name].items():
        item = getattr(value, key)
        if item is default or (item == default and type(item) is type(default)):
            continue
        line[key] = item
    return line


def _from_object(line: dict[str, Any]) -> Any:
    name = line.pop("_", None)
    return line if name is None else _CLASSES[name](**{key: _tuples(item) for key, item in line.items()})


def _tuples(item: Any) -> Any:
    return tuple(map(_tuples, item)) if isinstance(item, list) else item


_encode = json.JSONEncoder(separators=(",", ":"), default=_as_object, check_circular=False).encode
_decode = json.JSONDecoder(object_hook=_from_object).decode


class Arrival(NamedTuple):
    """`Scheduler.add`."""

    new: EngineRequest
    seed: int


class Abort(NamedTuple):
    """`Scheduler.abort`."""

    request_id: str


class Reset(NamedTuple):
    """`Scheduler.reset_prefix_cache`."""


class Readmit(NamedTuple):
    """`Scheduler.readmit_all`."""


class Beams(NamedTuple):
    """`Scheduler.choose_beams`."""

    request_id: str
    beams: tuple[tuple[str, int], ...]


class Planned(NamedTuple):
    """`Scheduler.schedule`, and what it returned."""

    now: float
    plan: StepPlan | None


class Updated(NamedTuple):
    """`Scheduler.update`, with the plan it was for."""

    now: float
    plan: StepPlan
    result: StepResult
    stops: Mapping[int, Stop]


Event: TypeAlias = Arrival | Abort | Reset | Readmit | Beams | Planned | Updated

# -- writing ---------------------------------------------------------------------------------------------------------------


class TraceWriter:
    """Writes lines to a file. A plan is on disk before it is launched, so that the one that kills the process is on record."""

    def __init__(self, path: str | Path, config: SchedulerConfig, about: Mapping[str, Any] | None = None) -> None:
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise InvalidInput(f"cannot write the trace {str(path)!r}: {error.strerror}; choose another file", "trace") from None
        self._line(event="config", version=VERSION, scheduler=config, about=dict(about or {}))

    def _line(self, **line: Any) -> None:
        self._file.write(_encode(line) + "\n")

    def arrival(self, new: EngineRequest, seed: int) -> None:
        self._line(event="arrival", new=new, seed=seed)

    def abort(self, request_id: str) -> None:
        self._line(event="abort", request_id=request_id)

    def reset(self) -> None:
        self._line(event="reset")

    def readmit(self) -> None:
        self._line(event="readmit")

    def beams(self, request_id: str, beams: Sequence[tuple[str, int]]) -> None:
        self._line(event="beams", request_id=request_id, beams=beams)

    def plan(self, now: float, plan: StepPlan | None) -> None:
        self._line(event="plan", now=now, plan=plan)
        self._file.flush()

    def update(self, now: float, result: StepResult, stops: Mapping[int, Stop]) -> None:
        self._line(event="update", now=now, result=result, stops=list(stops.items()))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class RecordingScheduler(Scheduler):
    """A `Scheduler` that writes down what it is asked and what it answers."""

    def __init__(self, config: SchedulerConfig, writer: TraceWriter) -> None:
        super().__init__(config)
        self.writer = writer

    def add(self, new: EngineRequest, seed: int = 0) -> StopRule:
        rule = super().add(new, seed)  # a refused request leaves no trace
        self.writer.arrival(new, seed)
        return rule

    def abort(self, request_id: str) -> bool:
        self.writer.abort(request_id)
        return super().abort(request_id)

    def reset_prefix_cache(self) -> None:
        self.writer.reset()
        super().reset_prefix_cache()

    def readmit_all(self) -> None:
        self.writer.readmit()
        super().readmit_all()

    def choose_beams(self, request_id: str, beams: Sequence[tuple[str, int]]) -> list[str]:
        self.writer.beams(request_id, beams)
        return super().choose_beams(request_id, beams)

    def schedule(self, now: float) -> StepPlan | None:
        plan = super().schedule(now)
        self.writer.plan(now, plan)
        return plan

    def update(self, plan: StepPlan, result: StepResult, stops: Mapping[int, Stop], now: float) -> list[Progress]:
        self.writer.update(now, result, stops)  # before, so that what breaks the scheduler is on record
        return super().update(plan, result, stops, now)


# -- reading ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A trace in memory."""

    config: SchedulerConfig
    events: tuple[Event, ...]
    about: Mapping[str, Any] = field(default_factory=dict)  # of the engine: model, device ...; the scheduler never sees it
    cut_off: bool = False  # the last line is incomplete: the process was killed while writing


def read(path: str | Path) -> Trace:
    """Read a trace. Raises `InvalidInput` naming the line that is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            return _read(file, str(path))
    except OSError as error:
        raise InvalidInput(f"cannot read the trace {str(path)!r}: {error.strerror}", "trace") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{str(path)!r} is not a trace: it is not text", "trace") from None


def _read(file: TextIOBase | Any, name: str) -> Trace:
    config: SchedulerConfig | None = None
    about: Mapping[str, Any] = {}
    events: list[Event] = []
    plans: dict[int, StepPlan] = {}
    cut_off = False
    for number, text in enumerate(file, 1):
        if not text.endswith("\n"):
            cut_off = True
            break
        try:
            line = _decode(text)
            kind = line["event"]
            if kind == "config":
                if line["version"] != VERSION:
                    raise InvalidInput(f"{name!r} is a trace of version {line['version']}; this program reads version {VERSION}", "trace")
                config, about = line["scheduler"], line["about"]
            else:
                events.append(_EVENTS[kind](line, plans))
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"line {number} is {text[:60].strip()!r} ({type(error).__name__})"
            raise InvalidInput(f"{name!r} is not a trace: {what}", "trace") from None
        if config is None:
            break
    if config is None:
        raise InvalidInput(f"{name!r} is not a trace: it does not open with a config line", "trace")
    return Trace(config, tuple(events), about, cut_off)


def _planned(line: dict[str, Any], plans: dict[int, StepPlan]) -> Planned:
    plan = line["plan"]
    if plan is not None:
        plans[plan.step_id] = plan
    return Planned(line["now"], plan)


def _updated(line: dict[str, Any], plans: dict[int, StepPlan]) -> Updated:
    result = line["result"]
    return Updated(line["now"], plans.pop(result.step_id), result, dict(line["stops"]))


_EVENTS: dict[str, Callable[[dict[str, Any], dict[int, StepPlan]], Event]] = {
    "arrival": lambda line, plans: Arrival(line["new"], line["seed"]),
    "abort": lambda line, plans: Abort(line["request_id"]),
    "reset": lambda line, plans: Reset(),
    "readmit": lambda line, plans: Readmit(),
    "beams": lambda line, plans: Beams(line["request_id"], _tuples(line["beams"])),
    "plan": _planned,
    "update": _updated,
}

# -- replaying -------------------------------------------------------------------------------------------------------------


class Mismatch(NamedTuple):
    """Where a replay left the record."""

    number: int  # of the event
    step_id: int | None
    field: str  # column of the plan
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        return f"event {self.number}, step {self.step_id}: {self.field} was {self.recorded!r} and is {self.replayed!r}"


class Replayed(NamedTuple):
    """The scheduler after one event of the trace."""

    event: Event
    scheduler: Scheduler
    progress: list[Progress]  # after an update
    mismatch: Mismatch | None


def replay(trace: Trace) -> Iterator[Replayed]:
    """Feed the recorded calls to a fresh scheduler, event by event, comparing each plan. Ends after the first that differs."""
    scheduler = Scheduler(trace.config)
    for number, event in enumerate(trace.events):
        progress: list[Progress] = []
        mismatch = None
        match event:
            case Arrival(new, seed):
                scheduler.add(new, seed)
            case Abort(request_id):
                scheduler.abort(request_id)
            case Reset():
                scheduler.reset_prefix_cache()
            case Readmit():
                scheduler.readmit_all()
            case Beams(request_id, beams):
                scheduler.choose_beams(request_id, beams)
            case Planned(now, plan):
                mismatch = _compare(number, plan, scheduler.schedule(now))
            case Updated(now, plan, result, stops):
                progress = scheduler.update(plan, result, stops, now)
        yield Replayed(event, scheduler, progress, mismatch)
        if mismatch is not None:
            return


def _compare(number: int, recorded: StepPlan | None, replayed: StepPlan | None) -> Mismatch | None:
    if recorded == replayed:
        return None
    if recorded is None or replayed is None:
        step = recorded or replayed
        return Mismatch(number, step.step_id if step else None, "plan", recorded, replayed)
    name = next(f.name for f in dataclasses.fields(StepPlan) if getattr(recorded, f.name) != getattr(replayed, f.name))
    return Mismatch(number, recorded.step_id, name, getattr(recorded, name), getattr(replayed, name))
