"""Ownership of folders: what runs remove and replace, and that other files outlive every verb."""

from __future__ import annotations

import ast
import fcntl
import gzip
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch

from fedsp_mpi import cli
from fedsp_mpi.comm.guard import Guard
from fedsp_mpi.config import ConfigError, load
from fedsp_mpi.files import fingerprint, ownership
from fedsp_mpi.record import Checkpoints, RunRecord, read
from fedsp_mpi.record.lock import RunLock
from fedsp_mpi.report import difference
from fedsp_mpi.run.inputs import ExperimentInputs
from helpers.paths import ROOT
from helpers.record_samples import make

PACKAGE = ROOT / "fedsp_mpi"
SHORT = (
    "federation.rounds=2",
    "federation.clients=2",
    "distillation.stage.steps=2",
    "client.alignment.steps=1",
    "client.tuning.steps=1",
    "server.tuning.steps=1",
    "data.limit.train=48",
    "data.limit.validation=8",
    "data.limit.test=8",
)


def words(runs: Path, name: str, *settings: str) -> list[str]:
    """Return the command line of a short run of the embedded default."""
    command = ["run", "--name", name]
    for setting in (*SHORT, f"run.folder={runs}", *settings):
        command += ["--set", setting]
    return command


def run_command(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    """Run a command in this process; return its status, stdout and stderr."""
    status = cli.main(list(line))
    return status, *capsys.readouterr()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- the source: what removes or overwrites, and why it may ---

CALLS = {
    "rmtree",
    "unlink",
    "remove",
    "rmdir",
    "replace",
    "rename",
    "move",
    "write_text",
    "write_bytes",
    "save_pretrained",
    "save_file",
    "savefig",
    "truncate",
    "ftruncate",
}
# Where such a call stands, and why it takes nothing away from anybody.
ALLOWED = {
    (
        "files/ownership.py",
        "clear",
    ): "files by the patterns of runs, in a folder with the mark of a run",
    (
        "files/ownership.py",
        "remove_parts",
    ): "half-written models by their pattern, in a folder with the mark of a run",
    ("files/ownership.py", "remove_if_empty"): "the file system refuses where something is left",
    (
        "files/ownership.py",
        "place_model",
    ): "files on the list of the model's folder; others are set aside",
    ("files/ownership.py", "set_aside"): "a name that is free",
    (
        "files/ownership.py",
        "replace_picture",
    ): "a file that is ours, by its content; the other one was made here",
    (
        "files/ownership.py",
        "begin_split",
    ): "the manifest and files by their pattern, in the folder of a split",
    ("files/ownership.py", "finish_split"): "the mark that this split began with",
    (
        "files/ownership.py",
        "_clear_owner",
    ): "files by their pattern, in a folder that a split's mark lists",
    ("files/ownership.py", "_replace_text"): "a split's mark or manifest, after `require_split`",
    (
        "commands/split.py",
        "_write_rows",
    ): "names of the split's own, in a folder that it has marked",
    ("files/fingerprint.py", "list_folder"): "in a folder that this process has just made",
    ("models/auxiliary.py", "write_model"): "in a folder that this process has just made",
    (
        "record/event_files.py",
        "__init__",
    ): "event files by their pattern, in a folder of that name in the folder of a run",
    ("models/class_head.py", "write"): "in a folder that this process has just made",
    ("models/lora.py", "write"): "in a folder that this process has just made",
    ("models/prompts.py", "write_adapter"): "in a folder that this process has just made",
    (
        "record/atomic.py",
        "write",
    ): "names of the record's own, in the folder of a run; `evaluate` and `sweep` look before",
    ("record/atomic.py", "writing"): "the half-written file of a write that failed",
    ("record/atomic.py", "rename"): "the same names",
    (
        "record/lock.py",
        "release",
    ): "the lock that this process made, in a folder that holds nothing else",
    ("record/additions.py", "remove"): "names of the record's own, in the folder of a run",
    ("record/writer.py", "create"): "the config.yaml that this call has made",
    ("record/writer.py", "_fold"): "run.h5 and rounds by their pattern, in the folder of a run",
    ("record/writer.py", "_remove_additions"): "names of the record's own, in the folder of a run",
    ("record/writer.py", "_sweep"): "rounds by their pattern, in the folder of a run",
    ("record/checkpoint.py", "remove_client"): "a file that this process wrote",
    (
        "record/checkpoint.py",
        "remove_distillation",
    ): "a name of the checkpoints', in the folder of a run",
    (
        "record/checkpoint.py",
        "_sweep_distillation",
    ): "checkpoints by their pattern, in the folder of a run",
    (
        "record/checkpoint.py",
        "remove_clients",
    ): "checkpoints by their pattern, in the folder of a run",
    ("record/checkpoint.py", "remove_after"): "commit marks by their names, in the folder of a run",
    ("record/checkpoint.py", "_sweep"): "checkpoints by their pattern, in the folder of a run",
    ("record/probe.py", "_begin"): "in a folder that this process has just made",
    (
        "record/probe.py",
        "remove",
    ): "in a folder that this process made, by the names that ranks wrote",
    ("record/probe.py", "look"): "in the folder of the server's probe",
    ("report/plot.py", "_picture"): "into memory",
    ("resources/make_embedded.py", "write_data"): "makes what the package ships; not part of a run",
    ("resources/make_embedded.py", "main"): "makes what the package ships; not part of a run",
}
WRITERS = {
    ("files/ownership.py", "write_new"): "a file that is not there yet (O_EXCL)",
    ("record/lock.py", "_opened"): "the lock, in a folder that is ours",
    ("record/atomic.py", "_open"): "the part of a file, for `write`",
    ("record/atomic.py", "append"): "adds to the end of a name of the record's own",
    ("record/hdf5.py", "fold_into"): "the part of run.h5, for `_fold`",
    ("commands/jobs.py", "_start"): "adds to the end of a log",
    ("record/probe.py", "_begin"): "in a folder that this process has just made",
    ("record/probe.py", "_lock_trouble"): "opens the probe's own file, and writes nothing",
    ("files/ownership.py", "replace_picture"): "a temporary file of a new name",
    ("cli.py", "_show"): "/dev/null",
    ("comm/guard.py", "_end_in_any_case"): "/dev/null",
}


def is_path_call(node: ast.Call) -> bool:
    """Return True if a call removes or overwrites a file, unlike str.replace and list.remove."""
    if not isinstance(node.func, ast.Attribute) or node.func.attr not in CALLS:
        return False
    owner = ast.unparse(node.func.value)
    if node.func.attr == "replace":
        return len(node.args) == 1 and not node.keywords
    return not (
        node.func.attr == "remove"
        and (owner in ("hook", "open_ranks", "self._probe") or "[" in owner or "_child" in owner)
    )


def opens_for_writing(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name not in ("open", "fdopen", "File", "mkstemp"):
        return False
    text = ast.unparse(node)
    modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    is_mode = any(
        isinstance(mode, str) and set(mode) <= set("rwax+b") and set(mode) & set("wax+")
        for mode in modes
    )
    in_memory = "backing_store=False" in text
    return (
        (is_mode and not in_memory)
        or "O_WRONLY" in text
        or "O_RDWR" in text
        or "flags" in text
        or "mode" in text
    )


def calls(predicate) -> set[tuple[str, str]]:
    """Return (file, function) of the calls for which the predicate is true."""
    places = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and predicate(node)):
                continue
            around = [
                function
                for function in functions
                if function.lineno <= node.lineno <= function.end_lineno
            ]
            inner = max(around, key=lambda function: function.lineno).name if around else ""
            places.add((path.relative_to(PACKAGE).as_posix(), inner))
    return places


def test_every_call_that_removes_or_overwrites_has_its_reason():
    assert calls(is_path_call) == set(ALLOWED)
    assert calls(opens_for_writing) == set(WRITERS)


# --- names ---


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "../../x",
        "/abs",
        "a/b",
        "",
        " ",
        "a\nb",
        "\a",
        "-n",
        "a\0b",
        "a\u202eb",
        "a\u2028b",
        "x\udcff",
    ],
)
def test_a_name_is_one_plain_component_of_a_path(name, capsys):
    status, _, error = run_command(capsys, "run", f"--name={name}")
    assert (
        status == 2 and error.startswith("fedsp_mpi: run.name: found ") and error.count("\n") == 1
    )
    assert error.isprintable() or error[:-1].isprintable()


