"""Questions of one rank to rank 0, and its answers: both sealed for the rank that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..files.untrusted import JsonMapping, JsonObject, parse_json
from .inspection import ProtocolError, require_fields
from .messages import to_json
from .sealing import fingerprint

if TYPE_CHECKING:
    from .keys import Seals
    from .wire import Wire

_SERVER = 0  # rank
_CLIENT = 1
_PROBLEM = (str, type(None))  # types of the field; None: there is none


class Dialogue:
    """One rank's end: rank 1 calls `ask` and then `close`, rank 0 `serve`.

    Args:
        wire: between the two ranks.
        seals: of this rank.

    Attributes:
        server_key: fingerprint of the key that questions are sealed for.
    """

    def __init__(self, wire: Wire, seals: Seals) -> None:
        assert wire.topology.size == 2, "two ranks talk to each other"
        self._wire = wire
        self._seals = seals
        self.server_key = fingerprint(seals.add_answers())

    # -- on rank 1 ---------------------------------------------------------------------------------

    def ask(self, question: JsonMapping) -> JsonObject:
        """Ask rank 0; return its answer.

        Raises:
            ProtocolError: the answer cannot be opened: it was changed, repeated or left out.
            ValueError: rank 0 has found a problem with the question.
        """
        self._wire.collect({"question": question, "problem": None})
        sealed = self._wire.agree(None)
        message = parse_json(self._seals.open_answer(sealed))
        if not isinstance(message, dict):
            raise ProtocolError(f"rank {_SERVER}: found no mapping as its answer, expected one")
        require_fields(message, _SERVER, {"problem": _PROBLEM})
        if message["problem"] is not None:
            raise ValueError(message["problem"])
        require_fields(message, _SERVER, {"answer": dict})
        answer: JsonObject = message["answer"]
        return answer

    def close(self, problem: str | None = None) -> None:
        """Tell rank 0 that no more questions follow, or why there is none."""
        self._wire.collect({"question": None, "problem": problem})

    # -- on rank 0 ---------------------------------------------------------------------------------

    def serve(self, answer: Callable[[JsonMapping], JsonMapping]) -> None:
        """Answer until rank 1 closes.

        Args:
            answer: returns the answer to a question; a ValueError is the question's problem, which
                rank 1 hears.

        Raises:
            ValueError: rank 1 has closed with a problem.
            ProtocolError: its message cannot be opened, or is no question.
        """
        while True:
            messages = self._wire.collect({})
            assert messages is not None, "rank 0 serves"
            message = messages[_CLIENT]
            require_fields(message, _CLIENT, {"question": (dict, type(None)), "problem": _PROBLEM})
            if message["problem"] is not None:
                raise ValueError(message["problem"])
            if message["question"] is None:
                return
            reply = self._reply(answer, message["question"])
            self._wire.agree(None, note=self._seals.seal_answer(to_json(reply)))

    @staticmethod
    def _reply(answer: Callable[[JsonMapping], JsonMapping], question: JsonMapping) -> JsonMapping:
        """Return an answer, or the problem with the question, which rank 1 must hear."""
        try:
            return {"answer": answer(question), "problem": None}
        except ProtocolError:
            raise
        except ValueError as error:
            return {"answer": None, "problem": str(error)}
