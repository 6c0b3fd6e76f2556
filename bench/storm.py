"""A storm on the server: many clients, of which most misbehave; afterwards nothing may be left of it.  Run: python -m bench.storm

1,000 requests from 200 clients go to a tiny random model on the CPU: ordinary ones (whole or streamed, completions, chats and
responses), ones that hang up at a random moment, ones that are aborted by id, bad fields, bad JSON, bytes that are not HTTP, bodies
that never end, and a queue short enough to overflow. The server runs in a separate process (its engine in another), which a probe
asks before and after: blocks in use, requests and streams known, asyncio tasks, open files, memory.

The storm is right if nothing is left, and if every ordinary request got exactly what `LLM.generate` says alone. Exit status 1 if not.
"""
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "max_model_len": 256, "num_gpu_blocks_override": 160, "max_num_seqs": 24, "block_size": 16,
    # Few tokens a step. With larger steps the engine's memory was seen to grow for more rounds before it came to rest, as if the CPU's
    # matrix library kept something for each shape that it meets; that this is the reason was not proven.
    "max_num_batched_tokens": 48,
}
MAX_QUEUE = 40  # fewer than the clients, so that some are turned away
# Warm-up rounds go on until a round adds less than STILL to the memory; the storm may then add MEMORY, in MiB, to each process.
STILL, MEMORY = 6.0, 16.0
MOST_ROUNDS = 8
KINDS = {"ordinary": 40, "hangs up": 20, "aborted by id": 10, "bad field": 12, "bad JSON": 6, "not HTTP": 6, "half a body": 6}

BAD_FIELDS: tuple[dict[str, Any], ...] = (
    {"temperature": -1}, {"max_tokens": 10**9}, {"n": 0}, {"stop": ""}, {"prompt": []}, {"prompt": [[5], [9999]]}, {"temprature": 1},
    {"logit_bias": {"x": 1}}, {"model": "another"}, {"stream_options": {}}, {"top_p": 0}, {"seed": 2**64}, {"logprobs": 99},
)
BAD_JSON = (b"", b"{", b'{"prompt": "x"', b'{"prompt": ' + b"[" * 20_000, b'{"prompt": "\xff\xfe"}', b"9" * 9000, b"\x00" * 64)
NOT_HTTP = (b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/7\r\n\r\n", b"\x00" * 4096,
            b"POST /v1/completions HTTP/1.1\r\nx\r\n\r\n")


# -- the server's process -----------------------------------------------------------------------------------------------------


def serve(model: str, pipe: Connection) -> None:
    """Serve until told to end; answer probes meanwhile."""
    import psutil

    from minivllm.config import EngineConfig, ServerConfig
    from minivllm.engine.tokenizer import Tokenizer
    from minivllm.server.app import create_app
    from minivllm.server.listen import Server
    from minivllm.server.run import start_engine
    from minivllm.server.terminal import configure_logging

    configure_logging("error")
    client = start_engine(EngineConfig(model=model, max_queue=MAX_QUEUE, **SETTINGS), process=True, log_level="error")
    config = ServerConfig(access_log=False, served_model_name=("storm",))
    app = create_app(client, config, Tokenizer(Path(model)))
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    loops: list[asyncio.AbstractEventLoop] = []

    def ready() -> None:
        loops.append(asyncio.get_running_loop())
        pipe.send(listener.getsockname()[1])

    server = Server(app, config, ready)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    this = psutil.Process()
    while pipe.recv() == "probe":
        stats = client.stats()
        pipe.send({
            "blocks in use": stats.used_blocks, "requests in the engine": stats.num_running + stats.num_waiting,
            "requests in the server": len(server.running), "streams": len(client._streams), "tasks": len(asyncio.all_tasks(loops[0])),
            "connections": len(server.server_state.connections), "open files": this.num_fds(),
            "server MiB": round(this.memory_info().rss / 2**20, 1),
            "engine MiB": round(sum(p.memory_info().rss for p in this.children()) / 2**20, 1), "preemptions": stats.num_preemptions,
            "failed steps": stats.num_failed_steps,
        })
    loops[0].call_soon_threadsafe(server.end, False)
    thread.join()
    client.close()


# -- the clients --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Prompts with the text that greedy decoding gives them alone."""

    prompts: list[str]
    texts: list[str]
    chat_texts: list[str]
    max_tokens: int


@dataclass
class Report:
    """What the clients saw."""

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    turned_away: int = 0


