"""One run of `minivllm bench serve`, from its arguments to its report."""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from minivllm.benchmarks.address import ServerAddress
from minivllm.benchmarks.canned import CannedServers
from minivllm.benchmarks.client import HttpError, LoadClient
from minivllm.benchmarks.event_loop import run_fast
from minivllm.benchmarks.load import Load, LoadProgress, TimedRequest, run_load
from minivllm.benchmarks.outcome import RequestOutcome
from minivllm.benchmarks.report import METRICS, client_info, details, read_objectives, summarize, table
from minivllm.benchmarks.serving import LengthDistribution, ServingRequest, arrivals, nano_requests, random_requests, trace_requests
from minivllm.errors import InvalidInput, nearest

NOT_SAVED = ("api_key", "command", "kind", "command_parser")  # arguments that the JSON record leaves out


def run_serve(args: argparse.Namespace) -> int:
    """Returns the exit status: 1 if any request failed."""
    metrics, percentiles = read_metrics(args.percentile_metrics), read_percentiles(args.metric_percentiles)
    objectives = read_objectives(args.goodput)
    save = result_file(args)
    if args.plot:
        _check_plot(args.plot)
    requests = read_requests(args)
    with contextlib.ExitStack() as stack:
        if args.canned:
            address = ServerAddress("127.0.0.1", stack.enter_context(CannedServers(args.client_processes)).port)
        else:
            address = ServerAddress(args.host, args.port) if args.base_url is None else ServerAddress.of(args.base_url)
        headers = _headers(args)
        model = args.model or run_fast(first_model(address, headers))
        load = Load(address, args.endpoint, _timed(args, requests, model), args.max_concurrency, headers)
        if args.num_warmups:
            _warm_up(load, args.num_warmups)
        print(f"{len(requests)} requests to {model} ({'canned events' if args.canned else args.endpoint}), rate {args.request_rate:g}/s, "
              f"at most {args.max_concurrency or len(requests)} at a time, from {args.client_processes} client processes", file=sys.stderr)
        with progress_bar(len(requests), hidden=args.disable_tqdm) as progress:
            begin, outcomes = run_load(load, args.client_processes, progress)
    prompt_tokens = [len(r.prompt.split() if isinstance(r.prompt, str) else r.prompt) for r in requests]
    result = summarize(begin, outcomes, metrics=metrics, percentiles=percentiles, objectives=objectives, prompt_tokens=prompt_tokens)
    print(table(result, percentiles))
    if args.canned:
        print(f"maximum rate of the load generator: {result['events'] / result['duration']:,.0f} events/s and "
              f"{result['request_throughput']:,.0f} requests/s with {args.client_processes} client processes "
              "(the canned servers run on the same machine)")
    _save(args, save, model, begin, outcomes, result)
    return _print_failures(outcomes)


# -- arguments --------------------------------------------------------------------------------------------------------


def read_metrics(text: str) -> list[str]:
    names = [{"e2e": "e2el"}.get(name, name) for name in text.split(",") if name]
    for name in names:
        if name not in METRICS:
            raise InvalidInput(f"percentile_metrics must be among {', '.join(METRICS)}, got {name!r}{nearest(name, METRICS)}",
                               "percentile_metrics")
    return names


def read_percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise InvalidInput(f"metric_percentiles must be numbers from 0 to 100 such as 90,99; got {text!r}", "metric_percentiles")
    return values


def result_file(args: argparse.Namespace) -> Path | None:
    """The file for the figures, checked before the measurement."""
    name = args.save
    if name is None and (args.save_result or args.save_detailed):
        name = f"minivllm-bench-{datetime.now():%Y%m%d-%H%M%S}.json"
    if name is None:
        return None
    _check_folder(name, "save")
    return Path(name)


def _check_plot(file: str) -> None:
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise InvalidInput(f"plot must end in .png, .svg or .pdf, got {file!r}", "plot")
    _check_folder(file, "plot")
    import matplotlib  # noqa: F401  # if it is missing, fail now and not after the run


def _check_folder(file: str, param: str) -> None:
    if not Path(file).resolve().parent.is_dir():
        raise InvalidInput(f"the folder of {file} does not exist: create it, or choose another", param)


