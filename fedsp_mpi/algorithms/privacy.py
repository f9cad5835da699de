"""Local differential privacy of what a client sends: its update is clipped, and gets Laplace noise.

What it promises: whatever text a client has, an update clipped to an L1 norm of C differs by at
most 2 C in that norm from what any other text would have made of it. So with Laplace noise of scale
b on every value, the tensors that go up in a round are epsilon-differentially private with epsilon
= 2 C / b, for the client's whole text (Dwork et al., 2006; Dwork and Roth, 2014, theorem 3.6),
before the server or anybody else sees them. Over the rounds that a client takes part in, epsilons
add up. Laplace noise is calibrated to the L1 norm; with a bound of the L2 norm, epsilon would grow
with the root of the number of values, so that is not what is clipped here.

What it does not: how many samples a client used, how many seconds it took, and whether it failed go
up as they are, and so does what poisoned clients tell about their attack, in the study of one;
losses are left out. Noise is computed in fp64 and rounded with the sum to fp32, so the attack on
the last bits of floating point (Mironov, 2012) is not excluded. Nothing is promised about what a
client keeps between rounds, its optimizer's moments, which lie in the run's folder as they are
(federation.client_state=restarted keeps nothing), and the server's own text, on which it tunes and
validates, has no noise. The scale that FedPrompt's table V was made with is not stated there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fedsp_mpi.algorithms.client_state import Client
from fedsp_mpi.tensors import NamedTensors, Update

Source = Callable[[int], bytes]
_STRETCH = 1 << 20  # values that are worked on at once


class LocalDPClient:
    """Clients of any method whose updates have the names and shapes of what comes down.

    Args:
        client: does the work.
        clip: largest L1 norm of an update, which is what was tuned less what was received.
        scale: of the Laplace noise on every value.
        source: gives so many random bytes; the operating system's. No seed makes this noise again.
    """

    def __init__(
        self, client: Client, clip: float, scale: float, source: Source = os.urandom
    ) -> None:
        self._client, self._clip, self._scale, self._source = client, clip, scale, source

    @property
    def states(self) -> Any:
        """What the clients keep between rounds."""
        return self._client.states

    def local(self, client: int, round: int, down: NamedTensors) -> Update:
        """One client's round, its tensors clipped and noisy, and without its losses.

        The same errors as without.
        """
        received = down.copy()
        update = self._client.local(client, round, down)
        tensors = privatised(received, update.tensors, self._clip, self._scale, self._source)
        told = {
            name: value for name, value in update.metrics.items() if not name.startswith("loss")
        }
        return replace(update, tensors=tensors, metrics=told)


def privatised(
    received: NamedTensors,
    tuned: NamedTensors,
    clip: float,
    scale: float,
    source: Source = os.urandom,
) -> NamedTensors:
    """received + (tuned - received) min(1, clip / |tuned - received|_1) + noise, in fp64 and
    rounded to fp32.

    Raises ValueError if names or shapes differ.
    """
    tuned.schema.require(received.schema, "update that is to be private")
    pieces = list(_stretches(len(tuned.flat)))
    norm = sum(float(np.abs(_difference(received, tuned, piece)).sum()) for piece in pieces)
    factor = min(1.0, clip / norm) if norm > 0 else 1.0
    flat = np.empty_like(tuned.flat)
    for piece in pieces:
        moved = received.flat[piece] + factor * _difference(received, tuned, piece)
        flat[piece] = moved + laplace(len(moved), scale, source)
    return NamedTensors(tuned.schema, flat)


def laplace(num: int, scale: float, source: Source = os.urandom) -> np.ndarray:
    """`num` draws of the Laplace distribution around 0, density exp(-|x| / scale) / (2 scale); fp64
    [num].

    Of each value's 64 random bits, 53 make a number u of (0, 1], and one the sign of scale ln u.
    """
    bits = np.frombuffer(source(8 * num), dtype="<u8")
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    return np.where(bits & np.uint64(1), 1.0, -1.0) * scale * np.log(uniform)


def _difference(received: NamedTensors, tuned: NamedTensors, piece: slice) -> np.ndarray:
    return tuned.flat[piece].astype(np.float64) - received.flat[piece]


def _stretches(num: int) -> Iterator[slice]:
    for start in range(0, num, _STRETCH):
        yield slice(start, start + _STRETCH)
