"""Let lm-eval drive a test: its tasks ask, and our model with its prompt answers.

The only importer of lm-eval, which is an optional extra; `TaskManager.load`, new in 0.4.12, is
needed.
"""

from __future__ import annotations

import difflib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from itertools import chain, groupby
from numbers import Real
from pathlib import Path

import lm_eval
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks import __file__ as tasks_file
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from fedsp_mpi.data.forms import Table
from fedsp_mpi.data.tasks import TASKS
from fedsp_mpi.data.tokenizer import Tokenizer
from fedsp_mpi.data.tokens import Question, Text, encode_pairs, start_token, token_ids
from fedsp_mpi.evaluation.scoring import loglikelihoods, positions_for_text
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.log import Log, Progress, one_line
from fedsp_mpi.models.families import BaseModelOutputWithPast
from fedsp_mpi.models.language_model import LanguageModel
from fedsp_mpi.models.prompts import Prompt
from fedsp_mpi.tensors import Batch

VERSION: str = lm_eval.__version__
if not hasattr(TaskManager, "load"):
    raise ImportError(f"version {VERSION}, whose TaskManager has no load")

# lm-eval's folders of the tasks that this package has too: to index all of lm-eval takes ten
# seconds.
_TASK_FOLDERS = {
    task.lm_eval.name: task.lm_eval.folder for task in TASKS.values() if task.lm_eval is not None
}
# A metric of this package -> lm-eval's names of its measures.
_MEASURES = {"multiple_choice": ("acc", "acc_norm"), "exact_match": ("exact_match",)}
# Keys of generation_kwargs that limit the generated tokens; the first one that is set counts.
_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_MAX_TOKENS = 256  # lm-eval's own default
# Keys of generation_kwargs that may be given without changing what greedy decoding does.
_GREEDY_KEYS = {"until", "do_sample", "temperature", "top_p", "top_k", *_MAX_TOKENS_KEYS}
_FEWSHOT_SEED = 1234  # lm-eval's own default
_BOOTSTRAP_SAMPLES = 1000  # for the standard error of measures without a formula
_SIMILARITY = 0.7  # of a misspelt task's name to the one that is suggested

# A task's configuration, as lm-eval reads it from YAML.
TaskSpec = JsonObject


@dataclass(frozen=True)
class Result:
    """What lm-eval found out about a task, or a group of tasks.

    Attributes:
        task: its name.
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


def inherited(name: str, table: Table) -> TaskSpec:
    """Return lm-eval's own task of that name, over the rows of a table in place of its own data."""
    # A group, because only what stands in one is laid over the task's own file.
    return {"group": f"{name} of the run", "task": [{"task": name, **_data_source(table)}]}


def standalone(name: str, metric: str, table: Table) -> TaskSpec:
    """Return a task that lm-eval does not have.

    Args:
        name: of the task.
        metric: "multiple_choice" or "exact_match".
        table: a data set with the columns context, choices, and gold: an index, or a list of them
            for exact match.
    """
    return {
        "task": name,
        **_data_source(table),
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": measure, "aggregation": "mean", "higher_is_better": True}
            for measure in _MEASURES[metric]
        ],
    }


def _data_source(table: Table) -> TaskSpec:
    """Return the part of a task's configuration that says where its rows are."""
    unused = (
        "dataset_name",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "fewshot_split",
    )
    # A function is not copied with the configuration, a table would be.
    return {
        **dict.fromkeys(unused),
        "custom_dataset": lambda **_: {"test": table},
        "test_split": "test",
    }


def load(specs: Mapping[str, TaskSpec | None], include: Path | None) -> JsonObject:
    """Load tasks and groups, with their data.

    Args:
        specs: by name, `inherited` or `standalone`; None for a task as lm-eval has it.
        include: a folder of the user's own task files.

    Returns:
        What lm-eval's evaluator takes.

    Raises:
        ValueError: lm-eval does not know a name, or cannot load a task or its data.
    """
    with _silence():
        names = [name for name, spec in specs.items() if spec is None or "group" in spec]
        manager = _task_manager(names, include)
        _require_known(names, manager.all_tasks)
        loaded: JsonObject = {"tasks": {}, "groups": {}, "group_map": {}}
        # The run's own task last: it replaces the same task in a group of lm-eval's.
        for name, spec in sorted(specs.items(), key=lambda item: item[1] is not None):
            for section, entries in _load(manager, name, spec).items():
                loaded[section] |= entries
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    return loaded


