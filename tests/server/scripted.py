"""An engine that follows a test's script, behind the real client, loop and HTTP server.

`script(prompt_token_ids, params, child)` returns one (token ids, text) pair for each step. With a `gate`, each step waits until the test
releases it, so that tests control the order of events without sleeping.
"""
from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from minivllm.config import EngineConfig, ServerConfig
from minivllm.core.plan import TokenLogprobs
from minivllm.engine.client import EngineClient, ThreadClient
from minivllm.engine.messages import EngineInfo
from minivllm.engine.metrics import EngineStats
from minivllm.engine.tokenizer import Tokenizer
from minivllm.engine_request import EngineRequest, LoRARequest
from minivllm.errors import ModelError
from minivllm.outputs import OutputDelta
from minivllm.sampling_params import SamplingParams
from minivllm.server.app import create_app
from minivllm.server.listen import Server
from minivllm.server.run import bind, bind_unix, start_engine

Steps = list[tuple[tuple[int, ...], str]]
EOS = 1


@dataclass
class Scripted:
    """One request in the engine, for tests to inspect."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    request: EngineRequest
    remaining: dict[int, Steps]
    first: bool = True


@dataclass
class ScriptedEngine:
    """The part of `EngineCore` that the engine loop uses."""

    folder: Path
    gate: threading.Semaphore | None = None
    max_model_len: int = 256
    scheduling_policy: str = "fcfs"
    generation_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer(self.folder)
        self.script: Callable[[Sequence[int], SamplingParams, int], Steps] = self.default_script
        self.refuse: Callable[[Sequence[int], SamplingParams], Exception | None] = lambda prompt, params: None
        self.fail_step: Callable[[], str | None] = lambda: None  # a message: this step fails; an exception: the engine dies
        self.requests: dict[str, Scripted] = {}
        self.seen: list[Scripted] = []  # all requests that were added
        self.aborted: list[str] = []
        self.changed = threading.Condition()  # notified by every add, abort and step
        self.steps = 0
        self.adapters: list[str] = []  # names of loaded LoRA adapters

    def default_script(self, prompt: Sequence[int], params: SamplingParams, child: int) -> Steps:
        """Child 0 generates "Paris 0.", child 1 "Paris 1.", and so on, one token per step."""
        stream = self.tokenizer.stream(prompt)
        return [((t,), stream.push(t)) for t in self.tokenizer.encode(f"Paris {child}.")]

    # -- called by the loop, on its own thread

    def info(self) -> EngineInfo:
        return EngineInfo(
            model="org/fake-model", model_folder="/secret/folder", tokenizer_folder=str(self.folder), max_model_len=self.max_model_len,
            vocab_size=320, eos_token_ids=(EOS,), device="cpu", dtype="float32", num_blocks=64, block_size=4,
            generation_config=self.generation_config, scheduling_policy=self.scheduling_policy, embedding_size=8,
        )

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.requests), num_blocks=63, num_steps=self.steps)

    def add(self, request: EngineRequest) -> None:
        request_id, ids, params = request.request_id, request.prompt_token_ids, request.params
        error = self.refuse(ids, params)
        if error is not None:
            raise error
        limit = params.max_tokens if params.max_tokens is not None else self.max_model_len
        remaining = {child: self.script(ids, params, child)[:limit] or [((), "")] for child in range(params.n)}
        with self.changed:
            self.requests[request_id] = Scripted(request_id, ids, params, request, remaining)
            self.seen.append(self.requests[request_id])
            self.changed.notify_all()

    def prepare_ahead(self) -> bool:
        return False

    def warm_up(self) -> None:
        pass

    def check_room(self, owner: str, num_preparing: int) -> None:
        pass

    def preparation(self, request: EngineRequest | LoRARequest) -> None:
        return None

    def load_adapter(self, request: LoRARequest) -> None:
        if "missing" in request.lora_path:
            raise ModelError(f"{request.lora_path} is not a LoRA adapter", "lora_path")
        self.adapters.append(request.lora_name)

    def unload_adapter(self, lora_name: str) -> None:
        self.adapters.remove(lora_name)

    def abort_request(self, request_id: str) -> list[OutputDelta]:
        with self.changed:
            self.aborted.append(request_id)
            request = self.requests.pop(request_id, None)
            self.changed.notify_all()
        if request is None:
            return []
        return [OutputDelta(request_id, child, (), "", finish_reason="abort") for child, left in request.remaining.items() if left]

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def reset_prefix_cache(self) -> bool:
        return not self.requests

    def watch(self, on: bool) -> None:
        pass

    def view(self) -> None:
        return None

    def step(self) -> list[OutputDelta]:
        if self.gate is not None:
            self.gate.acquire()
        with self.changed:
            self.steps += 1
            self.changed.notify_all()
            error = self.fail_step()
            running = list(self.requests.values())
            if error is not None:
                self.requests.clear()
                return [OutputDelta(r.request_id, c, (), "", finish_reason="error", error=error) for r in running for c in r.remaining]
            deltas = [delta for request in running for delta in self._advance(request)]
            for request in running:
                if not any(request.remaining.values()):
                    del self.requests[request.request_id]
            return deltas

    def _advance(self, request: Scripted) -> Iterator[OutputDelta]:
        prompt_logprobs = None
        if request.first and request.params.prompt_logprobs is not None:
            prompt_logprobs = (None, *(self.logprobs(t, request.params.prompt_logprobs) for t in request.prompt[1:]))
        request.first = False
        for child, left in request.remaining.items():
            if not left:
                continue
            token_ids, text = left.pop(0)
            wanted = request.params.logprobs
            yield OutputDelta(
                request.request_id, child, token_ids, text,
                logprobs=None if wanted is None else tuple(self.logprobs(t, wanted) for t in token_ids),
                finish_reason=None if left else ("stop" if token_ids and token_ids[-1] == EOS else "length"),
                num_cached_tokens=4, prompt_logprobs=prompt_logprobs,
                pooled=None if request.params.pooling is None else bytes(4 * 8),  # eight zeros
            )
            prompt_logprobs = None

    @staticmethod
    def logprobs(token: int, top: int) -> TokenLogprobs:
        """The sampled token is always the second most probable one."""
        others = (token + 1, token, token + 2, token + 3, token + 4)[:top]
        return TokenLogprobs(token, -0.5, 2, others, tuple(-0.25 * (i + 1) for i in range(len(others))))

    def when_failed(self, call: Callable[[Exception], None]) -> None:
        pass

    def close(self) -> None:
        pass

    # -- called by tests

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a command to the engine (a request, an abort) or a step makes the condition true."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout=30), "the condition did not become true"

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Release one step after the other until the condition is true."""
        assert self.gate is not None
        while True:
            with self.changed:
                if condition():
                    return
                before = self.steps
            self.gate.release()
            self.wait_until(lambda before=before: self.steps > before or condition())  # type: ignore[misc]


