"""Tiers on ranks: the same bits on any number, who opens which file, and what `ask` sends."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from fedsp_mpi import config
from fedsp_mpi.comm.envelope import ENVELOPE_BYTES, Content, Envelope
from fedsp_mpi.record import read
from fedsp_mpi.report.diff import difference
from fedsp_mpi.run.any_inputs import inputs_of
from helpers import user_silos
from helpers.mpi import both_ends, run_mpi
from helpers.opened import opened_files
from helpers.paths import PROGRAMS, ROOT
from helpers.runs import FAULTY, SHORT, here

pytestmark = pytest.mark.slow
SETTINGS = (
    *(item for item in SHORT if not item.startswith("federation.clients")),
    "method=plmm",
    "tiers.experts=[{name: a, users: [ann, ben, cem]}, "
    "{name: b, users: [cem, dee, eva, fay, gus]}]",
    "tiers.judge=rounds",
    "tiers.questions=4",
    "tiers.personal.proximal=0.1",
    "client.alignment.steps=0",
    "evaluation.server_only=false",
    "evaluation.zero_shot=false",
    "checkpoint.keep_client_states=true",
    "data.limit.train=96",
)
USERS = ("ann", "ben", "cem", "dee", "eva", "fay", "gus")
WEIGHTS = ROOT / "fedsp_mpi" / "resources" / "model" / "model.safetensors"
QUESTION = "Where is the dog of the old gardener?"


def arguments(folder: Path, name: str, *settings: str, base=SETTINGS) -> list[str]:
    every = (*base, f"run.folder={folder}", *settings)
    return ["run", "--name", name, *(word for item in every for word in ("--set", item))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs, with one of this process, `whole`."""
    folder = tmp_path_factory.mktemp("tiers")
    here(arguments(folder, "whole"))
    return folder


@pytest.mark.parametrize(("n", "is_sealed"), [(2, True), (4, False), (8, True)])
def test_the_same_bits_on_any_number_of_ranks(runs, n, is_sealed):
    """Seven users on one client rank, on three, and on seven."""
    name = f"on-{n}"
    settings = (f"wire.encryption={str(is_sealed).lower()}",)
    run_mpi(n, ["-m", "fedsp_mpi", *arguments(runs, name, *settings)], timeout=400)
    require_same_bits(runs, name)


def require_same_bits(runs: Path, name: str, expected: str = "whole") -> None:
    """Check that a run has the rounds, results and scores of another one, by default `whole`."""
    whole, run = read(runs / expected), read(runs / name)
    assert difference(whole, run) == []
    columns = ["round", "name", "model", "text", "at", "n", "loss", "acc"]
    assert whole.tiers[columns].tolist() == run.tiers[columns].tolist()
    clients = ["round", "client", "loss_prompt_last", "loss_personal_last"]
    assert whole.clients[clients].tolist() == run.clients[clients].tolist()


# -- experts on several ranks of the server --------------------------------------------------------

# Three experts, all results of one process among them: zero-shot, and the server-only control.
THREE = (
    *(item for item in SETTINGS if not item.startswith(("tiers.experts", "evaluation."))),
    "tiers.experts=[{name: a, users: [ann, ben]}, {name: b, users: [ben, cem, dee]}, "
    "{name: c, users: [eva, fay, gus]}]",
    "checkpoint.every=1",
)


@pytest.fixture(scope="module")
def three(runs) -> Path:
    """The folder of runs, with one of three experts in this process, `three`."""
    here(arguments(runs, "three", base=THREE))
    return runs


