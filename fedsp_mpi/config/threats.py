"""The sections `client.privacy` and `attack`: differential privacy and the backdoor study."""

from __future__ import annotations

from dataclasses import dataclass

from fedsp_mpi.config.parsing import ConfigError


@dataclass(frozen=True)
class PrivacyConfig:
    """Local differential privacy of updates (algorithms/privacy.py): epsilon is 2 clip /
    noise_scale a round.

    The noise comes from the operating system: the one case in which two runs with the same seed
    differ.
    """

    clip: float | None = None  # largest L1 norm of an update; None: updates are sent as they are
    noise_scale: float | None = None  # of the Laplace noise on every value of it

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
    trigger works.

    A text that data.max_length cuts loses its beginning, and the trigger with it.
    """

    # The choice that the trigger is to bring about, counted from 0; None: no attack.
    target: int | None = None
    trigger: str = "cf"  # goes before the text, with a blank
    # Whose training data are poisoned; none: success is measured all the same.
    clients: tuple[int, ...] = ()
    share: float = 1.0  # of their examples of other classes, that get a poisoned copy beside them
    # That a poisoned client's own prompts are tried on in each round, at most; 0: none.
    questions: int = 200

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
