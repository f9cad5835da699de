"""What a configuration says about data where clients are the users of experts.

Each expert's domain is an experiment's inputs of its own, whose server is the expert and whose
clients are its users. Joined they are the run's: a user owns the rows that it has in its domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from fedsp_mpi import rng
from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.tiers import ExpertConfig
from fedsp_mpi.data import loading, tasks
from fedsp_mpi.data.tokens import Question
from fedsp_mpi.run.inputs import ExperimentInputs
from fedsp_mpi.run.silo_inputs import choices_digest


class DomainText(ExperimentInputs):
    """Text in the words of one domain, in which questions can be asked."""

    @property
    def has_fixed_choices(self) -> bool:
        """Whether all questions of the domain have the same choices."""
        return self._has_classes

    def example_of(self, text: str) -> tasks.Example:
        """Return a question of the domain with a text of a user's in its words.

        The choices are those of the first training row, whose place the text takes.
        """
        tables = self._tables_of(self.task)
        task, _ = loading.with_found_classes(self.task, tables)
        split = "train" if "train" in tables else next(iter(tables))
        row = {**tables[split][0], task.columns[0]: text}
        return task.example(row)

    def questions_of(self, examples: Sequence[tasks.Example]) -> list[Question]:
        """Tokenise examples with their options."""
        return self._to_questions(examples)

    def choices(self) -> str | None:
        """Return a digest of the choices of all rows; None if they have none in common."""
        return choices_digest(self._all_examples, self.task)


class DomainInputs(DomainText):
    """One domain: the expert's and its users' text.

    Args:
        config: of the experiment.
        expert: of the domain.
        tiers: the run's inputs, which tell the model's shape and tokenizer.
        part: which part of the source's training rows is this domain's, and how many parts there
            are: experts of the same data share its rows out.

    Attributes:
        public: questions of the domain that every rank may open, in a place of their own; None
            where users share the experts' data.
    """

    public: DomainText | None = None

    def __init__(
        self, config: Config, expert: ExpertConfig, tiers: TierInputs, *, part: tuple[int, int]
    ) -> None:
        federation = replace(config.federation, clients=len(expert.users), users=expert.users)
        data = expert.data_over(config.data)
        super().__init__(replace(config, data=data, federation=federation))
        self.name = expert.name
        self._tiers = tiers
        self._part = part
        self.model_config = tiers.model_config
        self.tokenizer = tiers.tokenizer

    @property
    def candidates(self) -> torch.Tensor | None:  # type: ignore[override]
        """Ids of the tokens that losses run over, [num_candidates]: those of all domains."""
        return self._tiers.candidates

    def _load_splits(self) -> tasks.Splits:
        """Read the source, and keep this domain's part of train."""
        splits = self._read_splits()
        index, num_parts = self._part
        if num_parts == 1:
            return splits
        order = rng.generator(self.config.run.seed, "domains").permutation(len(splits.train))
        rows = np.sort(order[index::num_parts])
        note = f"train: part {index + 1} of {num_parts}, among the experts of this source"
        train = tuple(splits.train[row] for row in rows)
        return replace(splits, train=train, notes=(*splits.notes, note))

    def _read_splits(self) -> tasks.Splits:
        return super()._load_splits()

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work with this domain's text."""
        if self.task.metric != "multiple_choice":
            raise ConfigError(
                f"found the task {self.task.name}, whose answers are written freely, expected one "
                "of multiple choice, on which tiers are scored"
            )
        super().check()

    @cached_property
    def judged(self) -> list[Question]:
        """The first questions of the domain's test split, which tiers are scored on."""
        return self._to_questions(self.splits.test[: self.config.tiers.questions])