def reference(model: str, count: int, max_tokens: int) -> Work:
    """One request at a time, no sharing of steps."""
    from minivllm import LLM, SamplingParams

    dice = random.Random(7)
    words = ("cat", "hat", "the", "sat", "mat", "and", "then", "on")
    opening = "once there was "  # shared, so that blocks are
    prompts = [opening + " ".join(dice.choice(words) for _ in range(dice.randint(1, 24))) for _ in range(count)]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with LLM(model=model, **SETTINGS) as llm:
        texts = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].text for prompt in prompts]
        chats: list[Any] = [[{"role": "user", "content": prompt}] for prompt in prompts]
        chat_texts = [llm.chat(chat, params, use_tqdm=False)[0].outputs[0].text for chat in chats]
    return Work(prompts, texts, chat_texts, max_tokens)


class Clients:
    """All clients of one storm, on one event loop. The seed fixes what each request is; when it happens is the machine's business."""

    def __init__(self, port: int, work: Work, seed: int) -> None:
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits)
        self.port = port
        self.work = work
        self.seed = seed
        self.report = Report()

    async def run(self, requests: int, clients: int) -> Report:
        kinds = random.Random(self.seed).choices(list(KINDS), list(KINDS.values()), k=requests)
        todo = list(enumerate(kinds))

        async def client() -> None:
            while todo:
                number, kind = todo.pop()
                dice = random.Random(self.seed * 1_000_003 + number)
                try:
                    await getattr(self, "_" + kind.replace(" ", "_").lower())(number, dice)
                except Exception as error:
                    self.report.wrong.append(f"request {number} ({kind}): {type(error).__name__}: {error}")
                self.report.seen[kind] += 1

        async with self.http:
            await asyncio.gather(*(client() for _ in range(clients)))
        return self.report

    def _body(self, which: int, **more: Any) -> dict[str, Any]:
        return {"prompt": self.work.prompts[which], "max_tokens": self.work.max_tokens, "temperature": 0, "ignore_eos": True, **more}

    def _check(self, number: int, got: str, wanted: str) -> None:
        if got != wanted:
            self.report.wrong.append(f"request {number}: {got!r} instead of {wanted!r}")

    # One method for each kind.

    async def _ordinary(self, number: int, dice: random.Random) -> None:
        which, stream, path = dice.randrange(len(self.work.prompts)), dice.random() < 0.5, dice.choice(("completions", "chat", "responses"))
        body = self._body(which, stream=stream)
        if path == "chat":
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        elif path == "responses":
            body["input"], body["max_output_tokens"] = body.pop("prompt"), body.pop("max_tokens")
        url = {"chat": "/v1/chat/completions"}.get(path, "/v1/" + path)
        while (answer := await self.http.post(url, json=body)).status_code == 429:
            self.report.turned_away += 1
            await asyncio.sleep(dice.uniform(0.05, 0.5))
        assert answer.status_code == 200, answer.text
        text = _streamed_text(answer.text) if stream else _text(answer.json())
        self._check(number, text, (self.work.texts if path == "completions" else self.work.chat_texts)[which])

    async def _hangs_up(self, number: int, dice: random.Random) -> None:
        more = {"stream": dice.random() < 0.5, "n": dice.choice((1, 1, 4)), "max_tokens": 100}
        body = self._body(dice.randrange(len(self.work.prompts)), **more)
        if dice.random() < 0.3:
            body["prompt"] = self.work.prompts[:4]
        await self._send_raw(_http(json.dumps(body).encode()), dice.choice((0.0, 0.01, 0.1, 0.5)), dice.random() < 0.5)

    async def _aborted_by_id(self, number: int, dice: random.Random) -> None:
        name = f"storm-{self.seed}-{number}"
        body = self._body(dice.randrange(len(self.work.prompts)), request_id=name, max_tokens=100, n=dice.choice((1, 3)))
        asked = asyncio.create_task(self.http.post("/v1/completions", json=body))
        await asyncio.sleep(dice.uniform(0.0, 0.5))
        while not asked.done():
            await self.http.post("/abort_requests", json={"request_ids": [name]})
            await asyncio.wait((asked,), timeout=0.2)
        answer = await asked
        if answer.status_code == 429:
            self.report.turned_away += 1
            return
        assert answer.status_code == 200, answer.text
        assert {choice["finish_reason"] for choice in answer.json()["choices"]} <= {"abort", "length"}, answer.text

    async def _bad_field(self, number: int, dice: random.Random) -> None:
        answer = await self.http.post("/v1/completions", json={**self._body(0), **dice.choice(BAD_FIELDS)})
        assert answer.status_code in (400, 404, 429) and answer.json()["error"]["message"], answer.text

    async def _bad_json(self, number: int, dice: random.Random) -> None:
        raw = dice.choice(BAD_JSON)
        answer = await self.http.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json", answer.text

    async def _not_http(self, number: int, dice: random.Random) -> None:
        await self._send_raw(dice.choice(NOT_HTTP), 0.1, False)

    async def _half_a_body(self, number: int, dice: random.Random) -> None:
        raw = _http(json.dumps(self._body(0)).encode())
        await self._send_raw(raw[: dice.randrange(1, len(raw))], dice.uniform(0.0, 0.3), False)

    async def _send_raw(self, raw: bytes, patience: float, reset: bool) -> None:
        """Send, wait, and be gone: politely, or with a reset connection."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        if reset:
            own: socket.socket = writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        writer.write(raw)
        await asyncio.sleep(patience)
        writer.close()


def _http(body: bytes) -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: storm\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _text(body: dict[str, Any]) -> str:
    if body["object"] == "response":
        return str(body["output"][0]["content"][0]["text"])
    choice = body["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def _streamed_text(events: str) -> str:
    text = ""
    for line in events.splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event or event["error"] is None, line
        if event.get("type") == "response.output_text.delta":
            text += event["delta"]
        for choice in event.get("choices", ()):
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return text


# -- before, storm, after -----------------------------------------------------------------------------------------------------


def settled(pipe: Connection, seconds: float = 60.0) -> dict[str, Any]:
    """The server's state once nothing is on its way any more, or after a minute of waiting for that."""
    deadline = time.monotonic() + seconds
    while True:
        pipe.send("probe")
        state: dict[str, Any] = pipe.recv()
        busy = state["blocks in use"] or state["requests in the engine"] or state["requests in the server"] or state["connections"]
        if not busy or time.monotonic() > deadline:
            return state
        time.sleep(0.05)


