"""What a configuration says about data where the users of experts have silos.

A user's silo is opened by the rank that plays it alone, an expert's text by the server's alone.
What every rank may open, to score prompts on a domain, is public text in a place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from fedsp_mpi.config import Config, ConfigError
from fedsp_mpi.config.tiers import ExpertConfig
from fedsp_mpi.data import loading, tasks
from fedsp_mpi.data.tokens import Question
from fedsp_mpi.run.silo_inputs import SiloInputs, SiloText, load_judged
from fedsp_mpi.run.tier_inputs import DomainInputs, DomainText, TierInputs, named_domain


class UserText(SiloText, DomainText):
    """One user's silo, on the rank that plays it; some of it is always held back."""

    @property
    def holds_back(self) -> bool:
        """True: a user's rank scores all tiers on what its user holds back."""
        return True

    def held_out_places(self, places: np.ndarray) -> list[tasks.Example]:
        """Return the examples at places, int64 [any number], of what is held back."""
        return [self._held_out_examples[place] for place in places.tolist()]


class PublicText(DomainText):
    """Questions of a domain that every rank may open.

    Args:
        config: of the experiment.
        expert: of the domain.
        tiers: the run's inputs, which tell the model's shape and tokenizer.
    """

    def __init__(self, config: Config, expert: ExpertConfig, tiers: TierInputs) -> None:
        data = expert.data_over(config.data)
        data = replace(data, source=expert.public_test, loss_over="vocabulary")
        super().__init__(replace(config, data=data))
        self.model_config = tiers.model_config
        self.tokenizer = tiers.tokenizer

    def _load_splits(self) -> tasks.Splits:
        data = self.config.data
        return loading.load(
            self.task,
            self.source,
            seed=self.config.run.seed,
            limit={"test": data.limit.test},
            columns=data.columns,
            owner="public",
        )


class ExpertInputs(DomainInputs):
    """One domain, whose text is the expert's own.

    Args:
        config: of the experiment.
        expert: of the domain.
        tiers: the run's inputs, which tell the model's shape and tokenizer.
        part: as in `DomainInputs`.
    """

    def __init__(
        self, config: Config, expert: ExpertConfig, tiers: TierInputs, *, part: tuple[int, int]
    ) -> None:
        super().__init__(config, expert, tiers, part=part)
        self.public = PublicText(config, expert, tiers) if expert.public_test is not None else None

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """All rows of train, int64 [num_rows], which are the expert's."""
        return [np.arange(len(self.splits.train))]

    @cached_property
    def judged(self) -> list[Question]:
        """The first questions of the public test text; without one, of the expert's own."""
        if self.public is None:
            return super().judged
        return self.public.test[: self.config.tiers.questions]

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work with the expert's text."""
        self._require_splits()
        super().check()
        if self.public is None:
            return
        if self.public.choices() != self.choices():
            raise ConfigError(
                f"public_test: found other choices in {self.public.source!r} than in the expert's "
                "rows, expected the same labels; correct them, or name all in classes"
            )

    def _read_splits(self) -> tasks.Splits:
        return load_judged(self, self.config.data.columns)

    def _require_splits(self) -> None:
        """Raise ConfigError if the expert lacks rows that it needs."""
        config = self.config
        splits = self.splits
        if not splits.validation:
            raise ConfigError(
                f"found no rows of validation in {self.source!r}, expected some, by which the "
                "expert chooses the best round"
            )
        for key in ("server.tuning", "tiers.upgrade", "tiers.consensus"):
            steps = config.value(key).steps
            if steps and not splits.train:
                raise ConfigError(
                    f"found no rows of train in {self.source!r}, expected some for {key}; or set "
                    f"{key}.steps=0"
                )


