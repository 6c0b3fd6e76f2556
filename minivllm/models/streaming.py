"""Layers whose weights are in host memory. Each is copied to the device before it computes, while other layers compute.

Streamed layers share two staging buffers, in turns. A layer's tensors are views of its buffer, so kernels and captured graphs see
fixed addresses, and no linear method knows of this.

    computing stream   ... layer 1 (A) ... layer 3 (B) ... layer 5 (A) ... layer 7 (B) ...      A, B: the buffers; 1, 3, 5, 7 are streamed
    copying stream                    [ 5 to A       ][ 7 to B      ][ 1 to A      ][ 3 to B ]

As soon as a layer has computed, its buffer receives the next layer that uses this buffer. So after a step the buffers hold the first two
streamed layers again. A captured step relies on that: `settle` at its end, and before its replay, makes sure that they are there.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from minivllm.kernels.layout import AdapterWeights, KVLayer
from minivllm.layers.attention import Attention, LastTokens, StepContext
from minivllm.layers.latent_attention import LatentAttention
from minivllm.quantization.base import Matmul

NUM_BUFFERS = 2
_ALIGN = 256  # bytes, as PyTorch aligns tensors on a GPU: kernels may rely on it
_SMALLEST_PIECE = 1 << 20  # bytes


class DecoderLayer(Protocol):
    """One layer of a decoder."""

    index: int

    @property
    def attention(self) -> Attention | LatentAttention: ...

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        """x: [T, hidden] -> the same shape; x may be overwritten. With `last`, only the rows of its tokens: [B, hidden]."""


class Copies(Protocol):
    """Copies beside the computation."""

    def start(self, weights: HostWeights, buffer: Tensor) -> Any:
        """Copy `weights` to `buffer` once everything that was launched so far has run. Returns what `wait` needs."""

    def wait(self, copy: Any) -> None:
        """Everything that is launched from now on runs after this copy."""


class SideStream:
    """Copies on a second stream of a GPU. Inside a capture they become part of the graph."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, weights: HostWeights, buffer: Tensor) -> torch.cuda.Event:
        """See `Copies`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            weights.copy_to(buffer)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return copied

    def wait(self, copy: torch.cuda.Event) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(copy)


def tensors_of(part: object) -> Iterator[Tensor]:
    """Every tensor that a part of a model holds, each once: in attributes, tuples, lists and dictionaries.

    Functions, and other callable objects of libraries, are not looked into: a tensor that only they hold stays on the device.
    """
    seen: set[int] = set()
    todo = [part]
    while todo:
        found = todo.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, AdapterWeights):  # views of the slots, which stay on the device
            continue
        elif isinstance(found, (tuple, list)):
            todo += found
        elif isinstance(found, dict):
            todo += found.values()
        elif type(found).__module__.startswith("minivllm.") or Matmul in type(found).__mro__ or not (
                callable(found) or isinstance(found, ModuleType)):
            todo += getattr(found, "__dict__", {}).values()
            slots = (name for base in type(found).__mro__ for name in base.__dict__.get("__slots__", ()))
            todo += [getattr(found, name, None) for name in slots]


class HostWeights:
    """One layer's weights in host memory, and its tensors, which view a buffer on the device from `bind` on."""

    def __init__(self, layer: object, device: torch.device) -> None:
        """Copies the weights to host memory, and frees their memory on the device."""
        tensors = [t for t in tensors_of(layer) if t.device == device and t.layout == torch.strided and t.untyped_storage().nbytes()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}  # several tensors may view one storage
        starts, self.num_bytes = {}, 0
        for address, storage in storages.items():
            starts[address] = self.num_bytes
            self.num_bytes += -(-storage.nbytes() // _ALIGN) * _ALIGN
        host = torch.zeros(self.num_bytes, dtype=torch.uint8)
        for address, storage in storages.items():
            host[starts[address] :][: storage.nbytes()] = torch.empty(0, dtype=torch.uint8, device=device).set_(storage).cpu()
        self._pieces = _pieces(host, pinned=device.type == "cuda")
        self.views = [(t, starts[t.untyped_storage().data_ptr()] // t.itemsize + t.storage_offset(), t.shape, t.stride()) for t in tensors]
        for t in tensors:
            t.set_(torch.UntypedStorage(0, device=device))

    def bind(self, buffer: Tensor) -> None:
        """Make the layer's tensors views of `buffer`: uint8, at least num_bytes."""
        for t, offset, shape, strides in self.views:
            t.set_(buffer.untyped_storage(), offset, shape, strides)

    def copy_to(self, buffer: Tensor) -> None:
        """Copy all bytes to the device, without waiting for it."""
        start = 0
        for piece in self._pieces:
            buffer[start : start + len(piece)].copy_(piece, non_blocking=True)
            start += len(piece)


def _pieces(host: Tensor, pinned: bool) -> list[Tensor]:
    """The same bytes in pinned memory. PyTorch rounds each pinned allocation up to a power of two, so there are several of such sizes."""
    if not pinned:
        return [host]
    pieces = []
    while len(host):
        size = max(1 << len(host).bit_length() - 1, _SMALLEST_PIECE)
        pieces.append(torch.empty(min(size, len(host)), dtype=torch.uint8, pin_memory=True).copy_(host[:size]))
        host = host[size:]
    return pieces


class StreamedLayer:
    """A layer whose weights are on the device only while it computes."""

    __slots__ = ("_layer", "_position", "_stream", "attention", "index")

    def __init__(self, layer: DecoderLayer, stream: WeightStream, position: int) -> None:
        """position: among the streamed layers."""
        self._layer, self._stream, self._position = layer, stream, position
        self.index, self.attention = layer.index, layer.attention

    def __call__(self, x: Tensor, step: StepContext, kv: KVLayer, last: LastTokens | None = None) -> Tensor:
        """See `DecoderLayer`."""
        self._stream.before(self._position)
        x = self._layer(x, step, kv, last)
        self._stream.after(self._position)
        return x


class WeightStream:
    """The streamed layers of one model, their staging buffers, and which layer each buffer holds or is receiving."""

    def __init__(self, layers: Sequence[int], device: torch.device, copies: Copies | None = None) -> None:
        """layers: indices of the layers to stream. copies: None: those of a GPU."""
        self._indices, self._device = frozenset(layers), device
        self._copies = SideStream(device) if copies is None else copies
        self._weights: list[HostWeights] = []
        self._buffers: list[Tensor] = []
        self._held: list[int | None] = [None] * NUM_BUFFERS  # position of a layer
        self._copying: list[Any] = [None] * NUM_BUFFERS  # a copy that the computing stream has not waited for
        self.bytes_per_second = 0.0  # measured

    @property
    def host_bytes(self) -> int:
        """Bytes of the streamed weights."""
        return sum(weights.num_bytes for weights in self._weights)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(map(len, self._buffers))

    def add(self, layer: DecoderLayer) -> DecoderLayer:
        """Called with each new layer of the model, in order. If it is to be streamed, its weights leave the device."""
        if layer.index not in self._indices:
            return layer
        self._weights.append(HostWeights(layer, self._device))
        return StreamedLayer(layer, self, len(self._weights) - 1)

    def start(self, resident: object) -> None:
        """Called when all layers were added. resident: the other parts of the model."""
        moved = [id(view[0]) for weights in self._weights for view in weights.views]
        assert len(set(moved)) == len(moved) and not set(moved) & {id(t) for t in tensors_of(resident)}, "layers share a tensor object"
        for b in range(min(NUM_BUFFERS, len(self._weights))):
            users = self._weights[b::NUM_BUFFERS]
            self._buffers.append(torch.empty(max(weights.num_bytes for weights in users), dtype=torch.uint8, device=self._device))
            for weights in users:
                weights.bind(self._buffers[b])
        self.bytes_per_second = self._measure()

    def before(self, position: int) -> None:
        """Kernels that are launched from now on see the weights of this streamed layer in its buffer."""
        b = position % NUM_BUFFERS
        self._fetch(position)  # nothing to do, except after a step that failed half-way, and in a model without repetition
        if self._copying[b] is not None:
            self._copies.wait(self._copying[b])
            self._copying[b] = None

    def after(self, position: int) -> None:
        """The kernels of this layer were launched: its buffer receives the next layer that uses it."""
        following = position + NUM_BUFFERS
        self._fetch(following if following < len(self._weights) else position % NUM_BUFFERS)

    def settle(self) -> None:
        """The state between captured steps: the buffers hold the first layers, and no copy is under way."""
        for position in range(len(self._buffers)):
            self.before(position)

    def _fetch(self, position: int) -> None:
        b = position % NUM_BUFFERS
        if self._held[b] != position:
            self._copying[b] = self._copies.start(self._weights[position], self._buffers[b])
            self._held[b] = position

    def _measure(self) -> float:
        """Fill the buffers. Returns bytes per second of the second time: the first one includes the start of the driver's copies."""
        seconds = 0.0
        for _ in range(2):
            self._held = [None] * NUM_BUFFERS
            began = time.perf_counter()
            self.settle()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - began
        return sum(weights.num_bytes for weights in self._weights[:NUM_BUFFERS]) / max(seconds, 1e-9)
