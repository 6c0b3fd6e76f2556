"""Trial compilation: a grammar is first compiled in another process, which is killed if it needs too much time or memory.

    engine, compile thread ── job ──▶ trial process ── job ──▶ child: compiles under limits, computes the first mask
                           ◀─ reply ──              ◀─ reply ── or is killed: out of time, out of memory, canceled, crashed

Compiling some short grammars takes minutes and gigabytes, and llguidance cannot be interrupted. A compiled grammar cannot be sent to
another process. So the engine compiles only what has passed a trial, which tells that it stays within the limits. The trial process
holds the vocabulary and forks the child that compiles. After a killed child it forks another one, which takes milliseconds.

The limits count a child's own CPU time (`setitimer`) and its address space (`RLIMIT_AS`, not on macOS). Where `os.fork` does not exist
(Windows), the trial process compiles itself, and the deadline in `TrialProcess` ends it.
"""
from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from minivllm.engine.grammar_text import VocabularySource, build_matcher, grammar_text, invalid_schema, matcher_error, one_line
from minivllm.errors import InvalidInput, is_failure
from minivllm.sampling_params import StructuredOutputsParams

DEADLINE = 10.0  # seconds of waiting per second of CPU time that is allowed: on a busy machine a child runs only now and then
CANCEL, KILL = getattr(signal, "SIGUSR1", signal.SIGTERM), getattr(signal, "SIGKILL", signal.SIGTERM)
CANCEL_SECONDS = 0.5
NICE = 5  # the engine has precedence
REPLACE_AFTER = 32 << 20  # bytes that a grammar took: the child does not give all of them back
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from minivllm.engine.grammar_trial import main; main()"


@dataclass(frozen=True, slots=True)
class TrialLimits:
    """What one compilation may use."""

    seconds: float  # of CPU time
    num_bytes: int = 512 << 20  # of memory, besides the vocabulary


@dataclass(frozen=True, slots=True)
class TrialJob:
    """A grammar to compile: parameters of a request, or the text of a JSON schema, which is checked without a vocabulary."""

    grammar: StructuredOutputsParams | str
    limits: TrialLimits

    @property
    def where(self) -> str:
        """The request's field, for errors."""
        return "the schema" if isinstance(self.grammar, str) else self.grammar.where


@dataclass(frozen=True, slots=True)
class TrialReply:
    """What a trial found: the grammar's text, or why it cannot be used."""

    grammar: str = ""
    error: str | None = None
    overran: bool = False  # the error is a limit, not a wrong grammar
    num_bytes: int = 0  # of memory that the compiled grammar takes


class TrialCanceled(Exception):
    """The request has gone, so its trial was ended."""


class Ticket(Protocol):
    """Stands for one job. `cancel` of a process takes effect only while that job runs there."""

    canceled: bool


