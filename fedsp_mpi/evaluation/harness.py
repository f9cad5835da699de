"""lm-eval drives a test: its tasks ask, and our model with its prompt answers.

The only importer of lm-eval, which is an optional extra; `TaskManager.load`, new in 0.4.12, is
needed.
"""

from __future__ import annotations

import difflib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as tasks_file
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from fedsp_mpi.data.tasks import TASKS
from fedsp_mpi.data.tokens import Text, encode_pairs, first_token, token_ids
from fedsp_mpi.evaluation.scoring import Question, loglikelihoods, positions_for_text
from fedsp_mpi.log import Log, Progress, one_line
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch

VERSION: str = lm_eval.__version__
if not hasattr(TaskManager, "load"):
    raise ImportError(f"version {VERSION}, whose TaskManager has no load")

# lm-eval's folders of the tasks that this package has too, by lm-eval's names.
_TASK_FOLDERS = {
    task.lm_eval.name: task.lm_eval.folder for task in TASKS.values() if task.lm_eval is not None
}
_MEASURES = {"multiple_choice": ("acc", "acc_norm"), "exact_match": ("exact_match",)}
_MOST = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the first that is there counts
_DEFAULT_MOST = 256  # tokens that are generated, lm-eval's own default
_NEUTRAL = {
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    *_MOST,
}  # what greedy decoding may be told
_SEED = 1234  # of few-shot examples, lm-eval's own default
_REDRAWN = 1000  # samples for the standard error of measures without a formula


@dataclass(frozen=True)
class Result:
    """What lm-eval found out about a task, or a group of them.

    Attributes:
        filter: which of the task's ways to read an answer; "none" is the usual one.
        n: questions; 0 for a group.
        measures: by lm-eval's names.
        errors: standard errors of the measures that have one.
    """

    task: str
    filter: str
    n: int
    measures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


# -- tasks -----------------------------------------------------------------------------------------


def inherited(name: str, table: Any) -> dict[str, Any]:
    """lm-eval's own task of that name, asked about the rows of a table in place of lm-eval's data."""
    # A group, because only what stands in one is laid over the task's own file.
    return {"group": f"{name} of the run", "task": [{"task": name, **_reading(table)}]}


def standalone(name: str, metric: str, table: Any) -> dict[str, Any]:
    """A task that lm-eval does not have.

    Args:
        metric: "multiple_choice" or "exact_match".
        table: a data set with the columns context, choices, and gold: a position, or a list of them
            for exact match.
    """
    return {
        "task": name,
        **_reading(table),
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": measure, "aggregation": "mean", "higher_is_better": True}
            for measure in _MEASURES[metric]
        ],
    }


def _reading(table: Any) -> dict[str, Any]:
    """The part of a task's configuration that says where its rows are.

    A function is not copied, a table would be.
    """
    none = dict.fromkeys(
        ("dataset_name", "dataset_kwargs", "training_split", "validation_split", "fewshot_split")
    )
    return {**none, "custom_dataset": lambda **_: {"test": table}, "test_split": "test"}


def load(wanted: Mapping[str, dict[str, Any] | None], include: Path | None) -> dict[str, Any]:
    """Tasks and groups as lm-eval wants them, with their data.

    Args:
        wanted: names, and for the tasks that are not as lm-eval has them `inherited` or
            `standalone`.
        include: a folder of the user's own task files.

    Raises ValueError if lm-eval does not know a name, or cannot load a task or its data.
    """
    with _quiet():
        names = [name for name, spec in wanted.items() if spec is None or "group" in spec]
        manager = _manager(names, include)
        _require_known(names, manager.all_tasks)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        # The run's own last: it takes the place of the same task in a group of lm-eval's.
        for name, spec in sorted(wanted.items(), key=lambda item: item[1] is not None):
            for part, found in _load(manager, name, spec).items():
                loaded[part] |= found
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_SEED)
    return loaded


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """The index of the tasks: of a few folders, if they hold all that is wanted, else of all that
    lm-eval has.
    """
    rooms = {
        Path(tasks_file).parent / _TASK_FOLDERS[name] for name in names if name in _TASK_FOLDERS
    }
    own = [include] if include else []
    manager = TaskManager(include_path=[*sorted(rooms), *own], include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=own)


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else "name one of its tasks, or the folder of yours by --include"
            )
            raise ValueError(
                f"--tasks: found {name!r}, which lm-eval {VERSION} does not know; {hint}"
            )


def _load(manager: TaskManager, name: str, spec: dict[str, Any] | None) -> dict[str, Any]:
    try:
        return manager.load([spec or name])
    except Exception as error:  # a task's file may do anything, and so may the network
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise ValueError(
            f"{name}: found {type(error).__name__} while lm-eval loaded the task "
            f"({one_line(error)}), expected a task's file "
            "and its data, in the local cache or on the hub; run this once where there is "
            "a network, to fill the cache"
        ) from None


