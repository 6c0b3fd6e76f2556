"""One run of `minivllm bench serve`, from its arguments to its report."""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from minivllm.benchmarks.canned import Canned
from minivllm.benchmarks.client import Address, Client, HttpError, Outcome
from minivllm.benchmarks.load import Call, Load, Progress, run_fast, run_load
from minivllm.benchmarks.report import METRICS, circumstances, details, read_objectives, summarise, table
from minivllm.benchmarks.serving import Ask, Lengths, arrivals, nano_asks, random_asks, trace_asks
from minivllm.errors import InvalidInput, nearest

NO_SETTINGS = ("api_key", "command", "kind", "command_parser")  # of the arguments: not for the record


def run_serve(args: argparse.Namespace) -> int:
    """Returns the exit status: 1 if any request failed."""
    metrics, percentiles = read_metrics(args.percentile_metrics), read_percentiles(args.metric_percentiles)
    objectives = read_objectives(args.goodput)
    save = result_file(args)
    if args.plot:
        _check_plot(args.plot)
    asks = read_work(args)
    with contextlib.ExitStack() as stack:
        if args.canned:
            address = Address("127.0.0.1", stack.enter_context(Canned(args.client_processes)).port)
        else:
            address = Address.of(args.base_url or f"http://{args.host}:{args.port}")
        headers = _headers(args)
        model = args.model or run_fast(first_model(address, headers))
        load = Load(address, args.endpoint, _calls(args, asks, model), args.max_concurrency, headers)
        if args.num_warmups:
            _warm_up(load, args.num_warmups)
        print(f"{len(asks)} requests to {model} ({'canned events' if args.canned else args.endpoint}), rate {args.request_rate:g}/s, "
              f"at most {args.max_concurrency or len(asks)} at once, from {args.client_processes} client processes", file=sys.stderr)
        with progress_bar(len(asks), hidden=args.disable_tqdm) as progress:
            begin, outcomes = run_load(load, args.client_processes, progress)
    prompt_tokens = [len(ask.prompt.split() if isinstance(ask.prompt, str) else ask.prompt) for ask in asks]
    result = summarise(begin, outcomes, metrics=metrics, percentiles=percentiles, objectives=objectives, prompt_tokens=prompt_tokens)
    print(table(result, percentiles))
    if args.canned:
        print(f"the load generator's own ceiling: {result['events'] / result['duration']:,.0f} events a second "
              f"with {args.client_processes} client processes (canned servers share the machine with them)")
    _keep(args, save, model, begin, outcomes, result)
    return _tell_failures(outcomes)


# -- arguments --------------------------------------------------------------------------------------------------------


def read_metrics(text: str) -> list[str]:
    names = [{"e2e": "e2el"}.get(name, name) for name in text.split(",") if name]
    for name in names:
        if name not in METRICS:
            raise InvalidInput(f"percentile_metrics knows {', '.join(METRICS)}, got {name!r}{nearest(name, METRICS)}", "percentile_metrics")
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
    """Where the figures go, tried before anything is measured."""
    name = args.save
    if name is None and (args.save_result or args.save_detailed):
        name = f"minivllm-bench-{datetime.now():%Y%m%d-%H%M%S}.json"
    if name is None:
        return None
    path = Path(name)
    if not path.resolve().parent.is_dir():
        raise InvalidInput(f"the folder of {name} does not exist: make it, or choose another", "save")
    return path


def _check_plot(file: str) -> None:
    if Path(file).suffix not in (".png", ".svg", ".pdf"):
        raise InvalidInput(f"plot must end in .png, .svg or .pdf, got {file!r}", "plot")
    if not Path(file).resolve().parent.is_dir():
        raise InvalidInput(f"the folder of {file} does not exist: make it, or choose another", "plot")
    import matplotlib  # noqa: F401  # missing: said now, not after the run


def read_work(args: argparse.Namespace) -> list[Ask]:
    chat = args.endpoint.endswith("chat/completions")
    text = (args.prompt_format or ("text" if chat else "ids")) == "text"
    if chat and not text:
        raise InvalidInput("the chat endpoint takes text: leave out --prompt-format ids", "prompt_format")
    if (args.dataset_path is not None) != (args.dataset_name == "trace"):
        raise InvalidInput("dataset_path names the file of --dataset-name trace: give both, or neither", "dataset_path")
    if args.dataset_name == "trace":
        return trace_asks(args.dataset_path, args.num_prompts, seed=args.seed, last_id=args.max_token_id, text=text)
    if args.dataset_name == "nano":
        if text:
            raise InvalidInput("nano's prompts are token ids: use --endpoint /v1/completions with --prompt-format ids", "dataset_name")
        return nano_asks(args.num_prompts, args.seed)
    inputs, outputs = (
        Lengths(middle=middle, ratio=args.random_range_ratio, sigma=args.random_sigma)
        for middle in (args.random_input_len, args.random_output_len)
    )
    return random_asks(args.num_prompts or 100, inputs, outputs, seed=args.seed, prefix_len=args.random_prefix_len,
                       last_id=args.max_token_id, text=text)