class TrialProcess:
    """The engine's side. One thread at a time calls `run`; any thread may call `cancel`."""

    def __init__(self, source: VocabularySource | None) -> None:
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # guards _current: a signal must not meet the next job
        self._current: Ticket | None = None

    def run(self, job: TrialJob, ticket: Ticket) -> TrialReply:
        """Raises `TrialCanceled` if the ticket was canceled."""
        for _ in range(2):
            if (reply := self._run_once(job, ticket)) is not None:
                return reply
            self.close()  # it was ending already, because of the signal for the last job, or it was killed from outside: a new one
        return TrialReply(error=f"{job.where} could not be compiled: send it again")

    def _run_once(self, job: TrialJob, ticket: Ticket) -> TrialReply | None:
        """None: the trial process has ended before its deadline."""
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            if ticket.canceled:
                raise TrialCanceled
            self._current = ticket
        deadline = time.monotonic() + job.limits.seconds * DEADLINE + 30
        timer = threading.Timer(deadline - time.monotonic(), process.kill)
        timer.daemon = True
        timer.start()
        reply: TrialReply | None = None
        try:
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            reply = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):  # the trial process has ended
            if time.monotonic() >= deadline:
                reply = TrialReply(error=_too_long(job.limits), overran=True)
        finally:
            timer.cancel()
            with self._lock:
                self._current = None
        if ticket.canceled:
            raise TrialCanceled
        return reply

    def cancel(self, ticket: Ticket) -> None:
        """End the job with this ticket, if it is running. The ticket has been marked as canceled before."""
        if self._signal(ticket, CANCEL):  # a signal that arrives before the job is lost: then the whole process ends
            last = threading.Timer(CANCEL_SECONDS, self._signal, (ticket, KILL))
            last.daemon = True
            last.start()

    def _signal(self, ticket: Ticket, number: int) -> bool:
        with self._lock:
            if self._current is not ticket or self._process is None:
                return False
            self._process.send_signal(number)
            return True

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process, if it does not run. Returns before it is ready."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            process = subprocess.Popen([sys.executable, "-c", _START, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL)
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended: `run` notices
                pickle.dump(self._source, process.stdin)
                process.stdin.flush()
            self._process = process
        return self._process

    def close(self) -> None:
        """End the process. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # a job may still be in the buffer
                    pipe.close()  # type: ignore[union-attr]


# -- the trial process -------------------------------------------------------------------------------------------------


class _Child:
    """The process that compiles: a fork of the trial process, and a new one after each that was killed."""

    def __init__(self, vocabulary: Any, special: tuple[str, ...]) -> None:
        self._vocabulary, self._special = vocabulary, special
        self._pid = 0
        self._jobs: BinaryIO | None = None
        self._replies: BinaryIO | None = None

    def kill(self, *signal_and_frame: object) -> None:
        """Also the handler of SIGUSR1."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)

    def run(self, job: TrialJob) -> TrialReply:
        """Let the child compile. Tells from its exit status why it was killed."""
        if not self._pid:
            self.start()
        assert self._jobs is not None and self._replies is not None
        try:
            pickle.dump(job, self._jobs)
            self._jobs.flush()
            reply: TrialReply = pickle.load(self._replies)
        except (EOFError, OSError, pickle.UnpicklingError):
            return _killed_by(self._end(), job.limits)
        if reply.num_bytes > REPLACE_AFTER:
            self.kill()
            self._end()
        return reply

    def start(self) -> None:
        """Fork. Returns in the trial process only."""
        jobs_read, jobs_write = os.pipe()
        replies_read, replies_write = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(jobs_read)
            os.close(replies_write)
            self._jobs, self._replies = open(jobs_write, "wb"), open(replies_read, "rb")  # noqa: SIM115 - closed by `_end`
            return
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        os.close(jobs_write)
        os.close(replies_read)
        with open(jobs_read, "rb") as jobs, open(replies_write, "wb") as replies, contextlib.suppress(EOFError):
            while True:
                job: TrialJob = pickle.load(jobs)
                with _limited(job.limits):
                    reply = _attempt(job, self._vocabulary, self._special)
                pickle.dump(reply, replies)
                replies.flush()
        os._exit(0)

    def _end(self) -> int:
        """Close the pipes of a child that has ended. Returns its exit code, or minus the signal that killed it."""
        assert self._jobs is not None and self._replies is not None
        for pipe in (self._jobs, self._replies):
            with contextlib.suppress(OSError):  # a job may still be in the buffer
                pipe.close()
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    """Main function of the trial process: jobs on standard input, replies on standard output. Ends with its input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    jobs, replies = sys.stdin.buffer, sys.stdout.buffer
    source: VocabularySource | None = pickle.load(jobs)
    vocabulary, special = (None, ()) if source is None else (source.build(), source.special())
    child = _Child(vocabulary, special) if hasattr(os, "fork") else None
    if child is not None:
        signal.signal(signal.SIGUSR1, child.kill)
        os.nice(NICE)
        child.start()
    with contextlib.suppress(EOFError):
        while True:
            job: TrialJob = pickle.load(jobs)
            pickle.dump(_attempt(job, vocabulary, special) if child is None else child.run(job), replies)
            replies.flush()


def _killed_by(code: int, limits: TrialLimits) -> TrialReply:
    """What the exit code of a child means for its grammar."""
    if code == -signal.SIGPROF:
        return TrialReply(error=_too_long(limits), overran=True)
    if code in (-signal.SIGABRT, -signal.SIGKILL):  # a failed allocation of llguidance; the system's out-of-memory killer
        return TrialReply(error=_too_large(limits), overran=True)
    return TrialReply(error="nests too deeply", overran=True)  # a stack overflow


@contextlib.contextmanager
def _limited(limits: TrialLimits) -> Iterator[None]:
    import resource

    total, none = _memory()[0], (resource.RLIM_INFINITY,) * 2
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    resource.setrlimit(resource.RLIMIT_AS, (total + limits.num_bytes, resource.RLIM_INFINITY) if total else none)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, none)


def _memory() -> tuple[int, int]:
    """Bytes of this process: address space, resident memory. (0, 0): not known, so that only time is limited."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            total, resident = file.read().split()[:2]
    except OSError:
        return 0, 0
    size = os.sysconf("SC_PAGE_SIZE")
    return int(total) * size, int(resident) * size


def _attempt(job: TrialJob, vocabulary: Any, special: tuple[str, ...]) -> TrialReply:
    try:
        if isinstance(job.grammar, str):
            return TrialReply(error=invalid_schema(job.grammar))
        grammar = grammar_text(job.grammar, special)
        before = _memory()[1]
        matcher = build_matcher(grammar, vocabulary, job.where)
        matcher.compute_bitmask()
        if matcher.is_error():
            return TrialReply(error=f"{job.where}: {matcher_error(matcher)}")
        return TrialReply(grammar, num_bytes=max(_memory()[1] - before, 0))
    except InvalidInput as error:
        return TrialReply(error=str(error))
    except MemoryError:
        return TrialReply(error=_too_large(job.limits), overran=True)
    except BaseException as error:  # a panic of llguidance
        if is_failure(error):
            return TrialReply(error=f"{job.where} cannot be used: {one_line(str(error))}")
        raise


def _too_long(limits: TrialLimits) -> str:
    return f"needs more than {limits.seconds:g} s"


def _too_large(limits: TrialLimits) -> str:
    return f"needs more than {limits.num_bytes >> 20} MiB of memory"
