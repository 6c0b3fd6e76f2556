"""A trace: every call of a scheduler and every plan that it returned, as a file with one JSON object per line.

    {"event":"config","version":3,"scheduler":{...},"about":{...}}        the first line
    {"event":"arrival","new":{...}}                                       a call of `add`; the other lines are in the order of the calls
    {"event":"plan","now":12.25,"plan":{...}}                             `schedule`, and its plan: null if there was nothing to plan
    {"event":"update","now":12.31,"result":{...},"stops":[[0,{...}]]}     `update`, with the model's result and the detokenizer's stops
    {"event":"abort","request_id":"r7"}                                   `abort`

A row of a plan names its request instead of repeating the parameters and the prompt. Recording ends at `MAX_BYTES`, after a whole line, and
what was recorded can be replayed. `gzip` makes a trace about ten times smaller, and `read` reads it then too.

The scheduler uses no clock and no randomness, so these lines determine its plans. `replay` repeats the calls on a new scheduler,
without a model, and every plan must be exactly equal. A wrong plan that was recorded once can thus be examined again and again.

`RecordingScheduler` is a `Scheduler` that writes these lines. No other part of the engine is concerned with tracing.
"""
from __future__ import annotations

import dataclasses
import gzip
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import TextIOBase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from minivllm.core.plan import BlockCopy, BlockMove, RowAdmission, StepPlan, StepResult, Stop, TokenLogprobs
from minivllm.core.request import SequenceUpdate
from minivllm.core.scheduler import Scheduler, SchedulerConfig
from minivllm.core.stopping import StopRule
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import InvalidInput
from minivllm.sampling_params import PoolingParams, SamplingParams, StructuredOutputsParams

VERSION = 3
MAX_BYTES = 1 << 30
MAX_KNOWN = 4096  # requests whose parameters and prompts are not repeated: the newest ones

log = logging.getLogger(__name__)

# -- JSON lines ------------------------------------------------------------------------------------------------------------

_CLASSES: dict[str, Any] = {c.__name__: c for c in (
    SchedulerConfig, EngineRequest, LoRARequest, SamplingParams, StructuredOutputsParams, StepPlan, RowAdmission, BlockCopy, BlockMove,
    StepResult, TokenLogprobs, Stop, PoolingParams)}
_DEFAULTS = {name: {f.name: f.default for f in dataclasses.fields(c)} for name, c in _CLASSES.items()}


def _as_object(value: Any) -> dict[str, Any]:
    """A dataclass as its name and those fields that differ from their defaults: most columns of most plans are empty."""
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
    """A call of `Scheduler.add`."""

    new: EngineRequest
    seed: int


class Aborted(NamedTuple):
    """A call of `Scheduler.abort`."""

    request_id: str


class CacheReset(NamedTuple):
    """A call of `Scheduler.reset_prefix_cache`."""


class Readmitted(NamedTuple):
    """A call of `Scheduler.readmit_all`."""


class BeamsChosen(NamedTuple):
    """A call of `Scheduler.choose_beams`."""

    request_id: str
    beams: tuple[tuple[str, int], ...]


class Planned(NamedTuple):
    """A call of `Scheduler.schedule`, and the plan that it returned."""

    now: float
    plan: StepPlan | None


class Updated(NamedTuple):
    """A call of `Scheduler.update`, with the plan that it was for."""

    now: float
    plan: StepPlan
    result: StepResult
    stops: Mapping[int, Stop]


TraceEvent: TypeAlias = Arrival | Aborted | CacheReset | Readmitted | BeamsChosen | Planned | Updated

# -- writing ---------------------------------------------------------------------------------------------------------------


class TraceWriter:
    """Writes a trace file. A plan is written out before it is launched, so a plan that kills the process is on record."""

    def __init__(self, path: str | Path, config: SchedulerConfig, about: Mapping[str, Any] | None = None,
                 max_bytes: int = MAX_BYTES) -> None:
        self._left: int | None = max_bytes  # None: recording has ended
        self._known: OrderedDict[str, EngineRequest] = OrderedDict()  # by id
        try:
            self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise InvalidInput(f"cannot write the trace {str(path)!r}: {error.strerror}; choose another file", "trace") from None
        self._line(event="config", version=VERSION, scheduler=config, about=dict(about or {}))

    def _line(self, **line: Any) -> None:
        if self._left is None:
            return
        text = _encode(line) + "\n"
        self._left -= len(text)
        if self._left < 0:
            self._left = None
            log.warning("the trace %s has reached its largest size: recording ends, and the engine goes on", self._file.name)
        else:
            self._file.write(text)

    def arrival(self, new: EngineRequest, seed: int) -> None:
        self._line(event="arrival", new=new, seed=seed)
        self._known.pop(new.request_id, None)
        self._known[new.request_id] = new
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)

    def abort(self, request_id: str) -> None:
        self._line(event="abort", request_id=request_id)

    def reset(self) -> None:
        self._line(event="reset")

    def readmit(self) -> None:
        self._line(event="readmit")

    def beams(self, request_id: str, beams: Sequence[tuple[str, int]]) -> None:
        self._line(event="beams", request_id=request_id, beams=beams)

    def plan(self, now: float, plan: StepPlan | None) -> None:
        if plan is not None and plan.admitted:
            plan = replace(plan, admitted=tuple(map(self._shortened, plan.admitted)))
        self._line(event="plan", now=now, plan=plan)
        self._file.flush()

    def _shortened(self, row: RowAdmission) -> RowAdmission:
        """The row with the id of its request instead of its parameters, and only the tokens after the prompt."""
        found = (self._known.get(name) for name in (row.request_id, row.request_id.rpartition("#")[0]))
        request = next((request for request in found if request is not None and request.params is row.params), None)
        if request is None:
            return row
        named: Any = request.request_id
        return replace(row, params=named, token_ids=row.token_ids[len(request.prompt_token_ids):])

    def update(self, now: float, result: StepResult, stops: Mapping[int, Stop]) -> None:
        self._line(event="update", now=now, result=replace(result, pooled=()) if result.pooled else result, stops=list(stops.items()))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class RecordingScheduler(Scheduler):
    """A `Scheduler` that records its calls and plans."""

    def __init__(self, config: SchedulerConfig, writer: TraceWriter) -> None:
        super().__init__(config)
        self.writer = writer

    def add(self, new: EngineRequest, seed: int = 0) -> StopRule:
        rule = super().add(new, seed)  # first: a refused request is not recorded
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

    def update(self, plan: StepPlan, result: StepResult, stops: Mapping[int, Stop], now: float) -> list[SequenceUpdate]:
        self.writer.update(now, result, stops)  # first: a result that makes `update` fail is on record
        return super().update(plan, result, stops, now)