# -- answers ---------------------------------------------------------------------------------------


def measure(loaded: dict[str, Any], answers: Answers, limit: int | None) -> list[Result]:
    """Ask all questions of the tasks, or the first `limit` of each; results in lm-eval's order."""
    with _quiet():
        found = evaluator.evaluate(
            lm=answers, task_dict=loaded, limit=limit, bootstrap_iters=_REDRAWN, log_samples=False
        )
    counts = {name: int(count["effective"]) for name, count in found["n-samples"].items()}
    return [
        result
        for name, values in found["results"].items()
        for result in _results(name, values, counts.get(name, 0))
    ]


def _results(task: str, values: Mapping[str, Any], n: int) -> Iterator[Result]:
    """From lm-eval's "acc,none" and "acc_stderr,none"; none for a group without measures of its
    own.
    """
    found: dict[str, Result] = {}
    for key, value in values.items():
        name, comma, filter = key.partition(",")
        if comma and isinstance(value, Real):
            result = found.setdefault(filter, Result(task, filter, n))
            where = result.errors if name.endswith("_stderr") else result.measures
            where[name.removesuffix("_stderr")] = float(value)
    yield from found.values()


@dataclass(frozen=True)
class _Wish:
    """A text to go on with: what is read of it, what ends it, and after how many tokens it ends
    anyway.
    """

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    most: int

    def cut(self, text: str) -> str:
        for stop in self.stops:
            text = text.split(stop)[0]
        return text