@pytest.mark.parametrize("name", ["a", "a b", "ünter", "1.5-x_y", "auto", ".hidden", "[v2]"])
def test_other_names_are_taken(name):
    assert load(None, values={"run.name": name}).run.name == name


@pytest.mark.parametrize(
    "key", ["run.folder", "model.name", "model.tokenizer", "data.source", "distillation.text"]
)
def test_a_path_that_is_no_text_is_refused(key):
    with pytest.raises(
        ConfigError, match=rf"^{key}: found '/x.udcff', expected text .* set LC_ALL"
    ):
        load(None, [f"{key}=/x\udcff"])


def test_a_path_that_the_locale_cannot_write_is_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"run: {{folder: '{tmp_path}/ü'}}\nmodel: {{name: embedded}}\n", encoding="utf-8"
    )
    locale = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    for more in ([str(tmp_path / "c.yaml")], ["--set", f"run.folder={tmp_path}/ü"]):
        done = subprocess.run(
            [sys.executable, "-m", "fedsp_mpi", "run", *more],
            cwd=ROOT,
            env=locale,
            capture_output=True,
            timeout=60,
        )
        error = done.stderr.decode()
        assert (
            done.returncode == 2
            and error.startswith("fedsp_mpi: run.folder: found")
            and error.count("\n") == 1
        )


