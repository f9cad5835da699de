"""What a record says of how to use a run's result without this package: model, task, a question.

The question is one of the server's own test split, in the run's own words. `report.plain_use` makes
lines of Python of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsp_mpi.data import cloze
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tokens import Question, Text
from fedsp_mpi.files.untrusted import JsonObject
from fedsp_mpi.models.families import kind_of
from fedsp_mpi.run.inputs import ExperimentInputs

SECTION = "plain_use"
_MAX_EXAMPLES = 200  # that a question is chosen from
_MAX_CHARACTERS = 600  # of a question with its choices


def plain_use(inputs: ExperimentInputs) -> JsonObject:
    """Return what plain transformers and peft need to load what a run has tuned, and to ask it.

    `question` is left out where there is no short one whose tokens are just those of its text.
    """
    config = inputs.config
    section: JsonObject = {
        "kind": kind_of(inputs.model_config),
        "model": _absolute(inputs.model_name),
        "revision": config.model.revision,
        "tokenizer": _absolute(config.model.tokenizer or inputs.model_name),
        "dtype": config.evaluation.dtype,
        "tuned": config.tuned_folder,
    }
    if inputs.is_plain_text:
        return section
    if inputs.is_cloze:
        questions = _cloze_questions(inputs)
    elif config.classifies:
        questions = _classification_questions(inputs)
    else:
        questions = _causal_questions(inputs)
    shortest = min(questions, key=_num_characters, default=None)
    if shortest is not None and _num_characters(shortest) <= _MAX_CHARACTERS:
        section["question"] = shortest
    return section


def _absolute(name: str) -> str:
    """Return a folder's absolute path; a name on the hub as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _num_characters(question: JsonObject) -> int:
    return len(question["text"]) + sum(len(choice) for choice in question.get("choices", ()))


def _test_questions(inputs: ExperimentInputs) -> list[tuple[Example, Question]]:
    pairs = zip(inputs.splits.test, inputs.test, strict=True)
    return [pair for pair, _ in zip(pairs, range(_MAX_EXAMPLES))]


def _causal_questions(inputs: ExperimentInputs) -> Iterator[JsonObject]:
    """Yield the questions whose tokens are those of the text, then those of an option behind it."""
    tokenizer = inputs.tokenizer
    for example, question in _test_questions(inputs):
        text = example.context.rstrip()
        gap = example.context[len(text) :] + " "
        choices = [f"{gap}{choice}" for choice in example.choices]
        if not text or not all(
            _is_plain(tokenizer(text + choice).input_ids, tokenizer(text).input_ids, option)
            for choice, option in zip(choices, question.options)
        ):
            continue
        if inputs.task.metric == "exact_match":
            yield {"text": text, "num_tokens": max(o.num_answers for o in question.options)}
            continue
        are_tokens = all(
            tokenizer(choice, add_special_tokens=False).input_ids == option.ids[-1:].tolist()
            and option.num_answers == 1
            for choice, option in zip(choices, question.options)
        )
        yield {"text": text, "choices": choices, "are_tokens": are_tokens}


def _classification_questions(inputs: ExperimentInputs) -> Iterator[JsonObject]:
    """Yield the questions of a causal model with a head whose tokens are those of the text."""
    for example, question in _test_questions(inputs):
        text = example.context.rstrip()
        option = question.options[0]
        if text and inputs.tokenizer(text).input_ids == option.ids[: option.answer].tolist():
            yield {"text": text, "choices": list(example.choices)}


def _is_plain(joint_ids: list[int], context_ids: list[int], option: Text) -> bool:
    return joint_ids == option.ids.tolist() and option.answer == len(context_ids)


def _cloze_questions(inputs: ExperimentInputs) -> Iterator[JsonObject]:
    """Yield the questions that have one gap and fit whole."""
    tokenizer = inputs.tokenizer
    token, token_id = cloze.gap(tokenizer)
    for example, question in _test_questions(inputs):
        text = f"{example.context.rstrip()} {token}{example.suffix}".lstrip()
        ids = tokenizer(text).input_ids
        if ids.count(token_id) == 1 and len(ids) == len(question.options[0].ids):
            choices = [f" {choice}" for choice in example.choices]
            yield {"text": text, "choices": choices, "gap": token}
