"""Ownership of folders and files: the one place that decides what a run may remove or replace.

A folder is ours if it is absent or empty, or has the mark of a run. The mark is `lock`, the first
file that a run creates and never removes, or else `run.h5`: a kill at any moment leaves one of
them, or an empty folder. In a folder that is ours, a run removes the files that runs write there
(by the patterns below, or by the list in the folder of a model) and nothing else. Other files that
somebody put there stay. The folder of a split has a mark of its own: what it is begun with, or its
manifest, which is written last.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedsp_mpi.files.untrusted import JsonMapping, JsonObject, open_regular_file

LOCK = "lock"
RECORD = "run.h5"
# In a model's folder: the files that were written there, each with its digest.
MANIFEST = "digests.json"
MODELS = ("auxiliary", "prompt", "adapter", "head", "model")
EVALUATION = "evaluation.json"
# In the folder of a split: what it is begun with, and what it ends with.
SPLIT_BEGUN = "unfinished.json"
SPLIT_MANIFEST = "manifest.json"
SPLIT_FORMAT = "fedsp_mpi split"
SPLIT_VERSION = 1
# In the note in `lock`: the run was begun by a version that writes such manifests.
LISTS_MODELS = "lists_models"
# Keys of the note in `lock`, in every version that writes one.
_NOTE_KEYS = {"host", "pid", "job"}
# A model's folder before it gets its name.
_PARTS = re.compile(rf"({'|'.join(MODELS)})\.part\d+")
# Names of a run's files, by subfolder.
_RUN_FILES = {
    "": re.compile(
        rf"(run\.(h5|additions(\.mark)?)|config\.yaml|{re.escape(EVALUATION)})(\.part)?"
    ),
    "rounds": re.compile(r"\d{4,}\.h5(\.part)?"),
    "checkpoints": re.compile(
        r"(\d{4,}\.json|(server-\d{4,}|client-\d{5,}-\d{4,}|distillation-\d+)\.safetensors"
        r"|distillation\.json)(\.part)?"
    ),
}
# Names of a split's files: in an owner's folder, and in its own.
_OWNER_FILES = re.compile(r"(train|validation|test)\.parquet(\.part)?")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SPLIT_FILES = re.compile(r"(labels\.png|silos\.yaml|manifest\.json\.part)")
# Files that versions without a manifest wrote into the folder of a model.
_UNLISTED = re.compile(
    r"(adapter_(model\.safetensors|config\.json)|distillation\.json|(generation_)?config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer(_config)?\.json"
    r"|tokenizer\.model|spiece\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.jinja)"
)
# Unicode categories: control and format characters, line separators.
_CONTROL = ("Cc", "Cf", "Zl", "Zp")
_PICTURE_MARK = b"fedsp_mpi"
_HEAD_BYTES = 4096  # of a file, in which the mark of a picture is looked for


def require_plain_name(key: str, name: str) -> None:
    """Raise ValueError unless a name is one path component that is safe to print and to type.

    The message names the configuration's key.
    """
    trouble = ""
    if name in ("", ".", "..") or name != name.strip():
        trouble = "expected letters, digits, '.', '_' or '-'"
    elif "/" in name or "\0" in name:
        trouble = "expected a name without '/'; the folder that it lies in is run.folder"
    elif name.startswith("-"):
        trouble = "expected a name that does not begin with '-', which commands take for an option"
    elif any(unicodedata.category(character) in _CONTROL for character in name):
        trouble = "expected a name without control characters"
    if trouble:
        raise ValueError(
            f"{key}: found {name!r}, {trouble}; choose one plain name for the run's folder"
        )


def require_readable_path(key: str, text: str) -> None:
    """Raise ValueError, naming the key, if the locale cannot encode a path."""
    try:
        text.encode()
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"{key}: found {text!r}, which is no text in the encoding of the locale "
            f"({sys.getfilesystemencoding()}), expected a path that the libraries can read; "
            "set LC_ALL=C.UTF-8, or choose another name"
        ) from None


def is_ours(folder: Path) -> bool:
    """Return True if a run may use a folder: it is absent, empty, or has the mark of a run."""
    return _foreign_name(folder) is None


def require_ours(folder: Path) -> None:
    """Raise ValueError, naming a file of somebody else, unless a run may use a folder."""
    name = _foreign_name(folder)
    if name is not None:
        raise ValueError(
            f"{folder}: found {name!r} and no sign that a run wrote it, expected a new folder, an "
            "empty one, or that of a run; choose another run.name or run.folder"
        )


def require_apart(
    folder: Path,
    inputs: Mapping[str, str | None],
    *,
    owner: str = "run",
    advice: str = "choose another run.name or run.folder",
) -> None:
    """Raise ValueError if a folder that is written is one of the inputs, or contains one.

    Args:
        folder: of a run or of a split.
        inputs: values of configuration keys; those that do not exist as files are not paths.
        owner: what the folder is of, for the message.
        advice: for the message.
    """
    target = folder.resolve()
    for key, text in inputs.items():
        if text and Path(text).expanduser().exists():
            path = Path(text).expanduser().resolve()
            if path == target or target in path.parents:
                raise ValueError(
                    f"{folder}: found {text!r} of {key} in the {owner}'s folder, expected it "
                    f"elsewhere, because a {owner} replaces its folder; {advice}"
                )


def run_files(folder: Path) -> Iterator[Path]:
    """Yield the files that runs have written into their folder; not `lock` or failure reports."""
    for subfolder in _RUN_FILES:
        yield from run_files_in(folder / subfolder, subfolder)
    for subfolder in MODELS:
        yield from _model_files(folder / subfolder)


def run_files_in(folder: Path, subfolder: str) -> list[Path]:
    """Return the files in `folder` that are named like those of runs.

    `subfolder` says which names: those in "rounds", in "checkpoints", or in the run's folder ("").
    """
    return [path for path in _files(folder) if _RUN_FILES[subfolder].fullmatch(path.name)]


def clear(folder: Path) -> None:
    """Remove the files of runs from a folder, and its subfolders that are empty then.

    Raises:
        ValueError: the folder is not ours.
        OSError: a file cannot be removed.
    """
    require_ours(folder)
    remove_parts(folder)
    # The record goes last, because it marks the folder as ours.
    for path in sorted(run_files(folder), key=lambda path: path.name == RECORD):
        path.unlink(missing_ok=True)
    for subfolder in ("rounds", "checkpoints", *MODELS):
        remove_if_empty(folder / subfolder)


def require_split(folder: Path, *, replace: bool) -> None:
    """Raise ValueError unless a split may be written into a folder.

    It may if the folder is absent, empty, or that of a split that was killed.

    Args:
        folder: to write into.
        replace: a complete split may be replaced, too.
    """
    name = _first_name(folder, ignored=f"{SPLIT_BEGUN}.part")
    if name is None:
        return
    is_complete = bool(_split_folders(folder / SPLIT_MANIFEST))
    if not is_complete and not _split_folders(folder / SPLIT_BEGUN):
        raise ValueError(
            f"{folder}: found {name!r} and no sign that a split wrote it, expected a new folder, "
            "an empty one, or that of a split; choose another --to"
        )
    if is_complete and not replace:
        raise ValueError(
            f"{folder}: found a complete split, expected a new folder, or an empty one; add "
            "--replace to write it anew, or choose another --to"
        )


def begin_split(folder: Path, owners: Sequence[str], *, private: bool) -> None:
    """Mark a folder as that of an unfinished split, and remove an earlier split from it.

    Args:
        folder: is created if it is absent.
        owners: names of the folders that will be written in it.
        private: nobody else may use it.

    Raises:
        ValueError: it is not ours.
        OSError: a file cannot be written or removed.
    """
    require_split(folder, replace=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_folder(folder, private)
    old_owners = [
        *_split_folders(folder / SPLIT_MANIFEST),
        *_split_folders(folder / SPLIT_BEGUN),
    ]
    all_owners = dict.fromkeys([*owners, *old_owners])
    note = {
        "format": SPLIT_FORMAT,
        "version": SPLIT_VERSION,
        "owners": [{"folder": name} for name in all_owners],
    }
    _replace_text(folder / SPLIT_BEGUN, json.dumps(note))
    # The manifest first: what has none is no complete split.
    (folder / SPLIT_MANIFEST).unlink(missing_ok=True)
    for path in _files(folder):
        if _SPLIT_FILES.fullmatch(path.name):
            path.unlink()
    for name in old_owners:
        _clear_owner(folder / name)


def finish_split(folder: Path, manifest: str) -> None:
    """Write the manifest of a split, the last of its files.

    Raises:
        OSError: it cannot be written.
    """
    _replace_text(folder / SPLIT_MANIFEST, manifest)
    (folder / SPLIT_BEGUN).unlink()


def _clear_owner(folder: Path) -> None:
    """Remove the files of a split from an owner's folder, and the folder if it is empty then."""
    if folder.is_symlink():
        return
    for path in _files(folder):
        if _OWNER_FILES.fullmatch(path.name):
            path.unlink()
    remove_if_empty(folder)


