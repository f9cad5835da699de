"""The section `lora`: low-rank adapters, which are tuned and travel in the place of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation, W + alpha / rank x B A (Hu et al., 2021), with `method: lora`.

    Clients hold the whole model; A and B travel.
    """

    rank: int = option(8, "columns of B and rows of A")
    alpha: int = option(16, "the product counts alpha / rank times")
    targets: tuple[str, ...] = option(
        (),
        "endings of the names of the linear maps that are adapted, such as `[q_proj, v_proj]`; "
        "none: those that peft takes for the family",
    )
    dropout: float = option(0.0, "of what enters A, while clients or server tune", "fraction")
    ranks: tuple[int, ...] = option(
        (),
        "of each client, in their order, from the beginning again where there are more clients: a "
        "lower rank tunes the first rows of A and columns of B, and sends 0 for the others; none: "
        "all have `rank`",
    )
    merge: Literal["factors", "products"] = option(
        "factors",
        "`factors`: A and B are averaged by themselves; `products`: B A is, and divided again by "
        "a singular value decomposition (FlexLoRA, Bai et al., 2024)",
    )

    merged: bool = option(
        False,
        "also write the model with the adapters merged into its weights, which `model.after` of a "
        "later run names",
    )

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