# --- marks ---


def test_a_folder_is_ours_if_it_is_absent_empty_or_marked(tmp_path):
    folder = tmp_path / "a"
    assert ownership.is_ours(folder)
    folder.mkdir()
    assert ownership.is_ours(folder)
    (folder / "lock").touch()  # killed before the note was written
    assert ownership.is_ours(folder)
    (folder / "mine.txt").write_text("x")
    for text in ("", "mine", "[]", '{"host": 1}', "[" * 100_000):
        (folder / "lock").write_text(text)
        assert not ownership.is_ours(folder), text
    (folder / "lock").write_text('{"host": "h", "pid": 1, "job": null}')  # of earlier versions too
    assert ownership.is_ours(folder)
    (folder / "lock").unlink()
    for name in ("config.yaml", "run.h5"):
        (folder / name).write_bytes(b"\x89HDF\r\n\x1a\nof something else")
        assert not ownership.is_ours(folder)
    make(tmp_path / "b")  # of earlier versions, whose lock somebody has deleted
    assert ownership.is_ours(tmp_path / "b")
    assert not ownership.is_ours(folder / "mine.txt")


def test_replacing_takes_what_runs_wrote_and_leaves_the_rest(tmp_path):
    folder = tmp_path / "a"
    RunLock.take(folder).release()
    strangers = [
        "notes.txt",
        "rounds/mine.h5",
        "checkpoints/server-mine.safetensors",
        "checkpoints/x-y",
        "prompt/x.txt",
    ]
    strangers += [
        "model/config.json",
        "model/model.safetensors",
        "model.part1x/w",
        "auxiliary/model.safetensors",
    ]
    ours = [
        "run.h5.part",
        "config.yaml",
        "rounds/0001.h5",
        "rounds/0002.h5.part",
        "checkpoints/0001.json",
    ]
    ours += [
        "checkpoints/client-00003-0001.safetensors",
        "checkpoints/distillation-4.safetensors",
        "model.part12/w",
    ]
    ours += [
        "checkpoints/distillation.json",
        "prompt/adapter_model.safetensors",
        "prompt/digests.json",
    ]
    for name in (*strangers, *ours):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "prompt" / "digests.json").write_text('{"adapter_model.safetensors": ""}')
    (folder / "checkpoints" / "0002.json").symlink_to(tmp_path / "elsewhere")
    ownership.clear(folder)
    assert sorted(contents(folder)) == sorted(["lock", *strangers])
    assert (folder / "checkpoints" / "0002.json").is_symlink()


@pytest.mark.parametrize("name", ["run.h5", "config.yaml"])
def test_a_folder_in_the_place_of_a_runs_file_is_named_when_it_is_replaced(tmp_path, name):
    run = make(tmp_path / "a")
    RunLock.take(run.folder).release()
    (run.folder / name).unlink()
    (run.folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name}: found something that no run .* move it away"):
        RunRecord.create(run.folder, config={}, config_text="", environment={}, if_exists="replace")


