"""The section `data`: the task, where its rows come from, and who owns which of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.parsing import ConfigError, shown


@dataclass(frozen=True)
class LimitConfig:
    """The most rows of each split, taken from its beginning; None: all."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """The task and where its rows come from; `embedded` is the tiny world of the package."""

    task: str = "multiple_choice"
    # None: the task's own hub set; a folder; "hub/name[:configuration]"; "embedded".
    source: str | None = None
    # {task's column: file's column}, where the names differ; a list of columns where each choice
    # has one.
    columns: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # Of the task classification, in their order: data/classification.py. None: those of the rows.
    classes: tuple[str, ...] = ()
    # What number the first class or choice has in the user's own rows.
    first_label: Literal[0, 1] = 0
    # The user's own words, for example "{sentence} It was {mask}." with columns of the task:
    # data/templates.py.
    template: str | None = None  # None: the task's own, which is lm-eval's
    verbaliser: tuple[str, ...] = ()  # a word a class; none: the task's own
    max_length: int = 1024  # tokens of a training text; longer contexts lose their beginning
    limit: LimitConfig = LimitConfig()
    # Few-shot: so many examples of each class, drawn by the seed, are all of train.
    shots: int | None = None
    # What of the training split the server owns: None: a shard like every client's; a fraction
    # below 1; from 1 on, so many examples; 0: nothing, so that what clients learn is all there is.
    server_share: float | None = None
    # Among the owners: equal shards, label skew, quantity skew, or a client for each value of a
    # column of the training split; then null of server_share means 0.
    partition: Literal["iid", "labels", "quantity", "column"] = "iid"
    partition_column: str | None = None  # with partition=column
    # What an answer's cross entropy runs over: all tokens, or those that the task's choices are
    # made of. auto: the choices where every example has the same ones, else the vocabulary.
    loss_over: Literal["vocabulary", "choices", "auto"] = "vocabulary"
    # Of the Dirichlet distribution that makes the skew: 0.1 is strong, 100 hardly any.
    alpha: float = 0.5

    @property
    def resolved_server_share(self) -> float | None:
        """The server's share; 0 where it is not given and clients are the values of a column."""
        if self.partition == "column" and self.server_share is None:
            return 0.0
        return self.server_share

    def check(self, where: str) -> None:
        """Raise ConfigError, under the section's key `where`, on values that cannot work."""
        if self.server_share is not None and self.server_share > 1 and self.server_share % 1:
            raise ConfigError(
                f"{where}.server_share: found {self.server_share}, expected a fraction below 1, "
                "or a whole number of examples"
            )
        if (self.partition == "column") != (self.partition_column is not None):
            raise ConfigError(
                f"{where}.partition_column: found {shown(self.partition_column)} with "
                f"{where}.partition={self.partition}, expected the name of a column with "
                f"{where}.partition=column, and null otherwise; set the other one"
            )