def storm(model: str, requests: int, clients: int, seed: int, max_tokens: int = 24, most_rounds: int = MOST_ROUNDS) -> dict[str, Any]:
    """Warm up, look, storm, look again. `problems` in the result is empty if all is well."""
    work = reference(model, 40, max_tokens)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(model, theirs))
    process.start()
    try:
        port = pipe.recv()
        before, rounds = settled(pipe), []
        for i in range(most_rounds):
            earlier = before
            asyncio.run(Clients(port, work, seed + 1 + i).run(max(requests // 2, clients), clients))
            before = settled(pipe)
            rounds.append(before["engine MiB"])
            if before["engine MiB"] - earlier["engine MiB"] < STILL:
                break
        begun = time.monotonic()
        report = asyncio.run(Clients(port, work, seed).run(requests, clients))
        seconds = time.monotonic() - begun
        after = settled(pipe)
    finally:
        pipe.send("end")
        process.join(60)
        if process.is_alive():
            process.kill()
    problems = list(report.wrong)
    zero = ("blocks in use", "requests in the engine", "requests in the server", "streams", "connections", "failed steps")
    problems += [f"{name}: {after[name]} after the storm" for name in zero if after[name]]
    problems += [f"{name}: {before[name]} before, {after[name]} after" for name in ("tasks", "open files") if after[name] > before[name]]
    problems += [f"{name}: {before[name]} before, {after[name]} after" for name in ("server MiB", "engine MiB")
                 if after[name] > before[name] + MEMORY]
    if process.exitcode != 0:
        problems.append(f"the server's process ended with {process.exitcode}")
    return {"requests": requests, "clients": clients, "seed": seed, "seconds": round(seconds, 1), "kinds": dict(report.seen),
            "turned_away": report.turned_away, "warm_up_engine_MiB": rounds, "before": before, "after": after, "problems": problems}


def write_model(folder: Path) -> None:
    """A tiny random model with a tokenizer of single bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from bench.models import write_random_model

    write_random_model("bytes", folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0, **{sign: i + 1 for i, sign in enumerate(alphabet)}}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from bench.machine import describe, one_line

    machine = describe("cpu", int(os.environ.get("OMP_NUM_THREADS", "0")) or (os.cpu_count() or 1))
    print(one_line(machine))
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        result = storm(folder, args.requests, args.clients, args.seed)
    print(f"{result['requests']} requests from {result['clients']} clients in {result['seconds']} s; turned away with 429 and come again: "
          f"{result['turned_away']}")
    print("  " + ", ".join(f"{count} {kind}" for kind, count in sorted(result["kinds"].items(), key=lambda item: -item[1])))
    print(f"  engine's memory after each round of warm-up: {', '.join(map(str, result['warm_up_engine_MiB']))} MiB")
    print(f"{'':26}{'before':>10}{'after':>10}")
    for name, value in result["before"].items():
        print(f"{name:26}{value:>10}{result['after'][name]:>10}")
    for problem in result["problems"][:20]:
        print("PROBLEM " + problem)
    print("nothing is left, and every ordinary request got its greedy text" if not result["problems"] else
          f"{len(result['problems'])} problems")
    print(json.dumps({"bench": "storm", "machine": machine, **result}))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
