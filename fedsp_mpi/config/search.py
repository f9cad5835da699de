"""The section `search`: how prompts are searched for without gradients (FedBPT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option


@dataclass(frozen=True)
class SearchConfig:
    """Tuning without gradients (`method: fedbpt`): a search by CMA-ES for a short vector z; the
    prompt is the first one + A z. See configs/methods/README.md.
    """

    # The matrix A is random, follows from the seed, and never travels.
    dimension: int = option(500, "length of z; the prompt is the first one + A z", "numbers")
    population: int = option(
        5,
        "of an iteration of CMA-ES; each costs a forward pass over all of a client's text",
        "points",
    )
    iterations: int = option(8, "of a client", "iterations a round")
    step_size: float = option(1.0, "of the first round; A is scaled by it")
    spread: float = option(
        1.0,
        "of the first prompts from where they begin, in standard deviations of an embedding (of a "
        "first prefix's values)",
        "deviations",
    )
    objective: Literal["loss", "ratio_of_means", "mean_of_ratios"] = option(
        "ratio_of_means",
        "what clients minimise: the `loss`; the ratio of mean losses with the text and with the "
        "perturbed copy, as the paper's code has it (`ratio_of_means`); or the mean of such ratios "
        "over the examples, Eq. 7 (`mean_of_ratios`)",
    )
    perturbation: float = option(0.5, "of the words of the copy that are random", "fraction")
    rule: Literal["evolution", "average"] = option(
        "evolution",
        "the server's own CMA-ES, which ranks the clients' means; or `average`: what all clients' "
        "CMA-ES knows is averaged by their examples (FedAvg-BBT)",
    )
    # Both change with that of the server's CMA-ES, for which clients' means count as of points of
    # equal weights (FedBPT, Eq. 6), or of their own weights.
    step_size_by: Literal["server", "clients"] = option(
        "server",
        "whose step size a round begins with: the server's (FedBPT), or what the clients' came to "
        "in the last round",
    )
    rank_by: Literal["objective", "improvement"] = option(
        "objective",
        "what the server ranks its clients by: what each says of its mean (`objective`), or that "
        "divided by what it says of the mean that came down, so that texts need not be equally "
        "easy",
    )
    parents: Literal["half", "all"] = option(
        "half",
        "which clients' means the server moves to: all, good ones further, or the better half",
    )
    # Either way it is learned in as many steps as there are dimensions, so that in hundreds of
    # them the two are hardly different.
    covariance: Literal["full", "identity"] = option(
        "full",
        "`full`: it travels as its upper triangle; `identity`: it stays with the server, and "
        "clients begin each round with the identity, which saves nearly all bytes",
    )
    batch_tokens: int = option(4096, "of a forward pass, prompts included", "tokens")
    forward: Literal["clients", "server"] = option(
        "clients",
        "who runs the forward passes; `server`: its ranks, for clients that hold no model, whose "
        "text then goes to the server",
    )

    def travelling(self) -> tuple[list[str], list[str]]:
        """Return the names of a search's state that go down, and of those that come up.

        FedBPT's clients begin each round without evolution paths.
        """
        down = ["mean", "step_size"]
        if self.covariance == "full":
            down.append("covariance")
        if self.rule == "average":
            down += ["step_path", "mean_path"]
            return down, down
        if self.step_size_by == "clients":
            return down, ["mean", "step_size"]
        return down, ["mean"]

    @property
    def compares(self) -> bool:
        """Whether a client tries the mean that came down too, to be ranked by its improvement."""
        return self.rule == "evolution" and self.rank_by == "improvement"

    @property
    def points(self) -> int:
        """Points that a client tries in a round, its own mean among them."""
        num_means = 2 if self.compares else 1
        return self.iterations * self.population + num_means
