"""What training starts with: the target's tables, the draft vocabulary, and a network whose layer is the target's last one."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minivllm.families import MLPSpec
from minivllm.layers.attention import Attention
from minivllm.layers.linear import Linear
from minivllm.layers.mlp import MLP
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rope import inverse_frequencies
from minivllm.models.decoder import Decoder, PreNormLayer
from minivllm.speculative.shared import final_norm, output_rows
from minivllm.speculative.training.generations import Generation
from minivllm.speculative.training.network import HeadNetwork, HeadSize
from minivllm.speculative.training.trainer import Example, TargetTables

SMALL = 0.05  # weights of a norm that are smaller, relative to their mean, are not divided by
RIDGE = 1e-2  # relative to the mean square of a feature


def draft_vocabulary(generations: Sequence[Generation], vocab_size: int, size: int) -> Tensor:
    """The `size` tokens that the target chooses most often, in ascending order: [size] int64.

    If it chose fewer, the lowest other ids fill up: tokenizers give these to the most frequent pieces of text (FR-Spec, Zhao et al. 2025).
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for g in generations:
        counts += torch.bincount(g.targets[g.prompt_len - 1 :], minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def target_tables(target: Decoder, vocabulary: Tensor) -> TargetTables:
    norm, device = final_norm(target), target.build.device
    weight, eps = norm.weight.float(), norm.eps
    with torch.inference_mode():
        head = output_rows(target, vocabulary)
        table = target.embedding.rows(torch.arange(target.spec.vocab_size, dtype=torch.int32, device=device))
    return TargetTables(
        table.float().clone(), lambda x: torch.nn.functional.rms_norm(x, (len(weight),), weight, eps), head.float().clone(),
        vocabulary.to(device))


def start_network(target: Decoder, tables: TargetTables, answers: Sequence[Example], seed: int = 0) -> HeadNetwork:
    """A network whose features are already the best estimates of the target's hidden states that least squares can find.

    Gradients alone need many more steps from a random start. Queries, keys, values and the inner part of the MLP are those of the target's
    last layer, if it has EAGLE's form. Then fc, o_proj and down_proj are fitted one after the other, each to what is still missing.
    """
    spec = target.spec
    a, m = spec.layers[-1].attention, spec.layers[-1].mlp
    assert a.rope is not None
    size = HeadSize(hidden=spec.hidden_size, num_heads=a.num_heads, num_kv_heads=a.num_kv_heads, head_dim=a.head_dim,
                    intermediate=m.intermediate_size, eps=spec.norm_eps)
    torch.manual_seed(seed)
    network = HeadNetwork(size, inverse_frequencies(a.rope, a.head_dim, spec.max_model_len)).to(target.build.device)
    last = target.layers[-1]
    plain = spec.layers[-1].block == "pre" and not (m.bias or a.qkv_bias or a.out_bias or a.qk_norm)
    if plain and isinstance(last, PreNormLayer) and isinstance(m, MLPSpec) and a.latent is None and m.gated and m.activation == "silu":
        _copy_layer(network, target, last)
    fit(network, tables, answers)
    return network


@torch.no_grad()
def _copy_layer(network: HeadNetwork, target: Decoder, last: PreNormLayer) -> None:
    """The inner weights of the target's last layer. It multiplies norm(x) v, and the head states that have gone through the final norm, w:
    so v / w moves into the weights."""
    size = network.size
    w = final_norm(target).weight.float()
    w = torch.where(w.abs() < SMALL * w.abs().mean(), SMALL * w.abs().mean(), w)
    assert isinstance(last.mlp, MLP) and isinstance(last.attention, Attention)
    attn_norm, mlp_norm = last.attention.qkv.norm, last.mlp.up.norm
    assert isinstance(attn_norm, RMSNorm) and isinstance(mlp_norm, RMSNorm)

    def dense(linear: Linear) -> Tensor:
        return linear.dense_weight(size.hidden, target.build.device, target.build.dtype).float()

    q, kv = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    copied = {f"self_attn.{name}_proj": part * (attn_norm.weight.float() / w)
              for name, part in zip("qkv", dense(last.attention.qkv).split((q, kv, kv)), strict=True)}
    copied["mlp.gate_proj"], copied["mlp.up_proj"] = dense(last.mlp.up).chunk(2)
    copied["post_attention_layernorm"] = mlp_norm.weight.float() / w * w.pow(2).mean().sqrt()
    network.layers[0].load_state_dict({f"{name}.weight": weight for name, weight in copied.items()}, strict=False)


@torch.no_grad()
def fit(network: HeadNetwork, tables: TargetTables, answers: Sequence[Example]) -> None:
    """Ridge regressions of the hidden states of positions p + 1 on what fc, o_proj and down_proj read at p."""
    attention, mlp = network.part("self_attn"), network.part("mlp")
    attention["o_proj"].weight.zero_()
    mlp["down_proj"].weight.zero_()

    def joined(x: Example) -> Tensor:
        return torch.cat((tables.embedding[x.tokens[:, 1:]], x.hidden[:, :-1]), dim=-1)

    def after_attention(x: Example) -> Tensor:
        y = network.fc(joined(x))
        return y + attention["o_proj"](network.attend(y))

    nothing = answers[0].hidden.new_zeros(())
    stages: tuple[tuple[Any, Callable[[Example], Tensor], Callable[[Example], Tensor]], ...] = (
        (network.fc, joined, lambda x: nothing),
        (attention["o_proj"], lambda x: network.attend(network.fc(joined(x))), lambda x: network.fc(joined(x))),
        (mlp["down_proj"], lambda x: network.gated(after_attention(x)), after_attention))
    for linear, inputs, known in stages:
        size = linear.weight.shape[1]
        squares, products = nothing.new_zeros(size, size), nothing.new_zeros(size, network.size.hidden)
        for x in answers:
            learned = x.learned[:, 1:]
            features = inputs(x)[learned]
            squares += features.T @ features
            products += features.T @ (x.hidden[:, 1:] - known(x))[learned]
        squares.diagonal().add_(RIDGE * squares.diagonal().mean())
        linear.weight.copy_(torch.linalg.solve(squares, products).T)
