"""The section `search`: how prompts are searched for without gradients (FedBPT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SearchConfig:
    """Tuning without gradients: a search by CMA-ES for a short vector z; the prompt is the first
    one + A z (FedBPT).
    """

    dimension: int = 500  # of z; A is random, follows from the seed, and never travels
    # Points of an iteration; each costs a forward pass over all of a client's text.
    population: int = 5
    iterations: int = 8  # of a client in a round
    # Of the first round; A is scaled by it, so it only says what the numbers of z are like.
    step_size: float = 1.0
    # Of the first prompts around where they begin, in standard deviations of an embedding.
    spread: float = 1.0
    # What is minimised: the loss; the mean loss over the mean loss of a copy of the text in which a
    # share of the words is random (as the reference does); or the mean of such ratios over the
    # examples (FedBPT, Eq. 7).
    objective: Literal["loss", "ratio_of_means", "mean_of_ratios"] = "ratio_of_means"
    perturbation: float = 0.5  # that share
    # evolution: the server's own CMA-ES ranks the clients' means (FedBPT); average: what all
    # clients' CMA-ES knows is averaged by their examples (FedAvg-BBT).
    rule: Literal["evolution", "average"] = "evolution"
    # Whose step size a client begins a round with. server: its own (FedBPT); clients: what theirs
    # came to in the last round. Both change with that of the server's CMA-ES, for which clients'
    # means count as of points of equal weights (FedBPT, Eq. 6), or of their own weights.
    step_size_by: Literal["server", "clients"] = "server"
    # What the server ranks its clients' means by. objective: what each says of its own, on text of
    # its own (FedBPT); improvement: that divided by what it says of the mean that came down, so
    # that texts need not be equally easy.
    rank_by: Literal["objective", "improvement"] = "objective"
    # Which of the clients' means the server moves to, good ones further than bad ones. half: the
    # better half, as CMA-ES does (FedBPT); all: every one, as the reference does.
    parents: Literal["half", "all"] = "half"
    # full: it travels as its upper triangle; identity: clients begin each round with the identity,
    # which saves nearly all bytes. In hundreds of dimensions the two are hardly different: it is
    # learned in as many times as many steps.
    covariance: Literal["full", "identity"] = "full"
    batch_tokens: int = 4096  # of a forward pass, prompts among them
    # Who runs the forward passes: clients, on the model that is handed out to them; or the server's
    # ranks, for clients that hold no model, whose text then goes to the server.
    forward: Literal["clients", "server"] = "clients"

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
