"""What a configuration says about data that lie in silos: each rank opens only those that it plays.

The server's own text is `server.data`. What it knows of a silo's text is what the silo declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fedsp_mpi import rng
from fedsp_mpi.config import Config, ConfigError, DataConfig
from fedsp_mpi.data import answers, cache, loading, own_tasks, poison, sources, tasks
from fedsp_mpi.data.few_labels import ClientText
from fedsp_mpi.data.tokens import Question, Text
from fedsp_mpi.files import fingerprint
from fedsp_mpi.run.handout import HandoutMeta
from fedsp_mpi.run.inputs import ExperimentInputs


class SiloText(ExperimentInputs):
    """One silo's text, on the rank that plays it.

    Args:
        config: of the experiment.
        client: its id, the silo's place among the silos.
        model: tells the model's shape and tokenizer, which all silos of a rank share.
    """

    def __init__(self, config: Config, client: int, model: SiloInputs) -> None:
        silo = config.federation.silos[client]
        super().__init__(replace(config, data=_data_of(config, client)))
        self._client = client
        self._folder = cache.private_folder(config.federation.silo_cache, silo.name)
        self._model = model
        self.model_config = model.model_config
        self.tokenizer = model.tokenizer

    @cached_property
    def texts(self) -> list[Text]:
        """The tokenised texts that the client trains on."""
        return self._encode(self._training_examples(self._client + 1))

    @property
    def holds_back(self) -> bool:
        """Whether the client keeps some of its text from training, to judge by."""
        return self.config.evaluation.at != "server"

    @property
    def num_held_out(self) -> int:
        """Number of texts that the client holds back."""
        return len(self.held_out) if self.holds_back else 0

    @cached_property
    def held_out(self) -> list[Text]:
        """The tokenised texts that the client holds back, to judge each round by."""
        return self._encode(self._held_out_examples, whole=False)

    @cached_property
    def held_out_questions(self) -> list[Question]:
        """The same with their options; none where answers are written freely."""
        if self.task.metric != "multiple_choice":
            return []
        return self._to_questions(self._held_out_examples)

    @property
    def reading_digest(self) -> str:
        """A digest of what decides how rows become tokens: tokenizer, template, verbaliser."""
        return _reading_digest(self._model.tokenizer_digest, self.config.data)

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest text."""
        unlabelled = [text for question in self.unlabelled for text in question.options]
        return max(len(text.ids) for text in (*self.texts, *unlabelled))

    @cached_property
    def unlabelled(self) -> Sequence[Question]:
        """The tokenised texts without a label, with their options."""
        return self.client_text(self._client + 1).unlabelled

    @property
    def num_texts(self) -> int:
        """Number of texts that the client may train on, those without a label among them."""
        return len(self.texts) + len(self.unlabelled)

    def prepared_files(self) -> list[Path]:
        """Read the source's rows once, and return the files that `datasets` made of them."""
        tables = self._tables_of(self.task)
        return [Path(file["filename"]) for table in tables.values() for file in table.cache_files]

    def _tables_of(self, task: tasks.Task) -> dict[str, sources.Table]:
        tables, _ = loading.read_tables(
            task,
            self.source,
            self.config.data.columns,
            cache=self._folder,
            may_lack_labels=self.config.augment.is_on,
        )
        return tables

    def shard(self, owner: int) -> list[Text]:
        """Return `texts`; `owner` is the silo itself."""
        return self.texts

    def choices(self) -> str | None:
        """Return a digest of the choices, where all examples have the same ones; else None."""
        return choices_digest(self._all_examples, self.task)

    def require_usable(self) -> None:
        """Raise ValueError on the first thing that keeps the silo from taking part."""
        self.check_texts()
        poison_target = self.config.attack.target
        if poison_target is not None and self._client in self.config.attack.clients:
            poison.require_feasible_target(self.splits.train, poison_target)
        _ = self.texts
        _ = self.unlabelled
        if self.holds_back:
            _ = self.held_out

    def require_candidates(self, candidates: torch.Tensor) -> None:
        """Raise ConfigError if an answer has a token that the losses do not run over.

        Args:
            candidates: ascending token ids, int64 [num_candidates].
        """
        examples = self._training_examples(self._client + 1)
        answers.require_candidates(self.texts, examples, candidates.numpy())

    def _load_splits(self) -> tasks.Splits:
        data = self.config.data
        return loading.load(
            self.task,
            self.source,
            seed=self.config.run.seed,
            limit={"train": data.limit.train},
            columns=data.columns,
            owner="silo",
            cache=self._folder,
            keeps_unlabelled=self.config.augment.is_on,
        )

    def _examples_of(self, owner: int) -> list[tasks.Example]:
        """Return the silo's training examples, in file order; `owner` is the silo itself."""
        rows, _ = self._divided
        return [self.splits.train[row] for row in rows]

    def unlabelled_examples(self, owner: int) -> list[tasks.Example]:
        """Return the silo's examples without a label; `owner` is the silo itself."""
        return list(self.splits.unlabelled)

    @property
    def _all_examples(self) -> list[tasks.Example]:
        return [*super()._all_examples, *self.splits.unlabelled]

    @property
    def _held_out_examples(self) -> Sequence[tasks.Example]:
        if self.splits.validation:
            return self.splits.validation
        _, rows = self._divided
        return [self.splits.train[row] for row in rows]

    @cached_property
    def _divided(self) -> tuple[Sequence[int], Sequence[int]]:
        """The rows of train that are trained on, and those that are held out."""
        num_rows = len(self.splits.train)
        evaluation = self.config.evaluation
        if not self.holds_back or self.splits.validation:
            return range(num_rows), ()
        if num_rows < 2:
            raise ConfigError(
                f"found {num_rows} usable row in train, expected at least 2, of which "
                "evaluation.held_out holds one back"
            )
        order = rng.generator(self.config.run.seed, "held out", self._client).permutation(num_rows)
        num_held_out = min(num_rows - 1, max(1, round(evaluation.held_out * num_rows)))
        held_out = np.sort(order[:num_held_out]).tolist()
        trained = np.sort(order[num_held_out:]).tolist()
        return trained, held_out