class TierInputs(ExperimentInputs):
    """Model and data of an experiment whose clients are the users of experts.

    The splits are those of all domains, one after the other. The server's shard is all that
    experts own; a client's, what its user has in all its domains, without what is held back.
    """

    @cached_property
    def domains(self) -> list[DomainInputs]:
        """The domain of each expert."""
        experts = self.config.tiers.experts
        sources = []
        for expert in experts:
            data = expert.data_over(self.config.data)
            sources.append((data.task, data.source))
        domains = []
        for index, expert in enumerate(experts):
            part = (sources[:index].count(sources[index]), sources.count(sources[index]))
            domains.append(self._domain_of(expert, part))
        return domains

    def _domain_of(self, expert: ExpertConfig, part: tuple[int, int]) -> DomainInputs:
        """Return an expert's domain; see `DomainInputs`."""
        return DomainInputs(self.config, expert, self, part=part)

    def own_candidates(self) -> torch.Tensor | None:
        """Return the candidates of all domains, int64 [num_candidates]; None where one of them
        asks for all tokens.

        Raises:
            ConfigError: candidates are asked for, and a domain's examples have different choices.
        """
        candidates = []
        for domain in self.domains:
            with named_domain(domain):
                of_domain = domain.own_candidates()
            if of_domain is None:
                return None
            candidates.append(of_domain)
        return torch.unique(torch.cat(candidates))

    @property
    def domains_read(self) -> Sequence[DomainInputs]:
        """The domains whose text this rank reads: all of them."""
        return self.domains

    @cached_property
    def members(self) -> list[tuple[int, ...]]:
        """The experts of each user, by client id."""
        tiers = self.config.tiers
        return [tiers.experts_of(user) for user in tiers.users]

    @property
    def paths(self) -> dict[str, str | None]:
        """What may be a file or a folder of the user, by the key that names it."""
        sources = {
            f"tiers.experts[{index}].source": domain.config.data.source
            for index, domain in enumerate(self.domains)
        }
        return super().paths | sources

    @property
    def task(self) -> tasks.Task:  # type: ignore[override]
        """The first domain's task; all are of multiple choice."""
        return self.domains[0].task

    @cached_property
    def _fitting_splits(self) -> tuple[tasks.Splits, tuple[str, ...]]:
        """The splits of all domains that are read, and notes on rows that are left out."""
        parts = [domain.splits for domain in self.domains_read]
        notes = tuple(
            f"{domain.name}: {note}" for domain in self.domains_read for note in domain.notes
        )
        splits = tasks.Splits(
            train=tuple(example for part in parts for example in part.train),
            validation=tuple(example for part in parts for example in part.validation),
            test=tuple(example for part in parts for example in part.test),
            notes=notes,
        )
        return splits, ()

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """None: those of the domains stand among the notes of their splits."""
        return ()

    @property
    def partition_notes(self) -> tuple[str, ...]:
        """None: no domain leaves a row without an owner."""
        return ()

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """Rows of train by participant, the experts' together first: int64, [num_rows] each.

        Raises:
            ConfigError: a user has no row left to train on.
        """
        experts_rows, users_rows = self._owned_rows
        return [experts_rows, *(trained for trained, _ in users_rows)]

    @cached_property
    def _owned_rows(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """The experts' rows, and those that each user trains on and holds back, all [num_rows]."""
        experts_rows: list[np.ndarray] = []
        users_rows: list[list[np.ndarray]] = [[] for _ in self.members]
        users = self.config.tiers.users
        offset = 0
        for domain in self.domains:
            with named_domain(domain):
                expert_rows, *shards = domain.shards
            experts_rows.append(offset + expert_rows)
            for user, rows in zip(domain.config.federation.users, shards, strict=True):
                users_rows[users.index(user)].append(offset + rows)
            offset += len(domain.splits.train)
        held_out = [
            self._hold_out(client, np.concatenate(rows)) for client, rows in enumerate(users_rows)
        ]
        return np.concatenate(experts_rows), held_out

    def _hold_out(self, client: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Divide a user's rows, [num_rows], into those to train on and those to judge by."""
        config = self.config
        if len(rows) < 2:
            raise ConfigError(
                f"tiers.experts: found {len(rows)} training rows of user "
                f"{config.tiers.users[client]}, expected at least 2, of which evaluation.held_out "
                "holds one back; raise the limit, or name fewer users"
            )
        order = rng.generator(config.run.seed, "held out", client).permutation(len(rows))
        num_held_out = min(len(rows) - 1, max(1, round(config.evaluation.held_out * len(rows))))
        return rows[np.sort(order[num_held_out:])], rows[np.sort(order[:num_held_out])]

    @property
    def shared_sources(self) -> Sequence[str | None]:
        """What every rank reads: the text of all domains."""
        return [domain.source for domain in self.domains]

    @property
    def public_examples(self) -> list[tasks.Example]:
        """The domains' questions that no owner has; none where users share the experts' data."""
        return []

    def words_of(self, client: int) -> dict[str, DomainText]:
        """Return text in whose words a user asks itself and its experts, by their names."""
        return {self.domains[expert].name: self.domains[expert] for expert in self.members[client]}

    def texts_of(self, client: int) -> dict[str, list[Question]]:
        """Return what a user's rank scores prompts on: "own", "domain" and "other" text."""
        experts = self.members[client]
        return {
            "own": self.own_text(client),
            "domain": self.domain_text(experts),
            "other": self.other_text(experts),
        }

    def own_text(self, client: int) -> list[Question]:
        """Return what a user holds back of its own text, at most as much as tiers are scored on."""
        return self._to_questions(self.own_examples(client))

    def own_examples(self, client: int, expert: int | None = None) -> list[tasks.Example]:
        """Return the same, before it is tokenised.

        Args:
            client: of the user.
            expert: only what is of this expert's domain; None: of all the user's domains.
        """
        _, users_rows = self._owned_rows
        _, rows = users_rows[client]
        # Of several domains, some of each.
        chosen = rows[self._judged_places(client, len(rows))]
        if expert is not None:
            sizes = [len(domain.splits.train) for domain in self.domains]
            offset = sum(sizes[:expert])
            chosen = chosen[(chosen >= offset) & (chosen < offset + sizes[expert])]
        return [self.splits.train[row] for row in chosen]

    def _judged_places(self, client: int, num_rows: int) -> np.ndarray:
        """Return the places of what is scored, of the rows that a user holds back: int64 [number
        of them], ascending.
        """
        order = rng.generator(self.config.run.seed, "own text", client).permutation(num_rows)
        return np.sort(order[: self.config.tiers.questions])

    def domain_text(self, experts: Sequence[int]) -> list[Question]:
        """Return test questions of some domains, an equal number of each."""
        share = -(-self.config.tiers.questions // max(1, len(experts)))
        return [question for expert in experts for question in self.domains[expert].judged[:share]]

    def other_text(self, experts: Sequence[int]) -> list[Question]:
        """Return test questions of all domains but those given; none if there are no others."""
        return self.domain_text([e for e in range(len(self.domains)) if e not in experts])

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work, before any weight is loaded."""
        self.check_model()
        for domain in self.domains:
            with named_domain(domain):
                domain.check()
        _ = self.shards
        _ = self.candidates
        _ = self.shard(0)
        _ = self.validation
        _ = self.alignment_texts


@contextmanager
def named_domain(domain: DomainInputs) -> Iterator[None]:
    """Name the expert in what is wrong with its domain."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"tiers.experts, {domain.name}: {error}") from None
