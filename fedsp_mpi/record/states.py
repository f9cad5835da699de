"""A state as the bytes of a safetensors file, and back."""

from __future__ import annotations

import json

import numpy as np

from fedsp_mpi.record import atomic
from fedsp_mpi.tensors import State

_TYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64"}


def pack(state: State) -> list[atomic.Buffer]:
    """A safetensors file in parts: its header, and the arrays as they lie in memory."""
    header, parts, end = {}, [], 0
    for name, value in state.items():
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        header[name] = {
            "dtype": _TYPES[value.dtype.str],
            "shape": value.shape,
            "data_offsets": [end, end + flat.size],
        }
        parts.append(flat.data)
        end += flat.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def unpack(image: memoryview) -> State:
    """The arrays of `pack`, as writable views of the image."""
    start = 8 + int.from_bytes(image[:8], "little")
    names = {short: long for long, short in _TYPES.items()}
    found = {}
    for name, entry in json.loads(bytes(image[8:start])).items():
        begin, end = entry["data_offsets"]
        raw = image[start + begin : start + end]
        found[name] = np.frombuffer(raw, names[entry["dtype"]]).reshape(entry["shape"])
    return found
