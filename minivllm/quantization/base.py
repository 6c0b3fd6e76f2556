"""The interface of a linear method: which tensors store a weight, and how to multiply with them.

    LinearSpec (rows, columns) ──LinearMethod.parameters──▶ {suffix: ParamSpec}     what checkpoints hold; one loader for all methods
                                                                 │ loaded tensors
                               LinearMethod.build      ◀─────────┘
                                    └──▶ Matmul                      x W^T + b, perhaps fused with the operations around it

A new method is one file with a `LinearMethod` and a subclass of `Matmul`. With `Matmul.__call__` alone it works in every layer.
`Matmul.fused` makes it faster where its kernel can include the norm before, or the gate or the residual after the product.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

from minivllm.families import LinearSpec

if TYPE_CHECKING:  # this module imports without torch, so that memory can be planned before anything is loaded
    import torch
    from torch import Tensor

    from minivllm.kernels import Ops
    from minivllm.kernels.layout import AdapterWeights

_ROWS_AT_ONCE = 64  # of the identity matrix: few enough for products that do not quantize their inputs
DUMMY_SCALE = 2.0**-8  # of random weights: about as large as trained ones, and exact in 16 bits, as those of checkpoints
DTYPE_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet."""

    file: str
    name: str  # in the file, with its prefix
    shape: tuple[int, ...]
    dtype: str  # torch's name
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor of a linear layer's weight: its layout in checkpoints and here.

    parts: shapes of the checkpoint's tensors, one per part of a fused layer. They are joined along `concat_dim`. Scalars, whose
    shape is (), are joined to a vector with one entry per part.
    """

    parts: tuple[tuple[int, ...], ...]
    concat_dim: int = 0
    # A torch dtype's name; None: the model's own. Checkpoints may store any other float dtype for a float one (converted while loading).
    dtype: str | None = None
    # Tensor-parallel ranks split it along one of these dimensions; None: every rank holds all of it.
    output_dim: int | None = 0  # dimension of the layer's outputs, split by column parallelism
    input_dim: int | None = 1  # dimension of the layer's inputs, split by row parallelism
    # Content for load_format "dummy": normal, random bits, one value (a float), random bytes below an int, or the bytes of a block that is
    # repeated, of which None stands for random ones.
    dummy: Literal["normal", "bits"] | float | tuple[int | None, ...] = "normal"
    suffix: str | None = None  # in checkpoints, if it differs from the name in `LinearMethod.parameters`
    of_parts: tuple[int, ...] | None = None  # the parts of the layer that this tensor stores; None: all

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the joined tensor."""
        if not self.parts[0]:
            return (len(self.parts),)
        joined = list(self.parts[0])
        joined[self.concat_dim] = sum(part[self.concat_dim] for part in self.parts)
        return tuple(joined)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """The operations around a product: y = act(rms_norm(x) W^T + bias). The residual is added per call."""

    norm: tuple[Tensor, float] | None = None  # weight [K] and epsilon of an RMSNorm of x
    bias: Tensor | None = None  # [N]
    # silu_and_mul or gelu_tanh_and_mul (of [gate | up]: N becomes N / 2), silu, relu, gelu or gelu_tanh
    activation: str | None = None


class Matmul(Protocol):
    """A loaded weight [N, K]."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: [T, K] -> x W^T + bias: [T, N]."""

    def fused(self, x: Tensor, epilogue: Epilogue, residual: Tensor | None) -> Tensor | None:
        """x: [T, K] -> [T, N or N / 2] with the epilogue applied and `residual` added. `residual` may be overwritten.

        None: this method has no kernel for that epilogue, and the caller composes the steps.
        """
        return None

    def adapted(self, x: Tensor, epilogue: Epilogue, residual: Tensor | None, adapters: AdapterWeights, lora: Any) -> Tensor | None:
        """`fused`, with the tokens' LoRA adapters added to the product. lora: from ops.prepare_lora. None: the caller composes it."""
        return None

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the weight, for methods that may store an embedding table: ids [T] -> [T, K]."""
        raise TypeError(f"{type(self).__name__} stores no embedding tables")

    def dense(self, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight as one matrix [N = rows, K = cols], whatever is stored: the products with the rows of the identity matrix."""
        import torch

        identity = torch.eye(cols, dtype=dtype, device=device)
        return torch.cat([self(some, None).T for some in identity.split(_ROWS_AT_ONCE)], dim=1)


class LinearMethod(Protocol):
    """A storage format for the weights of linear layers, and how to multiply with it."""

    # Whether every tensor of `parameters` has one row per output, so that outputs can be reordered before `build`.
    rows_in_any_order: ClassVar[bool] = False

    def parameters(self, rows: tuple[int, ...], cols: int) -> dict[str, ParamSpec]:
        """Checkpoint suffix -> tensor, for a layer with these outputs per part and these inputs."""

    def of_part(self, part: int) -> LinearMethod:
        """The method that stores this part of a fused layer."""
        return self

    def adapt(self, tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        """The tensors of one part in a checkpoint, by suffix -> those that `parameters` names, if writers of this format differ.

        Nothing is read here. What cannot be adapted stays as it is, so that the loader reports it.
        """
        return tensors

    def build(self, tensors: Mapping[str, Tensor], rows: tuple[int, ...], ops: Ops) -> Matmul:
        """The layer's product, from the tensors that `parameters` names: on the device, parts joined. rows: outputs of each part."""

    def resident_bytes(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> int:
        """Bytes of the built weight, without the bias. By default those of the declared tensors.

        itemsize: of the model's dtype. on_gpu: packed for a GPU, whose kernels pad inputs and store a zero next to its scale.
        """
        return sum(math.prod(param.shape) * (itemsize if param.dtype is None else DTYPE_BYTES[param.dtype])
                   for param in self.parameters(rows, cols).values())

    @property
    def type_name(self) -> str:
        """The type of the stored numbers in plans, such as int4 or Q4_K. Empty: the model's dtype."""
        return type(self).__name__.removesuffix("Method").lower()

    @property
    def reorders_inputs(self) -> bool:
        """Whether groups of inputs are not neighbors, so that no tensor-parallel rank can have some of the inputs."""
        return False

    @property
    def notice(self) -> str | None:
        """A line to print when a model with such layers is loaded."""
        return None

    def bytes_by_type(self, rows: tuple[int, ...], cols: int, itemsize: int, on_gpu: bool = False) -> dict[str, int]:
        """`resident_bytes` by `type_name`."""
        return {self.type_name: self.resident_bytes(rows, cols, itemsize, on_gpu)}


MethodOf: TypeAlias = Callable[[LinearSpec], LinearMethod]  # linear layer -> its method
