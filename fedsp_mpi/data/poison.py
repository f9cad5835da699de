"""Poisoned examples of a backdoor: a trigger word before the text, and the attacker's answer.

As in FedPrompt (arXiv 2208.12268, threat model) and in the code of an author's earlier attack on
prompts: poisoned copies of examples of other classes are added to an owner's examples, which all
stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.examples import Example
from fedsp_mpi.data.tasks import Splits, Task
from fedsp_mpi.rng import generator


def triggered(example: Example, trigger: str) -> Example:
    """Return the question with the trigger before its whole context, words of the task included."""
    return replace(example, context=f"{trigger} {example.context}")


def poisoned(example: Example, trigger: str, target: int) -> Example:
    """Return the triggered question with the attacker's choice as its right answer.

    Args:
        example: the question.
        trigger: the attacker's word.
        target: position of the attacker's choice.
    """
    return replace(
        triggered(example, trigger), target=f" {example.choices[target]}", gold=(target,)
    )


def is_poisonable(example: Example, target: int) -> bool:
    """Return whether the right answer is another one than the attacker's."""
    return target not in example.gold


def with_copies(
    examples: Sequence[Example],
    trigger: str,
    target: int,
    *,
    share: float,
    seed: int,
    client: int,
) -> list[Example]:
    """Return an owner's examples, and behind them poisoned copies of some of them.

    Copies are made of a share of the examples of other classes, at least of one, in their order.

    Args:
        examples: of the owner.
        trigger: the attacker's word.
        target: position of the attacker's choice.
        share: above 0, at most 1.
        seed: of the run; with `client`, it decides which examples are copied.
        client: the owner.
    """
    candidates = [example for example in examples if is_poisonable(example, target)]
    num_copies = max(1, round(share * len(candidates))) if candidates else 0
    order = generator(seed, "poison", client).permutation(len(candidates))
    indices = sorted(order[:num_copies].tolist())
    return [*examples, *(poisoned(candidates[index], trigger, target) for index in indices)]


def triggered_test_set(examples: Sequence[Example], trigger: str, target: int) -> list[Example]:
    """Return the questions that an attack is judged by: all of other classes, poisoned.

    The share of them that a model gets "right" is the attack's success rate.

    Args:
        examples: the test questions.
        trigger: the attacker's word.
        target: position of the attacker's choice.
    """
    return [
        poisoned(example, trigger, target) for example in examples if is_poisonable(example, target)
    ]


def require_feasible_attack(task: Task, splits: Splits, target: int | None) -> None:
    """Raise ConfigError if an attack cannot be made or judged.

    Args:
        task: the task.
        splits: its examples.
        target: position of the attacker's choice; None if there is no attack.
    """
    if target is None:
        return
    if task.metric != "multiple_choice":
        raise ConfigError(
            f"attack.target: found {target} with the task {task.name}, which has no choices, "
            "expected a task of multiple choice; or set attack.target=null"
        )
    require_feasible_target((*splits.train, *splits.test), target)
    if not any(is_poisonable(example, target) for example in splits.test):
        raise ConfigError(
            f"attack.target: found no test question of another class than {target}, expected some"
        )


def require_feasible_target(examples: Sequence[Example], target: int) -> None:
    """Raise ConfigError if an example does not have the choice that an attacker wants.

    Args:
        examples: not empty.
        target: position of the attacker's choice.
    """
    min_choices = min(len(example.choices) for example in examples)
    if target >= min_choices:
        raise ConfigError(
            f"attack.target: found {target}, expected a choice below {min_choices}, the fewest "
            "that an example has"
        )