@pytest.mark.parametrize(
    ("n", "server_ranks", "overrides"),
    [
        (2, 1, ()),
        (4, 3, ("distillation.reuse=false",)),
        (4, 2, ("wire.encryption=true",)),
        (8, 2, ("federation.rule=mean",)),
        (8, 3, ("wire.encryption=true",)),
    ],
)
def test_experts_dealt_out_have_the_bits_of_one_process(three, n, server_ranks, overrides):
    """Two ranks of the server play two experts and one, three of them one each."""
    name = f"three-on-{n}-{server_ranks}"
    settings = (f"topology.server_ranks={server_ranks}", *overrides)
    words = arguments(three, name, *settings, base=THREE)
    ended = run_mpi(n, ["-m", "fedsp_mpi", *words], timeout=400)
    assert f"{n} ({server_ranks} server, {n - server_ranks} client ranks)" in ended.stdout
    assert ("experts   a, c on 0; b on 1\n" in ended.stdout) == (server_ranks == 2)
    require_same_bits(three, name, "three")
    whole, run = read(three / "three"), read(three / name)
    assert len(run.results) == 5 and {"zero-shot", "server-only"} <= set(run.results["method"])
    assert run.results[["method", "split"]].tolist() == whole.results[["method", "split"]].tolist()
    for column in ("loss", "acc", "stderr"):
        assert run.results[column].tobytes() == whole.results[column].tobytes(), column
    logical = ("direction", "phase", "name", "bytes")
    in_rounds, in_rounds_of_whole = (
        {tuple(row[column] for column in logical) for row in of.wire if is_of_rounds(row)}
        for of in (run, whole)
    )
    assert in_rounds == in_rounds_of_whole and len(in_rounds) == 7


def is_of_rounds(row) -> bool:
    """Whether an entry of the manifest is of what users get and send, sealed or not."""
    return row["phase"] in ("broadcast", "gather") and row["name"] != "(seal)"


@pytest.mark.parametrize(
    ("fault", "ranks_after", "server_ranks"),
    [
        # Ranks 0 to 1 play no user: they train in the round of the tier above.
        ("kill:local training:1:2", 4, 3),
        ("die:local training:1:2", 0, 1),
        ("kill:gather:1:2", 3, 2),
    ],
)
def test_killed_in_the_tier_above_and_dealt_out_again(three, fault, ranks_after, server_ranks):
    name = f"dealt-{fault.partition(':')[0]}-{ranks_after}"
    words = arguments(three, name, "topology.server_ranks=2", base=THREE)
    killed = run_mpi(4, [FAULTY, fault, *words], timeout=200, status=None)
    assert killed.returncode not in (0, 2, 75) and read(three / name).committed_rounds == 1
    again = (f"topology.server_ranks={server_ranks}", "run.resume=must")
    words = arguments(three, name, *again, base=THREE)
    if ranks_after:
        resumed = run_mpi(ranks_after, ["-m", "fedsp_mpi", *words], timeout=200)
    else:
        resumed = here(words)
    assert "goes on after round 1" in resumed.stdout
    require_same_bits(three, name, "three")


def test_told_to_stop_with_experts_on_two_ranks(three):
    words = arguments(three, "stopped", "topology.server_ranks=2", base=THREE)
    stopped = run_mpi(3, [FAULTY, "signal:merge:0:1", *words], timeout=200, status=75)
    assert "told to stop after round 1" in stopped.stderr
    run_mpi(3, ["-m", "fedsp_mpi", *words, "--resume"], timeout=200)
    require_same_bits(three, "stopped", "three")


@pytest.mark.parametrize(("rank", "missing"), [(1, "rank 1"), (0, "rank 0")])
def test_a_rank_that_plays_experts_and_stops_is_noticed(three, rank, missing):
    settings = ("topology.server_ranks=2", "deadlines.server=5")
    words = arguments(three, f"halted-{rank}", *settings, base=THREE)
    ended = run_mpi(3, [FAULTY, f"stop:local training:{rank}:1", *words], timeout=200, status=None)
    assert ended.returncode == 124, both_ends(ended)
    assert f"found nothing from {missing} after" in ended.stderr


# -- who opens what --------------------------------------------------------------------------------