def _headers(args: argparse.Namespace) -> dict[str, str]:
    key = args.api_key or os.environ.get("MINIVLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise InvalidInput("api_key must be plain ASCII: HTTP headers carry nothing else", "api_key")
    return {"Authorization": f"Bearer {key}"}


# -- requests ---------------------------------------------------------------------------------------------------------


def _calls(args: argparse.Namespace, asks: Sequence[Ask], model: str) -> list[Call]:
    due = arrivals(asks, args.request_rate, args.burstiness, args.seed)
    return [Call(json.dumps(body(args, ask, model)).encode(), at) for ask, at in zip(asks, due, strict=True)]


def body(args: argparse.Namespace, ask: Ask, model: str) -> dict[str, Any]:
    """One request as the server reads it."""
    temperature = args.temperature if args.temperature is not None else ask.temperature or 0.0
    fields: dict[str, Any] = {"model": model, "max_tokens": ask.output_len, "temperature": temperature, "stream": args.stream}
    if args.endpoint.endswith("chat/completions"):
        if not isinstance(ask.prompt, str):
            raise InvalidInput("the trace holds token ids, and the chat endpoint takes text: use --endpoint /v1/completions", "endpoint")
        fields["messages"] = [{"role": "user", "content": ask.prompt}]
    else:
        fields["prompt"] = ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)
    if args.stream:
        fields["stream_options"] = {"include_usage": True}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    return fields | args.extra_body


async def first_model(address: Address, headers: dict[str, str]) -> str:
    """The first name in /v1/models."""
    client = Client(address, headers)
    try:
        return str(json.loads(await client.get("/v1/models"))["data"][0]["id"])
    except (OSError, HttpError) as error:
        raise InvalidInput(f"no OpenAI-compatible server answers at {address.host}:{address.port} ({error}): start one "
                           "(minivllm serve), or say where it is with base_url, host or port", "base_url") from None
    except (ValueError, LookupError, TypeError):
        raise InvalidInput(f"{address.host}:{address.port} does not list its models as OpenAI's API does: give --model", "model") from None
    finally:
        client.close()


def _warm_up(load: Load, count: int) -> None:
    """The first requests, one after the other; if they fail, so would all the others."""
    calls = [Call(load.calls[i % len(load.calls)].body) for i in range(count)]
    _, outcomes = run_load(Load(load.address, load.path, calls, 1, load.headers), 1)
    for outcome in outcomes:
        if outcome.error is not None:
            raise InvalidInput(f"the first request failed: {outcome.error}")


# -- what is shown and kept -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(total: int, hidden: bool) -> Iterator[Callable[[Progress], None]]:
    from tqdm import tqdm

    with tqdm(total=total, disable=hidden or None, unit="req", leave=False) as bar:
        def show(so_far: Progress) -> None:
            bar.update(so_far.requests - bar.n)
            bar.set_postfix_str(f"{so_far.tokens:,} tokens", refresh=False)

        yield show


def _keep(
    args: argparse.Namespace, save: Path | None, model: str, begin: float, outcomes: Sequence[Outcome], result: dict[str, Any],
) -> None:
    if save is not None:
        settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
        settings["request_rate"] = str(args.request_rate)  # JSON knows no infinity
        record = {**circumstances(), "model_id": model, "settings": settings, **result}
        if args.save_detailed:
            record |= details(begin, outcomes)
        save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"figures written to {save}", file=sys.stderr)
    if args.plot:
        from minivllm.benchmarks.plot import draw

        rate = "as fast as possible" if args.request_rate == float("inf") else f"{args.request_rate:g} requests a second"
        title = f"{model}: {len(outcomes)} requests, {rate}, {result['output_throughput']:,.0f} output tokens a second"
        draw(args.plot, begin, outcomes, title, result.get("goodput_objectives_ms", {}))
        print(f"picture written to {args.plot}", file=sys.stderr)


def _tell_failures(outcomes: Sequence[Outcome]) -> int:
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    for error, count in sorted(errors.items(), key=lambda item: -item[1])[:5]:
        print(f"{count} requests failed: {error}", file=sys.stderr)
    return 1 if errors else 0