# -- reading ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """A trace that was read from a file."""

    config: SchedulerConfig
    events: tuple[TraceEvent, ...]
    about: Mapping[str, Any] = field(default_factory=dict)  # the engine's model, device, ...: not used by the scheduler
    cut_off: bool = False  # the last line is incomplete, because the process was killed while it wrote


def read(path: str | Path) -> Trace:
    """Read a trace; one compressed with gzip if its name ends with .gz. Raises `InvalidInput` naming the first line that is not valid."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            return _read(file, str(path))
    except (OSError, EOFError) as error:
        raise InvalidInput(f"cannot read the trace {str(path)!r}: {getattr(error, 'strerror', None) or error}", "trace") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{str(path)!r} is not a trace: it is not text", "trace") from None


def _read(file: TextIOBase | Any, name: str) -> Trace:
    config: SchedulerConfig | None = None
    about: Mapping[str, Any] = {}
    events: list[TraceEvent] = []
    seen = _Seen()
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
                events.append(_EVENTS[kind](line, seen))
        except InvalidInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"line {number} is {text[:60].strip()!r} ({type(error).__name__})"
            raise InvalidInput(f"{name!r} is not a trace: {what}", "trace") from None
        if config is None:
            break
    if config is None:
        raise InvalidInput(f"{name!r} is not a trace: it does not start with a config line", "trace")
    return Trace(config, tuple(events), about, cut_off)


class _Seen:
    """What earlier lines of a trace have said."""

    def __init__(self) -> None:
        self.plans: dict[int, StepPlan] = {}  # launched and not updated
        self.requests: dict[str, EngineRequest] = {}  # the newest one with each id


def _arrival(line: dict[str, Any], seen: _Seen) -> Arrival:
    arrival = Arrival(line["new"], line["seed"])
    seen.requests[arrival.new.request_id] = arrival.new
    return arrival


def _planned(line: dict[str, Any], seen: _Seen) -> Planned:
    plan: StepPlan | None = line["plan"]
    if plan is not None:
        plan = replace(plan, admitted=tuple(_completed(row, seen) for row in plan.admitted))
        seen.plans[plan.step_id] = plan
    return Planned(line["now"], plan)


def _completed(row: RowAdmission, seen: _Seen) -> RowAdmission:
    """The row with its request's parameters and prompt, if it has only the id."""
    if not isinstance(row.params, str):
        return row
    request = seen.requests[row.params]
    return replace(row, params=request.params, token_ids=request.prompt_token_ids + row.token_ids)


def _updated(line: dict[str, Any], seen: _Seen) -> Updated:
    result = line["result"]
    return Updated(line["now"], seen.plans.pop(result.step_id), result, dict(line["stops"]))


_EVENTS: dict[str, Callable[[dict[str, Any], _Seen], TraceEvent]] = {
    "arrival": _arrival,
    "abort": lambda line, seen: Aborted(line["request_id"]),
    "reset": lambda line, seen: CacheReset(),
    "readmit": lambda line, seen: Readmitted(),
    "beams": lambda line, seen: BeamsChosen(line["request_id"], _tuples(line["beams"])),
    "plan": _planned,
    "update": _updated,
}

# -- replaying -------------------------------------------------------------------------------------------------------------


class Mismatch(NamedTuple):
    """The first difference between a replay and its trace."""

    number: int  # index of the event
    step_id: int | None
    field: str  # the plan's field that differs
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        return f"event {self.number}, step {self.step_id}: {self.field} was {self.recorded!r} and is {self.replayed!r}"


class Replayed(NamedTuple):
    """One event of the trace, and the scheduler after it."""

    event: TraceEvent
    scheduler: Scheduler
    updates: list[SequenceUpdate]  # of an `Updated` event; else empty
    mismatch: Mismatch | None


def replay(trace: Trace) -> Iterator[Replayed]:
    """Repeat the recorded calls on a new scheduler and compare each plan. Ends after the first plan that differs."""
    scheduler = Scheduler(trace.config)
    for number, event in enumerate(trace.events):
        updates: list[SequenceUpdate] = []
        mismatch = None
        match event:
            case Arrival(new, seed):
                scheduler.add(new, seed)
            case Aborted(request_id):
                scheduler.abort(request_id)
            case CacheReset():
                scheduler.reset_prefix_cache()
            case Readmitted():
                scheduler.readmit_all()
            case BeamsChosen(request_id, beams):
                scheduler.choose_beams(request_id, beams)
            case Planned(now, plan):
                mismatch = _compare(number, plan, scheduler.schedule(now))
            case Updated(now, plan, result, stops):
                updates = scheduler.update(plan, result, stops, now)
        yield Replayed(event, scheduler, updates, mismatch)
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