@dataclass
class LiveServer:
    """A server on a real socket, in a thread."""

    url: str
    client: EngineClient
    server: Server
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the event loop makes the condition true."""
        async def look() -> None:
            while not condition():
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(look(), self.loop).result(30)

    def end(self, *, drain: bool) -> None:
        """The effect of a signal: SIGTERM drains, SIGINT does not."""
        self.loop.call_soon_threadsafe(self.server.end, drain)


@contextlib.contextmanager
def serving(client: EngineClient, tokenizer: Tokenizer | None, **settings: Any) -> Iterator[LiveServer]:
    """Serve a client's engine until the end of the block. Without a `port` in the settings the system chooses one."""
    config = ServerConfig(access_log=False, **settings)
    app = create_app(client, config, tokenizer)
    listener = bind("127.0.0.1", settings.get("port", 0)) if config.uds is None else bind_unix(config.uds)
    listener.listen(128)
    scheme = "http" if config.ssl_certfile is None else "https"
    address = "localhost" if config.uds is not None else f"127.0.0.1:{listener.getsockname()[1]}"
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def is_ready() -> None:
        loops.append(asyncio.get_running_loop())
        ready.set()

    server = Server(app, config, is_ready)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield LiveServer(f"{scheme}://{address}", client, server, loops[0], thread)
    finally:
        if thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it may end by itself at this moment
                loops[0].call_soon_threadsafe(server.end, False)
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
        listener.close()


@contextlib.contextmanager
def scripted_server(engine: ScriptedEngine, **settings: Any) -> Iterator[LiveServer]:
    client = ThreadClient.start_with(lambda: engine)  # type: ignore[arg-type, return-value]
    try:
        with serving(client, engine.tokenizer, **settings) as live:
            yield live
    finally:
        if engine.gate is not None:
            engine.gate.release(1000)
        client.close()


@contextlib.contextmanager
def serving_model(folder: Path, *, process: bool, **settings: Any) -> Iterator[LiveServer]:
    """Serve a model under the name "tiny". process: the engine runs in its own process, with one thread."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        client = start_engine(EngineConfig(model=str(folder), **settings), process=process, log_level="warning")
    try:
        with serving(client, Tokenizer(folder), served_model_name=("tiny",)) as live:
            yield live
    finally:
        client.close()
