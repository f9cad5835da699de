"""Fewer bytes for what travels in rounds: changes in bf16, or in int8 blocks, with error feedback.

What travels is the change against a *reference*, values that both ends hold with the same bits. The
receiver adds what it decodes to its reference. Error feedback (Seide et al., 2014; Karimireddy et
al., 2019, arXiv 1901.09847, algorithm 2): what rounding took from a message, its *residual*, is
added to the sender's next one.

Both formats can be cut between blocks, so that vectors travel in chunks:

    bf16    2 bytes a value: the upper half of its fp32 bits, rounded to the nearest even
    int8    block by block: an fp32 scale, the largest absolute value / 127, then a byte a value,
            value / scale rounded to the nearest even, from -127 to 127. The last block has as many
            bytes as it has values.

All numbers are little-endian. Every operation on a value is one that IEEE 754 rounds exactly, so
all machines encode and decode to the same bits, whatever the chunks are.
"""

from __future__ import annotations

import numpy as np

from fedsp_mpi.config.federation import CompressionConfig

_SCALE_BYTES = 4
_LARGEST_CODE = 127
# The largest change that is encoded; far above what may be averaged, and below what bf16 holds.
_MAX_CHANGE = 1e38
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # smaller ones lose digits: their blocks become 0
_STRETCH = 1 << 20  # values that are in memory as fp64 at once