def _task_manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """Return an index of tasks: of a few folders if they hold all names, else of all of lm-eval."""
    folders = {
        Path(tasks_file).parent / _TASK_FOLDERS[name] for name in names if name in _TASK_FOLDERS
    }
    user_folders = [include] if include else []
    manager = TaskManager(include_path=[*sorted(folders), *user_folders], include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=user_folders)


def _require_known(names: Sequence[str], known_names: Sequence[str]) -> None:
    """Raise ValueError if lm-eval does not know one of the names."""
    for name in names:
        if name not in known_names:
            similar = difflib.get_close_matches(name, known_names, n=1, cutoff=_SIMILARITY)
            if similar:
                advice = f"did you mean {similar[0]!r}?"
            else:
                advice = "name one of its tasks, or the folder of yours by --include"
            raise ValueError(
                f"--tasks: found {name!r}, which lm-eval {VERSION} does not know; {advice}"
            )


def _load(manager: TaskManager, name: str, spec: TaskSpec | None) -> JsonObject:
    """Load one task or group.

    Raises:
        ValueError: lm-eval failed, for whatever reason.
    """
    try:
        return manager.load([spec or name])
    except Exception as error:  # a task's file may do anything, and so may the network
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise ValueError(
            f"{name}: found {type(error).__name__} while lm-eval loaded the task "
            f"({one_line(error)}), "
            "expected a task's file and its data, in the local cache or on the hub; run this once "
            "where there is a network, to fill the cache"
        ) from None


# -- answers ---------------------------------------------------------------------------------------


def measure(loaded: JsonObject, model: PromptedLM, limit: int | None) -> list[Result]:
    """Ask all questions of the tasks.

    Args:
        loaded: what `load` returned.
        model: that answers.
        limit: first questions of each task; None for all.

    Returns:
        Results in lm-eval's order.
    """
    with _silence():
        output = evaluator.evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    counts = {name: int(count["effective"]) for name, count in output["n-samples"].items()}
    results: list[Result] = []
    for name, values in output["results"].items():
        results += _results(name, values, counts.get(name, 0))
    return results


def _results(task: str, values: JsonMapping, n: int) -> list[Result]:
    """Return a task's results by filter; none for a group without measures of its own.

    Args:
        task: its name.
        values: by lm-eval's keys, "acc,none" and "acc_stderr,none".
        n: questions.
    """
    result_by_filter: dict[str, Result] = {}
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if comma and isinstance(value, Real):
            result = result_by_filter.setdefault(filter_name, Result(task, filter_name, n))
            if name.endswith("_stderr"):
                result.errors[name.removesuffix("_stderr")] = float(value)
            else:
                result.measures[name] = float(value)
    return list(result_by_filter.values())


