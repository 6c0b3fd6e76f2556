"""Weights for a decoder that runs in Transformers' code, and before them a comparison of a small model with Transformers' own attention.

The forward pass of `transformers_spec` cannot see everything that a model does with several sequences in one row. So a small random model
of the same class is run in both ways.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivllm.errors import ModelError
from minivllm.families.spec import model_error
from minivllm.kernels import REFERENCE
from minivllm.kernels.layout import InputBatch, KVLayer
from minivllm.layers.build import BuildContext
from minivllm.models.transformers_interface import NAME, Unsupported, register
from minivllm.models.transformers_model import TransformersModel
from minivllm.models.transformers_spec import ForeignSpec, layer_specs, line_of, probe

CHECK_PARAMETERS = 100_000_000  # the self-check is skipped for a model that stays larger than this
CHECK_TOLERANCE = 1e-3  # of the largest logit
CHECK_VOCABULARY, CHECK_WINDOW, CHECK_BLOCK = 128, 4, 16
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner",
          "num_attention_heads", "num_key_value_heads")  # in config.json, divided for the small model


def load_transformers(spec: ForeignSpec, folder: Path, load_format: str, build: BuildContext, seed: int = 0) -> TransformersModel:
    """The model of `spec` with the weights in `folder` (safetensors), or with random ones for load_format "dummy".

    Raises `ModelError` if its code computes other logits here than in Transformers, or if weights are missing."""
    print(f"minivllm: {spec.architecture} runs in Transformers' modeling code around this engine's paged attention, without CUDA graphs",
          file=sys.stderr, flush=True)
    check_logits(spec)
    cls, config = spec.model_class, copy.deepcopy(spec.config)
    if load_format == "dummy":
        with torch.random.fork_rng(devices=[build.device] if build.device.type == "cuda" else []), build.device:
            torch.manual_seed(seed)
            return TransformersModel(spec, build, cls._from_config(config, attn_implementation=NAME, dtype=build.dtype).eval())
    try:
        model, report = cls.from_pretrained(str(folder), config=config, attn_implementation=NAME, dtype=build.dtype, use_safetensors=True,
                                            local_files_only=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"Transformers cannot load the weights in {folder} ({line_of(error)}): they must be safetensors files",
                         "model") from error
    problems = [f"{kind.removesuffix('_keys')}: {', '.join(sorted(map(str, report[kind]))[:8])}"
                for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[kind]]
    if problems:
        raise ModelError(f"the weights in {folder} do not match its config.json ({spec.architecture}): {'; '.join(problems)}", "model")
    return TransformersModel(spec, build, model.to(build.device).eval())


def check_logits(spec: ForeignSpec) -> None:
    """Compare a small random model of the same class, with two sequences in one row and a prompt in two chunks, with Transformers' own
    attention. Raises `ModelError` if the logits differ: some code mixes tokens, or counts their positions, outside of its attention.
    Prints one line if there is no model that is small enough."""
    try:
        config = small(spec.config)
        layers, vocabulary, parameters = probe(spec.model_class, config)
        if parameters > CHECK_PARAMETERS:
            raise Unsupported(f"a small one still has {parameters:,} parameters, and at most {CHECK_PARAMETERS:,} are compared")
    except Exception as error:  # the model's code may refuse the small sizes in any way
        reason = str(error) if isinstance(error, Unsupported) else line_of(error)
        print(f"minivllm: no small model of {spec.architecture} was compared with Transformers' own attention: {reason}",
              file=sys.stderr, flush=True)
        return
    register()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode():
        torch.manual_seed(0)
        model = spec.model_class._from_config(config, attn_implementation=NAME, dtype=torch.float32).eval()
        prompts = [torch.randint(3, vocabulary, (length,)) for length in (11, 6)]
        few = dataclasses.replace(spec, layers=layer_specs(layers, spec.hidden_size), vocab_size=vocabulary)
        ours = _in_steps(TransformersModel(few, BuildContext(torch.device("cpu"), torch.float32, REFERENCE), model), prompts)
        model.set_attn_implementation("eager")
        theirs = torch.cat([model(input_ids=p[None], use_cache=False).logits[0] for p in prompts])
    worst, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not worst <= CHECK_TOLERANCE * scale:
        raise model_error(f"the architecture {spec.architecture} is not supported: with several sequences in one row, its code computes "
                          f"other logits (by {worst / scale:.1%} of the largest, in a small random model): it mixes tokens or counts "
                          "positions outside of its attention")


def small(config: Any) -> Any:
    """A configuration of the same class with few layers (one of each kind), fewer heads and a small vocabulary."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    number = text.num_hidden_layers
    kinds = list(getattr(text, "layer_types", None) or ())
    few = min(number, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    for name, value in text.to_dict().items():
        if isinstance(value, (list, tuple)) and len(value) == number:
            setattr(text, name, list(value)[:few])
    text.num_hidden_layers = few
    heads = text.num_attention_heads
    divisor = math.gcd(heads // 2 if heads % 2 == 0 else heads, getattr(text, "num_key_value_heads", None) or heads)
    values = {name: value for name in WIDTHS if isinstance(value := getattr(text, name, None), int)}
    if all(value % divisor == 0 for value in values.values()):
        for name, value in values.items():
            setattr(text, name, value // divisor)
    text.vocab_size = min(text.vocab_size, CHECK_VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    if isinstance(getattr(text, "initializer_range", None), float):
        text.initializer_range = text.hidden_size**-0.5  # with the usual 0.02, attention is nearly uniform and hides what is wrong
    if getattr(text, "sliding_window", None):
        text.sliding_window = min(text.sliding_window, CHECK_WINDOW)
    return config


def _in_steps(model: TransformersModel, prompts: Sequence[Tensor]) -> Tensor:
    """Logits of all tokens of two prompts, the first after the second: beginnings in one step, then the rest of the first as a chunk and
    the last token of the second as a decode. Each sequence has one block in each KV group."""
    first, second = prompts
    kv = [KVLayer(*(torch.zeros((1 + 2 * len(model.groups), CHECK_BLOCK, a.num_kv_heads, a.head_dim)) for _ in range(2)))
          for a in (layer.attention for layer in model.spec.layers)]
    found: list[list[Tensor]] = [[], []]
    cut = len(first) - CHECK_WINDOW
    for parts in (((0, 0, cut), (1, 0, len(second) - 1)), ((1, len(second) - 1, len(second)), (0, cut, len(first)))):
        lens, ends = tuple(end - start for _, start, end in parts), tuple(end for _, _, end in parts)
        positions = torch.cat([torch.arange(start, end) for _, start, end in parts])
        blocks = [torch.tensor([1 + 2 * g + s for s, _, _ in parts]) for g in range(len(model.groups))]
        batch = InputBatch(
            tokens=torch.cat([prompts[s][start:end] for s, start, end in parts]).int(), positions=positions,
            query_start=torch.tensor((0, *lens)).cumsum(0).int(), seq_lens=torch.tensor(ends).int(),
            slots=tuple(b.repeat_interleave(torch.tensor(lens)) * CHECK_BLOCK + positions for b in blocks),
            block_tables=tuple(b[:, None].int() for b in blocks), logit_rows=torch.zeros(1, dtype=torch.int64),
            num_decodes=sum(n == 1 for n in lens), query_lens_host=lens, seq_lens_host=ends)
        logits = model.logits(model.forward(batch, kv, CHECK_BLOCK)).split(lens)
        for (s, _, _), rows in zip(parts, logits, strict=True):
            found[s].append(rows)
    return torch.cat(found[0] + found[1])
