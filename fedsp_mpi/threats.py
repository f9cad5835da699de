"""The parts of a configuration that say what clients are afraid of, and what is to be feared from them."""

from __future__ import annotations

from dataclasses import dataclass

from fedsp_mpi.plain import ConfigError


@dataclass(frozen=True)
class PrivacyConfig:
    """Local differential privacy of updates (algorithms/privacy.py): epsilon is 2 clip / noise_scale a round.

    The noise comes from the operating system: the one case in which two runs with the same seed differ.
    """

    clip: float | None = None  # largest L1 norm of an update; None: updates are sent as they are
    noise_scale: float | None = None  # of the Laplace noise on every value of it

    @property
    def epsilon(self) -> float | None:
        """Of one round; None without noise."""
        return 2 * self.clip / self.noise_scale if self.clip and self.noise_scale else None

    def check(self, where: str) -> None:
        if (self.clip is None) != (self.noise_scale is None):
            raise ConfigError(
                f"{where}: found clip {self.clip} with noise_scale {self.noise_scale}, expected both or "
                "none: noise hides only what is bounded; set the other one"
            )
        for name in ("clip", "noise_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{where}.{name}: found {value}, expected a number above 0, or null")