def test_a_model_takes_its_place_beside_files_of_somebody_else(tmp_path):
    RunLock.take(tmp_path / "a").release()
    folder = tmp_path / "a" / "model"
    for number in range(2):
        if number:
            (folder / "mine.txt").write_text("mine")
            (folder / "config.json").unlink()
            (folder / "config.json").mkdir()
        part = ownership.begin_model(folder)
        (part / "config.json").write_text(str(number))
        (part / "digests.json").write_text('{"config.json": ""}')
        ownership.place_model(part, folder)
    assert contents(folder) == {
        "mine.txt": b"mine",
        "config.json": b"1",
        "digests.json": b'{"config.json": ""}',
    }
    assert (folder / "config.json.1").is_dir() and [
        path.name for path in folder.parent.glob("*part*")
    ] == []


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_what_is_no_folder_is_set_aside_for_a_model(tmp_path, kind):
    RunLock.take(tmp_path / "a").release()
    folder = tmp_path / "a" / "model"
    if kind == "file":
        folder.write_text("mine")
    elif kind == "link":
        folder.symlink_to("nowhere")
    else:
        os.mkfifo(folder)
    part = ownership.begin_model(folder)
    (part / "config.json").write_text("new")
    ownership.place_model(part, folder)
    assert contents(folder) == {"config.json": b"new"}
    assert os.path.lexists(folder.with_name("model.1"))


