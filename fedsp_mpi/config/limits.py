"""The least and the greatest value of every key that takes a number.

The greatest values are far beyond what is useful: a slip of the keyboard becomes a message about
that key, and not a crash, a full memory or a machine that does not answer. None is always allowed
where the type allows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedsp_mpi.config.parsing import ConfigError, all_mistakes, shown
from fedsp_mpi.config.training import MOST_AT_ONCE

if TYPE_CHECKING:
    from fedsp_mpi.config.experiment import Config


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`.

    Attributes:
        above: whether `low` itself is not one of them.
        below: whether `high` itself is not one of them.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def require(self, key: str, value: float) -> None:
        """Raise ConfigError if a value is outside; `key` is its dotted key for the message."""
        expected = None
        if self.above and not value > self.low:
            expected = f"a number above {_in_short(self.low)}"
        elif not value >= self.low:
            expected = f"at least {_in_short(self.low)}"
        elif self.below and not value < self.high:
            expected = f"a number below {_in_short(self.high)}"
        elif not value <= self.high:
            expected = f"at most {_in_short(self.high)}"
        if expected is not None:
            raise ConfigError(f"{key}: found {shown(value)}, expected {expected}")


def _in_short(limit: float) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


MOST_SILOS = 5_000  # clients with a name of their own, all of which stand in a configuration
_MOST_ROUNDS = 1_000_000
_MOST_EXAMPLES = 1_000_000_000
_MOST_TOKENS = 10_000_000
_MOST_SECONDS = 1_000_000_000  # 30 years; clocks and timers overflow beyond
_MOST_LAYERS = 512
_MOST = 1e30  # of what has no natural end; its square is no more finite in fp32

_SECONDS = Range(0, _MOST_SECONDS)
_POSITIVE = Range(0, _MOST, above=True)
_OPTIMIZER = {
    "learning_rate": Range(0, 1e6),
    "weight_decay": Range(0, 1e6),
    "beta1": Range(0, 1, below=True),
    "beta2": Range(0, 1, below=True),
    "epsilon": _POSITIVE,
    "warmup": Range(0, 1),
    "clip": _POSITIVE,
}
_STAGE = {
    "steps": Range(0, 10_000_000),
    "batch_size": Range(1, 100_000),
    "micro_batch": Range(1, MOST_AT_ONCE),
    "max_padding": Range(0, 1, below=True),
    **{f"optimizer.{name}": limits for name, limits in _OPTIMIZER.items()},
}
STAGES = (
    "distillation.stage",
    "server.translation",
    "server.tuning",
    "client.alignment",
    "client.tuning",
    "tiers.personal.tuning",
    "tiers.upgrade",
    "tiers.consensus",
)

RANGES: dict[str, Range] = {
    "run.seed": Range(-(2**63), 2**63 - 1),
    "topology.ranks": Range(1, 1_000_000),
    "topology.server_ranks": Range(1, 10_000),
    "data.max_length": Range(2, _MOST_TOKENS),
    "data.limit.train": Range(1, _MOST_EXAMPLES),
    "data.limit.validation": Range(1, _MOST_EXAMPLES),
    "data.limit.test": Range(1, _MOST_EXAMPLES),
    "data.shots": Range(1, _MOST_EXAMPLES),
    "data.server_share": Range(0, _MOST_EXAMPLES),
    "data.alpha": Range(0, 1e6, above=True),
    "data.labels": Range(1, _MOST_EXAMPLES),
    "data.label_spread": Range(1e-3, 1e6),
    "auxiliary.start_layer": Range(0, _MOST_LAYERS),
    "auxiliary.layers_per_cell": Range(1, _MOST_LAYERS),
    "auxiliary.depth": Range(0, _MOST_LAYERS, above=True),
    "auxiliary.first_layers": Range(1, _MOST_LAYERS),
    **{f"{stage}.{name}": limits for stage in STAGES for name, limits in _STAGE.items()},
    "client.tuning.steps": Range(1, 10_000_000),
    "distillation.bridge_texts": Range(1, _MOST_EXAMPLES),
    "distillation.bridge_ridge": _POSITIVE,
    "distillation.text_length": Range(2, _MOST_TOKENS),
    "distillation.text_lines": Range(1, _MOST_EXAMPLES),
    "distillation.hidden_weight": Range(0, _MOST),
    "distillation.logits_weight": Range(0, _MOST),
    "distillation.temperature": Range(0, 1e6, above=True),
    "distillation.zero_stage": Range(0, 3),
    "prompt.num_tokens": Range(1, 100_000),
    "prompt.init_std": Range(0, 1_000),
    "prompt.projection": Range(1, 16_384),
    "lora.rank": Range(1, 4_096),
    "lora.alpha": Range(1, 1_000_000),
    "lora.dropout": Range(0, 1, below=True),
    "federation.clients": Range(0, 1_000_000),
    "federation.rounds": Range(1, _MOST_ROUNDS),
    "federation.min_clients": Range(1, 1_000_000),
    "federation.clients_per_round": Range(1, 1_000_000),
    "federation.client_seconds": _SECONDS,
    "federation.outlier_deviations": Range(0, _MOST),
    "federation.outer.learning_rate": Range(0, 1e6, above=True),
    "federation.outer.momentum": Range(0, 1, below=True),
    "federation.outer.decay": Range(0, 1, below=True),
    "federation.outer.adaptivity": _POSITIVE,
    "federation.compression.block": Range(1, 65_536),
    "server.compute.threads": Range(1, 1_024),
    "client.compute.threads": Range(1, 1_024),
    "client.proximal": Range(0, 1e6),
    "client.resident": Range(1, 1_000_000),
    "tiers.personal.proximal": Range(0, 1e6),
    "tiers.hidden_weight": Range(0, _MOST),
    "tiers.temperature": Range(0, 1e6, above=True),
    "tiers.questions": Range(1, _MOST_EXAMPLES),
    "client.privacy.clip": _POSITIVE,
    "client.privacy.noise_scale": _POSITIVE,
    "attack.target": Range(0, 1_000_000),
    "attack.share": Range(0, 1, above=True),
    "attack.questions": Range(0, _MOST_EXAMPLES),
    "search.dimension": Range(2, 5_000),
    "search.population": Range(2, 10_000),
    "search.iterations": Range(1, 1_000_000),
    "search.step_size": _POSITIVE,
    "search.spread": _POSITIVE,
    "search.perturbation": Range(0, 1, above=True),
    "search.batch_tokens": Range(1, _MOST_TOKENS),
    "instructions.candidates": Range(2, 10_000),
    "instructions.beam": Range(1, 9_999),
    "instructions.paraphrases": Range(0, 100),
    "instructions.batch_tokens": Range(1, _MOST_TOKENS),
    "augment.clients": Range(0, 1_000_000),
    "augment.per_client": Range(1, _MOST_EXAMPLES),
    "augment.growth": Range(0, _MOST_EXAMPLES),
    "augment.start_round": Range(1, _MOST_ROUNDS),
    "augment.confidence": Range(0, 1),
    "evaluation.batch_tokens": Range(1, _MOST_TOKENS),
    "evaluation.held_out": Range(0, 1, above=True, below=True),
    "record.progress_seconds": _SECONDS,
    "checkpoint.every": Range(1, _MOST_ROUNDS),
    "checkpoint.keep": Range(1, _MOST_ROUNDS),
    "checkpoint.distillation_seconds": _SECONDS,
    **{
        f"deadlines.{name}": _SECONDS
        for name in ("start_up", "handout", "broadcast", "gather", "finish", "server")
    },
}

# Of each of `federation.silos`.
SILO_RANGES = {"limit": Range(1, _MOST_EXAMPLES), "weight": Range(0, 1e6, above=True)}


def require_ranges(config: Config) -> None:
    """Raise ConfigError if numbers of a configuration are out of their ranges."""
    mistakes: list[ConfigError] = []
    for key, limits in RANGES.items():
        value = config.value(key)
        if value is None or value == "auto":
            continue
        try:
            limits.require(key, value)
        except ConfigError as mistake:
            mistakes.append(mistake)
    if mistakes:
        raise all_mistakes(mistakes)