class UserSiloInputs(SiloInputs, TierInputs):
    """Model and data of an experiment whose clients are the users of experts, and have silos.

    The splits are those of all experts, one after the other, on the server's rank 0, and on its
    other ranks of those that they play. A user's own text and what it holds back are its silo's.

    Args:
        config: of the experiment, its silos found.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._experts_read: Sequence[int] = range(len(config.tiers.experts))

    @property
    def domains_read(self) -> Sequence[DomainInputs]:
        """The domains of the experts whose text this rank reads."""
        return [self.domains[expert] for expert in self._experts_read]

    def read_only_experts(self, experts: Sequence[int], candidates: Sequence[int] | None) -> None:
        """Leave the text of other experts alone, on a rank of the server that plays some.

        Args:
            experts: indexes of those that it plays.
            candidates: ids of the tokens that losses run over, from the text of all experts; None:
                all tokens.
        """
        self._experts_read = experts
        self.candidates = None if candidates is None else torch.tensor(candidates)

    @property
    def task(self) -> tasks.Task:  # type: ignore[override]
        """The first domain's task; all are of multiple choice."""
        return self.domains[0].task

    @property
    def paths(self) -> dict[str, str | None]:
        """What may be a file or a folder of the user, by the key that names it."""
        public = {
            f"tiers.experts[{index}].public_test": expert.public_test
            for index, expert in enumerate(self.config.tiers.experts)
        }
        return super().paths | public

    @property
    def shared_sources(self) -> Sequence[str | None]:
        """The domains' public text, which every rank may read."""
        return [expert.public_test for expert in self._public_experts]

    @property
    def public_examples(self) -> list[tasks.Example]:
        """The questions of the domains' public text."""
        texts = [domain.public for domain in self.domains]
        return [example for text in texts if text is not None for example in text.splits.test]

    def _domain_of(self, expert: ExpertConfig, part: tuple[int, int]) -> ExpertInputs:
        return ExpertInputs(self.config, expert, self, part=part)

    @property
    def _public_experts(self) -> list[ExpertConfig]:
        return [expert for expert in self.config.tiers.experts if expert.public_test is not None]

    # -- users -------------------------------------------------------------------------------------

    def text_of(self, client: int) -> UserText:
        """Return a user's text, of which nothing has been read."""
        return UserText(self.config, client, self)

    def open_silo(self, client: int) -> SiloText:
        """Open a user's silo, and the public text that its rank scores prompts on, too.

        Raises:
            ValueError: one of them cannot be used.
        """
        text = super().open_silo(client)
        if self._public_experts:
            _ = self.domain_text(range(len(self.domains)))
        return text

    def _opened_text(self, client: int) -> UserText:
        """Return the text of a user of this rank; outside a run it is opened when it is read."""
        text = self.opened.setdefault(client, self.text_of(client))
        assert isinstance(text, UserText), "made by text_of"
        return text

    def words_of(self, client: int) -> dict[str, DomainText]:
        """Return text in whose words a user asks itself and its experts, by their names: its own.

        Raises:
            ValueError: the silo cannot be used.
        """
        names = [self.config.tiers.experts[expert].name for expert in self.members[client]]
        return dict.fromkeys(names, self._opened_text(client))

    def texts_of(self, client: int) -> dict[str, list[Question]]:
        """Return what a user's rank scores prompts on; nothing where its silo cannot be used.

        Without public text that is the user's own alone.
        """
        if client not in self.opened:
            return {}
        if not self._public_experts:
            return {"own": self.own_text(client)}
        return super().texts_of(client)

    def own_text(self, client: int) -> list[Question]:
        """Return what a user holds back of its own text, at most as much as tiers are scored on."""
        return self._opened_text(client).questions_of(self.own_examples(client))

    def own_examples(self, client: int, expert: int | None = None) -> list[tasks.Example]:
        """Return the same, before it is tokenised.

        Args:
            client: of the user.
            expert: who is asked: of several, who read it alike, the first gets all of it.
        """
        if expert not in (None, self.members[client][0]):
            return []
        text = self._opened_text(client)
        return text.held_out_places(self._judged_places(client, text.num_held_out))

    # -- what experts own --------------------------------------------------------------------------

    def choices_by_owner(self, client: int) -> dict[str, str | None]:
        """Return digests of the choices of a user's experts, by whose rows have them."""
        domains = [self.domains[expert] for expert in self.members[client]]
        return {f"the rows of expert {domain.name}": domain.choices() for domain in domains}

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work, before any weight is loaded."""
        self.check_model()
        for domain in self.domains_read:
            with named_domain(domain):
                domain.check()
        self._server_size = len(self.splits.train)
        _ = self.candidates
        _ = self.shard(0)
        _ = self.validation
        _ = self.alignment_texts
