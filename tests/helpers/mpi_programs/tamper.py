"""The command line, with something wrong between the two processes of `ask`.

python tamper.py WAY ARGUMENTS..., where WAY is
    question, answer    the first that is sealed is changed on its way
    problem             the expert cannot answer
"""

import sys
from collections.abc import Callable

from fedsp_mpi import cli
from fedsp_mpi.comm import leave
from fedsp_mpi.comm.wire import Wire
from fedsp_mpi.commands.ask_models import LocalExperts

_SEALED = b"FSPS"
_NUM_PROOFS = 1  # sealed messages of a rank before its first question: that it has its key


def with_flipped_bit(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def change_question() -> None:
    send: Callable[..., None] = Wire._send_message
    num_sealed = 0

    def changed(wire: Wire, content: bytes, *rest: object) -> None:
        nonlocal num_sealed
        if bytes(content[:4]) == _SEALED:
            num_sealed += 1
            if num_sealed == 1 + _NUM_PROOFS:
                content = with_flipped_bit(content, -1)
        send(wire, content, *rest)

    Wire._send_message = changed


def change_answer() -> None:
    broadcast: Callable[..., bytes] = Wire._broadcast_json

    def changed(wire: Wire, content: bytes, *rest: object) -> bytes:
        start = content.find(_SEALED.hex().encode())  # travels as hexadecimal digits
        if start >= 0:
            last_digit = content.index(b'"', start) - 1
            other_digit = b"1" if content[last_digit : last_digit + 1] == b"0" else b"0"
            content = content[:last_digit] + other_digit + content[last_digit + 1 :]
        return broadcast(wire, content, *rest)

    Wire._broadcast_json = changed


def have_problem() -> None:
    def refuse(experts: LocalExperts, text: str, expert: str) -> None:
        raise ValueError(f"the expert cannot answer a text of {len(text)} characters")

    LocalExperts.answer = refuse


WAYS = {"question": change_question, "answer": change_answer, "problem": have_problem}
WAYS[sys.argv[1]]()
leave(cli.main(sys.argv[2:]))
