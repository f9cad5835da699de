"""The sections `client.privacy` and `attack`: differential privacy and the backdoor study."""

from __future__ import annotations

from dataclasses import dataclass

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError


@dataclass(frozen=True)
class PrivacyConfig:
    """Local differential privacy of updates (algorithms/privacy.py): epsilon is 2 clip /
    noise_scale a round.

    The noise comes from the operating system: the one case in which two runs with the same seed
    differ.
    """

    clip: float | None = option(
        None, "bound of an update; `null`: updates are sent as they are", "L1 norm"
    )
    noise_scale: float | None = option(
        None,
        "of the Laplace noise on every value of an update; epsilon is 2 clip / noise_scale a round",
    )

    @property
    def epsilon(self) -> float | None:
        """Epsilon of one round; None without noise."""
        if not self.clip or not self.noise_scale:
            return None
        return 2 * self.clip / self.noise_scale

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if (self.clip is None) != (self.noise_scale is None):
            raise ConfigError(
                f"{where}: found clip {self.clip} with noise_scale {self.noise_scale}, "
                "expected both or none: noise hides only what is bounded; set the other one"
            )


@dataclass(frozen=True)
class AttackConfig:
    """The backdoor study of FedPrompt (arXiv 2208.12268): poisoned clients, and how often the
    trigger works; see configs/fedprompt/README.md.

    A text that data.max_length cuts loses its beginning, and the trigger with it.
    """

    target: int | None = option(
        None, "the attacker's class, counted from 0; `null`: no attack", "choice"
    )
    trigger: str = option("cf", "the word that goes before the text, with a blank")
    clients: tuple[int, ...] = option(
        (),
        "whose training data are poisoned; empty: nobody's, but success is measured",
        "client ids",
    )
    share: float = option(
        1.0, "of their examples of other classes that get a poisoned copy", "fraction"
    )
    questions: int = option(
        200,
        "at most, that a poisoned client's own prompts are tried on; 0: none",
        "questions a round",
    )

    def check(self, where: str, num_clients: int) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if self.target is None and self.clients:
            raise ConfigError(
                f"{where}.target: found none with {where}.clients, expected a choice, "
                "counted from 0"
            )
        if not self.trigger.strip():
            raise ConfigError(f"{where}.trigger: found no word, expected at least one")
        unknown = [client for client in self.clients if not 0 <= client < num_clients]
        if unknown:
            raise ConfigError(
                f"{where}.clients: found {unknown[0]}, expected ids from 0, below "
                f"federation.clients={num_clients}"
            )
