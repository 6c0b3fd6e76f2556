"""`minivllm train-draft`, from a loaded target and tokenized prompts to a folder with a head."""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minivllm.errors import InvalidInput
from minivllm.models.decoder import Decoder
from minivllm.models.hub import ModelFiles
from minivllm.quantization.quantize.eight_bit import int8
from minivllm.quantization.quantize.settings import QuantizeConfig, quantization_config
from minivllm.speculative.load import VOCABULARY
from minivllm.speculative.packaged import TARGET, record_of
from minivllm.speculative.shared import final_norm
from minivllm.speculative.training.generations import Generation, generate
from minivllm.speculative.training.network import HeadNetwork
from minivllm.speculative.training.settings import TrainDraftConfig
from minivllm.speculative.training.start import draft_vocabulary, start_network, target_tables
from minivllm.speculative.training.trainer import HeadTrainer, TargetTables, examples

SAMPLED = 3  # of so many answers, one is sampled
BATCH = {"cpu": 48, "cuda": 512}  # prompts that are answered together
MEASURED = 4  # positions of a draft whose acceptance is printed


def train_head(target: Decoder, prompts: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], stop: Sequence[int],
               config: TrainDraftConfig, say: Callable[[str], object] = print) -> tuple[HeadNetwork, TargetTables, list[float]]:
    """-> the head, what it shares with the target, and the acceptance at each position on the held-out prompts' greedy answers."""
    final_norm(target)  # raises for a target that no head fits
    start = time.monotonic()
    answers = _answers(target, prompts, stop, config, config.temperature, "answering")
    measured = _answers(target, held_out, stop, config, 0.0, "answering held-out prompts")
    tokens = sum(len(g.tokens) - g.prompt_len for g in answers)
    say(f"{len(answers)} answers of {tokens:,} tokens in {time.monotonic() - start:.0f} s")
    size = config.draft_vocab_size or target.spec.vocab_size
    vocabulary = draft_vocabulary(answers, target.spec.vocab_size, min(size, target.spec.vocab_size))
    tables, device = target_tables(target, vocabulary), target.build.device
    batches = examples(answers, tables, config.batch_tokens, device)
    if not any(bool(batch.learned[:, config.steps + 1 :].any()) for batch in batches):
        raise InvalidInput("the model ends all its answers at once, so there is nothing to learn from: give other prompts", "prompts")
    network = start_network(target, tables, batches, config.seed)
    trainer = HeadTrainer(network, tables, steps=config.steps, learning_rate=config.learning_rate)
    measured_batches = examples(measured, tables, config.batch_tokens, device)
    say(f"accepted before training, by position: {percentages(trainer.acceptance(measured_batches, MEASURED))}")
    losses: list[float] = []
    with tqdm(total=config.epochs * len(batches), unit="step", desc="training", disable=None) as bar:
        for _, loss in trainer.run(batches, config.epochs, config.seed):
            losses.append(loss)
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.2f}", refresh=False)
            bar.update()
    acceptance = trainer.acceptance(measured_batches, MEASURED)
    first, last = (sum(some) / len(some) for some in (losses[:20], losses[-20:]))
    say(f"loss at the start {first:.2f} with one draft, at the end {last:.2f} with {config.steps} in a row")
    return network, tables, acceptance


def percentages(acceptance: Sequence[float]) -> str:
    return ", ".join(f"{a:.0%}" for a in acceptance)


def _answers(target: Decoder, prompts: Sequence[Sequence[int]], stop: Sequence[int], config: TrainDraftConfig, temperature: float,
             what: str) -> list[Generation]:
    seen: set[tuple[int, ...]] = set()
    temperatures = []
    for i, prompt in enumerate(map(tuple, prompts)):
        temperatures.append(temperature if i % SAMPLED == 0 or prompt in seen else 0.0)
        seen.add(prompt)
    with tqdm(total=len(prompts) * config.max_tokens, unit="token", desc=what, disable=None) as bar:
        return list(generate(target, prompts, max_tokens=config.max_tokens, temperature=temperatures, stop=stop, seed=config.seed,
                             batch_size=BATCH[target.build.device.type], progress=bar.update))


def write_head(out: Path, network: HeadNetwork, tables: TargetTables, target: Decoder, files: ModelFiles,
               store: str = "bfloat16") -> int:
    """Write the folder in EAGLE's layout. files: of the target. store: see `TrainDraftConfig`. -> bytes of the weights"""
    from safetensors.torch import save_file

    size, spec = network.size, target.spec
    tensors: dict[str, Tensor] = {}
    for name, weight in network.state_dict().items():
        if store == "int8" and weight.dim() == 2:
            tensors.update({f"{name.removesuffix('.weight')}.{suffix}": t for suffix, t in int8(weight.cpu(), torch.bfloat16).items()})
        else:
            tensors[name] = weight.to("cpu", torch.bfloat16)
    if len(tables.vocabulary) < spec.vocab_size:
        ids = tables.vocabulary.cpu()
        tensors[VOCABULARY] = ids - torch.arange(len(ids))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "vocab_size": spec.vocab_size,
        "hidden_size": size.hidden, "intermediate_size": size.intermediate, "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads, "head_dim": size.head_dim, "hidden_act": "silu", "rms_norm_eps": size.eps,
        "max_position_embeddings": spec.max_model_len, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        **{name: files.config[name] for name in ("rope_theta", "rope_scaling", "rope_parameters") if files.config.get(name) is not None},
        TARGET: record_of(spec, files.name, files.folder)}
    if store == "int8":
        config["quantization_config"] = quantization_config(QuantizeConfig(method="int8"), -1, [])
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.safetensors"), *out.glob("config.json")]:
        old.unlink()
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (out / "model.safetensors").stat().st_size
