"""Which folders and files are ours: the one place that decides what may be taken, removed or
replaced.

A folder is ours if it is absent or empty, or carries the mark of a run. The mark is `lock`, the
first file that a run makes and never removes, or else `run.h5`: a kill at any moment leaves one of
them, or an empty folder. In a folder that is ours, a run removes the files that runs write there,
by the patterns below or by the list in the folder of a model, and nothing else. A file that
somebody put beside them stays.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOCK, RECORD = "lock", "run.h5"
MANIFEST = (
    "digests.json"  # in a model's folder: the files that were written there, each with its digest
)
MODELS = ("auxiliary", "prompt", "model")
EVALUATION = "evaluation.json"
LISTED = (
    "lists_models"  # in the note in `lock`: the run was begun by a version that writes such lists
)
_NOTE = {"host", "pid", "job"}  # what the note in `lock` says, since the first version that has one
_PARTS = re.compile(rf"({'|'.join(MODELS)})\.part\d+")  # a model's folder before it has its name
_WRITTEN = {
    "": re.compile(rf"(run\.h5|config\.yaml|{re.escape(EVALUATION)})(\.part)?"),
    "rounds": re.compile(r"\d{4,}\.h5(\.part)?"),
    "checkpoints": re.compile(
        r"(\d{4,}\.json|(server-\d{4,}|client-\d{5,}-\d{4,}|distillation-\d+)\.safetensors|distillation\.json)(\.part)?"
    ),
}
# What versions without a list of their own wrote into the folder of a model.
_UNLISTED = re.compile(
    r"(adapter_(model\.safetensors|config\.json)|distillation\.json|(generation_)?config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer(_config)?\.json|tokenizer\.model|spiece\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|chat_template\.jinja)"
)
_PICTURE = b"fedsp_mpi"
_BEGINNING = 4096  # bytes of a file that are looked at


def require_plain_name(key: str, name: str) -> None:
    """Raise ValueError, naming the key, unless a name is one component of a path that is safe to
    print and to type.
    """
    trouble = ""
    if name in ("", ".", "..") or name != name.strip():
        trouble = "expected letters, digits, '.', '_' or '-'"
    elif "/" in name or "\0" in name:
        trouble = "expected a name without '/'; the folder that it lies in is run.folder"
    elif name.startswith("-"):
        trouble = "expected a name that does not begin with '-', which commands take for an option"
    elif any(unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp") for sign in name):
        trouble = "expected a name without control characters"
    if trouble:
        raise ValueError(
            f"{key}: found {name!r}, {trouble}; choose one plain name for the run's folder"
        )


def require_readable_path(key: str, text: str) -> None:
    """Raise ValueError, naming the key, if a path is no text, or the locale cannot write it."""
    try:
        text.encode()
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"{key}: found {text!r}, which is no text in the encoding of the locale "
            f"({sys.getfilesystemencoding()}), "
            "expected a path that the libraries can read; set LC_ALL=C.UTF-8, or choose "
            "another name"
        ) from None


def is_ours(folder: Path) -> bool:
    """Whether a run may take a folder: it is absent, empty, or carries the mark of a run."""
    return _stranger(folder) is None


def require_ours(folder: Path) -> None:
    """Raise ValueError, naming a file of somebody else, unless a run may take a folder."""
    if name := _stranger(folder):
        raise ValueError(
            f"{folder}: found {name!r} and no sign that a run wrote it, expected a new "
            "folder, an empty one, or that "
            "of a run; choose another run.name or run.folder"
        )


def require_apart(folder: Path, inputs: Mapping[str, str | None]) -> None:
    """Raise ValueError if a run's folder is what the run reads, or contains it.

    Args:
        inputs: the path behind each key; what does not exist is no path.
    """
    target = folder.resolve()
    for key, text in inputs.items():
        if text and Path(text).expanduser().exists():
            path = Path(text).expanduser().resolve()
            if path == target or target in path.parents:
                raise ValueError(
                    f"{folder}: found {text!r} of {key} in the run's folder, expected "
                    "it elsewhere, "
                    "because a run "
                    "replaces its folder; choose another run.name or run.folder"
                )


def written(folder: Path) -> Iterator[Path]:
    """The files that runs have written into a folder of theirs, except `lock` and reports of
    failures.
    """
    for room in _WRITTEN:
        yield from written_in(folder / room if room else folder, room)
    for room in MODELS:
        yield from _in_model(folder / room)


def written_in(folder: Path, room: str) -> list[Path]:
    """The files in a folder whose names are those that runs give there; `room` is "rounds" or
    "checkpoints".
    """
    return [path for path in _files(folder) if _WRITTEN[room].fullmatch(path.name)]


def clear(folder: Path) -> None:
    """Remove what runs have written into a folder, and the folders below it that are empty then.

    Raises ValueError if the folder is not ours, OSError if a file cannot be removed.
    """
    require_ours(folder)
    remove_parts(folder)
    for path in sorted(written(folder), key=lambda path: path.name == RECORD):  # the mark goes last
        path.unlink(missing_ok=True)
    for room in ("rounds", "checkpoints", *MODELS):
        remove_if_empty(folder / room)


def remove_parts(folder: Path) -> None:
    """Remove the models that a killed process had half written into a folder, if that is ours."""
    if folder.is_dir() and is_ours(folder):
        for path in list(folder.iterdir()):
            if _PARTS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    with suppress(OSError):
        folder.rmdir()


def begin_model(folder: Path) -> Path:
    """An empty folder to write a model into, which `place_model` gives the name of `folder`.

    Raises OSError.
    """
    remove_parts(folder.parent)
    number = os.getpid()
    while (part := folder.with_name(f"{folder.name}.part{number}")).exists():
        number += 1
    make_folder(part)
    return part


def place_model(part: Path, folder: Path) -> None:
    """Put a model that was written into `part`, with its list of files, in the place of the one in
    `folder`.

    A file in `folder` that is not ours stays; where it has the name of a new one, it is set aside
    as NAME.1. The list goes first and comes last, so that a model in between is not taken for a
    whole one. Raises OSError.
    """
    give_rights(part)
    ours = {path.name for path in _in_model(folder)}
    for name in (MANIFEST, *sorted(ours - {MANIFEST})):
        if name in ours:
            (folder / name).unlink(missing_ok=True)
    remove_if_empty(folder)
    if not folder.exists():
        part.rename(folder)
        return
    names = sorted((path.name for path in part.iterdir()), key=lambda name: name == MANIFEST)
    for name in names:
        if (folder / name).exists():
            set_aside(folder / name, name)
        (part / name).rename(folder / name)
    part.rmdir()


def require_picture(path: Path) -> None:
    """Raise ValueError unless a file is absent, empty, or a picture of ours (see `picture_mark`)."""
    if not path.exists():
        return
    head = b"" if path.is_dir() else _head(path)
    if path.is_dir() or (head and _PICTURE not in head):
        raise ValueError(
            f"{path}: found a file that no report wrote, expected a new name, or a picture "
            "of an earlier report; name "
            "another file, or move that one away"
        )


def picture_mark(ending: str) -> dict[str, str | None]:
    """What a picture says about its origin, by the keys that matplotlib has for a kind of file."""
    return (
        {"Date": None, "Creator": "fedsp_mpi report"}
        if ending == ".svg"
        else {"Software": "fedsp_mpi report"}
    )


def replace_picture(path: Path, image: bytes) -> None:
    """Put a picture at `path`, whole or not at all.

    Raises ValueError like `require_picture`, OSError.
    """
    require_picture(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def require_configuration(path: Path, line: str) -> None:
    """Raise ValueError unless a file is absent, empty, or a resolved configuration with this line
    in `run`.
    """
    if not path.exists():
        return
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    )
    is_resolved = {
        "run:",
        f"  {line}",
        "model:",
        "data:",
        "federation:",
        "server:",
        "client:",
    } <= set(lines)
    if path.is_dir() or (lines and not is_resolved):
        raise ValueError(
            f"{path}: found a file that no sweep wrote, expected none, or the configuration "
            "of this run; move it away, "
            "or choose another folder"
        )


def require_evaluation(path: Path) -> None:
    """Raise ValueError unless a file is absent, empty, or an evaluation of ours."""
    content = _json(path)
    if path.exists() and _head(path) and not {"run", "versions", "results"} <= content.keys():
        raise ValueError(
            f"{path}: found a file that `evaluate` did not write, expected none, or one of "
            "an earlier evaluation; move "
            "it away"
        )


def make_folder(path: Path, private: bool | None = None) -> None:
    """Make a folder, if it is absent, with the rights of the folder around it; `private` takes them
    from all others.
    """
    around = 0o777 if private is False else 0o700 if private else _rights(path.parent)
    path.mkdir(mode=around, exist_ok=True)
    if private:
        with suppress(OSError):  # of another user, or on a file system without rights
            path.chmod(0o700)


def file_mode(path: Path) -> int:
    """The rights of a new file: no more than those of the folder that it lies in."""
    return 0o666 & _rights(path.parent)


def give_rights(target: Path) -> None:
    """Give a file, or the files in a folder, which a library wrote, the rights of a file that a run
    writes there.
    """
    for path in _files(target) if target.is_dir() else [target]:
        with suppress(OSError):
            path.chmod(file_mode(path) & ~_umask())


def set_aside(path: Path, name: str) -> None:
    """Give a file the first of the names NAME, NAME.1, NAME.2, ...

    in its folder that is free. Raises OSError.
    """
    other, number = path.with_name(name), 0
    while other.exists():
        number += 1
        other = path.with_name(f"{name}.{number}")
    path.rename(other)


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet, with no more rights than its folder.

    Raises FileExistsError, OSError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file_mode(path))
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def is_by_this_user(*paths: Path) -> bool:
    """Whether all of some files and folders are there and belong to the user who asks."""
    try:
        return all(path.stat().st_uid == os.geteuid() for path in paths)
    except OSError:
        return False


def _stranger(folder: Path) -> str | None:
    """A name in a folder that is not ours; None if it is ours."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        return None
    except (
        NotADirectoryError
    ):  # a file stands there, or in the place of a folder around it, which nobody can make
        return folder.name if os.path.lexists(folder) else None
    lock = folder / LOCK
    if not names or _is_marked(folder):
        return None
    if names == [LOCK] and lock.is_file() and not lock.stat().st_size:
        return None  # killed between the making of the file and its first word
    return next((name for name in names if name != LOCK), names[0])


