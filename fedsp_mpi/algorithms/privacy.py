"""Local differential privacy: a client's update is clipped, and gets Laplace noise.

What it promises: whatever text a client has, an update clipped to an L1 norm of C differs by at
most 2 C in that norm from what any other text would have made of it. With Laplace noise of scale b
on every value, the tensors that go up in a round are therefore epsilon-differentially private with
epsilon = 2 C / b, for the client's whole text (Dwork et al., 2006; Dwork and Roth, 2014, theorem
3.6), before the server or anybody else sees them. Epsilons add up over the rounds that a client
takes part in. Laplace noise is calibrated to the L1 norm; with a bound of the L2 norm, epsilon
would grow with the root of the number of values, so that is not what is clipped here.

What it does not promise: the number of samples that a client used, its seconds, and whether it
failed go up as they are, and so does what poisoned clients report in the backdoor study; losses and
a method's own metrics are left out. Noise is computed in fp64 and rounded with the sum to fp32, so
the attack on the last bits of floating point (Mironov, 2012) is not excluded. Nothing is promised
about what a client keeps between rounds: its optimizer's moments lie in the run's folder as they
are (federation.client_state=restarted keeps nothing). The server's own text, on which it tunes and
validates, has no noise. FedPrompt does not state the scale that its table V was made with.

Compression (federation.compression) comes after the noise: what rounding makes of a noisy update,
and what it adds to the next one, is computed from what is private already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from fedsp_mpi.algorithms import backdoor
from fedsp_mpi.algorithms.base import Client, WrappedClient
from fedsp_mpi.tensors import NamedTensors, Update

RandomBytes = Callable[[int], bytes]
_CHUNK_VALUES = 1 << 20  # values that are worked on at once


class LocalDPClient(WrappedClient):
    """Clients of any method in which an update has the names and shapes of the broadcast.

    Args:
        client: does the work.
        clip: largest L1 norm of an update, which is what was tuned less what was received.
        scale: of the Laplace noise on every value.
        random_bytes: returns so many random bytes; those of the operating system, which no seed
            reproduces.
    """

    def __init__(
        self, client: Client, clip: float, scale: float, *, random_bytes: RandomBytes = os.urandom
    ) -> None:
        super().__init__(client)
        self._clip = clip
        self._scale = scale
        self._random_bytes = random_bytes

    def local_update(self, client: int, round: int, broadcast: NamedTensors) -> Update:
        """Train one client; return its update clipped, noisy, and without what its metrics tell.

        See `Client.local_update`.

        Raises:
            ClientError: as the client without noise.
        """
        received = broadcast.copy()
        update = self._client.local_update(client, round, broadcast)
        tensors = privatize(
            received,
            update.tensors,
            clip=self._clip,
            scale=self._scale,
            random_bytes=self._random_bytes,
        )
        # Only these: a method's own numbers may say as much of the text as its losses do.
        metrics = {
            name: value
            for name, value in update.metrics.items()
            if name.startswith("seconds_") or name in backdoor.METRICS
        }
        return replace(update, tensors=tensors, metrics=metrics)


def privatize(
    received: NamedTensors,
    tuned: NamedTensors,
    *,
    clip: float,
    scale: float,
    random_bytes: RandomBytes = os.urandom,
) -> NamedTensors:
    """Return received + (tuned - received) min(1, clip / |tuned - received|_1) + noise.

    Args:
        received: fp32 tensors, each [*shape] of the broadcast's schema.
        tuned: tensors of the same names and shapes.
        clip: largest L1 norm of the difference.
        scale: of the Laplace noise.
        random_bytes: returns so many random bytes.

    Returns:
        Tensors of the same names and shapes, computed in fp64 and rounded to fp32.

    Raises:
        ValueError: names or shapes differ.
    """
    tuned.schema.require(received.schema, "update that is to be private")
    chunks = list(_chunks(len(tuned.flat)))
    norm = sum(float(np.abs(_difference(received, tuned, chunk)).sum()) for chunk in chunks)
    factor = min(1.0, clip / norm) if norm > 0 else 1.0
    flat = np.empty_like(tuned.flat)
    for chunk in chunks:
        clipped = received.flat[chunk] + factor * _difference(received, tuned, chunk)
        flat[chunk] = clipped + laplace(len(clipped), scale, random_bytes)
    return NamedTensors(tuned.schema, flat)


def laplace(num: int, scale: float, random_bytes: RandomBytes = os.urandom) -> np.ndarray:
    """Draw from the Laplace distribution around 0, with density exp(-|x| / scale) / (2 scale).

    Of each value's 64 random bits, 53 make a number u of (0, 1], and one the sign of scale ln u.

    Args:
        num: number of draws.
        scale: of the distribution.
        random_bytes: returns so many random bytes.

    Returns:
        fp64 [num].
    """
    bits = np.frombuffer(random_bytes(8 * num), dtype="<u8")
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
    sign = np.where(bits & np.uint64(1), 1.0, -1.0)
    return sign * scale * np.log(uniform)


def _difference(received: NamedTensors, tuned: NamedTensors, chunk: slice) -> np.ndarray:
    return tuned.flat[chunk].astype(np.float64) - received.flat[chunk]


def _chunks(num_values: int) -> Iterator[slice]:
    for start in range(0, num_values, _CHUNK_VALUES):
        yield slice(start, start + _CHUNK_VALUES)
