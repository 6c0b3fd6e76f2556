"""What a model is, as data: one `LayerSpec` per layer, and the few things that all layers share.

    ModelSpec
      layers[i]: LayerSpec ── attention: AttentionSpec   heads, window, rotary embedding, norms of q and k, biases
                           ├─ mlp: MLPSpec | MoESpec     width, activation, gated or plain, biases | experts, router, shared expert
                           └─ block: one of BLOCKS       where the norms are, and whether attention and MLP are parallel

Layers may differ in every field of a `LayerSpec`. Code that needs a property of a layer reads it from that layer.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from minivllm.errors import ModelError

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")
GATED_ACTIVATIONS = ("silu", "gelu_tanh")
QK_NORMS = (
    None,
    "head",  # RMSNorm of each head, with one weight for all heads of q and one for those of k (Qwen3)
    "width",  # RMSNorm over all heads of q at once, and over those of k (OLMo 2)
    "layer",  # LayerNorm of each head, with one weight and bias for all heads of q, and for those of k (Phi)
    "layer_by_head",  # LayerNorm of each head, with a weight per head (Cohere)
)
BLOCKS = (
    "pre",  # x + f(norm(x)): attention, then MLP
    "post",  # norm(x + f(x)) (OPT-350m)
    "output",  # x + norm(f(x)) (OLMo 2)
    "sandwich",  # x + norm(f(norm(x))) (Gemma 2)
    "parallel",  # x + attention(norm(x)) + mlp(norm(x)), with two norms (GPT-NeoX)
    "parallel_one_norm",  # the same with one norm (GPT-J)
)


def model_error(message: str) -> ModelError:
    """An error about the model that the user chose."""
    return ModelError(message, "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding: its base, and how its frequencies are stretched beyond the trained context length."""

    theta: float = 10000.0
    dim: int = 0  # dimensions of a head that are rotated, the first ones; 0: all
    interleaved: bool = False  # checkpoints pair dimension 2 i with 2 i + 1, as GPT-J; else dimension i with i + dim / 2
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_len: int = 0  # trained context length, in tokens
    low_freq_factor: float = 1.0  # llama3: wavelengths above original / low are stretched by `factor` ...
    high_freq_factor: float = 4.0  # ... those below original / high are kept, those between are partly stretched
    beta_fast: float = 32.0  # yarn: dimensions with more turns than this over the original length are kept ...
    beta_slow: float = 1.0  # ... those with fewer turns than this are stretched by `factor`
    truncate: bool = True  # yarn: round these two borders outwards to whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: factor on cos and sin
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies, if no longer context than the original one is served ...
    long_factors: tuple[float, ...] = ()  # ... and if a longer one is


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2): all heads share one cached vector per token, the latent and a rotated key.

        x ── q_a, norm, q_b ──▶ each head's query   | nope_dim | rope_dim |
        x ── kv_a ──▶ | latent, normed: rank | rotated key: rope_dim |     cached
        kv_b: latent ──▶ each head's key (nope_dim) and value (value_dim)
    """

    q_rank: int | None  # width between q_a and q_b; None: one projection, q
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_eps: float = 1e-6  # of the norms of the latents

    def __post_init__(self) -> None:
        for name in ("rank", "nope_dim", "rope_dim", "value_dim"):
            _require(getattr(self, name) >= 1, f"{name} of latent attention must be at least 1, got {getattr(self, name)}")
        _require(self.rope_dim % 2 == 0, f"qk_rope_head_dim must be even, got {self.rope_dim}")
        _require(self.q_rank is None or self.q_rank >= 1, f"q_lora_rank must be at least 1, got {self.q_rank}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Self-attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None  # keys that a query attends to, its own included; None: all earlier ones
    rope: RopeSpec | None  # None: no rotation
    qk_norm: str | None  # norm of q and k before the rotation: one of QK_NORMS
    qkv_bias: bool
    out_bias: bool
    multiplier: float | None = None  # factor on the scores; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    # ALiBi: what each head's scores lose per position of distance (Press et al. 2021). A rank's part of a model has all ranks' slopes.
    alibi: tuple[float, ...] | None = None
    latent: LatentSpec | None = None  # then there is one KV head, whose head_dim is rank + rope_dim
    sinks: bool = False  # each head has one more score in its softmax, a parameter, which no value belongs to (gpt-oss)
    grouped_qkv: bool = False  # checkpoints have one matrix, with the rows of q, k and v of the first KV head, then of the second, ...

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"num_attention_heads {self.num_heads} must be a multiple of num_key_value_heads {self.num_kv_heads}")
        _require(self.rope is None or self.head_dim % 2 == 0, f"a rotary head_dim must be even, got {self.head_dim}")
        _require(self.rope is None or (self.rope.dim % 2 == 0 and 0 <= self.rope.dim <= self.head_dim),
                 f"the rotated dimensions must be an even number up to head_dim, got {self.rope and self.rope.dim} of {self.head_dim}")
        _require(self.alibi is None or len(self.alibi) % self.num_heads == 0, f"alibi needs one slope for each of {self.num_heads} heads")
        _require(self.latent is None or (self.num_kv_heads, self.head_dim) == (1, self.latent.rank + self.latent.rope_dim),
                 "latent attention has one KV head of its rank and rotated dimensions")
        _require(self.qk_norm in QK_NORMS, f"qk_norm {self.qk_norm!r} is not supported")
        _require(self.window is None or self.window >= 1, f"a sliding window must be at least 1, got {self.window}")

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5) if self.multiplier is None else self.multiplier

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """Feed-forward half of one layer: down(act(gate(x)) * up(x)) if gated, else down(act(up(x)))."""

    intermediate_size: int
    gated: bool
    activation: str  # one of ACTIVATIONS
    bias: bool

    def __post_init__(self) -> None:
        _require(self.intermediate_size >= 1, f"intermediate_size must be at least 1, got {self.intermediate_size}")
        _require(self.activation in ACTIVATIONS, f"activation {self.activation!r} is not supported")
        _require(not self.gated or self.activation in GATED_ACTIVATIONS,
                 f"a gated MLP with activation {self.activation!r} is not supported, only with {' and '.join(GATED_ACTIVATIONS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Mixture of experts (Shazeer et al. 2017): each token is computed by its `top_k` best experts, each of them a gated MLP.

        scores of all experts ── scoring, groups ──▶ the top_k best ── renormalize, scale ──▶ sum of weight * expert(x), + shared(x)
    """

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    # softmax: over all experts, then the best. top_softmax: the best, then softmax over these. sigmoid: each expert for itself
    scoring: Literal["softmax", "top_softmax", "sigmoid"] = "softmax"
    renormalize: bool = False  # the weights of a token's experts are divided by their sum
    scale: float = 1.0  # factor on the weights
    groups: int = 1  # the experts are divided into this many groups, and only those in the best `top_groups` can be chosen
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"  # a group is as good as its best expert, or as the sum of its two best
    correction: bool = False  # a bias per expert takes part in the choice, and not in the weights (DeepSeek-V3)
    router_bias: bool = False
    bias: bool = False  # of the experts' products
    interleaved: bool = False  # checkpoints store all experts as [experts, inputs, outputs], and gate and up by turns (gpt-oss)
    clamp: tuple[float, float] | None = None  # (alpha, limit) of gpt-oss: clamped silu(alpha * gate) / alpha * (up + 1)
    activation: str = "silu"  # of the experts and the shared one
    shared: MLPSpec | None = None  # computes every token
    shared_gate: bool = False  # its output is multiplied by sigmoid(x w)

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "intermediate_size", "groups", "top_groups"):
            _require(getattr(self, name) >= 1, f"{name} of the experts must be at least 1, got {getattr(self, name)}")
        _require(self.num_experts % self.groups == 0, f"{self.num_experts} experts cannot be divided into {self.groups} groups (n_group)")
        _require(self.top_groups <= self.groups, f"topk_group {self.top_groups} exceeds n_group {self.groups}")
        _require(self.top_k <= self.num_experts // self.groups * self.top_groups,
                 f"num_experts_per_tok {self.top_k} exceeds the {self.num_experts // self.groups * self.top_groups} experts to choose from")
        _require(self.group_score == "max" or self.groups == 1 or self.num_experts >= 2 * self.groups,
                 f"{self.num_experts} experts in {self.groups} groups (n_group): a group needs at least 2")
        _require(self.shared is None or self.shared.gated, "a shared expert must be gated")
        _require(self.activation == "silu", f"experts with activation {self.activation!r} (hidden_act) are not supported, only with silu")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec
    mlp: MLPSpec | MoESpec
    block: str  # one of BLOCKS

    def __post_init__(self) -> None:
        _require(self.block in BLOCKS, f"block {self.block!r} is not supported; {', '.join(BLOCKS)} are")
        _require(isinstance(self.mlp, MLPSpec) or not self.block.startswith("parallel"),
                 f"experts in a {self.block} block are not supported")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model's architecture. Valid once constructed; raises `ModelError` naming the field."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    max_model_len: int  # in tokens: the model's own limit, replaced by the served length if that is shorter
    dtype: str  # of the checkpoint: float32, bfloat16 or float16
    tied: bool  # the output head is the embedding table
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_affine: bool  # norms have weights
    final_norm: bool
    learned_positions: int  # positions in the learned table; 0: there is no table
    position_offset: int  # row of position 0 in that table
    embed_size: int  # width of the embedding table; projected in and out if it is not hidden_size
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(repr=False, hash=False)  # module -> checkpoint modules
    norm_bias: bool = True  # LayerNorms have a bias
    norm_offset: float = 0.0  # added to the norms' stored weights (Gemma: 1)
    embed_norm: bool = False  # a norm of the embeddings (BLOOM)
    embed_scale: float = 1.0  # factor on the embeddings, rounded to the model's dtype
    head_bias: bool = False  # of the output head
    logit_scale: float = 1.0  # factor on the logits
    logit_softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    extra_layers: int = 0  # in checkpoints, behind the layers: they predict further tokens, and are not used
    transposed: bool = False  # checkpoints store the layers' plain matrices as [inputs, outputs] (GPT-2)
    parameters: int = 0  # number of weights of a model that other code runs, whose layers do not describe them
    shards: int = 1  # tensor-parallel ranks; heads and widths of the layers are those of one of them

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_model_len", "embed_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(len(self.layers) >= 1, "a model needs at least one layer")
        _require(not (self.tied and self.head_bias), "an output head with a bias cannot be tied (tie_word_embeddings)")
        _require(not self.learned_positions or self.max_model_len <= self.learned_positions,
                 f"max_model_len {self.max_model_len} exceeds the {self.learned_positions} learned positions; lower it")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table on one rank."""
        return -(-self.vocab_size // self.shards)

    @property
    def attention_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """The different (heads, KV heads, head dimension) of the layers, without those of latent attention, which have no kernels."""
        return tuple(dict.fromkeys((a.num_heads, a.num_kv_heads, a.head_dim) for a in (layer.attention for layer in self.layers)
                                   if a.latent is None))


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise model_error(otherwise)


# --- KV groups -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one block table: tensor j of the KV cache holds layer layers[j] of every group.

    6 layers, every third with full attention:     tensor     0   1
                                         group 0 (window)     0   1
                                         group 1 (window)     3   4
                                         group 2 (full)       2   5

    A physical block belongs to one group at a time. All groups use the same tensors, so any block can serve any group.
    """

    num_heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # None: full attention
    layers: tuple[int, ...]
    latent: bool = False  # keys and values are the same cached vectors: see `LatentSpec`