def _split_folders(path: Path) -> list[str]:
    """Return the owners' folders that a split's mark lists; none if it is no mark."""
    content = _read_json(path)
    owners = content.get("owners")
    if content.get("format") != SPLIT_FORMAT or not isinstance(owners, list):
        return []
    names = [owner.get("folder") for owner in owners if isinstance(owner, dict)]
    return [name for name in names if isinstance(name, str) and _OWNER.fullmatch(name)]


def _first_name(folder: Path, ignored: str) -> str | None:
    """Return a name in a folder; None if there is none but `ignored`.

    A path that is no folder has its own name.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return folder.name
    return next((name for name in names if name != ignored), None)


def _replace_text(path: Path, text: str) -> None:
    """Write a file that is complete or absent, on disk when this returns."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    write_new(part, text)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def remove_parts(folder: Path) -> None:
    """Remove models that a killed process left incomplete in a folder, if that is ours."""
    if folder.is_dir() and is_ours(folder):
        for path in list(folder.iterdir()):
            if _PARTS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with suppress(OSError):
        folder.rmdir()


def begin_model(folder: Path) -> Path:
    """Create an empty folder to write a model into; `place_model` renames it to `folder`.

    Raises:
        OSError: it cannot be created.
    """
    remove_parts(folder.parent)
    number = os.getpid()
    part = folder.with_name(f"{folder.name}.part{number}")
    while part.exists():
        number += 1
        part = folder.with_name(f"{folder.name}.part{number}")
    make_folder(part)
    return part


