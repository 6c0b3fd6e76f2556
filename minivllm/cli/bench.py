"""`minivllm bench serve | latency | throughput`: measure a running server over HTTP, or the engine in this process."""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from minivllm.cli.flags import CommandParser, add_config_file, add_config_flags, add_model_argument, build, given
from minivllm.cli.numbers import whole_number
from minivllm.config import LOG_LEVELS, EngineConfig
from minivllm.errors import InvalidInput
from minivllm.server.terminal import configure_logging

SET_BY_RUN = ("skip_tokenizer_init", "scheduling_policy", "max_queue")  # engine settings that the measurement sets itself


def number(kind: Callable[[str], Any], low: float, what: str) -> Callable[[str], Any]:
    """An argparse type: a number of at least `low`. `what` describes it in errors."""
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, argparse.ArgumentTypeError):
            value = None
        if value is None or not value >= low:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return read


COUNT = number(whole_number, 1, "a whole number of at least 1")
NATURAL = number(whole_number, 0, "a whole number of at least 0")
POSITIVE = number(float, 1e-9, "a number above 0")
NON_NEGATIVE = number(float, 0.0, "a number of at least 0")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure a server or the engine",
                                 description="Measure a running server (serve), or the engine in this process (latency, throughput).")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=CommandParser)
    serve = kinds.add_parser("serve", help="send load to a running OpenAI-compatible server",
                             description="Measure any running OpenAI-compatible server, like `vllm bench serve`.")
    _add_serve(serve)
    serve.set_defaults(command_parser=serve)
    for name, text in (("latency", "one batch, several times"), ("throughput", "many requests at the same time")):
        offline = kinds.add_parser(name, help=f"measure the engine: {text}",
                                   description=f"Measure the engine: {text}.")
        _add_offline(offline, name)
        offline.set_defaults(command_parser=offline)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="the server's address (default: http://HOST:PORT)")
    server.add_argument("--host", default="127.0.0.1", help="host, if there is no --base-url (default: 127.0.0.1)")
    server.add_argument("--port", type=COUNT, default=8000, help="port, if there is no --base-url (default: 8000)")
    server.add_argument("--endpoint", choices=("/v1/completions", "/v1/chat/completions"), default="/v1/completions",
                        help="path of the requests (default: /v1/completions)")
    server.add_argument("--model", help="model name in the requests (default: the first of /v1/models)")
    server.add_argument("--api-key", metavar="KEY", help="bearer token (default: MINIVLLM_API_KEY or OPENAI_API_KEY in the environment)")
    server.add_argument("--canned", action="store_true",
                        help="measure a built-in server that sends prepared events: prints the maximum rate of the load generator")
    _add_work(parser.add_argument_group("work"))
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=POSITIVE, default=float("inf"), metavar="X",
                      help="mean number of requests per second (default: inf: all at the start, or at the trace's times)")
    load.add_argument("--burstiness", type=POSITIVE, default=1.0, metavar="X",
                      help="shape of the gamma-distributed gaps: 1 is a Poisson process, values below 1 are burstier (default: 1)")
    load.add_argument("--max-concurrency", type=COUNT, metavar="N",
                      help="maximum number of requests at the same time; the others wait (default: no limit)")
    load.add_argument("--num-warmups", type=NATURAL, default=1, metavar="N", help="requests before the measurement (default: 1)")
    load.add_argument("--client-processes", type=COUNT, default=1, metavar="N", help="processes that send requests (default: 1)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="seed of prompts, lengths and arrivals (default: 0)")
    result = parser.add_argument_group("result")
    result.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES",
                        help="metrics to report (default: ttft,tpot,itl,e2el)")
    result.add_argument("--metric-percentiles", default="90,99", metavar="NUMBERS", help="percentiles to report (default: 90,99)")
    result.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS",
                        help="objectives, such as ttft:500 itl:50 (itl: a request's longest gap); reports requests/s that meet all")
    result.add_argument("--save", "--result-filename", dest="save", metavar="FILE", help="write the figures as JSON")
    result.add_argument("--save-result", action="store_true", help="write the figures to minivllm-bench-DATE.json")
    result.add_argument("--save-detailed", action="store_true", help="add the figures of each request to that file")
    result.add_argument("--plot", metavar="FILE", help="write a picture (.png, .svg, .pdf); needs matplotlib")
    result.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def _add_work(work: argparse._ArgumentGroup) -> None:
    work.add_argument("--dataset-name", choices=("random", "nano", "trace"), default="random",
                      help="random prompts; nano-vllm's 256 requests with 100 to 1,024 tokens; a trace file (default: random)")
    work.add_argument("--dataset-path", metavar="FILE",
                      help="JSONL trace; a line has input_length or prompt, output_length, timestamp (ms)")
    work.add_argument("--num-prompts", type=COUNT, metavar="N", help="number of requests (default: 100 for random, all for trace and nano)")
    work.add_argument("--random-input-len", type=COUNT, default=128, metavar="N", help="input tokens (default: 128)")
    work.add_argument("--random-output-len", type=COUNT, default=128, metavar="N", help="output tokens (default: 128)")
    work.add_argument("--random-range-ratio", type=number(float, 0.0, "a number from 0 to 1"), default=0.0, metavar="X",
                      help="lengths are uniform from (1 - X) to (1 + X) times --random-input-len and --random-output-len (default: 0)")
    work.add_argument("--random-sigma", type=NON_NEGATIVE, default=0.0, metavar="X",
                      help="lengths are log-normal instead, with sigma X and with --random-input-len and --random-output-len as medians "
                           "(default: 0: off)")
    work.add_argument("--random-prefix-len", type=NATURAL, default=0, metavar="N", help="common tokens before each prompt (default: 0)")
    work.add_argument("--max-token-id", type=COUNT, default=10_000, metavar="N", help="largest id in random prompts (default: 10000)")
    work.add_argument("--prompt-format", choices=("ids", "text"), help="form of the prompts (default: ids; for the chat endpoint: text)")
    work.add_argument("--no-stream", dest="stream", action="store_false", help="request complete responses instead of streams")
    work.add_argument("--ignore-eos", action="store_true", help="request outputs of exactly the given length (minivllm, vLLM)")
    work.add_argument("--temperature", type=NON_NEGATIVE, metavar="X", help="temperature of all requests (default: 0; for nano: 0.6)")
    work.add_argument("--extra-body", type=_json_object, default={}, metavar="JSON", help="additional fields of each request")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _add_offline(parser: argparse.ArgumentParser, kind: str) -> None:
    add_model_argument(parser)
    add_config_file(parser)
    work = parser.add_argument_group("work")
    input_len = 32 if kind == "latency" else 128
    work.add_argument("--input-len", type=COUNT, default=input_len, metavar="N", help=f"input tokens (default: {input_len})")
    work.add_argument("--output-len", type=COUNT, default=128, metavar="N", help="output tokens (default: 128)")
    if kind == "latency":
        work.add_argument("--batch-size", type=COUNT, default=8, metavar="N", help="requests per batch (default: 8)")
        work.add_argument("--num-iters-warmup", type=NATURAL, default=1, metavar="N", help="rounds before the measurement (default: 1)")
        work.add_argument("--num-iters", type=COUNT, default=5, metavar="N", help="measured rounds (default: 5)")
    else:
        work.add_argument("--dataset-name", choices=("random", "nano"), default="random", help="as in bench serve (default: random)")
        work.add_argument("--num-prompts", type=COUNT, metavar="N", help="number of requests (default: 100 for random, all 256 for nano)")
    work.add_argument("--save", "--output-json", dest="save", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="lowest level of log messages (default: warning)")
    add_config_flags(parser, EngineConfig, "engine", skip=SET_BY_RUN)


def run(args: argparse.Namespace) -> int:
    if args.kind == "serve":
        if args.random_range_ratio > 1:
            raise InvalidInput(f"random_range_ratio must be a number from 0 to 1, got {args.random_range_ratio}", "random_range_ratio")
        from minivllm.benchmarks.serve_run import run_serve

        return run_serve(args)
    config = build(EngineConfig, given(args, EngineConfig))
    configure_logging(args.log_level)
    from minivllm.benchmarks.offline import run_latency, run_throughput

    return (run_latency if args.kind == "latency" else run_throughput)(config, args)
