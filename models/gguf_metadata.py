"""The metadata of a .gguf file: config, vocabulary, chat template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package takes seconds to
read a vocabulary, because it makes three views of a memory map for every string.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from srit.runtime.files import InputError
from srit.runtime.limits import GGUF_ITEMS, GGUF_KEYS, GGUF_STRING_BYTES, GGUF_TENSORS

SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8",
           11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
DIMENSIONS = 4


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        chunk = self.data[self.at : self.at + size]
        if len(chunk) != size:
            raise EOFError("the file ends in its metadata")
        self.at += size
        return chunk

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, limit: int, what: str) -> int:
        count = self.number("<Q")
        if count > limit:
            raise ValueError(f"{count:,} {what}, the limit is {limit:,}")
        return count

    def text(self) -> str:
        return self.take(self.count(GGUF_STRING_BYTES, "bytes of text")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number("<I"), self.count(GGUF_ITEMS, "items in an array")
            if kind == ARRAY:
                raise ValueError("an array of arrays")
            return self.array(kind, count) if kind != STRING else [self.text() for _ in range(count)]
        return self.array(kind, 1)[0]

    def array(self, kind: int, count: int) -> list:
        dtype = np.dtype("<" + SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()


def read_metadata(path: Path) -> dict[str, Any]:
    """All metadata keys and their values, as plain Python objects.

    Raises InputError if the file is damaged, truncated, or not little-endian GGUF version 2 or 3.
    """
    with open(path, "rb") as handle:
        try:
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                cursor = _Cursor(data)
                magic, version = cursor.take(4), cursor.number("<I")
                if magic != b"GGUF" or version not in (2, 3):
                    raise ValueError(f"starts with {magic!r}, version {version}")
                tensors = cursor.count(GGUF_TENSORS, "tensors")
                found = {}
                for _ in range(cursor.count(GGUF_KEYS, "keys")):
                    key = cursor.text()
                    found[key] = cursor.value(cursor.number("<I"))
                for _ in range(tensors):  # for the gguf package, which believes what it reads
                    cursor.text()
                    if (dimensions := cursor.number("<I")) > DIMENSIONS:
                        raise ValueError(f"a tensor of {dimensions:,} dimensions")
                    cursor.take(8 * dimensions + 12)  # sizes, type, offset
                return found
        except (ValueError, KeyError, EOFError, OverflowError) as error:
            raise InputError(f"{path}: damaged or not GGUF ({error})") from None
