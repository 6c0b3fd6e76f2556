"""How fast a model can be on a card: the time to read weights and keys, the time to compute, and the time of a step's many kernels.

    decode of B sequences   max(bytes / bandwidth, FLOP / tensor cores) + layers x kernels      bytes: all weights once, keys of B contexts
    prompt of n tokens      max(bytes / bandwidth, FLOP / tensor cores) of each chunk + layers x kernels

The roofline model is Williams, Waterman and Patterson's (2009). The *floor* takes the data sheet's figures as they are. The *expected* time
takes the parts of them that this engine's kernels reached on an H200, and adds the time of each layer's kernels.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minivllm.families import ModelSpec, MoESpec, active_weights
from minivllm.planning.gpus import GPU
from minivllm.quantization.methods import ResidentWeight

BATCHES, CONTEXT = (1, 8, 32), 1000  # sequences of a decode, and tokens of each one's context
PROMPTS = (1000, 8000)  # tokens

# Measured on an H200 in bfloat16 with the shapes of SmolLM2-135M, Qwen3-0.6B and Mistral-7B (docs/performance.md). They give bs1 as 0.48,
# 0.67 and 3.8 ms (measured: 0.49, 0.78 and 3.7), bs32 of Mistral-7B as 4.6 (4.7), ttft8000 of the last two as 26 and 208 (29 and 203).
REACHED_BANDWIDTH = 0.88  # of the data sheet's: a large copy, and the large products of one row
REACHED_PRODUCTS, REACHED_ATTENTION = 0.65, 0.5  # of the tensor cores' FLOP/s: products and attention of long prompts
REACHED_PCIE = 0.8  # of PCIe's bandwidth, by copies from pinned memory; a common figure, not measured here
LAYER_MS, LAYER_MS_OF_BATCH = 0.014, 0.030  # time of a layer's chain of kernels that reading does not hide: one row, more rows


@dataclass(frozen=True, slots=True)
class Prediction:
    """Milliseconds."""

    floor: float
    expected: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """One model on one card whose data sheet is known."""

    spec: ModelSpec
    gpu: GPU
    weight_bytes: int  # read by each step
    kv_token_bytes: int  # of one token's key and value in one layer
    chunk: int  # tokens of a prompt in one step
    fp8: bool = False  # products of many rows multiply in fp8
    streamed: int = 0  # bytes of weights that each step reads from host memory
    expert_bytes: int = 0  # of `weight_bytes`: those of the experts, of which a step reads those that its tokens choose

    def tpot(self, batch: int, context: int = CONTEXT) -> Prediction:
        """Time per output token of `batch` sequences, each with `context` tokens before it."""
        keys = batch * sum(self.kv_token_bytes * min(context, layer.attention.window or context) for layer in self.spec.layers)
        flops = batch * (2 * _weights(self.spec) + self._attention_flops(1, context))
        return self._step(batch, keys, flops, 0.0, LAYER_MS if batch == 1 else LAYER_MS_OF_BATCH)

    def ttft(self, tokens: int) -> Prediction:
        """Time to the first token of a prompt, without a queue."""
        floor = expected = 0.0
        for start in range(0, tokens, self.chunk):
            count = min(self.chunk, tokens - start)
            products = count * 2 * (_weights(self.spec) - self._head) + 2 * self._head
            step = self._step(count, 0, products, self._attention_flops(count, start + count / 2), LAYER_MS_OF_BATCH)
            floor, expected = floor + step.floor, expected + step.expected
        return Prediction(floor, expected)

    @property
    def _head(self) -> int:
        return self.spec.vocab_rows * self.spec.embed_size

    def _attention_flops(self, queries: int, keys: float) -> float:
        """Of all layers; keys: mean number that a query sees."""
        return sum(4 * queries * min(keys, layer.attention.window or keys) * layer.attention.q_size for layer in self.spec.layers)

    def _unread(self, tokens: int) -> float:
        """Bytes of the experts that none of these tokens chooses, if each chooses its experts at random."""
        moe = next((layer.mlp for layer in self.spec.layers if isinstance(layer.mlp, MoESpec)), None)
        return 0.0 if moe is None else self.expert_bytes * (1 - moe.top_k / moe.num_experts) ** tokens

    def _step(self, tokens: int, keys: int, products: float, attention: float, layer_ms: float) -> Prediction:
        """keys: bytes read. products, attention: FLOP of prompts (a decode's attention is bound by its bytes)."""
        gpu = self.gpu
        assert gpu.bandwidth is not None and gpu.tflops is not None
        rate = (gpu.fp8_tflops or gpu.tflops) if self.fp8 else gpu.tflops
        reading, computing = (self.weight_bytes - self._unread(tokens) + keys) / gpu.bandwidth / 1e6, products / rate / 1e9  # ms
        attending, streaming = attention / gpu.tflops / 1e9, self.streamed / gpu.pcie / 1e6
        floor = max(reading, computing + attending, streaming)
        expected = max(reading / REACHED_BANDWIDTH,
                       computing / REACHED_PRODUCTS + attending / REACHED_ATTENTION,
                       streaming / REACHED_PCIE) + self.spec.num_layers * layer_ms
        return Prediction(floor, expected)


def bytes_per_step(spec: ModelSpec, weights: Iterable[ResidentWeight]) -> int:
    """Bytes of the weights that a step reads: all but the tables that are looked up by row."""
    return sum(w.num_bytes for w in weights if w.name != "positions" and (w.name != "embed" or spec.tied))


def _weights(spec: ModelSpec) -> int:
    """Numbers that each token is multiplied with."""
    return active_weights(spec) + (spec.vocab_rows * spec.embed_size if spec.tied else 0)