@pytest.mark.parametrize("name", ["model.safetensors", "digests.json"])
def test_a_pipe_in_a_model_s_folder_is_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "model.safetensors").write_text("weights")
    fingerprint.list_folder(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: found .*no regular file"):
        fingerprint.require_digests(tmp_path)


@pytest.mark.parametrize("name", ["lock", "run.h5", "evaluation.json", "a.png"])
def test_a_pipe_is_nobody_s_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert not ownership.is_ours(tmp_path)
    for require in (ownership.require_evaluation, ownership.require_picture):
        with pytest.raises(ValueError, match=r"found a file that .* did not write|no report wrote"):
            require(tmp_path / name)


def test_a_link_in_the_place_of_a_report_is_set_aside(tmp_path):
    (tmp_path / "failure.txt").symlink_to("nowhere")
    Guard().report_into(tmp_path)
    [moved] = tmp_path.iterdir()
    assert moved.name.startswith("failure-") and moved.is_symlink()


# --- verbs ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Return a folder with `whole`, a complete run whose folder also has files of somebody else.

    It keeps its clients' states.
    """
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    for path in (PACKAGE / "resources" / "data").glob("*.gz"):
        shutil.copy(path, folder / "data")
    settings = (f"data.source={folder / 'data'}", "checkpoint.keep_client_states=true")
    assert cli.main(words(folder, "whole", *settings)) == 0
    for name in STRANGERS:
        (folder / "whole" / name).write_text("mine")
    return folder


STRANGERS = ("notes.txt", "prompt/mine.txt", "checkpoints/mine-1.txt")


def unfinished(runs: Path, name: str) -> Path:
    """Copy `whole` to `runs/NAME/a`, as a kill in round 2 would leave it."""
    folder = runs / name / "a"
    shutil.copytree(runs / "whole", folder)
    Checkpoints(folder).remove_after(1)
    record = RunRecord.open(folder)
    record.cut(1)
    return folder


def resume(capsys, folder: Path, *settings: str) -> tuple[int, str, str]:
    settings = (
        f"data.source={folder.parent.parent / 'data'}",
        "checkpoint.keep_client_states=true",
        *settings,
    )
    return run_command(capsys, *words(folder.parent, "a", *settings), "--resume")


def test_a_run_refuses_what_is_not_ours_and_what_it_reads(tmp_path, capsys):
    project = tmp_path / "project"
    shutil.copytree(PACKAGE / "resources" / "model", project / "model")
    (project / "model" / "mine.txt").write_text("x")
    before = contents(tmp_path)
    for more in ([], ["--replace"], ["--resume", "auto"], ["--resume"]):
        status, _, error = run_command(capsys, *words(tmp_path, "project"), *more)
        assert (
            status == 2
            and "found 'model' and no sign that a run wrote it" in error
            and error.count("\n") == 1
        )
    for key, name in (
        ("model.name", "project"),
        ("data.source", "project/model"),
        ("distillation.text", "project"),
    ):
        shutil.rmtree(tmp_path / "project", ignore_errors=True)
        RunLock.take(project).release()
        shutil.copytree(PACKAGE / "resources" / "model", project / "model")
        status, _, error = run_command(
            capsys, *words(tmp_path, "project", f"{key}={tmp_path / name}"), "--replace"
        )
        assert status == 2 and f"of {key} in the run's folder, expected it elsewhere" in error, (
            error
        )
    assert set(contents(tmp_path)) >= set(before) - {"project/model/mine.txt"}


def test_a_stranger_s_file_outlives_every_verb(runs, capsys, tmp_path):
    folder = unfinished(runs, "strangers")
    picture = tmp_path / "picture.svg"
    picture.write_text("mine")
    (tmp_path / "sweep.yaml").write_text(
        f"folder: {folder.parent}\nseeds: [1]\ntasks: {{t: {{}}}}\nmethods: {{m: {{}}}}\n"
    )
    (folder.parent / "configs").mkdir()
    (folder.parent / "configs" / "t-m-1.yaml").write_text("mine: 1\n")
    source = f"data.source={runs / 'data'}"
    status, _, error = run_command(capsys, *words(folder.parent, "a", source))
    assert status == 2 and "found a run (run.h5), expected a new folder" in error
    status, _, error = run_command(capsys, "report", str(folder), "--plot", str(picture))
    assert (
        status == 2
        and "found a file that no report wrote" in error
        and picture.read_text() == "mine"
    )
    status, _, error = run_command(capsys, "sweep", str(tmp_path / "sweep.yaml"))
    assert (
        status == 2
        and "t-m-1.yaml: found a file that no sweep wrote" in error
        and "no run was started" in error
    )
    assert (folder.parent / "configs" / "t-m-1.yaml").read_text() == "mine: 1\n"
    assert run_command(capsys, "fetch", str(folder / "config.yaml"))[0] == 0
    assert run_command(capsys, "check", "--set", f"run.folder={folder.parent}")[0] == 0
    (folder / "auxiliary.part77").mkdir()
    status, out, error = resume(capsys, folder)
    assert (
        (status, error) == (0, "")
        and "goes on after round 1" in out
        and not (folder / "auxiliary.part77").exists()
    )
    assert difference(read(runs / "whole"), read(folder)) == []
    (folder / "evaluation.json").write_text("mine")
    status, _, error = run_command(capsys, "evaluate", str(folder))
    assert status == 2 and "found a file that `evaluate` did not write" in error
    (folder / "evaluation.json").unlink()
    assert run_command(capsys, "report", str(folder), "--plot", str(tmp_path / "new.svg"))[0] == 0
    # Its own picture is replaced.
    assert run_command(capsys, "report", str(folder), "--plot", str(tmp_path / "new.svg"))[0] == 0
    assert [(folder / name).read_text() for name in STRANGERS] == ["mine"] * 3
    assert run_command(capsys, *words(folder.parent, "a", source), "--replace")[0] == 0
    assert [(folder / name).read_text() for name in STRANGERS] == ["mine"] * 3
    assert read(folder).status == "complete" and read(folder).committed_rounds == 2
    # States of clients are removed at the end, unless checkpoint.keep_client_states is set.
    assert not list((folder / "checkpoints").glob("client-*"))


# --- inputs, and what is read back ---


@contextmanager
def changed(path: Path, before: str, after: str) -> Iterator[None]:
    """Replace a text in a data file, and restore the file and its time stamps afterwards.

    Args:
        path: gzip file.
        before: text to be replaced.
        after: text in its place.
    """
    image = path.read_bytes()
    times = path.stat()
    text = gzip.decompress(image).decode()
    assert before in text
    path.write_bytes(gzip.compress(text.replace(before, after).encode()))
    try:
        yield
    finally:
        path.write_bytes(image)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("split", "names"),
    [("train", "texts of the server"), ("validation", "validation split"), ("test", "test split")],
)
def test_other_texts_end_a_resume_before_it_begins(runs, capsys, split, names):
    folder = unfinished(runs, f"other-{split}")
    before = contents(folder)
    with changed(runs / "data" / f"{split}.jsonl.gz", "Question: ", "Query: "):
        status, _, error = resume(capsys, folder)
    assert (
        status == 2
        and f"found other inputs than the run was begun with ({names})" in error
        and error.count("\n") == 1
    )
    assert {
        name: image for name, image in contents(folder).items() if name != "lock"
    }.items() <= before.items()


def test_a_label_of_one_client_is_named(runs, capsys):
    folder = unfinished(runs, "label")
    rows = (
        gzip.decompress((runs / "data" / "train.jsonl.gz").read_bytes()).decode().splitlines()[:48]
    )
    shards = ExperimentInputs(load(folder / "config.yaml")).shards
    row = rows[shards[2][0]]
    with changed(
        runs / "data" / "train.jsonl.gz", row, row[:-2] + str((int(row[-2]) + 1) % 4) + "}"
    ):
        status, _, error = resume(capsys, folder)
    assert status == 2 and "(texts of client 1)" in error
    assert resume(capsys, folder)[0] == 0 and difference(read(runs / "whole"), read(folder)) == []


def test_other_weights_end_a_resume_before_it_begins(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(PACKAGE / "resources" / "model", model)
    text = tmp_path / "plain.txt"
    text.write_text("Noudroth is a grey town.\nTosith is a blue one.\n" * 20)
    settings = (
        f"model.name={model}",
        f"distillation.text={text}",
        "federation.rounds=1",
        "evaluation.server_only=false",
    )
    status, out, _ = run_command(capsys, *words(tmp_path, "a", *settings))
    assert (
        status == 0
        and "recipe    paper, with the settings of the embedded default, which suit its tiny model"
        in out
    )
    RunRecord.open(tmp_path / "a")
    text.write_text(text.read_text().replace("grey", "blue"))
    state = safetensors.torch.load_file(model / "model.safetensors")
    next(iter(state.values())).view(-1)[0] += 1
    safetensors.torch.save_file(state, model / "model.safetensors", {"format": "pt"})
    status, _, error = run_command(capsys, *words(tmp_path, "a", *settings), "--resume")
    assert status == 2 and "(weights of model.name, distillation.text)" in error


def test_a_checkpoint_without_digests_goes_on_with_a_note(runs, capsys):
    folder = unfinished(runs, "old")
    mark = folder / "checkpoints" / "0001.json"
    content = json.loads(mark.read_text())
    mark.write_text(
        json.dumps({name: content[name] for name in ("layout", "round", "server", "clients")})
    )
    for name in ("auxiliary", "prompt"):
        (folder / name / "digests.json").unlink()
    (folder / "lock").write_text('{"host": "h", "pid": 1, "job": null}')
    status, out, _ = resume(capsys, folder)
    assert status == 0 and "checkpoint: has no digests of texts and weights" in out
    assert (
        "auxiliary has no digests" in out and difference(read(runs / "whole"), read(folder)) == []
    )


def test_a_mark_of_other_inputs_or_with_a_flipped_byte_is_not_gone_on_from(runs, capsys):
    folder = unfinished(runs, "mark")
    mark = folder / "checkpoints" / "0001.json"
    image = mark.read_bytes()
    mark.write_bytes(image.replace(b'"inputs": "', b'"inputs": "0'))
    assert "a digest of other content" in Checkpoints(folder).newest()[1][0]
    mark.write_bytes(
        fingerprint.seal({**fingerprint.open_sealed(image), "inputs": "of another run"})
    )
    status, _, error = resume(capsys, folder)
    assert status == 2 and "was made from other texts or weights than the record" in error


def flip(path: Path) -> None:
    image = bytearray(path.read_bytes())
    image[-5] ^= 1
    path.write_bytes(image)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "the file was changed or damaged; it is not taken"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "the file was changed or damaged; it is not taken",
        ),
        (lambda path: path.unlink(), "found no readable file"),
        (lambda path: path.with_name("digests.json").unlink(), "has no digests"),
        (lambda path: os.chown(path, 12345, -1), "belongs to another user"),
    ],
    ids=["flipped", "cut", "gone", "unlisted", "foreign"],
)
def test_an_auxiliary_model_is_reused_only_as_it_was_written(
    runs, tmp_path, capsys, damage, reason
):
    shutil.copytree(runs / "whole" / "auxiliary", tmp_path / "earlier" / "auxiliary")
    try:
        damage(tmp_path / "earlier" / "auxiliary" / "model.safetensors")
    except PermissionError:
        pytest.skip("only root can give a file to somebody else")
    status, out, _ = run_command(
        capsys, *words(tmp_path, "next", f"data.source={runs / 'data'}", "federation.rounds=1")
    )
    assert (
        status == 0 and reason in out and "distilled in 2 steps" in out and "taken from" not in out
    )
    model = "auxiliary/model.safetensors"
    assert (tmp_path / "next" / model).read_bytes() == (runs / "whole" / model).read_bytes()


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()], ids=["flipped", "gone"])
def test_a_resumed_run_makes_a_damaged_auxiliary_model_anew(runs, capsys, damage, request):
    folder = unfinished(runs, request.node.callspec.id)
    damage(folder / "auxiliary" / "model.safetensors")
    status, out, _ = resume(capsys, folder)
    assert status == 0 and "it is not taken" in out and "distilled in 2 steps" in out
    assert difference(read(runs / "whole"), read(folder)) == []


def test_a_damaged_prompt_is_not_evaluated(runs, capsys):
    pytest.importorskip("lm_eval")
    shutil.copytree(runs / "whole", runs / "prompt")
    flip(runs / "prompt" / "prompt" / "adapter_model.safetensors")
    status, _, error = run_command(capsys, "evaluate", str(runs / "prompt"))
    assert (
        status == 2 and "the file was changed or damaged; copy the whole run folder again" in error
    )


# --- going on, locks, permissions ---


def test_a_refused_resume_names_the_command_that_goes_on(runs, capsys, monkeypatch):
    folder = unfinished(runs, "command")
    status, _, error = run_command(
        capsys, "run", "--name", "a", "--set", f"run.folder={folder.parent}", "--resume"
    )
    command = f"run --resume {folder}"
    assert status == 2 and command in error
    RunLock.take(folder).release()  # the process that had it is gone
    status, out, _ = run_command(capsys, "report", str(folder))
    assert "stopped (it was killed: no process writes to it any more)" in out
    assert out.splitlines()[-1] == f"go on     python -m fedsp_mpi {command}"
    status, out, _ = run_command(capsys, *shlex.split(out.splitlines()[-1])[5:])
    assert status == 0 and difference(read(runs / "whole"), read(folder)) == []


def test_a_refused_run_leaves_nothing_where_there_was_nothing(tmp_path, capsys):
    assert (
        run_command(capsys, *words(tmp_path, "a", "data.task=sst2", "data.source=embedded"))[0] == 2
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_held_is_running(tmp_path):
    make(tmp_path / "a")
    assert read(tmp_path / "a").status == "running"  # no lock: nobody can know
    lock = RunLock.take(tmp_path / "a")
    assert read(tmp_path / "a").status == "running"
    lock.release()
    assert read(tmp_path / "a").status == "stopped"


def test_a_lock_that_was_replaced_lets_nobody_in_beside_its_owner(tmp_path, monkeypatch):
    """Between opening and locking, the file may be replaced: then the new one must be locked."""
    folder = tmp_path / "a"
    RunLock.take(folder).release()
    flock = fcntl.flock
    new_locks = []

    def replaced_before(file, how):
        if not new_locks:
            (folder / "lock").unlink()
            new_locks.append(None)  # taking the lock calls this function again
            new_locks.append(RunLock.take(folder))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with pytest.raises(
        ValueError, match=rf"process {os.getpid()} on host .* is writing, expected to be alone"
    ) as refusal:
        RunLock.take(folder)
    assert "delete" not in str(refusal.value)


@pytest.mark.parametrize(("permissions", "forbidden"), [("private", 0o077), ("umask", 0o022)])
def test_what_a_run_writes_is_its_owner_s_alone_by_default(
    runs, tmp_path, capsys, permissions, forbidden
):
    umask = os.umask(0o022)
    try:
        shown = [] if permissions == "private" else ["run.permissions=umask"]
        assert (
            run_command(capsys, *words(tmp_path / "r", "a", "record.prompts=true", *shown))[0] == 0
        )
    finally:
        os.umask(umask)
    folder = tmp_path / "r" / "a"
    paths = [folder, *folder.rglob("*")]
    wrong = []
    for path in paths:
        mode = stat.S_IMODE(path.stat().st_mode)
        is_readable_by_others = bool(mode & 0o044)
        if mode & forbidden or is_readable_by_others == (permissions == "private"):
            wrong.append(path)
    assert wrong == [] and len(paths) > 15


def test_a_complete_run_forgets_the_states_of_its_clients(runs, capsys):
    # `whole` was told to keep them.
    assert list((runs / "whole" / "checkpoints").glob("client-*-0001.safetensors"))
    folder = runs / "forgets" / "whole"
    shutil.copytree(runs / "whole", folder)
    status, _, error = run_command(
        capsys, *words(runs / "forgets", "whole", f"data.source={runs / 'data'}"), "--resume"
    )
    assert status == 0 and "is complete, there is nothing to go on with" in error
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["mine-1.txt"]  # nor a checkpoint that refers to them
