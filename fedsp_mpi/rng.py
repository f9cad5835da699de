"""Randomness keyed by meaning, so that a result does not depend on which process asked for it, or
when.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for (seed, purpose, round, client, ...); the same on every machine."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A numpy generator of its own for (seed, purpose, ...)."""
    return np.random.Generator(np.random.PCG64(key(seed, purpose, *numbers)))


def seed_torch(seed: int, purpose: str, *numbers: int) -> None:
    """Set torch's global generators (dropout, initialisation) for the stage that begins now."""
    import torch

    torch.manual_seed(key(seed, purpose, *numbers))
