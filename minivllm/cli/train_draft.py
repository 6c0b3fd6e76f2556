"""`minivllm train-draft [MODEL] -o FOLDER`: train a head that drafts tokens for speculative decoding."""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from minivllm.cli.flags import add_config_flags, add_model_argument, build, given
from minivllm.config import EngineConfig
from minivllm.server.terminal import print_status
from minivllm.speculative.training.prompts import default_prompts, held_out_prompts, read_prompts
from minivllm.speculative.training.settings import TrainDraftConfig

FIELDS = ("model", "tokenizer", "revision", "download_dir", "hf_token", "quantization", "dtype", "device")  # of the engine's settings
HELD_OUT = 24  # prompts that only measure
HELD_OUT_PART = 10  # of a file of prompts, every tenth is held out


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train-draft", help="train a draft for speculative decoding",
        description="Let a model answer prompts, train a small head on its hidden states that predicts the next tokens, and write the head "
                    "into a folder for --speculative-config.")
    add_model_argument(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder for the head")
    parser.add_argument("--overwrite", action="store_true", help="replace the weights in a folder that is not empty")
    add_config_flags(parser, TrainDraftConfig, "training")
    add_config_flags(parser, EngineConfig, "model", only=FIELDS)


def run(args: argparse.Namespace) -> int:
    values, start = given(args, TrainDraftConfig, EngineConfig), time.monotonic()
    config = build(TrainDraftConfig, {n: v for n, v in values.items() if n in TrainDraftConfig.__dataclass_fields__})
    engine = build(EngineConfig, {n: values[n] for n in FIELDS if n in values})
    texts, held_out = _prompts(config)
    from minivllm.engine.compose import load_target
    from minivllm.quantization.quantize.checkpoint import prepare
    from minivllm.quantization.quantize.memory import memory_report
    from minivllm.speculative.training.run import percentages, train_head, write_head

    out = Path(args.output).expanduser()
    prepare(out, Path(engine.model or ""), args.overwrite)
    files, model, tokenizer, eos = load_target(engine)

    def tokens(text: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer.encode(text)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        assert isinstance(prompt, list)
        return prompt

    network, tables, acceptance = train_head(model, [tokens(t) for t in texts], [tokens(t) for t in held_out], eos, config, print_status)
    size = write_head(out, network, tables, model, files, config.store)
    print_status(f"{out}: a head of {size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s")
    print_status(f"accepted on {len(held_out)} held-out prompts, by position of the draft: {percentages(acceptance)}")
    print_status(memory_report(model.build.device))
    return 0


def _prompts(config: TrainDraftConfig) -> tuple[list[str], list[str]]:
    """For training, and held out."""
    if config.prompts is None:
        return default_prompts(config.num_prompts), held_out_prompts(HELD_OUT)
    given_prompts = read_prompts(config.prompts)[: config.num_prompts]
    every = min(HELD_OUT_PART, len(given_prompts))
    return [p for i, p in enumerate(given_prompts) if i % every], given_prompts[::every]