def _is_marked(folder: Path) -> bool:
    return is_note(_json(folder / LOCK)) or _is_record(folder / RECORD)


def is_note(content: Mapping[str, Any]) -> bool:
    """Whether this is the note in a run's `lock`."""
    return content.keys() >= _NOTE


def _is_record(path: Path) -> bool:
    """Whether a file is the record of a run, whole or damaged: HDF5 that names our format. No
    library is needed.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            return image[:8] == b"\x89HDF\r\n\x1a\n" and image.find(b"fedsp_mpi run") >= 0
    except (OSError, ValueError):  # the latter for a file without bytes
        return False


def _in_model(folder: Path) -> Iterator[Path]:
    """The files that a run has written into the folder of a model."""
    listed = _json(folder / MANIFEST)
    names = {*listed, MANIFEST} if listed else set()
    is_old = (
        not listed and _is_marked(folder.parent) and not _json(folder.parent / LOCK).get(LISTED)
    )
    for path in _files(folder):
        if path.name in names or (is_old and _UNLISTED.fullmatch(path.name)):
            yield path


def _files(folder: Path) -> list[Path]:
    """The plain files in a folder; no folders, and nothing behind a link."""
    with suppress(OSError):
        return [
            Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)
        ]
    return []


def _umask() -> int:
    """The process's umask, which the system tells only by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_BEGINNING)


def _rights(folder: Path) -> int:
    try:
        return stat.S_IMODE(folder.stat().st_mode) & 0o777 | 0o700
    except OSError:
        return 0o777
