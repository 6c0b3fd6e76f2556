"""`minivllm run-batch -i IN.jsonl -o OUT.jsonl`: answer a file of requests in OpenAI's batch format, without a server."""
from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from minivllm.cli.flags import add_config_file, add_config_flags, add_model_argument, build, given
from minivllm.config import LOG_LEVELS, EngineConfig, ServerConfig
from minivllm.errors import InvalidInput
from minivllm.server.terminal import configure_logging, print_status

# The server settings that have an effect without a server.
FIELDS = ("served_model_name", "chat_template", "trust_request_chat_template", "enable_auto_tool_choice", "tool_call_parser",
          "reasoning_parser", "max_choices", "permissive", "lora_modules", "data_parallel_size")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run-batch", help="answer a file of requests",
        description="Answer a file of requests in OpenAI's batch format: one per line, to /v1/chat/completions, /v1/completions, "
                    "/v1/responses, /v1/embeddings or /v1/score. A wrong line is answered with an error and does not affect the others. "
                    "The last message counts such lines; the exit status is 0 if all lines have an entry, even one with an error.")
    add_model_argument(parser)
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="requests, one JSON object per line")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="responses, in the same order; overwritten if it exists")
    parser.add_argument("--ray", action="store_true",
                        help="answer with Ray Data: engines on the machines of this machine's Ray cluster, as many as --data-parallel-size "
                             "says (needs minivllm[ray])")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning",
                        help="lowest level of log messages (default: warning)")
    add_config_file(parser)
    add_config_flags(parser, ServerConfig, "answers", only=FIELDS)
    add_config_flags(parser, EngineConfig, "engine", skip=("max_queue",))


def run(args: argparse.Namespace) -> int:
    values = given(args, EngineConfig, ServerConfig)
    known = {*EngineConfig.__dataclass_fields__, *FIELDS, "log_level"} - {"max_queue"}
    for name in values.keys() - known:
        raise InvalidInput(f"{name} has no effect on run-batch: leave it out of the file", name)
    server, engine = build(ServerConfig, values), build(EngineConfig, values)
    lines = _read(Path(args.input_file))
    if Path(args.output_file).exists() and Path(args.output_file).samefile(args.input_file):
        raise InvalidInput(f"the responses would overwrite the requests in {args.input_file}: name another output file", "output_file")
    replicas = server.data_parallel_size
    if engine.trace is not None and (args.ray or replicas > 1):
        raise InvalidInput("trace records one engine of this machine: leave it out, or the replicas", "trace")
    configure_logging(args.log_level)
    with _open(Path(args.output_file)) as output:
        from minivllm.server.run import read_chat_template

        template = read_chat_template(server.chat_template)
        print_status(f"loading {engine.model or 'the default model'} ...")
        if args.ray:
            from minivllm.cli.ray_batch import answer_with_ray

            failed = _write(answer_with_ray(lines, engine, server, template, args.log_level), len(lines), output)
        else:
            failed = _answer_here(lines, engine, server, template, args.log_level, output)
    print_status(f"{len(lines) - failed} of {len(lines)} requests were answered, {failed} have errors: {args.output_file}")
    return 0


def _answer_here(
    lines: list[str], engine: EngineConfig, server: ServerConfig, template: str | None, log_level: str, output: IO[str],
) -> int:
    """With engines of this machine. Returns the number of errors."""
    from minivllm.server.app import create_app
    from minivllm.server.run import build_tokenizer, start_engine

    replicas = server.data_parallel_size
    with contextlib.closing(start_engine(engine, process=False, log_level=log_level, replicas=replicas)) as client:
        app = create_app(client, server, build_tokenizer(client.info, template))
        return asyncio.run(_answer(app, lines, 2 * engine.max_num_seqs * replicas, output))


def _write(entries: Iterable[dict[str, Any]], total: int, output: IO[str]) -> int:
    """Write entries as they come. Returns the number of errors."""
    from tqdm import tqdm

    from minivllm.server.errors import encode

    failed = 0
    for entry in tqdm(entries, total=total, desc="Requests", unit="request", dynamic_ncols=True):
        failed += entry["error"] is not None
        output.write(encode(entry).decode() + "\n")
        output.flush()
    return failed


async def _answer(app: Any, lines: list[str], concurrency: int, output: IO[str]) -> int:
    """Write each entry as soon as those before it are written. Returns the number of errors."""
    from tqdm import tqdm

    from minivllm.cli.batch import answer_lines
    from minivllm.server.errors import encode

    failed = 0
    with tqdm(total=len(lines), desc="Requests", unit="request", dynamic_ncols=True) as bar:
        async for entry in answer_lines(app, lines, concurrency, bar.update):
            failed += entry["error"] is not None
            output.write(encode(entry).decode() + "\n")
            output.flush()
    return failed


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidInput(f"cannot read {path}: {reason}", "input_file") from None
    return [line for line in lines if line.strip()]


def _open(path: Path) -> IO[str]:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}", "output_file") from None