class Answers(LM):
    """Our model, with or without a prompt, as lm-eval asks a model.

    Prompts take positions from a text, and a text that is too long loses its beginning, as in
    `scoring.score`: options are run as there, so that scores are equal to the last bit.

    Args:
        model: on its device, frozen.
        prompt: at the model's depth, or None.
        batch_tokens: positions that a batch runs at most; more only where one text is longer.
        label: for the lines of progress.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt | None,
        tokenizer: Any,
        batch_tokens: int,
        label: str,
        log: Log,
    ) -> None:
        super().__init__()
        self._model, self._prompt, self._tokenizer = model, prompt, tokenizer
        self._batch_tokens, self._label, self._log = batch_tokens, label, log
        self._room = positions_for_text(model, prompt)
        settings = getattr(model.model, "generation_config", None)
        ends = getattr(settings, "eos_token_id", None)
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {
            None
        }

    def loglikelihood(
        self, requests: Sequence[Any], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether greedy decoding gives
        it.

        Raises ValueError if a continuation has no token, as lm-eval's own models do.
        """
        texts = encode_pairs(self._tokenizer, [request.args[:2] for request in requests])
        for text, request in zip(texts, requests):
            if text.num_answers < 1:
                raise ValueError(
                    f"{request.task_name}: found an option without a token in question "
                    f"{request.doc_id}, expected one "
                    "at least; correct the task's data, or choose another task"
                )
        owners = [(request.task_name, request.doc_id, request.args[0]) for request in requests]
        return self._scored(texts, owners, "options")

    def loglikelihood_rolling(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[float]:
        """Log-likelihood of whole texts, in windows of as many positions as there are, each token
        predicted once.
        """
        windows = [list(self._windows(request.args[0])) for request in requests]
        texts = [text for some in windows for text in some]
        found = iter(self._scored(texts, list(range(len(texts))), "windows"))
        return [sum(next(found)[0] for _ in some) for some in windows]

    def generate_until(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[str]:
        """What greedy decoding says behind each context, up to the first stop string.

        Raises ValueError if a task asks for something else than greedy decoding, or for more tokens
        than there are.
        """
        wishes = [self._wish(*request.args[:2]) for request in requests]
        said, progress = [""] * len(wishes), self._progress("answers", len(wishes))
        for some in self._alike(wishes):
            for place, text in zip(some, self._greedy([wishes[place] for place in some])):
                said[place] = text
            progress.step(len(some))
        return said

    def _scored(
        self, texts: Sequence[Text], owners: Sequence[Any], what: str
    ) -> list[tuple[float, bool]]:
        """What is found for each text; neighbours of one owner are the options of one question, run
        together.
        """
        answers = [(0.0, True)] * len(texts)
        groups = [
            list(some) for _, some in groupby(range(len(texts)), key=lambda place: owners[place])
        ]
        questions = [
            Question(tuple(texts[place] for place in some), (1,) * len(some), ()) for some in groups
        ]
        step: Callable[[int], None] = self._progress(what, len(texts)).step
        found = loglikelihoods(self._model, self._prompt, questions, self._batch_tokens, step) or []
        for some, each in zip(groups, found):
            for place, value, is_greedy in zip(some, each.loglikelihood, each.greedy):
                answers[place] = float(value), bool(is_greedy)
        return answers

    def _windows(self, text: str) -> Iterator[Text]:
        [ids] = token_ids(self._tokenizer, [text])
        for window in get_rolling_token_windows(
            ids, first_token(self._tokenizer), self._room, context_len=1
        ):
            context, rest = make_disjoint_window(window)
            yield Text(np.array([*context, *rest], dtype=np.int32), len(context))

    def _wish(self, context: str, settings: Mapping[str, Any]) -> _Wish:
        most = int(
            next((settings[key] for key in _MOST if settings.get(key) is not None), _DEFAULT_MOST)
        )
        _require_greedy(settings)
        if not 1 <= most < self._room:
            raise ValueError(
                f"max_gen_toks: found {most} tokens to generate, expected fewer than the "
                f"{self._room} positions that "
                "there are for a text; lower it in the task's file, or choose another task"
            )
        until = settings.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        if self._tokenizer.eos_token:
            stops.append(self._tokenizer.eos_token)
        [ids] = token_ids(self._tokenizer, [context])
        ids = ids or [first_token(self._tokenizer)]
        return _Wish(tuple(ids[most - self._room :]), tuple(stop for stop in stops if stop), most)

    def _alike(self, wishes: Sequence[_Wish]) -> Iterator[list[int]]:
        """Places of wishes that can share a batch: of one length, so that nothing is padded. The
        longest come first.
        """
        before = self._model.shape.num_positions - self._room

        def size(place: int) -> tuple[int, int]:
            return len(wishes[place].ids), wishes[place].most

        for sizes, some in groupby(sorted(range(len(wishes)), key=size, reverse=True), key=size):
            places, count = list(some), max(1, self._batch_tokens // (before + sum(sizes)))
            yield from (places[start : start + count] for start in range(0, len(places), count))

    @torch.no_grad()
    def _greedy(self, wishes: Sequence[_Wish]) -> list[str]:
        """Token after token, each the likeliest; a text that is done leaves the batch."""
        model, said = self._model, [list[int]() for _ in wishes]
        going = list(range(len(wishes)))
        with model.evaluating(), model.computing():
            output, mask = self._read(
                torch.tensor([wish.ids for wish in wishes], device=model.device)
            )
            while True:
                tokens = model.head(output.last_hidden_state[:, -1]).argmax(-1)
                for place, token in zip(going, tokens.tolist()):
                    said[place].append(token)
                rows = [
                    row
                    for row, place in enumerate(going)
                    if not self._is_done(said[place], wishes[place])
                ]
                if not rows:
                    break
                going, kept = [going[row] for row in rows], torch.tensor(rows, device=model.device)
                output.past_key_values.batch_select_indices(kept)
                mask = torch.cat([mask[kept], mask.new_ones(len(rows), 1)], dim=1)
                output = model.model.base_model(
                    input_ids=tokens[kept, None],
                    attention_mask=mask,
                    past_key_values=output.past_key_values,
                )
        return [wish.cut(self._decoded(tokens)) for wish, tokens in zip(wishes, said)]

    def _read(self, ids: Tensor) -> tuple[Any, Tensor]:
        """The forward pass of contexts of one length, [contexts, length], with its cache and its
        attention mask.
        """
        inputs, _ = self._model.inputs(Batch(ids, torch.ones_like(ids), ids), self._prompt)
        return self._model.model.base_model(**{**inputs, "use_cache": True}), inputs[
            "attention_mask"
        ]

    def _is_done(self, tokens: list[int], wish: _Wish) -> bool:
        if tokens[-1] in self._ends or len(tokens) >= wish.most:
            return True
        text = self._decoded(tokens)
        return any(stop in text for stop in wish.stops)

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            [token for token in tokens if token not in self._ends], skip_special_tokens=True
        )

    def _progress(self, what: str, total: int) -> Progress:
        return self._log.progress(f"{self._label}: {what}", total)


def _require_greedy(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a task wants its answers sampled, or changed in a way that is not built."""
    samples = settings.get("do_sample")
    if samples or (samples is None and float(settings.get("temperature") or 0) > 0):
        raise ValueError(
            f"do_sample: found sampling at temperature {settings.get('temperature', 1.0)} "
            "in a task's "
            "generation_kwargs, expected greedy decoding; set do_sample to false in the task's file"
        )
    if other := sorted(
        set(settings) - _NEUTRAL - ({"num_beams"} if settings.get("num_beams") == 1 else set())
    ):
        raise ValueError(
            f"generation_kwargs: found {', '.join(other)} in a task, expected "
            f"{', '.join(sorted(_NEUTRAL))}; choose "
            "another task"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, warnings or log lines of the libraries; lm-eval draws its bars whatever it is told."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