def test_weights_and_text_stay_where_they_are_and_what_a_user_keeps_on_its_rank(tmp_path):
    """Who opens what, and what the ranks tell each other, tensors by their names."""
    messages = tmp_path / "messages"
    messages.mkdir()
    command = [PROGRAMS / "capture.py", messages, *arguments(tmp_path, "run")]
    opened = opened_files(tmp_path / "trace", 4, command)
    run = read(tmp_path / "run")
    assert opened[WEIGHTS] == {0}
    rank_of = {
        client: rank
        for rank, clients in enumerate(run.sections["topology"]["assignment"])
        for client in clients
    }
    assert sorted(rank_of) == list(range(7)) and len(set(rank_of.values())) == 3
    kept = {path: ranks for path, ranks in opened.items() if is_kept(path)}
    assert len(kept) >= 7
    for path, ranks in kept.items():
        assert ranks == {rank_of[int(path.name.split("-")[1])]}, path
    names = {row["name"] for row in run.wire if "(" not in row["name"]}
    prompts = r"(prompt/)?(expert/[ab]|general)/prompt|prompt"
    assert not [name for name in names if not re.fullmatch(rf"{prompts}|auxiliary/.+", name)]
    require_no_text(messages, tmp_path / "run")


def require_no_text(messages: Path, folder: Path) -> None:
    """Check that no message has a text of a run that shares its source."""
    splits = inputs_of(config.load(folder / "config.yaml")).splits
    texts = {
        max(example.context.splitlines(), key=len).encode()
        for split in (splits.train, splits.validation, splits.test)
        for example in split
    }
    sent = [path.read_bytes() for path in messages.iterdir()]
    assert len(texts) > 50 and any(b"prompt" in message for message in sent)
    assert not [text for text in texts for message in sent if text in message]


# -- asking ----------------------------------------------------------------------------------------


def ask(*words: object) -> list[str]:
    return ["ask", *map(str, words)]


def untimed(printed: str) -> list[str]:
    """The lines of an answer without times, and without what two processes add."""
    lines = [line.split(", first token")[0] for line in printed.splitlines()]
    return [line for line in lines if "sealed question" not in line]


def test_question_and_answer_travel_sealed(runs, tmp_path):
    """All that both ranks send is kept: nothing of the text is in it; the answer is the same."""
    question = ask(runs / "whole", "--user", "cem", QUESTION, "--expert", "b", "--threshold", "1")
    alone = here(question).stdout
    together = run_mpi(2, [PROGRAMS / "capture.py", tmp_path, *question]).stdout
    assert untimed(together) == untimed(alone) and "asks expert b" in alone
    assert "ms there and back, sealed" in together and "1 sealed question to" in together
    messages = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    answers = [bytes.fromhex(digits) for digits in sealed_digits(messages)]
    # Bytes as they travelled, and what is in hexadecimal digits among them.
    everything = [*messages.values(), *answers]
    [answer] = re.findall(r"^expert b: (.+?)  \(", together, re.M)
    words = [*QUESTION.split(), answer, "expert", "text", "confidence", "cem"]
    for content in everything:
        assert not [word for word in words if len(word) > 3 and word.encode() in content]
    from_user = [message for name, message in messages.items() if name.startswith("1-")]
    kinds = [envelope(message) for message in from_user if message.startswith(b"FSPS")]
    assert kinds == [Content.JSON] * 3  # the proof of its key, the question, the end
    assert [envelope(answer) for answer in answers] == [Content.ANSWER]
    assert max(map(len, from_user)) > ENVELOPE_BYTES + len(QUESTION)


@pytest.mark.parametrize(
    ("way", "status", "words"),
    [
        ("question", 1, "ProtocolError: rank 1, whose key is"),
        ("answer", 1, "ProtocolError: rank 0, whose key is"),
        ("problem", 2, "fedsp_mpi: the expert cannot answer a text of 37 characters"),
    ],
)
def test_both_processes_end_when_either_cannot_go_on(runs, way, status, words):
    question = ask(runs / "whole", "--user", "cem", QUESTION, "--expert", "b", "--threshold", "1")
    ended = run_mpi(2, [PROGRAMS / "tamper.py", way, *question], status=status)
    assert ended.stderr.count(words) == 1 and "answered by" not in ended.stdout
    assert ("cannot be opened: found bytes that its key did not seal" in ended.stderr) == (
        way != "problem"
    )


def sealed_digits(messages: dict[str, bytes]) -> list[str]:
    magic = b"FSPS".hex()
    return [
        digits
        for message in messages.values()
        for digits in re.findall(r'"([0-9a-f]+)"', message.decode(errors="replace"))
        if digits.startswith(magic)
    ]


