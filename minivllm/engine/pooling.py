"""Pooling: the final hidden states of a prompt become one vector, an embedding.

    step      [0 .. 511]  [512 .. 1023]  [1024 .. 1199]      chunks of one prompt
    worker      sum           sum             sum            float32, on the device
    here       └────────── added up ───────────┘ / 1200      MEAN; LAST: only the state of the last token arrives
    ends with   the first `dimensions` entries, scaled to length 1

A sum needs 4 bytes for each entry of the hidden state, so the states themselves never leave the device.
"""
from __future__ import annotations

import sys
from array import array
from pathlib import Path

import numpy as np

from minivllm.errors import InvalidInput
from minivllm.families.model_folder import check_inside, read_json
from minivllm.sampling_params import PoolingParams


def default_pooling(folder: Path) -> PoolingParams:
    """The defaults of a model: as its file for sentence-transformers says, else the last token; vectors have length 1.

    Raises `ModelError` if that file is damaged, or a link leads out of the folder to it."""
    path, kind = folder / "1_Pooling" / "config.json", "LAST"
    if path.is_file():
        check_inside(path, folder, "model")
        modes = [name for name, on in read_json(path).items() if name.startswith("pooling_mode") and on is True]
        if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_lasttoken"]):
            print(f"minivllm: {path} names {' and '.join(modes) or 'no pooling'}, which is not supported: embeddings are "
                  "the hidden states of last tokens", file=sys.stderr, flush=True)
        kind = "MEAN" if modes == ["pooling_mode_mean_tokens"] else "LAST"
    return PoolingParams(pooling_type=kind, use_activation=True)


def check_dimensions(params: PoolingParams, size: int) -> None:
    """Raise `InvalidInput` if more entries are wanted than a vector has."""
    if params.dimensions is not None and params.dimensions > size:
        raise InvalidInput(f"dimensions must be at most {size}, the size of this model's vectors, got {params.dimensions}: lower it, or "
                           "leave it out", "dimensions")


class PooledPrompt:
    """The sum of a prompt's hidden states so far."""

    def __init__(self, params: PoolingParams, num_tokens: int) -> None:
        self._params, self._num_tokens = params, num_tokens
        self._sum: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
        self._count = self._end = 0

    def add(self, first: int, count: int, data: bytes) -> None:
        """data: the float32 sum over positions [first, first + count).

        After a preemption without a swap, the prompt is computed again from position 0, and so is the sum."""
        new = np.frombuffer(data, np.float32).astype(np.float64)
        if self._params.needs_all and first:
            assert self._sum is not None and first == self._end, "chunks of a prompt follow each other"
            self._sum, self._count = self._sum + new, self._count + count
        else:
            self._sum, self._count = new, count
        self._end = first + count

    def vector(self) -> bytes:
        """The finished vector, as float32."""
        assert self._sum is not None and self._end == self._num_tokens, "the whole prompt is computed"
        vector = (self._sum / self._count)[:self._params.dimensions]
        if not np.isfinite(vector).all():
            raise ValueError("hidden states that are infinite or not a number")
        if self._params.use_activation:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype(np.float32).tobytes()


def floats(vector: bytes) -> list[float]:
    """The entries of a float32 vector."""
    return array("f", vector).tolist()


def cosine(one: bytes, other: bytes) -> float:
    """Cosine similarity of two float32 vectors, from -1 to 1; 0 if one of them is 0."""
    x, y = (np.frombuffer(vector, np.float32).astype(np.float64) for vector in (one, other))
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-12))