def num_bytes(num_values: int, compression: CompressionConfig) -> int:
    """Return the bytes that the first `num_values` values of a vector travel in."""
    if compression.format == "int8":
        num_blocks = -(-num_values // compression.block)
        return num_values + _SCALE_BYTES * num_blocks
    return num_values * (2 if compression.format == "bf16" else 4)


def scale_bytes(num_values: int, compression: CompressionConfig) -> int:
    """Return how many of `num_bytes` are scales, which belong to no tensor alone."""
    return num_bytes(num_values, compression) - num_values if compression.format == "int8" else 0


def between_blocks(num_values: int, compression: CompressionConfig) -> int:
    """Return the nearest number of values, not above if possible, at which messages may be cut."""
    if compression.format != "int8":
        return num_values
    return max(1, num_values // compression.block) * compression.block


def byte_range(part: slice, compression: CompressionConfig) -> slice:
    """Return where a range of values, which begins with a block, lies among a vector's bytes."""
    return slice(num_bytes(part.start, compression), num_bytes(part.stop, compression))


def encode(change: np.ndarray, compression: CompressionConfig) -> np.ndarray:
    """Encode a change, fp32 [num_values].

    Returns:
        uint8 [num_bytes].

    Raises:
        ValueError: a value is not finite, or too large.
    """
    largest = float(np.abs(change).max(initial=0))  # nan if any value is nan
    if not largest <= _MAX_CHANGE:
        raise ValueError(f"found a change of {largest:g}, expected finite numbers")
    if compression.format == "bf16":
        return _encode_bf16(change)
    return _encode_int8(change, compression.block)


def decode(packed: np.ndarray, num_values: int, compression: CompressionConfig) -> np.ndarray:
    """Decode a change.

    Args:
        packed: uint8 [num_bytes].
        num_values: of the change.
        compression: as it was encoded.

    Returns:
        fp32 [num_values], finite.

    Raises:
        ValueError: `encode` returns no such bytes.
    """
    expected = num_bytes(num_values, compression)
    if packed.size != expected:
        raise ValueError(f"found {packed.size} bytes, expected {expected}")
    if compression.format == "bf16":
        return _decode_bf16(packed)
    return _decode_int8(packed, num_values, compression.block)


def encode_change(
    values: np.ndarray, reference: np.ndarray, compression: CompressionConfig
) -> np.ndarray:
    """Encode values by their change against a reference, where nobody here needs them decoded.

    Args:
        values: fp32 [num_values].
        reference: fp32 [num_values], what the receiver holds.
        compression: format.

    Returns:
        What travels, uint8 [num_bytes].

    Raises:
        ValueError: a value is not finite.
    """
    packed = np.empty(num_bytes(values.size, compression), dtype=np.uint8)
    stretch = between_blocks(_STRETCH, compression)
    for start in range(0, values.size, stretch):
        part = slice(start, min(start + stretch, values.size))
        change = _change(values[part].astype(np.float64), reference[part])
        packed[byte_range(part, compression)] = encode(change, compression)
    return packed


def encode_against(
    values: np.ndarray,
    reference: np.ndarray,
    residual: np.ndarray | None,
    *,
    compression: CompressionConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode values by their change against a reference.

    Args:
        values: fp32 [num_values].
        reference: fp32 [num_values], what the receiver holds.
        residual: fp32 [num_values], what rounding took from the last message, which is replaced by
            what it takes from this one; None: no error feedback.
        compression: format.

    Returns:
        What travels, uint8 [num_bytes], and what the receiver makes of it, fp32 [num_values].

    Raises:
        ValueError: a value is not finite.
    """
    packed = np.empty(num_bytes(values.size, compression), dtype=np.uint8)
    received = np.empty(values.size, dtype=np.float32)
    stretch = between_blocks(_STRETCH, compression)
    for start in range(0, values.size, stretch):
        part = slice(start, min(start + stretch, values.size))
        target = values[part].astype(np.float64)
        if residual is not None:
            target += residual[part]
        change = _change(target, reference[part])
        encoded = encode(change, compression)
        received[part] = reference[part] + decode(encoded, change.size, compression)
        packed[byte_range(part, compression)] = encoded
        if residual is not None:
            residual[part] = target - received[part]
    return packed, received


def _change(target: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return fp64 [num_values] less fp32 [num_values], rounded once to fp32."""
    with np.errstate(over="ignore"):
        return (target - reference).astype(np.float32)


# -- bf16 ------------------------------------------------------------------------------------------


def _encode_bf16(change: np.ndarray) -> np.ndarray:
    bits = change.view(np.uint32)
    # Just below half of the last place, and one more where that place is odd.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype("<u2").view(np.uint8)


def _decode_bf16(packed: np.ndarray) -> np.ndarray:
    bits = packed.view("<u2").astype(np.uint32) << np.uint32(16)
    values = bits.view(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("found a bf16 value that is not finite, expected finite numbers")
    return values


# -- int8 blocks -----------------------------------------------------------------------------------


def _encode_int8(change: np.ndarray, block: int) -> np.ndarray:
    num_blocks = -(-change.size // block)
    blocks = np.zeros((num_blocks, block), dtype=np.float32)
    blocks.reshape(-1)[: change.size] = change
    scales = np.abs(blocks).max(axis=1, initial=0) / np.float32(_LARGEST_CODE)
    scales[scales < _SMALLEST_SCALE] = 0
    divisors = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(blocks / divisors[:, None])
    rows = np.empty((num_blocks, _SCALE_BYTES + block), dtype=np.uint8)
    rows[:, :_SCALE_BYTES] = scales.astype("<f4").view(np.uint8).reshape(num_blocks, _SCALE_BYTES)
    limit = np.float32(_LARGEST_CODE)
    rows[:, _SCALE_BYTES:] = codes.clip(-limit, limit).astype(np.int8).view(np.uint8)
    return rows.reshape(-1)[: change.size + _SCALE_BYTES * num_blocks]


def _decode_int8(packed: np.ndarray, num_values: int, block: int) -> np.ndarray:
    num_blocks = -(-num_values // block)
    rows = np.zeros((num_blocks, _SCALE_BYTES + block), dtype=np.uint8)
    rows.reshape(-1)[: packed.size] = packed
    scales = np.ascontiguousarray(rows[:, :_SCALE_BYTES]).view("<f4").reshape(-1)
    is_wrong = ~(np.isfinite(scales) & ~np.signbit(scales))
    if is_wrong.any():
        scale = scales[is_wrong.argmax()]
        raise ValueError(f"found {scale:g} as a scale, expected a finite number from 0")
    codes = rows[:, _SCALE_BYTES:].view(np.int8)
    if codes.min(initial=0) < -_LARGEST_CODE:
        raise ValueError(f"found a code below {-_LARGEST_CODE}, expected none")
    with np.errstate(over="ignore"):
        values = codes.astype(np.float32) * scales.astype(np.float32)[:, None]
    if not np.isfinite(values).all():
        raise ValueError("found a scale too large for its codes, expected finite numbers")
    return values.reshape(-1)[:num_values]