class SiloInputs(ExperimentInputs):
    """Model and data of an experiment whose clients have silos.

    Args:
        config: of the experiment, its silos found.

    Attributes:
        opened: the silos that this rank plays and could open, by client.
        problems: why the others of this rank's cannot be used, by client.
        sizes: number of examples that each silo has declared, by client.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.source = config.server.data.source
        self.opened: dict[int, SiloText] = {}
        self.problems: dict[int, str] = {}
        self.sizes: list[int] = []
        self._server_size = 0

    @property
    def paths(self) -> dict[str, str | None]:
        """What may be a file or a folder of the user, by the key that names it."""
        silos = {f"silo {silo.name}": silo.source for silo in self.config.federation.silos}
        return super().paths | {"server.data.source": self.source} | silos

    @property
    def shared_sources(self) -> Sequence[str | None]:
        """None: each owner's text is its own."""
        return ()

    def text_of(self, client: int) -> SiloText:
        """Return a silo's text, of which nothing has been read."""
        return SiloText(self.config, client, self)

    def open_silo(self, client: int) -> SiloText:
        """Open a silo that this rank plays; raise ValueError if it cannot be used."""
        text = self.text_of(client)
        text.require_usable()
        self.opened[client] = text
        return text

    def refuse_silo(self, client: int, reason: str) -> None:
        """Close a silo that cannot be used; its client fails in every round, with this reason."""
        self.problems[client] = reason
        self.opened.pop(client, None)

    def weight_of(self, client: int) -> float:
        """Return how many times a silo's updates count."""
        return self.config.federation.silos[client].weight

    def disclosed_samples(self, clients: Sequence[int]) -> dict[int, float]:
        """Return what clients send as the number of their examples, where that is not exact.

        A search weighs a client by its examples; one that trains, by its steps, which say nothing
        of its text.
        """
        config = self.config
        if not config.searches or config.federation.disclose == "exact":
            return {}
        if config.federation.disclose == "nothing":
            return dict.fromkeys(clients, 1.0)
        return {client: float(self.sizes[client]) for client in clients}

    @cached_property
    def tokenizer_digest(self) -> str:
        """A digest of the tokenizer: its tokens, and their ids."""
        tokens = sorted(self.tokenizer.get_vocab().items())
        return fingerprint.of_rows(f"{token} {id}" for token, id in tokens)

    def reading_digest_of(self, client: int) -> str:
        """Return the digest of how a silo's rows become tokens, as this rank would do it."""
        return _reading_digest(self.tokenizer_digest, _data_of(self.config, client))

    @cached_property
    def task(self) -> tasks.Task:
        """What a row of the server's own text says."""
        data = self.config.data
        columns = self.config.server.data.columns or data.columns
        return own_tasks.configured(replace(data, columns=columns))

    # -- what the server owns ----------------------------------------------------------------------

    @property
    def shard_sizes(self) -> list[int]:
        """Number of training examples of the server, and what each silo has declared."""
        return [self._server_size, *self.sizes]

    def receive(self, meta: HandoutMeta) -> None:
        """Take over what the server knows of all silos, and what losses run over.

        A silo with an answer that is none of the candidates cannot be used.
        """
        self._server_size, *self.sizes = meta.sizes
        if meta.candidates is None:
            self.candidates = None
            return
        candidates = torch.tensor(meta.candidates)
        self.candidates = candidates
        for client, text in list(self.opened.items()):
            try:
                text.require_candidates(candidates)
            except ConfigError as error:
                self.refuse_silo(client, str(error))

    @property
    def has_text(self) -> bool:
        """Whether the server owns any text."""
        return bool(self.splits.train or self.splits.validation or self.splits.test)

    @property
    def _all_examples(self) -> list[tasks.Example]:
        """The server's examples; where it owns none, one in the words of the task, if they are
        known without a row.
        """
        return super()._all_examples or self._made_up_examples

    @cached_property
    def _made_up_examples(self) -> list[tasks.Example]:
        if not self.task.num_classes:
            return []
        *columns, answer_column = self.task.columns
        row: dict[str, object] = {**dict.fromkeys(columns, "a b"), answer_column: 0}
        try:
            return [self.task.example(row)]
        except (KeyError, ValueError):  # the template names columns that only rows have
            return []

    def choices(self) -> str | None:
        """Return a digest of the choices of the server's own text; None if it has no such."""
        return choices_digest(self._all_examples, self.task)

    def choices_by_owner(self, client: int) -> dict[str, str | None]:
        """Return digests of the choices that a silo's rows should have, by whose rows have them.

        None: these have none in common. Nothing where the server knows of no choices.
        """
        choices = self.choices()
        if self.has_text:
            return {"the server's rows": choices}
        return {} if choices is None else {"most silos": choices}

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work, before any weight is loaded."""
        self.check_model()
        self._server_size = len(self.splits.train)
        self._require_shard()
        if self.config.classifies:
            self._require_classification()
        if self.has_text:
            self.check_texts()
            self._require_attack()
            self._require_labelling()
        self._require_known_choices()
        _ = self.candidates
        _ = self.warnings
        _ = self.validation
        _ = self.alignment_texts
        if self.config.translates:
            _ = self.server_questions

    def shard(self, owner: int) -> list[Text]:
        """Return the tokenised training texts of the server (0) or of client `owner` - 1.

        Raises:
            ConfigError: the silo cannot be used.
        """
        client = owner - 1
        if client in self.opened:
            return self.opened[client].texts
        if client >= 0:
            raise ConfigError(self.problems.get(client, "another rank plays it"))
        return super().shard(0)

    def questions(self, owner: int) -> list[Question]:
        """Return the training texts of client `owner` - 1, whose silo is open, with options."""
        return self.opened[owner - 1].questions(owner)

    def client_text(self, owner: int) -> ClientText:
        """Return what client `owner` - 1 holds: text with labels, and text without any.

        Raises:
            ConfigError: the silo cannot be used.
        """
        _ = self.shard(owner)
        return self.opened[owner - 1].client_text(owner)

    def unlabelled_examples(self, owner: int) -> list[tasks.Example]:
        """Return the examples without a label of client `owner` - 1, if its silo is open here."""
        text = self.opened.get(owner - 1)
        return [] if text is None else text.unlabelled_examples(owner)

    def _load_splits(self) -> tasks.Splits:
        """Read the server's own splits; it may own none."""
        if self.source is None:
            return tasks.Splits((), (), (), ())
        own_columns = self.config.server.data.columns
        return load_judged(self, own_columns or self.config.data.columns)

    def _examples_of(self, owner: int) -> list[tasks.Example]:
        assert owner == 0, "a silo's examples are its own"
        return list(self.splits.train)

    def _require_shard(self) -> None:
        """Raise ConfigError if the server is to train on rows that it does not have."""
        config = self.config
        if self.splits.train:
            return
        expected = "a split train of the server's"
        if config.server.tuning.steps:
            raise ConfigError(
                f"server.data.source: found no rows to train on in {self.source!r}, expected "
                f"{expected}; or set server.tuning.steps=0"
            )
        if config.distillation.text is None and (config.distils or config.translates):
            raise ConfigError(
                f"server.data.source: found no rows to align the auxiliary model on in "
                f"{self.source!r}, expected {expected}, or plain text in distillation.text"
            )

    def _require_known_choices(self) -> None:
        """Raise ConfigError if losses are to run over choices that the server cannot know."""
        if self.config.data.loss_over == "choices" and not self._all_examples:
            raise ConfigError(
                "data.loss_over: found choices, and the server owns no text to know them from "
                "(server.data.source), expected a task with known classes (data.classes), or "
                "vocabulary"
            )

    def _require_attack(self) -> None:
        target = self.config.attack.target
        if target is not None and self.splits.test:
            poison.require_feasible_target(self.splits.test, target)


