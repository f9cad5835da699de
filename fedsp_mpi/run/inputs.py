"""What a configuration says about model and data, and what is wrong with it, found before it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsp_mpi import rng
from fedsp_mpi.config import Config, ConfigError, StageConfig
from fedsp_mpi.data import (
    answers,
    cloze,
    fit,
    partition,
    poison,
    pseudo_questions,
    sources,
    tasks,
    templates,
)
from fedsp_mpi.data.tokens import Batches, Text, encode, encode_pairs, pieces, token_ids, truncate
from fedsp_mpi.evaluation import scoring
from fedsp_mpi.models import auxiliary, backbone, families
from fedsp_mpi.models.prompts import DepthMap, Prompt, PromptSpec, require_positions
from fedsp_mpi.training.process_group import SINGLE_RANK, ServerGroup

RESOURCES = Path(__file__).parent.parent / "resources"


class ExperimentInputs:
    """What a configuration says about model and data, read when it is first asked for.

    Nothing here loads weights. `check` asks for all of it, so that every mistake that can be found
    without weights is.
    """

    def __init__(self, config: Config) -> None:
        backbone.quiet()
        self.config = config
        name = config.model.name
        self.model_name = str(RESOURCES / "model") if name == "embedded" else str(name)
        source = config.data.source
        self.source = str(RESOURCES / "data") if source == "embedded" else source
        self._texts: dict[int, list[Text]] = {}

    @property
    def paths(self) -> dict[str, str | None]:
        """What may be a file or a folder of the user, by the key that names it."""
        settings = self.config
        named = {"model.name": settings.model.name, "model.tokenizer": settings.model.tokenizer}
        return named | {
            "data.source": settings.data.source,
            "distillation.text": settings.distillation.text,
        }

    @cached_property
    def model_config(self) -> Any:
        return backbone.read_config(self.model_name, self.config.model.revision)

    @cached_property
    def shape(self) -> families.Shape:
        return families.shape_of(self.model_config)

    @property
    def fills_gaps(self) -> bool:
        """Whether the model fills in a gap in the text, and does not write on from left to right."""
        return families.kind_of(self.model_config) != "causal"

    @cached_property
    def tokenizer(self) -> Any:
        name = self.config.model.tokenizer
        return backbone.read_tokenizer(
            name or self.model_name, None if name else self.config.model.revision
        )

    @cached_property
    def task(self) -> tasks.Task:
        """What a row of the data says, in the task's own words or in the user's.

        Raises ConfigError on the latter.
        """
        data = self.config.data
        return templates.reworded(tasks.find(data.task), data.template, data.verbaliser)

    @property
    def is_reworded(self) -> bool:
        """Whether the user's own words stand around the text, or for its classes."""
        return self.config.data.template is not None or bool(self.config.data.verbaliser)

    @cached_property
    def splits(self) -> tasks.Splits:
        """The task's examples, without those whose answer does not fit."""
        return self._splits[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """How the splits were made, and what the user may want to look at."""
        return self.splits.notes + self.warnings

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Notes on rows that are left out, or scored otherwise than their text says.

        They cost a look at the test.
        """
        _, left_out = self._splits
        if self.fills_gaps:
            return left_out
        questions, options = self.splits.test, [question.options for question in self.test]
        equal = (
            answers.equal_options(questions, options)
            if self.task.metric == "multiple_choice"
            else ()
        )
        return left_out + fit.cut_options(questions, options, self._answer_room) + equal

    @cached_property
    def _splits(self) -> tuple[tasks.Splits, tuple[str, ...]]:
        """The splits, and notes on rows that are left out because their answer does not fit."""
        limit = {
            name: most for name, most in asdict(self.config.data.limit).items() if most is not None
        }
        shots, seed = self.config.data.shots, self.config.run.seed
        columns = self.config.data.columns
        loaded = tasks.load(self.task, self.source, seed=seed, limit=limit, columns=columns)
        room = self._answer_room.at_most(self.config.data.max_length)
        found, left_out = fit.leave_out(
            loaded, room, lambda: self.tokenizer, self.config.attack.target
        )
        if shots is None:
            return found, left_out
        self._require_classes(found, "data.shots", shots, "set data.limit.train instead")
        try:
            chosen = np.sort(
                partition.few_shot([example.gold[0] for example in found.train], shots, seed)
            )
        except ValueError as error:
            raise ConfigError(f"data.shots: {error}") from None
        notes = (
            *found.notes,
            f"train = {shots} examples of each class, {len(chosen)} of {len(found.train)} (shots)",
        )
        return replace(found, train=tuple(found.train[i] for i in chosen), notes=notes), left_out

    def _require_classes(self, splits: tasks.Splits, key: str, value: object, advice: str) -> None:
        """Raise ConfigError if the right answers are no classes.

        A position among other choices in each row says nothing of a text.
        """
        if (
            len({example.choices for example in splits.train}) > 1
            or self.task.metric != "multiple_choice"
        ):
            raise ConfigError(
                f"{key}: found {value} with {self.config.data.task}, whose examples have no "
                "classes in common, "
                f"expected a task with one set of choices; {advice}"
            )

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """Rows of the training split by participant: the server's, then each client's."""
        data, clients, seed = self.config.data, self.config.federation.clients, self.config.run.seed
        if data.partition == "labels":
            self._require_classes(
                self.splits, "data.partition", data.partition, "take iid or quantity instead"
            )
        labels = [example.gold[0] for example in self.splits.train]
        return partition.divide(
            labels, clients, seed, data.partition, data.alpha, data.server_share
        )

    @property
    def depth(self) -> int:
        """Layers of the auxiliary model, shared ones counted as often as they run."""
        return auxiliary.depth(self.config.auxiliary, self.shape.num_layers)

    @property
    def layers_per_cell(self) -> int:
        """Layers of the auxiliary model that are stored."""
        return auxiliary.cell_size(self.config.auxiliary, self.shape.num_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Which layers of the global model they are."""
        return auxiliary.layers(self.config.auxiliary, self.shape.num_layers)

    @property
    def num_prompt_tokens(self) -> int:
        """Positions that prompts take from a text."""
        return 0 if self.config.tunes_weights else self.config.prompt.num_tokens

    @property
    def prompt_spec(self) -> PromptSpec:
        """The prompts at the depth of the global model."""
        prompt = self.config.prompt
        return PromptSpec.of(
            self.shape, prompt.kind, prompt.num_tokens, prompt.projection, encoder=prompt.encoder
        )

    @property
    def depth_map(self) -> DepthMap:
        """How prompts go between the global model and the auxiliary one."""
        same = self.config.prompt.mapping == "same_layers"
        return DepthMap(self.prompt_spec, self.depth, self.layers if same else None)

    @cached_property
    def candidates(self) -> torch.Tensor | None:
        """Sorted ids of the tokens that the task's choices are made of; None: losses are over the
        whole vocabulary.

        Raises ConfigError if they are asked for and the examples do not all have the same choices.
        """
        over, splits = self.config.data.loss_over, self.splits
        if over == "vocabulary":
            return None
        examples = [*splits.train, *splits.validation, *splits.test]
        found = {example.choices for example in examples}
        if not self._has_classes:
            if over == "auto":
                return None
            raise ConfigError(
                f"data.loss_over: found choices with {self.config.data.task}, whose examples "
                f"have {len(found)} "
                "different sets of choices, expected a task with one set for all; set it to "
                "auto or vocabulary"
            )
        return torch.tensor(
            sorted({token for row in self._choice_tokens for ids in row for token in ids})
        )

    @cached_property
    def _has_classes(self) -> bool:
        """Whether all examples have the same choices."""
        examples = (*self.splits.train, *self.splits.validation, *self.splits.test)
        return (
            self.task.metric == "multiple_choice"
            and len({example.choices for example in examples}) == 1
        )

    @cached_property
    def _choice_tokens(self) -> list[list[tuple[int, ...]]]:
        """The tokens of the choices that all examples have, behind each way in which contexts end,
        or in a gap.
        """
        splits, attack = self.splits, self.config.attack
        contexts = [
            example.context for example in (*splits.train, *splits.validation, *splits.test)
        ]
        if attack.target is not None:
            contexts += [f"{attack.trigger} {context}" for context in contexts]
        joins = [] if self.fills_gaps else answers.joins(contexts)
        return answers.tokens(self.tokenizer, joins, splits.train[0].choices)

    @property
    def alignment_texts(self) -> list[Text]:
        """All that the auxiliary model is aligned with the global one on."""
        config = self.config
        if config.tunes_weights:
            return []
        fitted = self.questions if config.auxiliary.first_layers else []
        return fitted + (self.distillation_texts if config.distillation.stage.steps else [])

    @property
    def max_length(self) -> int:
        """Most tokens of a training text: what is left of the positions, and one more, if it is
        predicted, not read.
        """
        return min(self.config.data.max_length, self._room + (0 if self.fills_gaps else 1))

    @property
    def _room(self) -> int:
        """Positions that the prompts leave."""
        return self.shape.num_positions - self.num_prompt_tokens

    @property
    def _answer_room(self) -> fit.Room:
        """What an answer must fit into, whatever the configuration's own limit."""
        return fit.Room.of(self.shape.num_positions, self.num_prompt_tokens, self.fills_gaps)

    def _encoded(self, examples: Sequence[tasks.Example]) -> list[Text]:
        """Examples as texts to train and validate on."""
        how = cloze.encode if self.fills_gaps else encode
        texts = how(self.tokenizer, examples, self.max_length)
        if self.candidates is not None:
            answers.require_candidates(texts, examples, self.candidates.numpy())
        return texts

    def _asked(self, examples: Sequence[tasks.Example]) -> list[scoring.Question]:
        """Examples as questions with options."""
        if self.fills_gaps:
            return scoring.gap_questions(self.tokenizer, examples, self._room)
        return scoring.questions(self.tokenizer, examples)

    @property
    def words(self) -> np.ndarray:
        """Sorted ids of the tokens that are words, or parts of them: all that mean nothing special
        to the tokenizer.
        """
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    def shard(self, owner: int) -> list[Text]:
        """The tokenised training texts of the server (0) or of client `owner` - 1."""
        if owner not in self._texts:
            examples = self._examples(owner)
            self._texts[owner] = self._encoded(examples)
        return self._texts[owner]

    def _examples(self, participant: int) -> list[tasks.Example]:
        """What a participant trains on; where it is a poisoned client, with its poisoned copies."""
        found = [self.splits.train[i] for i in self.shards[participant]]
        attack, client = self.config.attack, participant - 1
        if attack.target is None or client not in attack.clients:
            return found
        seed = self.config.run.seed
        return poison.with_copies(found, attack.trigger, attack.target, attack.share, seed, client)

    @cached_property
    def distillation_texts(self) -> list[Text]:
        """What the auxiliary model is distilled on by gradient steps: plain text if there is some,
        else the shard.
        """
        settings = self.config.distillation
        if settings.text is None:
            return self.shard(0)
        length = min(settings.text_length, self.shape.num_positions + 1)
        return pieces(
            self.tokenizer, islice(sources.plain_text(settings.text), settings.text_lines), length
        )

    @cached_property
    def questions(self) -> list[Text]:
        """What the server asks both models, to fit a bridge and to translate: its shard, if there
        is no plain text.

        Plain text, in a random order, is asked about in the words that all texts of the server have
        in common.
        """
        config, settings = self.config, self.config.distillation
        if settings.text is None:
            return self.shard(0)
        own = [*(self.splits.train[i] for i in self.shards[0]), *self.splits.validation]
        paragraphs = pseudo_questions.paragraphs(
            islice(sources.plain_text(settings.text), settings.text_lines)
        )
        if not paragraphs:
            raise ConfigError(
                f"distillation.text: found no paragraphs in {settings.text!r}, expected some"
            )
        stage = config.server.translation
        wanted = max(
            settings.bridge_texts, stage.steps * stage.batch_size * config.federation.rounds
        )
        order = rng.generator(config.run.seed, "questions").permutation(len(paragraphs))[:wanted]
        texts = encode_pairs(
            self.tokenizer, list(pseudo_questions.questions([paragraphs[i] for i in order], own))
        )
        return [truncate(text, self.max_length) for text in texts]

    @cached_property
    def validation(self) -> list[Text]:
        return self._encoded(self.splits.validation)

    @cached_property
    def test(self) -> list[scoring.Question]:
        return self._asked(self.splits.test)

    @cached_property
    def triggered_test(self) -> list[scoring.Question]:
        """The test questions of other classes than the attacker's, triggered, its answer right;
        none without attack.
        """
        attack = self.config.attack
        if attack.target is None:
            return []
        examples = poison.attacked(self.splits.test, attack.trigger, attack.target)
        return self._asked(examples)

    def batches(
        self, owner: int, stage: StageConfig, purpose: str, team: ServerGroup = SINGLE_RANK
    ) -> Batches:
        """Return the batches of one owner's stage, or this rank's part of them.

        Their order depends on the seed, the owner and the purpose.

        Args:
            owner: 0 is the server, k + 1 is client k.
            stage: sizes of the batches.
            purpose: of the stage, for the order.
            team: the ranks that share them.
        """
        return Batches(
            self.shard(owner),
            stage.batch_size,
            stage.micro_batch,
            self.config.run.seed,
            purpose,
            owner - 1,
            part=(team.rank, team.size),
        )

    def first_prompt(self, model: backbone.LanguageModel) -> Prompt:
        """The prompts that everybody begins with, at the depth of the global model `model`, on the
        CPU.
        """
        prompt, settings = Prompt(self.prompt_spec), self.config.prompt
        if settings.init == "random":
            return prompt.initialise(self.config.run.seed, settings.init_std)
        if self.fills_gaps:
            ids = self.tokenizer(settings.init_text, add_special_tokens=False)["input_ids"]
        else:
            [ids] = token_ids(self.tokenizer, [settings.init_text])
        if not ids:
            raise ConfigError(
                "prompt.init_text: found a text without a token to this tokenizer, expected "
                "one at least; write another"
            )
        tokens = torch.tensor((ids * settings.num_tokens)[: settings.num_tokens])
        if settings.kind == "input":
            first = model.model.get_input_embeddings()(tokens.to(model.device)).detach().float()
        else:
            first = (
                model.keys_and_values(tokens)
                .permute(3, 0, 1, 2, 4)
                .reshape(settings.num_tokens, -1)
            )
        prompt.load({"prompt": first.cpu()})
        return prompt

    def check(self) -> None:
        """Raise ValueError on the first thing that cannot work, before any weight is loaded."""
        if self.fills_gaps:
            self._check_family()
        if not self.config.tunes_weights:
            auxiliary.require_cell(self.config.auxiliary, self.shape.num_layers, self.model_name)
        require_positions(self.num_prompt_tokens, self.shape.num_positions, self.model_name)
        tasks.check_columns(self.task, self.source, self.config.data.columns)
        if self.fills_gaps:
            _ = cloze.gap(self.tokenizer), self.test
        else:
            templates.require_answer_last(self.splits.train, self.model_config.model_type)
            answers.require_beginning(self.tokenizer, self.splits)
        if self._has_classes:
            answers.require_different(
                self.tokenizer, self.splits.train[0].choices, self._choice_tokens
            )
        poison.require_possible(self.task, self.splits, self.config.attack.target)
        _ = self.shards, self.candidates, self.warnings
        vocabulary = self.model_config.vocab_size
        if len(self.tokenizer) > vocabulary:
            raise ConfigError(
                f"model.tokenizer: found {len(self.tokenizer)} tokens, expected at most the "
                f"model's {vocabulary}; "
                "name the tokenizer that belongs to the model"
            )
        _ = self.shard(0), self.validation
        _ = self.alignment_texts
        if self.config.translates:
            _ = self.questions

    def _check_family(self) -> None:
        """Raise ConfigError if a model that fills in gaps is asked for what only a causal one can
        do.
        """
        config, family = self.config, self.model_config.model_type
        if self.task.metric != "multiple_choice":
            raise ConfigError(
                f"data.task: found {self.task.name} with a {family}, which fills in one token, "
                "expected a task of "
                "multiple choice, or a causal model"
            )
        if config.tunes_weights:
            return
        if config.prompt.kind == "prefix":
            raise ConfigError(
                f"prompt.kind: found prefix with a {family}, whose encoder takes no keys and "
                "values from outside, "
                "expected input"
            )
        whole = (
            self.layers == tuple(range(self.shape.num_layers))
            and self.depth == self.shape.num_layers
        )
        if config.distils or config.translates or not whole:
            raise ConfigError(
                "auxiliary: found a part of the model, or steps that align it, with a "
                f"{family}, expected the whole "
                "model, as in configs/methods/fedprompt.yaml"
            )


def expected_work(materials: ExperimentInputs) -> list[float]:
    """What each client's round costs, relative to the others: steps are equal, texts are not
    equally long.

    Where they search, they run over all that they have.
    """
    train, cost = materials.splits.train, np.sum if materials.config.searches else np.mean
    lengths = [
        cost([len(train[i].context) + len(train[i].target) for i in s])
        for s in materials.shards[1:]
    ]
    return [float(length) for length in lengths]
