"""Randomness keyed by purpose, so that results do not depend on which process draws, or when."""

from __future__ import annotations

import hashlib

import numpy as np


def key(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for (seed, purpose, round, client, ...); the same on every machine."""
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return a new numpy generator for (seed, purpose, round, client, ...)."""
    return np.random.Generator(np.random.PCG64(key(seed, purpose, *numbers)))


def seed_torch(seed: int, purpose: str, *numbers: int) -> None:
    """Seed torch's global generators (dropout, initialisation) for the stage that begins now."""
    import torch

    torch.manual_seed(key(seed, purpose, *numbers))