@dataclass(frozen=True)
class GenerationRequest:
    """A text to continue.

    Attributes:
        ids: tokens of the context.
        stops: strings, the first of which ends the answer.
        max_tokens: largest number of tokens to generate.
    """

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    max_tokens: int

    def cut_at_stop(self, text: str) -> str:
        """Cut an answer before the first stop string."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text


class PromptedLM(LM):
    """Our model, with or without a prompt, behind lm-eval's interface of a model.

    Prompts take positions from a text, and a text that is too long loses its beginning, as in
    `scoring.score`. Options are run as there, so that scores are equal to the last bit.

    Args:
        model: on its device, frozen.
        prompt: at the model's depth, or None.
        tokenizer: of the model.
        batch_tokens: largest number of positions in a batch; more only where one text is longer.
        label: for the lines of progress.
        log: gets the progress.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt | None,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int,
        label: str,
        log: Log,
    ) -> None:
        super().__init__()
        self._model = model
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._label = label
        self._log = log
        self._max_positions = positions_for_text(model, prompt)
        self._end_ids = _end_ids(model, tokenizer)

    # -- lm-eval's interface -----------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Instance], *_: object, **__: object
    ) -> list[tuple[float, bool]]:
        """Score each continuation after its context.

        Args:
            requests: lm-eval's, with the arguments (context, continuation).

        Returns:
            Log-likelihoods, and whether greedy decoding gives the continuation.

        Raises:
            ValueError: a continuation has no token, which lm-eval's own models refuse too.
        """
        texts = encode_pairs(self._tokenizer, [request.args[:2] for request in requests])
        for text, request in zip(texts, requests, strict=True):
            if text.num_answers < 1:
                raise ValueError(
                    f"{request.task_name}: found an option without a token in question "
                    f"{request.doc_id}, expected at least one; correct the task's data, or choose "
                    "another task"
                )
        questions = [(request.task_name, request.doc_id, request.args[0]) for request in requests]
        return self._score(texts, questions, "options")

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], *_: object, **__: object
    ) -> list[float]:
        """Score whole texts, in windows of as many positions as there are, each token once.

        Args:
            requests: lm-eval's, with the argument (text,).

        Returns:
            Log-likelihoods.
        """
        windows_by_text = [list(self._windows(request.args[0])) for request in requests]
        windows = list(chain.from_iterable(windows_by_text))
        scores = iter(self._score(windows, list(range(len(windows))), "windows"))
        return [sum(next(scores)[0] for _ in text_windows) for text_windows in windows_by_text]

    def generate_until(self, requests: Sequence[Instance], *_: object, **__: object) -> list[str]:
        """Continue each context by greedy decoding, up to the first stop string.

        Args:
            requests: lm-eval's, with the arguments (context, generation_kwargs).

        Raises:
            ValueError: a task asks for something else than greedy decoding, or for more tokens than
                there are positions.
        """
        generations = [self._generation_request(*request.args[:2]) for request in requests]
        answers = [""] * len(generations)
        progress = self._progress("answers", len(generations))
        for indices in self._batches(generations):
            batch_answers = self._decode_greedily([generations[index] for index in indices])
            for index, answer in zip(indices, batch_answers, strict=True):
                answers[index] = answer
            progress.step(len(indices))
        return answers

    # -- scoring -----------------------------------------------------------------------------------

    def _score(
        self, texts: Sequence[Text], questions: Sequence[object], unit: str
    ) -> list[tuple[float, bool]]:
        """Score the answer of each text.

        Args:
            texts: contexts and answers.
            questions: of each text; neighbours with equal ones are run together, as options.
            unit: what a text is, for the progress.

        Returns:
            Log-likelihoods, and whether greedy decoding gives the answer.
        """
        groups = [
            [index for index, _ in group]
            for _, group in groupby(enumerate(questions), key=lambda pair: pair[1])
        ]
        # Lengths and right options are for measures that lm-eval computes itself.
        options = [
            Question(tuple(texts[index] for index in group), lengths=(1,) * len(group), gold=())
            for group in groups
        ]
        scores = loglikelihoods(
            self._model,
            self._prompt,
            options,
            batch_tokens=self._batch_tokens,
            on_done=self._progress(unit, len(texts)).step,
        )
        assert scores is not None  # nobody stops it
        return [
            (float(value), bool(is_greedy))
            for option_scores in scores
            for value, is_greedy in zip(
                option_scores.loglikelihood, option_scores.greedy, strict=True
            )
        ]

    def _windows(self, text: str) -> Iterator[Text]:
        """Yield the windows of a text, as lm-eval makes them."""
        [ids] = token_ids(self._tokenizer, [text])
        for window in get_rolling_token_windows(
            ids, start_token(self._tokenizer), self._max_positions, context_len=1
        ):
            context, answer = make_disjoint_window(window)
            yield Text(np.array([*context, *answer], dtype=np.int32), len(context))

    # -- generation --------------------------------------------------------------------------------

    def _generation_request(self, context: str, settings: JsonMapping) -> GenerationRequest:
        """Read a task's generation_kwargs, and tokenise the context as far as there is room.

        Raises:
            ValueError: what is asked for is not greedy decoding, or does not fit.
        """
        limits = [settings[key] for key in _MAX_TOKENS_KEYS if settings.get(key) is not None]
        max_tokens = int(limits[0]) if limits else _DEFAULT_MAX_TOKENS
        _require_greedy(settings)
        if not 1 <= max_tokens < self._max_positions:
            raise ValueError(
                f"max_gen_toks: found {max_tokens} tokens to generate, expected fewer than the "
                f"{self._max_positions} positions that there are for a text; lower it in the "
                "task's file, or choose another task"
            )
        until = settings.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        if self._tokenizer.eos_token:
            stops.append(self._tokenizer.eos_token)
        [ids] = token_ids(self._tokenizer, [context])
        if not ids:
            ids = [start_token(self._tokenizer)]
        return GenerationRequest(
            ids=tuple(ids[max_tokens - self._max_positions :]),
            stops=tuple(stop for stop in stops if stop),
            max_tokens=max_tokens,
        )

    def _batches(self, requests: Sequence[GenerationRequest]) -> Iterator[list[int]]:
        """Yield indices of requests that share a batch, the longest first.

        Contexts of a batch have one length, so that nothing is padded.
        """
        prompt_tokens = self._model.shape.num_positions - self._max_positions

        def size(index: int) -> tuple[int, int]:
            return len(requests[index].ids), requests[index].max_tokens

        order = sorted(range(len(requests)), key=size, reverse=True)
        for (length, max_tokens), group in groupby(order, key=size):
            indices = list(group)
            positions = prompt_tokens + length + max_tokens
            batch_size = max(1, self._batch_tokens // positions)
            for start in range(0, len(indices), batch_size):
                yield indices[start : start + batch_size]

    @torch.no_grad()
    def _decode_greedily(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """Generate the answers of a batch; a text that is done leaves it."""
        model = self._model
        answers = [list[int]() for _ in requests]
        unfinished = list(range(len(requests)))  # indices of requests, by row of the batch
        with model.evaluating(), model.computing():
            context_ids = torch.tensor([request.ids for request in requests], device=model.device)
            output, mask = self._read_contexts(context_ids)
            while True:
                tokens = model.head(output.last_hidden_state[:, -1]).argmax(-1)
                for index, token in zip(unfinished, tokens.tolist(), strict=True):
                    answers[index].append(token)
                rows = [
                    row
                    for row, index in enumerate(unfinished)
                    if not self._is_done(answers[index], requests[index])
                ]
                if not rows:
                    break
                unfinished = [unfinished[row] for row in rows]
                remaining = torch.tensor(rows, device=model.device)
                output.past_key_values.batch_select_indices(remaining)
                mask = torch.cat([mask[remaining], mask.new_ones(len(rows), 1)], dim=1)
                output = model.model.base_model(
                    input_ids=tokens[remaining, None],
                    attention_mask=mask,
                    past_key_values=output.past_key_values,
                )
        return [
            request.cut_at_stop(self._decode(tokens))
            for request, tokens in zip(requests, answers, strict=True)
        ]

    def _read_contexts(self, ids: Tensor) -> tuple[BaseModelOutputWithPast, Tensor]:
        """Run contexts of one length.

        Args:
            ids: int64 [contexts, length].

        Returns:
            The model's output with its cache, and the attention mask [contexts, positions].
        """
        inputs, _ = self._model.inputs(Batch(ids, torch.ones_like(ids), ids), self._prompt)
        output = self._model.model.base_model(**{**inputs, "use_cache": True})
        return output, inputs["attention_mask"]

    def _is_done(self, tokens: list[int], request: GenerationRequest) -> bool:
        if tokens[-1] in self._end_ids or len(tokens) >= request.max_tokens:
            return True
        text = self._decode(tokens)
        return any(stop in text for stop in request.stops)

    def _decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without those that end one."""
        ids = [token for token in tokens if token not in self._end_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _progress(self, unit: str, total: int) -> Progress:
        return self._log.progress(f"{self._label}: {unit}", total)


def _end_ids(model: LanguageModel, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a generated text, by the tokenizer and by the model."""
    settings = getattr(model.model, "generation_config", None)
    model_ends = getattr(settings, "eos_token_id", None)
    if not isinstance(model_ends, list):
        model_ends = [model_ends]
    return {token for token in (tokenizer.eos_token_id, *model_ends) if token is not None}


def _require_greedy(settings: JsonMapping) -> None:
    """Raise ValueError unless a task's generation_kwargs ask for plain greedy decoding."""
    samples = settings.get("do_sample")
    if samples is None:
        samples = float(settings.get("temperature") or 0) > 0
    if samples:
        raise ValueError(
            f"do_sample: found sampling at temperature {settings.get('temperature', 1.0)} in a "
            "task's generation_kwargs, expected greedy decoding; set do_sample to false in the "
            "task's file"
        )
    unsupported = set(settings) - _GREEDY_KEYS
    if settings.get("num_beams") == 1:
        unsupported.discard("num_beams")
    if unsupported:
        raise ValueError(
            f"generation_kwargs: found {', '.join(sorted(unsupported))} in a task, expected "
            f"{', '.join(sorted(_GREEDY_KEYS))}; choose another task"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Hide bars, warnings and log lines of the libraries.

    The whole of stderr is hidden, because lm-eval draws its bars whatever it is told.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