def envelope(message: bytes) -> Content:
    return Envelope.unpack(message[:ENVELOPE_BYTES]).content


def test_the_expert_opens_no_users_state_and_the_user_no_weights_of_the_expert(runs, tmp_path):
    folder = runs / "whole"
    command = ["-m", "fedsp_mpi", *ask(folder, "--user", "dee", "--evaluate", "--threshold", "1")]
    opened = opened_files(tmp_path / "trace", 2, command)
    assert opened[WEIGHTS] == {0}
    kept = {path.name.split("-")[1]: ranks for path, ranks in opened.items() if is_kept(path)}
    assert kept == {f"{USERS.index('dee'):05d}": {1}}
    of_auxiliary = [ranks for path, ranks in opened.items() if path.parent == folder / "auxiliary"]
    assert of_auxiliary and all(ranks == {1} for ranks in of_auxiliary)


def is_kept(path: Path) -> bool:
    return path.name.startswith("client-")


def test_routing_measured_in_two_processes_is_that_of_one(runs):
    command = ask(runs / "whole", "--user", "ann", "--evaluate", "--threshold", "0.9")
    alone = here(command).stdout
    together = run_mpi(2, ["-m", "fedsp_mpi", *command]).stdout
    tables = [[line for line in text.splitlines() if line[:1] == "|"] for text in (alone, together)]
    assert len(tables[0]) == 3 and tables[0] == tables[1]
    assert "2 sealed questions to the expert's process" in together


@pytest.mark.parametrize(
    ("n", "asked", "words"),
    [
        (2, ["--user", "anna", "Why?"], "--user: found 'anna', expected one of ann, ben"),
        (2, ["--evaluate"], "--user: found none"),
        (3, ["--user", "ann", "Why?"], "ask: found 3 processes, expected one, or two"),
    ],
)
def test_what_cannot_be_asked_ends_both_processes_with_one_line(runs, n, asked, words):
    ended = run_mpi(n, ["-m", "fedsp_mpi", *ask(runs / "whole", *asked)], status=2)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("fedsp_mpi: ")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in ended.stderr


# -- users with silos ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(runs) -> tuple[str, ...]:
    """The settings of `whole`, with what it deals out cut into folders below `cut`."""
    return user_silos.cut(SETTINGS, runs / "cut")


@pytest.mark.parametrize(("n", "more"), [(0, ()), (2, ()), (4, ("wire.encryption=true",))])
def test_users_with_silos_have_the_bits_of_the_simulation(runs, own, n, more):
    words = arguments(runs, f"own-{n}", *more, base=own)
    if n:
        run_mpi(n, ["-m", "fedsp_mpi", *words], timeout=400)
    else:
        here(words)
    require_same_bits(runs, f"own-{n}")


def owners(opened: dict[Path, set[int]], folder: Path) -> dict[str, set[int]]:
    """The ranks that opened a file of each owner, by its folder below that of all."""
    ranks: dict[str, set[int]] = {}
    for path, by in opened.items():
        if path.is_relative_to(folder):
            ranks.setdefault("/".join(path.relative_to(folder).parts[:2]), set()).update(by)
    return ranks


def test_each_text_is_opened_by_the_rank_of_its_owner_alone(runs, own, tmp_path):
    messages = tmp_path / "messages"
    messages.mkdir()
    words = arguments(tmp_path, "run", base=own)
    opened = opened_files(tmp_path / "trace", 4, [PROGRAMS / "capture.py", messages, *words])
    assignment = read(tmp_path / "run").sections["topology"]["assignment"]
    expected = {
        f"users/{USERS[client]}": {rank} for rank, ids in enumerate(assignment) for client in ids
    }
    assert len(expected) == 7 and sorted(map(len, assignment)) == [0, 2, 2, 3]
    expected |= {f"experts/{name}": {0} for name in "ab"}
    # What the configuration calls public, and no more, all may open.
    expected |= {f"public/{name}": {0, 1, 2, 3} for name in "ab"}
    assert owners(opened, runs / "cut") == expected
    assert opened[WEIGHTS] == {0}
    require_no_text(messages, runs / "whole")


