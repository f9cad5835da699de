"""The section `data`: the task, where its rows come from, and who owns which of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsp_mpi.config.options import option
from fedsp_mpi.config.parsing import ConfigError, shown


@dataclass(frozen=True)
class LimitConfig:
    """The most rows of each split, taken from its beginning."""

    train: int | None = option(None, "use the first rows of the split only; `null`: all", "rows")
    validation: int | None = option(None, "the same of the validation split", "rows")
    test: int | None = option(None, "the same of the test split", "rows")


@dataclass(frozen=True)
class DataConfig:
    """The task and where its rows come from; `embedded` is the tiny world of the package."""

    task: str = option(
        "multiple_choice",
        "`arc_easy`, `arc_challenge`, `openbookqa`, `web_questions`, `hellaswag`, `piqa`, `sciq`, "
        "`race`, `sst2`, `rte`, `ag_news`; or your own text: `classification` (columns `text`, "
        "`label`), `multiple_choice` (`context`, `choices`, `label`), `question_answering` "
        "(`context`, `answers`), which configs/own_text/README.md describes. `race` scores "
        "one problem a row of `ehovy/race`, which alone has all splits",
    )
    source: str | None = option(
        None,
        "`null`: the task's own hub set; or a folder, with your own text also one file, "
        "`hub/name[:configuration]`, or `embedded`, the tiny world of the package. A folder's "
        "splits may be called train, training; validation, valid, val, dev, eval; test, testing",
    )
    columns: dict[str, str | tuple[str, ...]] = option(
        {},
        "`{context: question, label: answer}`: the task's columns as your files name them. A label "
        "is a position, the words of a choice, its letter, or a class whose name the file's schema "
        "gives; rows with a blank label are left out. Choices with a column each: "
        "`choices: [a, b, c, d]`",
    )
    classes: tuple[str, ...] = option(
        (),
        "of `classification`, in their order: names, or what the rows write for them. Empty: those "
        "of the rows, at most 100, which a note says",
    )
    first_label: Literal[0, 1] = option(
        0, "the number of the first class or choice where your labels are numbers"
    )
    template: str | None = option(
        None,
        'your own words around the text, such as `"{sentence} It was {mask}."`, with columns of '
        "the task, or, with your own text, any columns of the rows; there the answer follows at "
        "the end if no `{mask}` says where. `null`: the task's, which are lm-eval's",
    )
    verbaliser: tuple[str, ...] = option(
        (), "one word for each class, in their order; empty: the task's own"
    )
    max_length: int = option(
        1024,
        "of a training text; longer contexts lose their beginning, and a note counts them",
        "tokens",
    )
    limit: LimitConfig = LimitConfig()
    shots: int | None = option(
        None,
        "few-shot: keep this many training examples of each class, drawn by the seed",
        "examples",
    )
    labels: int | None = option(
        None,
        "few labels: clients keep this many labelled examples in all, drawn by the seed; the rest "
        "of their text is without labels, and of use to `augment` alone. `null`: all are labelled",
        "examples",
    )
    label_spread: float = option(
        1.0,
        "with `data.labels`, gamma of the Dirichlet distribution of labels over clients: 0.01 "
        "leaves nearly all of them with one client, 100 spreads them evenly",
    )
    server_share: float | None = option(
        None,
        "the server's part of the training split. `null`: a shard like a client's (with "
        "`partition: column`, nothing); below 1: a fraction; from 1 on: a number of examples; 0: "
        "nothing, the server only averages",
        "fraction or examples",
    )
    partition: Literal["iid", "labels", "quantity", "column"] = option(
        "iid",
        "among the owners: `iid` deals out evenly, `labels` skews the classes, `quantity` the "
        "sizes; `column`: a client for each value of `data.partition_column`",
    )
    partition_column: str | None = option(
        None,
        "with `partition: column`: a column of the training split, such as `user_id`, with text, "
        "numbers or truth values. `federation.clients` must be the number of its values (5,000 at "
        "most); rows without a value are left out, with a note",
    )
    loss_over: Literal["vocabulary", "choices", "auto"] = option(
        "vocabulary",
        "the tokens that an answer's cross entropy runs over: the whole `vocabulary`, or those of "
        "the `choices`; `auto`: the choices where every example has the same ones, with "
        "`tiers` every example of a domain, else the vocabulary",
    )
    alpha: float = option(
        0.5,
        "of the Dirichlet distribution behind the skew: 0.1 is strong, 100 hardly any",
    )

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