def load_judged(inputs: ExperimentInputs, columns: loading.ColumnNames) -> tasks.Splits:
    """Read the splits of text that the server or an expert owns: shard, validation and test.

    Args:
        inputs: whose source is read; `data.limit.train` is of each silo, and not of this text.
        columns: the task's columns as the files name them.
    """
    limits = {name: limit for name, limit in asdict(inputs.config.data.limit).items() if limit}
    limits.pop("train", None)
    return loading.load(
        inputs.task,
        inputs.source,
        seed=inputs.config.run.seed,
        limit=limits,
        columns=columns,
        owner="server",
    )


def _data_of(config: Config, client: int) -> DataConfig:
    """Return the section `data` of one silo, over that of its user's experts, if it has some."""
    silo = config.federation.silos[client]
    data = config.data
    for expert in config.tiers.experts_of(silo.name)[:1]:  # the others read alike
        data = config.tiers.experts[expert].data_over(data)
    return replace(
        data,
        source=silo.source,
        columns=silo.columns or data.columns,
        template=silo.template if silo.template is not None else data.template,
        verbaliser=silo.verbaliser or data.verbaliser,
        limit=replace(data.limit, train=silo.limit or data.limit.train),
        loss_over="vocabulary",
    )


def choices_digest(examples: Sequence[tasks.Example], task: tasks.Task) -> str | None:
    """Return a digest of the choices that all examples have in common; None if they have none."""
    choices = {example.choices for example in examples}
    if task.metric != "multiple_choice" or len(choices) != 1:
        return None
    [common] = choices
    return fingerprint.of_rows(common)[:16]


def _reading_digest(tokenizer_digest: str, data: DataConfig) -> str:
    """Return one digest of the tokenizer and of the words around a text."""
    words = [data.task, data.template or "", *data.verbaliser]
    return fingerprint.of_rows([tokenizer_digest, *words])[:16]
