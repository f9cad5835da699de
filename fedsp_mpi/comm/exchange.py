"""What both ends of the wire hold where rounds are compressed: the last broadcast as decoded.

Every rank decodes every broadcast, whether its clients take part in the round or not, so that all
hold the same reference with the same bits: the next broadcast is a change against it, and so are
the updates of the clients, which start from it. It is handed out whole, at the start of a run and
when one is resumed.
"""

from __future__ import annotations

import numpy as np

from fedsp_mpi.config.federation import CompressionConfig
from fedsp_mpi.tensors import State

from .compression import between_blocks, byte_range, decode, encode_against, num_bytes

# The largest value of a broadcast: changes between such values can be encoded.
_MAX_VALUE = 1e37


class Exchange:
    """One rank's end of compressed rounds, with its reference.

    Args:
        compression: format of what travels.
        reference: fp32 [num_values], which is used as it is, not copied.

    Attributes:
        compression: as above.
        reference: as above; a broadcast replaces its values.
    """

    def __init__(self, compression: CompressionConfig, reference: np.ndarray) -> None:
        self.compression = compression
        self.reference = reference
        self._residual: np.ndarray | None = None  # of the server's broadcasts

    def chunk(self, num_values: int) -> int:
        """Return how many values a chunk has that is to have about `num_values`."""
        return between_blocks(num_values, self.compression)

    def num_bytes(self, part: slice) -> int:
        """Return the bytes that a chunk travels in."""
        where = byte_range(part, self.compression)
        return where.stop - where.start

    def cut(self, packed: np.ndarray, part: slice) -> np.ndarray:
        """Return a chunk's bytes, uint8 [num_bytes], of those of all values; no copy."""
        return packed[byte_range(part, self.compression)]

    def can_encode(self, values: np.ndarray) -> bool:
        """Return whether the server's values, fp32 [num_values], have a change that can travel.

        Values that are not finite have none; nor have those near the largest fp32 numbers.
        """
        return bool(np.abs(values).max(initial=0) <= _MAX_VALUE)

    def encode_broadcast(self, values: np.ndarray, part: slice, *, is_start: bool) -> np.ndarray:
        """Encode a chunk of the server's values, and make of the reference what all others will.

        Args:
            values: fp32 [num_values of the chunk].
            part: where it lies.
            is_start: whether a round begins with it; what silos are only to judge leaves the
                residual as it is, since nobody trains from it.

        Returns:
            uint8 [num_bytes of the chunk].

        Raises:
            ValueError: a value is not finite.
        """
        residual = None
        if self.compression.error_feedback:
            if self._residual is None:
                self._residual = np.zeros_like(self.reference)
            residual = self._residual[part]
            if not is_start:
                residual = residual.copy()
        packed, received = encode_against(
            values, self.reference[part], residual, compression=self.compression
        )
        self.reference[part] = received
        return packed

    def decode_broadcast(self, packed: np.ndarray, part: slice) -> None:
        """Decode a chunk of a broadcast, uint8 [num_bytes], into the reference.

        Raises:
            ValueError: these are no bytes of such a chunk.
        """
        self.reference[part] = self.decode(packed, part)

    def decode(self, packed: np.ndarray, part: slice) -> np.ndarray:
        """Return a chunk of an update, fp32 [num_values], from uint8 [num_bytes].

        Raises:
            ValueError: these are no bytes of such a chunk.
        """
        change = decode(packed, part.stop - part.start, self.compression)
        return self.reference[part] + change

    def require_size(self, packed: np.ndarray | None, whose: str) -> np.ndarray:
        """Return an update's bytes, uint8 [num_bytes], if all are there.

        Updates are packed where they are made, by `algorithms.compressed`.

        Raises:
            ValueError: they are not; begins with `whose`.
        """
        expected = num_bytes(self.reference.size, self.compression)
        if packed is None or packed.size != expected:
            actual = 0 if packed is None else packed.size
            raise ValueError(f"{whose}: found {actual} packed bytes, expected {expected}")
        return packed

    def state(self) -> State:
        """Return what the next broadcast depends on, fp32 [num_values] each."""
        state = {"reference": self.reference}
        if self._residual is not None:
            state["residual"] = self._residual
        return state

    def load_state(self, state: State) -> None:
        """Continue from `state()`, which is copied."""
        self.reference[:] = state["reference"]
        self._residual = state["residual"].copy() if "residual" in state else None