def place_model(part: Path, folder: Path) -> None:
    """Replace the model in `folder` by the one in `part`, which has its manifest.

    A file in `folder` that is not ours stays; if a new one needs its name, it is renamed to NAME.1,
    and so is what is no folder in the place of `folder`.
    The old manifest is removed first and the new one placed last, so that a model in between is not
    taken for a complete one.

    Raises:
        OSError: a file cannot be moved.
    """
    apply_folder_mode(part)
    old_names = {path.name for path in _model_files(folder)}
    for name in sorted(old_names, key=lambda name: (name != MANIFEST, name)):
        (folder / name).unlink(missing_ok=True)
    remove_if_empty(folder)
    if not folder.is_dir() and os.path.lexists(folder):
        set_aside(folder, folder.name)
    if not folder.exists():
        part.rename(folder)
        return
    names = sorted((path.name for path in part.iterdir()), key=lambda name: name == MANIFEST)
    for name in names:
        if os.path.lexists(folder / name):
            set_aside(folder / name, name)
        (part / name).rename(folder / name)
    part.rmdir()


def require_picture(path: Path, mark: bytes = _PICTURE_MARK) -> None:
    """Raise ValueError unless a file is absent, empty, or our picture (see `picture_mark`).

    Other reports have another `mark`, which is in the first 4 KiB of each.
    """
    if not path.exists():
        return
    head = _head(path) if path.is_file() else b""
    if not path.is_file() or (head and mark not in head):
        kind = "a picture" if mark == _PICTURE_MARK else "one"
        raise ValueError(
            f"{path}: found a file that no report wrote, expected a new name, or {kind} of an "
            "earlier report; name another file, or move that one away"
        )


def picture_mark(ending: str) -> dict[str, str | None]:
    """Return matplotlib's metadata that mark a picture with this file name ending as ours."""
    if ending == ".svg":
        return {"Date": None, "Creator": "fedsp_mpi report"}  # no date: same bytes every time
    return {"Software": "fedsp_mpi report"}


def replace_picture(path: Path, image: bytes, mark: bytes = _PICTURE_MARK) -> None:
    """Write a picture, or another report with a mark of its own, atomically.

    Args:
        path: of the file; what is there already is replaced if it is ours.
        image: the file's content.
        mark: bytes in the first 4 KiB of each report of this kind.

    Raises:
        ValueError: as of `require_picture`.
        OSError: it cannot be written.
    """
    require_picture(path, mark)
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
    """Raise ValueError unless a file is absent, empty, or a resolved configuration of this run.

    `line` is a line in the section `run` that tells runs apart.
    """
    if not path.exists():
        return
    lines: list[str] = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    sections = {"run:", "model:", "data:", "federation:", "server:", "client:"}
    is_resolved = sections | {f"  {line}"} <= set(lines)
    if path.is_dir() or (lines and not is_resolved):
        raise ValueError(
            f"{path}: found a file that no sweep wrote, expected none, or the configuration of "
            "this run; move it away, or choose another folder"
        )


