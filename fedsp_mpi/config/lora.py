"""The section `lora`: low-rank adapters, which are tuned and travel in the place of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.parsing import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685): W + alpha / rank x B A."""

    rank: int = 8
    alpha: int = 16
    # Endings of the names of the linear maps that are adapted; none: those that peft takes for the
    # family.
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    # Of each client, in their order, from the beginning again where there are more clients; none:
    # all have `rank`. A client of a lower one tunes the first of the rows of A and columns of B.
    ranks: tuple[int, ...] = ()
    # factors: A and B are averaged by themselves; products: B A is, and divided again by a singular
    # value decomposition (FlexLoRA, Bai et al., 2024, arXiv 2402.11505).
    merge: Literal["factors", "products"] = "factors"

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        wrong = [rank for rank in self.ranks if not 1 <= rank <= self.rank]
        if wrong:
            raise ConfigError(
                f"{where}.ranks: found {wrong[0]}, expected ranks from 1 to "
                f"{where}.rank={self.rank}, which travels"
            )

    def rank_of(self, client: int) -> int:
        """Return the rank of a client's adapters."""
        return self.ranks[client % len(self.ranks)] if self.ranks else self.rank
