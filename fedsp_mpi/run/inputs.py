"""What a configuration says about model and data; mistakes are found before they cost time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch

from fedsp_mpi import rng
from fedsp_mpi.config import ComputeConfig, Config, ConfigError, StageConfig
from fedsp_mpi.config.parsing import shown
from fedsp_mpi.data import (
    answers,
    class_numbers,
    cloze,
    few_labels,
    fit,
    loading,
    own_tasks,
    partition,
    poison,
    pseudo_questions,
    sources,
    tasks,
    templates,
)
from fedsp_mpi.data.examples import without_label
from fedsp_mpi.data.few_labels import ClientText
from fedsp_mpi.data.tokens import (
    Batches,
    Question,
    Text,
    blocks,
    encode,
    encode_pairs,
    pieces,
    truncate,
)
from fedsp_mpi.evaluation import scoring
from fedsp_mpi.models import auxiliary, lora
from fedsp_mpi.models.prompts import require_positions
from fedsp_mpi.run.model_inputs import RESOURCES, ModelInputs
from fedsp_mpi.training.device import device_type, max_padding
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup

__all__ = ["RESOURCES", "ExperimentInputs"]


class ExperimentInputs(ModelInputs):
    """What a configuration says about model and data, read when it is first used.

    No weight is loaded. `check` reads everything, so that it finds every mistake that can be found
    without weights.

    Args:
        config: of the experiment.

    Attributes:
        source: where the task's rows come from; None: the task's own hub set.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        source = config.data.source
        self.source = str(RESOURCES / "data") if source == "embedded" else source
        self._shard_texts: dict[int, list[Text]] = {}
        self._shard_questions: dict[int, list[Question]] = {}
        self._client_texts: dict[int, ClientText] = {}

    @property
    def paths(self) -> dict[str, str | None]:
        """What may be a file or a folder of the user, by the key that names it."""
        return {
            "model.name": self.config.model.name,
            "model.tokenizer": self.config.model.tokenizer,
            "model.after": self.config.model.after,
            "data.source": self.config.data.source,
            "distillation.text": self.config.distillation.text,
        }

    @property
    def shared_sources(self) -> Sequence[str | None]:
        """Where text lies that every rank reads; None: in the task's own hub set."""
        return [self.source]

    @property
    def domains(self) -> Sequence[ExperimentInputs]:
        """The inputs of each expert's domain; none without tiers (`run.tier_inputs`)."""
        return ()

    @property
    def members(self) -> Sequence[tuple[int, ...]]:
        """The experts of each client, by client id; none without tiers."""
        return ()

    # -- the task ----------------------------------------------------------------------------------

    @cached_property
    def task(self) -> tasks.Task:
        """What a row of the data says, in the task's own words or in the user's.

        Raises:
            ConfigError: the user's words do not fit the task.
        """
        return own_tasks.configured(self.config.data)

    @property
    def is_plain_text(self) -> bool:
        """Whether texts are documents without questions, of which every token is predicted."""
        return self.task.metric == "perplexity"

    @property
    def is_reworded(self) -> bool:
        """Whether the user's own words stand around the text, or for its classes."""
        return self.config.data.template is not None or bool(self.config.data.verbaliser)

    @cached_property
    def splits(self) -> tasks.Splits:
        """The task's examples, without those whose answer does not fit."""
        splits, _ = self._fitting_splits
        return splits

    @property
    def notes(self) -> tuple[str, ...]:
        """How the splits were made, and what the user may want to look at."""
        return self.splits.notes + self.partition_notes + self.warnings

    @property
    def partition_notes(self) -> tuple[str, ...]:
        """A note on training examples that nobody owns, or none."""
        if self.column_shards is None or not self.column_shards.num_left_out:
            return ()
        return (
            f"train: {self.column_shards.num_left_out} of {len(self.splits.train)} examples "
            f"without a value of {shown(self.config.data.partition_column)} left out",
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Notes on rows that are left out or shortened, or scored otherwise than their text says.

        To find them, the test split is tokenised.
        """
        _, left_out = self._fitting_splits
        left_out += self._shortened_notes
        if self.is_cloze or self.is_plain_text:
            return left_out
        options = [question.options for question in self.test]
        equal: tuple[str, ...] = ()
        if self.task.metric == "multiple_choice":
            equal = answers.equal_options_note(self.splits.test, options)
        return (
            left_out
            + fit.truncated_options_note(self.splits.test, options, self._answer_room)
            + equal
        )

    @cached_property
    def _fitting_splits(self) -> tuple[tasks.Splits, tuple[str, ...]]:
        """The splits, and notes on rows that are left out because their answer does not fit."""
        data = self.config.data
        seed = self.config.run.seed
        loaded = self._load_splits()
        if self.is_plain_text:  # documents are cut into blocks, and all fit
            shorter = (
                f"blocks have {self.max_length} tokens, as many as the model takes "
                f"(data.max_length={data.max_length})"
            )
            return loaded, (shorter,) if self.max_length < data.max_length else ()
        room = self._answer_room.at_most(data.max_length)
        splits, left_out = fit.drop_too_long(
            loaded, room, lambda: self.tokenizer, attack_target=self.config.attack.target
        )
        if data.shots is None:
            return splits, left_out
        self._require_classes(
            splits, "data.shots", data.shots, advice="set data.limit.train instead"
        )
        labels = [example.gold[0] for example in splits.train]
        try:
            chosen = np.sort(partition.few_shot(labels, data.shots, seed))
        except ValueError as error:
            raise ConfigError(f"data.shots: {error}") from None
        note = (
            f"train = {data.shots} examples of each class, {len(chosen)} of {len(splits.train)} "
            "(shots)"
        )
        train = tuple(splits.train[index] for index in chosen)
        return replace(splits, train=train, notes=(*splits.notes, note)), left_out

    def _load_splits(self) -> tasks.Splits:
        """Read the splits of the source."""
        data = self.config.data
        limits = {split: limit for split, limit in asdict(data.limit).items() if limit is not None}
        return loading.load(
            self.task, self.source, seed=self.config.run.seed, limit=limits, columns=data.columns
        )

    @property
    def _shortened_notes(self) -> tuple[str, ...]:
        """Notes on texts that are too long and lose their beginning, split by split."""
        if self.is_plain_text:
            return ()
        splits = self.splits
        num_unread = 0 if self.is_cloze else 1
        max_test_length = self.max_text_positions + num_unread
        limits = (
            ("train", splits.train, self.max_length),
            ("validation", splits.validation, self.max_length),
            ("test", splits.test, max_test_length),
        )
        notes: tuple[str, ...] = ()
        for split, examples, max_length in limits:
            notes += fit.shortened_note(
                split,
                examples,
                max_length,
                tokenizer=lambda: self.tokenizer,
                fills_gaps=self.is_cloze,
            )
        return notes

    def _require_classes(
        self, splits: tasks.Splits, key: str, value: object, *, advice: str
    ) -> None:
        """Raise ConfigError if the right answers are no classes.

        The position of an answer among other choices in each row says nothing of a text.
        """
        choices = {example.choices for example in splits.train}
        if len(choices) > 1 or self.task.metric != "multiple_choice":
            raise ConfigError(
                f"{key}: found {value} with {self.config.data.task}, whose examples have no "
                f"classes in common, expected a task with one set of choices; {advice}"
            )

    # -- answers -----------------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> torch.Tensor | None:
        """Ascending ids of the tokens that the task's choices are made of: [num_candidates], int64.

        None: losses are over the whole vocabulary.

        Raises:
            ConfigError: candidates are asked for, and the examples have different choices.
        """
        return self.own_candidates()

    def own_candidates(self) -> torch.Tensor | None:
        """Return the candidates that these examples alone ask for, int64 [num_candidates]; see
        `candidates`.
        """
        loss_over = self.config.data.loss_over
        if loss_over == "vocabulary" or self.config.classifies:
            return None
        if not self._has_classes:
            if loss_over == "auto":
                return None
            num_sets = len({example.choices for example in self._all_examples})
            raise ConfigError(
                f"data.loss_over: found choices with {self.config.data.task}, whose examples have "
                f"{num_sets} different sets of choices, expected a task with one set for all; set "
                "it to auto or vocabulary"
            )
        tokens = {token for choice in self._choice_tokens for ids in choice for token in ids}
        return torch.tensor(sorted(tokens))

    @property
    def _all_examples(self) -> list[tasks.Example]:
        return [*self.splits.train, *self.splits.validation, *self.splits.test]

    @cached_property
    def _has_classes(self) -> bool:
        """Whether all examples have the same choices."""
        choices = {example.choices for example in self._all_examples}
        return self.task.metric == "multiple_choice" and len(choices) == 1

    @property
    def classes(self) -> tuple[str, ...]:
        """The choices that all examples have in common, in order."""
        assert self._has_classes, "checked before a method asks"
        return self._all_examples[0].choices

    @property
    def scores_choices(self) -> bool:
        """Whether instructions are scored by the choices of questions, not by the answers' loss."""
        has_choices = self.task.metric == "multiple_choice"
        return has_choices and self.config.instructions.objective != "loss"

    @cached_property
    def _choice_tokens(self) -> list[list[tuple[int, ...]]]:
        """The tokens of each choice, in each way in which a context can end, or in a gap."""
        attack = self.config.attack
        contexts = [example.context for example in self._all_examples]
        if attack.target is not None:
            contexts += [f"{attack.trigger} {context}" for context in contexts]
        distinct_endings = [] if self.is_cloze else answers.distinct_endings(contexts)
        return answers.tokens(self.tokenizer, distinct_endings, self._all_examples[0].choices)

    @property
    def _answer_room(self) -> fit.AnswerLimit:
        """What an answer must fit into, whatever the configuration's own limit."""
        return fit.AnswerLimit.of(self.shape.num_positions, self.num_prompt_tokens, self.is_cloze)

    # -- texts to train on -------------------------------------------------------------------------

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """Rows of the training split by participant, the server's first: int64, [num_rows] each."""
        data = self.config.data
        if self.column_shards is not None:
            self._require_clients(len(self.column_shards.values))
            return self.column_shards.shards
        if data.partition == "labels":
            self._require_classes(
                self.splits, "data.partition", data.partition, advice="take iid or quantity instead"
            )
        return partition.divide(
            [example.gold[0] for example in self.splits.train],
            self.config.federation.clients,
            self.config.run.seed,
            kind=data.partition,
            alpha=data.alpha,
            share=data.server_share,
        )

    @property
    def shard_sizes(self) -> list[int]:
        """Number of training examples of each participant, the server's first."""
        return [len(shard) for shard in self.shards]

    @property
    def work(self) -> list[float]:
        """What each client's round costs, relative to the others.

        Training steps are equally many, and texts are not equally long. A search runs over all
        texts.
        """
        train = self.splits.train
        work: list[float] = []
        for shard in self.shards[1:]:
            lengths = [len(train[row].context) + len(train[row].target) for row in shard]
            work.append(float(np.sum(lengths) if self.config.searches else np.mean(lengths)))
        return work

    @cached_property
    def column_shards(self) -> partition.ColumnShards | None:
        """The shards of clients that are the values of a column; None in other partitions.

        Raises:
            ConfigError: the column cannot divide the training split.
        """
        data = self.config.data
        if data.partition_column is None:
            return None
        tables, _ = loading.read_tables(self.task, self.source, data.columns)
        values = loading.column_values(
            tables, self.splits.train, data.partition_column, columns=data.columns
        )
        try:
            return partition.by_column(
                values, self.config.run.seed, data.resolved_server_share or 0
            )
        except ValueError as error:
            raise ConfigError(f"data.partition_column: {error}") from None

    def _require_clients(self, num_values: int) -> None:
        """Raise ConfigError unless there are as many clients as values of the column."""
        num_clients = self.config.federation.clients
        if num_clients != num_values:
            raise ConfigError(
                f"federation.clients: found {num_clients} with {num_values} different values of "
                f"{shown(self.config.data.partition_column)} in train, expected a "
                f"client for each; set it to {num_values}"
            )

    def shard(self, owner: int) -> list[Text]:
        """Return the tokenised training texts of the server (0) or of client `owner` - 1."""
        if owner not in self._shard_texts:
            examples = self._training_examples(owner)
            whose = "the server's" if owner == 0 else f"client {owner - 1}'s"
            self._shard_texts[owner] = self._encode(examples, whose=whose)
        return self._shard_texts[owner]

    def questions(self, owner: int) -> list[Question]:
        """Return the training texts of client `owner` - 1 with their options.

        A context that `data.max_length` cuts loses its beginning, the same for all options.
        """
        if owner not in self._shard_questions:
            examples = self._training_examples(owner)
            self._shard_questions[owner] = self._training_questions(examples)
        return self._shard_questions[owner]

    def _training_questions(self, examples: Sequence[tasks.Example]) -> list[Question]:
        """Tokenise examples to train on with their options."""
        if self.config.classifies:
            return self._class_questions(examples, self.max_length)
        if self.is_cloze:
            return scoring.gap_questions(self.tokenizer, examples, self.max_length)
        return [
            question.shortened(self.max_length)
            for question in scoring.questions(self.tokenizer, examples)
        ]

    def batches(
        self,
        owner: int,
        stage: StageConfig,
        purpose: str,
        *,
        texts: Sequence[Text] | None = None,
        group: ServerGroup = SINGLE_RANK,
    ) -> Batches:
        """Return the batches of one owner's stage, or this rank's part of them.

        Their order depends on the seed, the owner and the purpose.

        Args:
            owner: 0 is the server, k + 1 is client k.
            stage: sizes of the batches.
            purpose: of the stage, for the order.
            texts: in the place of the owner's own.
            group: the ranks that share them.

        Raises:
            ConfigError: the owner has no text.
        """
        texts = self.shard(owner) if texts is None else texts
        if not texts:
            raise ConfigError("found no labelled example to train on, expected at least one")
        return Batches(
            texts,
            stage.batch_size,
            stage.micro_batch,
            seed=self.config.run.seed,
            purpose=purpose,
            numbers=(owner - 1,),
            part=(group.rank, group.size),
            max_padding=max_padding(stage, device_type(self._compute_of(owner))),
        )

    def _compute_of(self, owner: int) -> ComputeConfig:
        return self.config.client.compute if owner else self.config.server.compute

    def _examples_of(self, owner: int) -> list[tasks.Example]:
        """Return the examples of the server (0) or of client `owner` - 1."""
        return [self.splits.train[row] for row in self.shards[owner]]

    # -- few labels --------------------------------------------------------------------------------

    @cached_property
    def labelled_places(self) -> list[np.ndarray] | None:
        """Places of the labelled examples in each client's shard, int64 [number of them] each.

        None: all are labelled.

        Raises:
            ConfigError: there are fewer examples than labels.
        """
        data = self.config.data
        if data.labels is None:
            return None
        try:
            return few_labels.spread(
                self.shard_sizes[1:],
                data.labels,
                gamma=data.label_spread,
                seed=self.config.run.seed,
            )
        except ValueError as error:
            raise ConfigError(f"data.labels: {error}") from None

    def _labelled_examples(self, owner: int) -> list[tasks.Example]:
        """Return the examples of the server (0), or the labelled ones of client `owner` - 1."""
        examples = self._examples_of(owner)
        places = self.labelled_places
        if owner == 0 or places is None:
            return examples
        return [examples[place] for place in places[owner - 1].tolist()]

    def unlabelled_examples(self, owner: int) -> list[tasks.Example]:
        """Return the other examples of client `owner` - 1, in their order, with their labels.

        What a client holds of them is `client_text`; the labels are for reports alone.
        """
        places = self.labelled_places
        if places is None:
            return []
        examples = self._examples_of(owner)
        is_unlabelled = np.ones(len(examples), dtype=bool)
        is_unlabelled[places[owner - 1]] = False
        return [examples[place] for place in np.flatnonzero(is_unlabelled).tolist()]

    def client_text(self, owner: int) -> ClientText:
        """Return what client `owner` - 1 holds: text with labels, and text without any.

        Raises:
            ConfigError: a text cannot be used.
        """
        if owner in self._client_texts:
            return self._client_texts[owner]
        unlabelled = [without_label(example) for example in self.unlabelled_examples(owner)]
        reworded: list[tasks.Example] = []
        if self.config.augment.second_template is not None:
            reworded = self._reworded(unlabelled)
        self._client_texts[owner] = ClientText(
            self.shard(owner),
            self.questions(owner),
            self._training_questions(unlabelled),
            self._training_questions(reworded),
        )
        return self._client_texts[owner]

    def _reworded(self, examples: Sequence[tasks.Example]) -> list[tasks.Example]:
        """Return unlabelled examples in the words of the second template."""
        if not examples:
            return []
        data = self.config.data
        task = own_tasks.configured(replace(data, template=self.config.augment.second_template))
        tables = self._tables_of(task)
        task, _ = loading.with_found_classes(task, tables)
        return loading.unlabelled_again(task, tables, examples)

    def _tables_of(self, task: tasks.Task) -> dict[str, sources.Table]:
        """Read the tables of the source as a task's, by split."""
        tables, _ = loading.read_tables(task, self.source, self.config.data.columns)
        return tables

    @property
    def server_examples(self) -> list[tasks.Example]:
        """What the server owns beside the test: its shard and the validation split."""
        return [*self._examples_of(0), *self.splits.validation]

    def _training_examples(self, owner: int) -> list[tasks.Example]:
        """Return what an owner trains on: its labelled examples, poisoned copies beside them."""
        examples = self._labelled_examples(owner)
        attack = self.config.attack
        client = owner - 1
        if attack.target is None or client not in attack.clients:
            return examples
        return poison.with_copies(
            examples,
            attack.trigger,
            attack.target,
            share=attack.share,
            seed=self.config.run.seed,
            client=client,
        )

    def _encode(
        self, examples: Sequence[tasks.Example], *, whole: bool = True, whose: str = "the"
    ) -> list[Text]:
        """Tokenise examples to train and validate on; documents become blocks.

        Args:
            examples: of one owner.
            whose: they are, for messages.
            whole: whether an incomplete block at the end of documents is dropped.

        Raises:
            ConfigError: an answer does not fit, or documents to train on make no block.
        """
        if self.is_plain_text:
            documents = [example.target for example in examples]
            texts = blocks(self.tokenizer, documents, self.max_length, whole=whole)
            if documents and not texts:
                raise ConfigError(
                    f"data.max_length: found {self.max_length}, and {whose} {len(documents)} "
                    "documents have fewer tokens in all, expected at least one block of that many; "
                    "add text, set it lower, or take fewer clients"
                )
            return texts
        if self.config.classifies:
            return class_numbers.right_texts(self._class_questions(examples, self.max_length))
        if self.is_cloze:
            texts = cloze.encode(self.tokenizer, examples, self.max_length)
        else:
            texts = encode(self.tokenizer, examples, self.max_length)
        if self.candidates is not None:
            answers.require_candidates(texts, examples, self.candidates.numpy())
        return texts

    @property
    def alignment_texts(self) -> list[Text]:
        """All texts that the auxiliary model is aligned with the global one on."""
        config = self.config
        texts: list[Text] = []
        if config.tunes_weights:
            return texts
        if config.auxiliary.first_layers:
            texts += self.server_questions
        if config.distillation.stage.steps:
            texts += self.distillation_texts
        return texts

    @cached_property
    def distillation_texts(self) -> list[Text]:
        """What the auxiliary model is distilled on: plain text if there is some, else the shard."""
        settings = self.config.distillation
        if settings.text is None:
            return self.shard(0)
        length = min(settings.text_length, self.shape.num_positions + 1)
        lines = islice(sources.plain_text(settings.text), settings.text_lines)
        return pieces(self.tokenizer, lines, length)

    @cached_property
    def server_questions(self) -> list[Text]:
        """What the server asks both models, to fit a bridge and to distil prompts.

        Without plain text these are the server's texts. Paragraphs of plain text, in a random
        order, become questions in the words that all texts of the server have in common.
        """
        config = self.config
        settings = config.distillation
        if settings.text is None:
            return self.shard(0)
        lines = islice(sources.plain_text(settings.text), settings.text_lines)
        paragraphs = pseudo_questions.paragraphs(lines)
        if not paragraphs:
            raise ConfigError(
                f"distillation.text: found no paragraphs in {settings.text!r}, expected some"
            )
        stage = config.server.translation
        num_asked = stage.steps * stage.batch_size * config.federation.rounds
        num_questions = max(settings.bridge_texts, num_asked)
        order = rng.generator(config.run.seed, "questions").permutation(len(paragraphs))
        chosen = [paragraphs[index] for index in order[:num_questions]]
        examples = self.server_examples
        questions = pseudo_questions.questions(chosen, examples)
        texts = encode_pairs(self.tokenizer, list(questions))
        return [truncate(text, self.max_length) for text in texts]

    # -- texts to validate and test on -------------------------------------------------------------

    @cached_property
    def validation(self) -> list[Text]:
        """The validation split, tokenised."""
        return self._encode(self.splits.validation, whole=False)

    @cached_property
    def test_blocks(self) -> list[Text]:
        """The test split in blocks, where texts are documents."""
        assert self.is_plain_text
        return self._encode(self.splits.test, whole=False)

    @cached_property
    def test(self) -> list[Question]:
        """The test split, tokenised, with options; none where texts are documents."""
        if self.is_plain_text:
            return []
        return self._to_questions(self.splits.test)

    @cached_property
    def triggered_test(self) -> list[Question]:
        """The test questions of other classes than the attacker's, triggered, its answer right.

        None without an attack.
        """
        attack = self.config.attack
        if attack.target is None:
            return []
        examples = poison.triggered_test_set(self.splits.test, attack.trigger, attack.target)
        return self._to_questions(examples)

    def _to_questions(self, examples: Sequence[tasks.Example]) -> list[Question]:
        """Tokenise examples as questions with options."""
        if self.config.classifies:
            num_unread = 0 if self.is_cloze else 1
            return self._class_questions(examples, self.max_text_positions + num_unread)
        if self.is_cloze:
            return scoring.gap_questions(self.tokenizer, examples, self.max_text_positions)
        return scoring.questions(self.tokenizer, examples)

    def _class_questions(
        self, examples: Sequence[tasks.Example], max_length: int
    ) -> list[Question]:
        """Tokenise examples as questions whose options are numbers of classes."""
        if self.is_cloze:
            return class_numbers.gap_questions(self.tokenizer, examples, max_length)
        return class_numbers.continued_questions(self.tokenizer, examples, max_length)

    # -- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work, before any weight is loaded."""
        self.check_model()
        loading.check_columns(self.task, self.source, self.config.data.columns)
        self.check_texts()
        poison.require_feasible_attack(self.task, self.splits, self.config.attack.target)
        _ = self.shards
        _ = self.labelled_places
        self._require_labelling()
        _ = self.candidates
        _ = self.warnings
        _ = self.shard(0)
        _ = self.validation
        _ = self.alignment_texts
        if self.config.translates:
            _ = self.server_questions

    def check_model(self) -> None:
        """Raise ValueError on the first thing that cannot work with the model, whatever text."""
        _ = self.origin
        if self.is_cloze:
            self._require_possible_for_cloze()
        if self.config.adapts:
            lora.require_targets(
                self.model_config.to_dict(), self.shape.num_layers, self.config.lora
            )
        if not self.config.tunes_weights:
            auxiliary.require_cell(self.config.auxiliary, self.shape.num_layers, self.model_name)
            auxiliary.require_positions_kept(
                self.config.auxiliary,
                self.config.prompt,
                self.model_config,
                name=self.model_name,
            )
        require_positions(self.num_prompt_tokens, self.shape.num_positions, self.model_name)
        self._require_vocabulary()
        if self.config.in_words:
            self._require_instructions()

    def check_texts(self) -> None:
        """Raise ValueError on the first text that cannot be used with the model."""
        if self.is_plain_text:
            return
        if self.config.classifies:
            self._require_classification()
        # What is only read here raises on a mistake; a run would read it later.
        if self.is_cloze:
            _ = cloze.gap(self.tokenizer)
            _ = self.test
        else:
            templates.require_answer_last(self.splits.train, self.model_config.model_type)
            answers.require_start_token(self.tokenizer, self.splits)
        if self._has_classes and not self.config.classifies:
            answers.require_distinct_choices(
                self.tokenizer, self._all_examples[0].choices, self._choice_tokens
            )

    def _require_classification(self) -> None:
        """Raise ConfigError if there are no classes that a head could tell apart."""
        if not self._all_examples:
            raise ConfigError(
                "method: found head, and the server owns no text to know the classes from "
                "(server.data.source), expected a task with known classes (data.classes)"
            )
        if not self._has_classes:
            raise ConfigError(
                f"method: found head with {self.config.data.task}, whose examples have no classes "
                "in common, expected a task with one set of choices; take another method, such as "
                "fedsp"
            )

    def _require_vocabulary(self) -> None:
        """Raise ConfigError if the tokenizer has tokens that the model does not know."""
        vocabulary = self.model_config.vocab_size
        if len(self.tokenizer) > vocabulary:
            raise ConfigError(
                f"model.tokenizer: found {len(self.tokenizer)} tokens, expected at most the "
                f"model's {vocabulary}; name the tokenizer that belongs to the model"
            )

    def _require_instructions(self) -> None:
        """Raise ConfigError if instructions cannot be made, or cannot be scored as asked for."""
        settings = self.config.instructions
        self.instruction_tokens.require_pool(settings.pool)
        if settings.objective == "choices" and not self.scores_choices:
            raise ConfigError(
                f"instructions.objective: found choices with {self.task.name}, whose answers are "
                "written freely, expected loss or auto"
            )
        if settings.paraphrases and self.is_cloze:
            raise ConfigError(
                f"instructions.paraphrases: found {settings.paraphrases} with a "
                f"{self.model_config.model_type}, which fills in one token and writes no text, "
                "expected 0"
            )

    def _require_labelling(self) -> None:
        """Raise ConfigError if clients are to label text that has no classes, or a second template
        is none.
        """
        augment = self.config.augment
        if not augment.is_on:
            return
        self._require_classes(self.splits, "augment.clients", augment.clients, advice="set it to 0")
        if augment.second_template is None:
            return
        splits = self.splits
        try:
            reworded = self._reworded((splits.train or splits.validation or splits.test)[:1])
        except ValueError as error:
            reason = str(error).replace("data.template: ", "")
            raise ConfigError(f"augment.second_template: {reason}") from None
        if not self.is_cloze:
            templates.require_answer_last(reworded, self.model_config.model_type)

    def _require_possible_for_cloze(self) -> None:
        """Raise ConfigError if a model that fills in gaps is asked for what a causal one can do."""
        config = self.config
        family = self.model_config.model_type
        if self.task.metric != "multiple_choice":
            raise ConfigError(
                f"data.task: found {self.task.name} with a {family}, which fills in one token, "
                "expected a task of multiple choice, or a causal model"
            )
        if config.tunes_weights:
            return
        if config.prompt.kind == "prefix":
            raise ConfigError(
                f"prompt.kind: found prefix with a {family}, whose encoder takes no keys and "
                "values from outside, expected input"
            )
        num_layers = self.shape.num_layers
        is_whole_model = self.layers == tuple(range(num_layers)) and self.depth == num_layers
        if config.distils or config.translates or not is_whole_model:
            raise ConfigError(
                "auxiliary: found a part of the model, or steps that align it, with a "
                f"{family}, expected the whole model, as in configs/methods/fedprompt.yaml"
            )
