"""`ask` in two processes: the user's has its own model, that of rank 0 the global one.

Questions and answers travel sealed. A question is the text that the user asks, or those of held-out
rows with their options; which option is right stays with the user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median

from fedsp_mpi import comm
from fedsp_mpi.comm.dialogue import Dialogue
from fedsp_mpi.comm.inspection import ProtocolError, reading
from fedsp_mpi.comm.wire import Wire
from fedsp_mpi.commands.ask_models import Answer, Choice, Experts, LocalExperts, Models
from fedsp_mpi.data.examples import Example
from fedsp_mpi.files.untrusted import JsonMapping, JsonObject
from fedsp_mpi.run.agreement import agreed

_EXPERT = 0  # rank
_USER = 1


class RemoteExperts:
    """Experts and the general model of rank 0, as the user's process asks them; see `Experts`.

    Args:
        dialogue: this rank's end.
    """

    def __init__(self, dialogue: Dialogue) -> None:
        self._dialogue = dialogue
        self._way_seconds: list[float] = []

    @property
    def summary(self) -> str:
        """How many questions there were, and how long they took on the way and back."""
        if not self._way_seconds:
            return "no question to the expert's process"
        plural = "s" if len(self._way_seconds) > 1 else ""
        return (
            f"{len(self._way_seconds)} sealed question{plural} to the expert's process, whose key "
            f"is {self._dialogue.server_key}, {1000 * median(self._way_seconds):.1f} ms there and "
            "back (median)"
        )

    def answer(self, text: str, expert: str) -> Answer:
        """Return an expert's answer; see `Experts.answer`.

        Raises:
            ProtocolError: the answer cannot be opened or read.
        """
        content = self._ask({"expert": expert, "text": text})
        with reading(_EXPERT, "an answer"):
            return Answer(
                tier=f"expert {expert}",
                text=str(content["text"]),
                confidence=float(content["confidence"]),
                first_token_seconds=float(content["first_token_seconds"]),
                seconds=float(content["seconds"]),
                num_tokens=int(content["num_tokens"]),
                way_seconds=float(content["way_seconds"]),
            )

    def choose(self, tier: str, expert: str, examples: Sequence[Example]) -> list[Choice]:
        """Return what a tier chooses; see `Experts.choose`.

        Args:
            tier: name of the expert, or "general".
            expert: whose domain the questions are of.
            examples: the questions.

        Raises:
            ProtocolError: the answer cannot be opened or read.
        """
        questions = [[item.context, list(item.choices), item.suffix] for item in examples]
        content = self._ask({"expert": expert, "tier": tier, "questions": questions})
        with reading(_EXPERT, "an answer"):
            choices = [Choice(int(option), float(share)) for option, share in content["choices"]]
            if len(choices) != len(examples):
                raise ValueError(f"{len(choices)} choices for {len(examples)} questions")
        return choices

    def _ask(self, question: JsonMapping) -> JsonObject:
        """Ask, and add the seconds beside the expert's own to the answer."""
        start = time.perf_counter()
        answer = self._dialogue.ask(question)
        with reading(_EXPERT, "an answer"):
            way_seconds = time.perf_counter() - start - float(answer["work_seconds"])
        self._way_seconds.append(way_seconds)
        return {**answer, "way_seconds": way_seconds}


def answered(wire: Wire, folder: str, work: Callable[[Models, Experts], list[str]]) -> list[str]:
    """Do a user's work on rank 1, with the experts of rank 0; return its lines, none on rank 0.

    Collective.

    Args:
        wire: between two ranks.
        folder: of the run.
        work: of the user's process.

    Raises:
        ValueError: on both ranks, what is wrong with the run or with what the user wants.
    """
    dialogue = wire.open_dialogue()
    with agreed(wire):
        models = _models_of(folder) if wire.is_server else None
    if models is not None:
        experts = LocalExperts(models)
        dialogue.serve(lambda question: _reply(experts, question))
        wire.finish()
        return []
    remote = RemoteExperts(dialogue)
    try:
        lines = work(Models.of(folder), remote)
    except ProtocolError:
        raise
    except ValueError as error:
        dialogue.close(str(error))
        raise
    dialogue.close()
    wire.finish()
    return [*lines, remote.summary]


def _models_of(folder: str) -> Models:
    """Read the run; raise comm.Refused if it cannot be asked."""
    try:
        return Models.of(folder)
    except ValueError as error:
        raise comm.Refused(str(error)) from None


def _reply(experts: Experts, question: JsonMapping) -> JsonObject:
    """Answer a question of the user's process."""
    start = time.perf_counter()
    with reading(_USER, "a question"):
        expert = str(question["expert"])
        text = question.get("text")
        tier = str(question.get("tier"))
        examples = [
            Example(str(context), "", tuple(map(str, choices)), (0,), suffix=str(suffix))
            for context, choices, suffix in question.get("questions", ())
        ]
    content: JsonObject = {}
    if text is not None:
        content = asdict(experts.answer(str(text), expert))
    else:
        content["choices"] = experts.choose(tier, expert, examples)
    return {**content, "work_seconds": time.perf_counter() - start}
