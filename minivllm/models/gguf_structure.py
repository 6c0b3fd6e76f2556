"""The structure of a GGUF file's header, checked before anything is read with the gguf package.

    magic, version | number of tensors, of keys | keys and values | name, dimensions, type and offset of each tensor | padding | tensors

The package trusts every number in a file: a count of 2^62 in a file of 49 bytes makes it loop for good. Here each count, length and
offset is compared with the size of the file first, in one pass that keeps nothing.
"""
from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from minivllm.errors import shown

MAGIC = b"GGUF"
# Far more than any model has. The package makes Python objects for each of them.
MAX_KEYS, MAX_TENSORS, MAX_ELEMENTS = 1 << 16, 1 << 17, 1 << 22
MAX_NAME, MAX_DIMENSIONS = 65_535, 4
STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> bytes


class OtherByteOrder(ValueError):
    """The file was written for a processor with the other byte order."""


def check_structure(path: Path) -> None:
    """Raise `ValueError` for a file whose header contradicts its own size, or is larger than that of any model."""
    if path.stat().st_size < 24:
        raise ValueError("it ends inside the header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _Walk(content).check()


class _Walk:
    """A position in the file that only moves forward."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._size, self._at = content, len(content), 0
        self._elements = 0  # of arrays so far

    def check(self) -> None:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if version and version & 0xFFFF == 0:
            raise OtherByteOrder
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported; 2 and 3 are")
        tensors, keys = self._count("tensors", MAX_TENSORS), self._count("metadata keys", MAX_KEYS)
        for _ in range(keys):
            self._skip_name()
            self._skip_value(self._number("<I"))
        for _ in range(tensors):
            self._skip_tensor()

    def _take(self, size: int) -> bytes:
        self._skip(size)
        return self._content[self._at - size:self._at]

    def _skip(self, size: int) -> None:
        if size > self._size - self._at:
            raise ValueError(f"it has {size:,} bytes less than its header says at byte {self._at}")
        self._at += size

    def _number(self, form: str) -> int:
        size = struct.calcsize(form)
        self._skip(size)
        found: int = struct.unpack_from(form, self._content, self._at - size)[0]
        return found

    def _count(self, what: str, limit: int) -> int:
        count = self._number("<Q")
        if count > limit:
            raise ValueError(f"it claims to have {count:,} {what}, and no model has more than {limit:,}")
        return count

    def _skip_text(self) -> None:
        self._skip(self._number("<Q"))

    def _skip_name(self) -> None:
        """Of a key or a tensor. Names are shown in messages, so they must not contain line ends or codes for terminals."""
        length = self._number("<Q")
        if length > MAX_NAME:
            raise ValueError(f"a name has {length:,} bytes, and at most {MAX_NAME:,} are allowed")
        if not (name := self._take(length).decode()).isprintable():
            raise ValueError(f"the name {shown(name)} is not printable")

    def _skip_value(self, kind: int) -> None:
        if kind == STRING:
            self._skip_text()
        elif kind == ARRAY:
            self._skip_array()
        elif kind in SIZES:
            self._skip(SIZES[kind])
        else:
            raise ValueError(f"{kind} is not the type of a value")

    def _skip_array(self) -> None:
        kind = self._number("<I")
        if kind == ARRAY:
            raise ValueError("it has an array of arrays, which no model has")
        count = self._count("elements in one array", MAX_ELEMENTS)
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise ValueError(f"its arrays have more than {MAX_ELEMENTS:,} elements")
        if kind in SIZES:
            self._skip(SIZES[kind] * count)
        else:
            for _ in range(count):
                self._skip_value(kind)

    def _skip_tensor(self) -> None:
        self._skip_name()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions, and only 1 to {MAX_DIMENSIONS} exist")
        shape = [self._number("<Q") for _ in range(dimensions)]
        if math.prod(shape) > 8 * self._size:  # one bit per number is the least
            raise ValueError(f"a tensor has the shape {shape}, which cannot be in a file of {self._size:,} bytes")
        self._skip(4)  # the type
        if (offset := self._number("<Q")) > self._size:
            raise ValueError(f"a tensor begins {offset:,} bytes behind the header")