def read_requests(args: argparse.Namespace) -> list[ServingRequest]:
    chat = args.endpoint.endswith("chat/completions")
    text = (args.prompt_format or ("text" if chat else "ids")) == "text"
    if chat and not text:
        raise InvalidInput("the chat endpoint takes text: leave out --prompt-format ids", "prompt_format")
    if (args.dataset_path is not None) != (args.dataset_name == "trace"):
        raise InvalidInput("dataset_path is the file of --dataset-name trace: give both, or neither", "dataset_path")
    if args.dataset_name == "trace":
        return trace_requests(args.dataset_path, args.num_prompts, seed=args.seed, last_id=args.max_token_id, text=text)
    if args.dataset_name == "nano":
        if text:
            raise InvalidInput("nano's prompts are token ids: use --endpoint /v1/completions with --prompt-format ids", "dataset_name")
        return nano_requests(args.num_prompts, args.seed)
    inputs, outputs = (
        LengthDistribution(middle=middle, ratio=args.random_range_ratio, sigma=args.random_sigma)
        for middle in (args.random_input_len, args.random_output_len)
    )
    return random_requests(args.num_prompts or 100, inputs, outputs, seed=args.seed, prefix_len=args.random_prefix_len,
                           last_id=args.max_token_id, text=text)


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = args.api_key or os.environ.get("MINIVLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise InvalidInput("api_key must be plain ASCII: HTTP headers allow nothing else", "api_key")
    return {"Authorization": f"Bearer {key}"}


# -- requests ---------------------------------------------------------------------------------------------------------


def _timed(args: argparse.Namespace, requests: Sequence[ServingRequest], model: str) -> list[TimedRequest]:
    due = arrivals(requests, args.request_rate, args.burstiness, args.seed)
    return [TimedRequest(json.dumps(body(args, request, model)).encode(), at) for request, at in zip(requests, due, strict=True)]


def body(args: argparse.Namespace, request: ServingRequest, model: str) -> dict[str, Any]:
    """The JSON body of one request."""
    temperature = args.temperature if args.temperature is not None else request.temperature or 0.0
    fields: dict[str, Any] = {"model": model, "max_tokens": request.output_len, "temperature": temperature, "stream": args.stream}
    if args.endpoint.endswith("chat/completions"):
        if not isinstance(request.prompt, str):
            raise InvalidInput("the trace has token ids, and the chat endpoint takes text: use --endpoint /v1/completions", "endpoint")
        fields["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        fields["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    if args.stream:
        fields["stream_options"] = {"include_usage": True}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    return fields | args.extra_body


async def first_model(address: ServerAddress, headers: dict[str, str]) -> str:
    """The first name in /v1/models."""
    client = LoadClient(address, headers)
    try:
        return str(json.loads(await client.get("/v1/models"))["data"][0]["id"])
    except (OSError, HttpError) as error:
        raise InvalidInput(f"no OpenAI-compatible server answers at {address.authority} ({error}): start one "
                           "(minivllm serve), or give its address with base_url, host or port", "base_url") from None
    except (ValueError, LookupError, TypeError):
        raise InvalidInput(f"{address.authority} does not list its models as OpenAI's API does: give --model", "model") from None
    finally:
        client.close()


def _warm_up(load: Load, count: int) -> None:
    """Send the first requests one after the other. If one of them fails, all others would fail too."""
    requests = [replace(load.requests[i % len(load.requests)], due=0.0) for i in range(count)]
    _, outcomes = run_load(replace(load, requests=requests, max_concurrency=1), 1)
    for outcome in outcomes:
        if outcome.error is not None:
            raise InvalidInput(f"the first request failed: {outcome.error}")


# -- output -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(total: int, hidden: bool) -> Iterator[Callable[[LoadProgress], None]]:
    from tqdm import tqdm

    with tqdm(total=total, disable=hidden or None, unit="req", leave=False) as bar:
        def show(so_far: LoadProgress) -> None:
            bar.update(so_far.requests - bar.n)
            bar.set_postfix_str(f"{so_far.tokens:,} tokens", refresh=False)

        yield show


def _save(
    args: argparse.Namespace, save: Path | None, model: str, begin: float, outcomes: Sequence[RequestOutcome], result: dict[str, Any],
) -> None:
    if save is not None:
        settings = {name: value for name, value in vars(args).items() if name not in NOT_SAVED}
        settings["request_rate"] = str(args.request_rate)  # JSON has no infinity
        record = {**client_info(), "model_id": model, "settings": settings, **result}
        if args.save_detailed:
            record |= details(begin, outcomes)
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"figures written to {save}", file=sys.stderr)
    if args.plot:
        from minivllm.benchmarks.plot import draw

        rate = "as fast as possible" if args.request_rate == float("inf") else f"{args.request_rate:g} requests/s"
        title = f"{model}: {len(outcomes)} requests, {rate}, {result['output_throughput']:,.0f} output tokens/s"
        draw(args.plot, begin, outcomes, title, result.get("goodput_objectives_ms", {}))
        print(f"picture written to {args.plot}", file=sys.stderr)


def _print_failures(outcomes: Sequence[RequestOutcome]) -> int:
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    for error, count in errors.most_common(5):
        print(f"{count} requests failed: {error}", file=sys.stderr)
    return 1 if errors else 0
