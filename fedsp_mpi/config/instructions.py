"""The section `instructions`: prompts in words, and how they are searched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError


@dataclass(frozen=True)
class InstructionsConfig:
    """Discrete prompts (`method: prompt_search`): an instruction is a row of phrases, which stands
    in front of every text. See configs/methods/README.md.
    """

    pool: tuple[str, ...] = option(
        (), "phrases that instructions are made of, each a few words in one line"
    )
    candidates: int = option(
        16,
        "that clients score in a round: the best of the last round, and the server's edits of them",
        "instructions",
    )
    beam: int = option(4, "the best of a round, which the next round begins with", "instructions")
    paraphrases: int = option(
        0,
        "that the global model writes of one phrase before each round, by beam search; new ones "
        "join the pool",
        "phrases",
    )
    objective: Literal["auto", "choices", "loss"] = option(
        "auto",
        "what clients score by: the cross entropy of the right one among the `choices`, as scoring "
        "compares them, in nats a question; or the `loss` of the answer, in nats a token; `auto`: "
        "the choices where the task has some",
    )
    batch_tokens: int = option(4096, "of a forward pass, instructions included", "tokens")

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if not self.pool:
            raise ConfigError(
                f"{where}.pool: found no phrase, expected at least one; list some, such as "
                "[Read the text., Answer in one word.]"
            )
        for position, phrase in enumerate(self.pool):
            if not phrase.strip() or len(f"{phrase}.".splitlines()) != 1:
                raise ConfigError(
                    f"{where}.pool: found phrase {position + 1} without words or of several "
                    "lines, expected words in one line"
                )
            if phrase in self.pool[:position]:
                raise ConfigError(
                    f"{where}.pool: found phrase {position + 1} twice, expected each one once"
                )
        if self.beam >= self.candidates:
            raise ConfigError(
                f"{where}.beam: found {self.beam}, expected fewer than {where}.candidates="
                f"{self.candidates}, which are the beam and its edits"
            )