def kv_groups(spec: ModelSpec) -> tuple[KVGroup, ...]:
    """Group the layers by attention shape and window, into groups of nearly equal size, so that few of the cache's tensors stay unused."""
    layers_of: dict[tuple[int, int, int, int | None, bool], list[int]] = {}
    for i, layer in enumerate(spec.layers):
        a = layer.attention
        # A window of at least max_model_len never hides a key, so such a layer counts as full attention.
        window = None if a.window is None or a.window >= spec.max_model_len else a.window
        layers_of.setdefault((a.num_heads, a.num_kv_heads, a.head_dim, window, a.latent is not None), []).append(i)
    counts = [len(layers) for layers in layers_of.values()]

    def unused(size: int) -> int:  # tensors without a layer, summed over all groups of this size
        return sum(-n % size for n in counts)

    # The largest size with at most an eighth unused. Fewer groups are better: each costs a block table and a gather per step.
    size = max(s for s in range(1, max(counts) + 1) if unused(s) * 8 <= spec.num_layers)
    return tuple(
        KVGroup(*shape[:4], layers=tuple(layers[at : at + size]), latent=shape[4])
        for shape, layers in layers_of.items()
        for at in range(0, len(layers), size)
    )


def num_kv_tensors(groups: tuple[KVGroup, ...]) -> int:
    """Key (and value) tensors of the cache: the layers of the largest group."""
    return max(len(group.layers) for group in groups)