def require_evaluation(path: Path) -> None:
    """Raise ValueError unless a file is absent, empty, or an evaluation of ours."""
    content = _read_json(path)
    is_ours = {"run", "versions", "results"} <= content.keys()
    if path.exists() and not is_ours and not (path.is_file() and not _head(path)):
        raise ValueError(
            f"{path}: found a file that `evaluate` did not write, expected none, or one of an "
            "earlier evaluation; move it away"
        )


def make_folder(path: Path, private: bool | None = None) -> None:
    """Create a folder if it is absent.

    Args:
        path: the folder; its parent exists.
        private: True: nobody else may use it, even if it is there already; False: as the umask
            allows; None: whoever may use its parent.
    """
    mode = 0o700 if private else 0o777
    if private is None:
        mode = _folder_mode(path.parent)
    path.mkdir(mode=mode, exist_ok=True)
    if private:
        with suppress(OSError):  # of another user, or on a file system without permissions
            path.chmod(0o700)


def file_mode(path: Path) -> int:
    """Return the mode of a new file: no more permissions than its folder has."""
    return 0o666 & _folder_mode(path.parent)


def apply_folder_mode(target: Path) -> None:
    """Set the mode of a file, or of a folder's files, that a library wrote to that of our files."""
    paths = _files(target) if target.is_dir() else [target]
    for path in paths:
        with suppress(OSError):
            path.chmod(file_mode(path) & ~_umask())


def set_aside(path: Path, name: str) -> None:
    """Rename a file within its folder to `name`, or to the first of NAME.1, NAME.2, ... not in use.

    Raises:
        OSError: it cannot be renamed.
    """
    target = path.with_name(name)
    number = 0
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{name}.{number}")
    path.rename(target)


def write_new(path: Path, text: str) -> None:
    """Write a new file, with no more permissions than its folder has.

    Raises:
        FileExistsError: it exists.
        OSError: it cannot be written.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file_mode(path))
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def is_by_this_user(*paths: Path) -> bool:
    """Return True if all of these files and folders exist and belong to the current user."""
    try:
        return all(path.stat().st_uid == os.geteuid() for path in paths)
    except OSError:
        return False


def _foreign_name(folder: Path) -> str | None:
    """Return a name in a folder that is not ours; None if the folder is ours."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        # The path is a file, or one of its parents is, so that the folder cannot be created.
        return folder.name if os.path.lexists(folder) else None
    lock = folder / LOCK
    if not names or _is_marked(folder):
        return None
    if names == [LOCK] and lock.is_file() and not lock.stat().st_size:
        return None  # killed after the file was created and before the note was written
    return next((name for name in names if name != LOCK), names[0])


def _is_marked(folder: Path) -> bool:
    """Return True if a folder has the mark of a run."""
    return is_lock_note(_read_json(folder / LOCK)) or _is_record(folder / RECORD)


def is_lock_note(content: JsonMapping) -> bool:
    """Return True if `content` is the note in a run's `lock`."""
    return content.keys() >= _NOTE_KEYS


def _is_record(path: Path) -> bool:
    """Return True if a file is a run's record, even a damaged one: HDF5 with our format's name.

    Does not need h5py.
    """
    try:
        with (
            open_regular_file(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content[:8] == b"\x89HDF\r\n\x1a\n" and content.find(b"fedsp_mpi run") >= 0
    except (OSError, ValueError):  # an empty file cannot be mapped: ValueError
        return False


def _model_files(folder: Path) -> Iterator[Path]:
    """Yield the files that a run has written into the folder of a model."""
    manifest = _read_json(folder / MANIFEST)
    if manifest:
        names = {*manifest, MANIFEST}
        yield from (path for path in _files(folder) if path.name in names)
        return
    run_folder = folder.parent
    # Runs that write manifests have no model files without one.
    if _is_marked(run_folder) and not _read_json(run_folder / LOCK).get(LISTS_MODELS):
        yield from (path for path in _files(folder) if _UNLISTED.fullmatch(path.name))


def _files(folder: Path) -> list[Path]:
    """Return the regular files in a folder: no folders, no links."""
    with suppress(OSError):
        return [
            Path(entry.path) for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False)
        ]
    return []


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def _read_json(path: Path) -> JsonObject:
    """Return the mapping in a JSON file; an empty one if it cannot be read."""
    try:
        with open_regular_file(path) as file:
            content = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _head(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _folder_mode(folder: Path) -> int:
    """Return the permissions of a folder, all of them for its owner."""
    try:
        return stat.S_IMODE(folder.stat().st_mode) & 0o777 | 0o700
    except OSError:
        return 0o777
