"""Turn a state into the bytes of a safetensors file, and back."""

from __future__ import annotations

import json

import numpy as np

from fedsp_mpi.record import atomic
from fedsp_mpi.tensors import State

_SAFETENSORS_TYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64"}
_NUMPY_TYPES = {name: dtype for dtype, name in _SAFETENSORS_TYPES.items()}


def pack(state: State) -> list[atomic.Buffer]:
    """Return a safetensors file in parts: its header, then the arrays as they lie in memory."""
    header = {}
    parts: list[atomic.Buffer] = []
    end = 0
    for name, array in state.items():
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": [end, end + flat.size],
        }
        parts.append(flat.data)
        end += flat.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def unpack(image: memoryview) -> State:
    """Return the arrays that `pack` was given, as writable views of the image."""
    start = 8 + int.from_bytes(image[:8], "little")
    state = {}
    for name, entry in json.loads(bytes(image[8:start])).items():
        begin, end = entry["data_offsets"]
        raw = image[start + begin : start + end]
        state[name] = np.frombuffer(raw, _NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return state