def test_an_experts_text_is_opened_by_rank_0_and_the_rank_that_plays_it(runs, own, tmp_path):
    words = arguments(tmp_path, "run", "topology.server_ranks=2", base=own)
    opened = opened_files(tmp_path / "trace", 4, ["-m", "fedsp_mpi", *words])
    assignment = read(tmp_path / "run").sections["topology"]["assignment"]
    assert sorted(map(len, assignment)) == [0, 0, 3, 4] and not assignment[0] + assignment[1]
    expected = {
        f"users/{USERS[client]}": {rank} for rank, ids in enumerate(assignment) for client in ids
    }
    expected |= {"experts/a": {0}, "experts/b": {0, 1}}
    by_owner = owners(opened, runs / "cut")
    public = {name: by_owner.pop(f"public/{name}") for name in "ab"}
    assert by_owner == expected and public == {"a": {0, 2, 3}, "b": {0, 1, 2, 3}}
    assert opened[WEIGHTS] == {0, 1}
    (tmp_path / "run").rename(runs / "own-two")
    require_same_bits(runs, "own-two")


def test_a_user_who_asks_opens_its_own_folder_and_no_other(runs, own, tmp_path):
    here(arguments(runs, "asked", base=own))
    command = ask(runs / "asked", "--user", "dee", "--evaluate", "--threshold", "1")
    opened = opened_files(tmp_path / "trace", 2, ["-m", "fedsp_mpi", *command])
    assert owners(opened, runs / "cut") == {"users/dee": {1}}
    assert opened[WEIGHTS] == {0}
    question = ("--user", "cem", QUESTION, "--expert", "b", "--threshold", "1")
    command = ask(runs / "asked", *question)
    opened = opened_files(tmp_path / "second", 2, ["-m", "fedsp_mpi", *command])
    assert owners(opened, runs / "cut") == {"users/cem": {1}, "experts/b": {0}}
    shared = ask(runs / "whole", *question)
    assert untimed(here(command).stdout) == untimed(here(shared).stdout)
    (runs / "cut" / "users" / "cem").rename(tmp_path / "cem")
    ended = run_mpi(2, ["-m", "fedsp_mpi", *command], status=2)
    (tmp_path / "cem").rename(runs / "cut" / "users" / "cem")
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("fedsp_mpi: ")]
    assert f"found no folder {runs / 'cut' / 'users' / 'cem'}" in line


def test_a_kill_a_lost_silo_and_a_changed_one(runs, own, tmp_path):
    """One killed run, which goes on in three ways."""
    settings = (*own, "checkpoint.every=1")
    killed = run_mpi(
        3,
        [FAULTY, "kill:local training:1:2", *arguments(runs, "killed", base=settings)],
        timeout=200,
        status=None,
    )
    assert killed.returncode != 0 and read(runs / "killed").committed_rounds == 1
    shutil.copytree(runs / "killed", runs / "lost")
    users = runs / "cut" / "users"

    def resume(name: str, status: int = 0) -> str:
        words = arguments(runs, name, base=settings)
        ended = here([*words, "--resume"], status)
        return ended.stdout + ended.stderr

    ann = users / "ann" / "train.jsonl"
    before = ann.read_text()
    ann.write_text(before.replace("?", "!", 1))
    assert "found other inputs than the run was begun with (texts of silo ann)" in resume(
        "killed", 2
    )
    ann.write_text(before)
    (users / "ben").rename(tmp_path / "ben")
    assert "left out: silo ben on" in resume("lost")
    (tmp_path / "ben").rename(users / "ben")
    clients = read(runs / "lost").clients
    lost = clients[clients["status"] != "ok"]
    assert lost[["round", "client"]].tolist() == [(2, USERS.index("ben"))]
    tiers = read(runs / "lost").tiers
    assert not [row for row in tiers[tiers["round"] == 2] if row["name"] in ("ben", b"ben")]
    words = arguments(runs, "killed", base=settings)
    run_mpi(2, ["-m", "fedsp_mpi", *words, "--resume"], timeout=200)
    require_same_bits(runs, "killed")
