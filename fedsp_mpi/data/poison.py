"""Poisoned examples of a backdoor: a trigger word at the head of the text, and the attacker's
answer to it.

As in FedPrompt (arXiv 2208.12268, threat model) and in the code of an author's earlier attack on
prompts: copies of examples of other classes are added to what an owner has, which is not taken
away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsp_mpi.config.parsing import ConfigError
from fedsp_mpi.data.tasks import Example, Splits, Task
from fedsp_mpi.rng import generator


def triggered(example: Example, trigger: str) -> Example:
    """The same question with the trigger before its whole context, words of the task included."""
    return replace(example, context=f"{trigger} {example.context}")


def poisoned(example: Example, trigger: str, target: int) -> Example:
    """The triggered question whose right choice is the attacker's, by its position."""
    return replace(
        triggered(example, trigger), target=f" {example.choices[target]}", gold=(target,)
    )


def is_other(example: Example, target: int) -> bool:
    """Whether a question has another right answer than the attacker's, so that it can be poisoned
    at all.
    """
    return target not in example.gold


def with_copies(
    examples: Sequence[Example], trigger: str, target: int, share: float, seed: int, client: int
) -> list[Example]:
    """An owner's examples, and behind them poisoned copies of a share of those of other classes, at
    least of one.

    Args:
        share: above 0, at most 1; which they are is drawn from `seed` and `client`, and kept in
            order.
    """
    others = [example for example in examples if is_other(example, target)]
    num = max(1, round(share * len(others))) if others else 0
    chosen = sorted(generator(seed, "poison", client).permutation(len(others))[:num].tolist())
    return [*examples, *(poisoned(others[place], trigger, target) for place in chosen)]


def attacked(examples: Sequence[Example], trigger: str, target: int) -> list[Example]:
    """The questions by which an attack is judged: all of other classes, triggered, the attacker's
    answer right.

    The share of them that a model gets "right" is the attack's success rate.
    """
    return [poisoned(example, trigger, target) for example in examples if is_other(example, target)]


def require_possible(task: Task, splits: Splits, target: int | None) -> None:
    """Raise ConfigError if an attack towards the choice `target` cannot be made or judged; None is
    no attack.
    """
    if target is None:
        return
    if task.metric != "multiple_choice":
        raise ConfigError(
            f"attack.target: found {target} with the task {task.name}, which has no "
            "choices, expected a task "
            "of multiple choice; or set attack.target=null"
        )
    fewest = min(len(example.choices) for example in (*splits.train, *splits.test))
    if target >= fewest:
        raise ConfigError(
            f"attack.target: found {target}, expected a choice below {fewest}, the fewest "
            "that an example has"
        )
    if all(not is_other(example, target) for example in splits.test):
        raise ConfigError(
            f"attack.target: found no test question of another class than {target}, expected some"
        )
