"""The laws of the house, read from the source: who imports whom, who prints, how long a function
may be.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from helpers.paths import ROOT

PACKAGE = ROOT / "fedsp_mpi"
# A file imports from its own room and from the rows above, never from its neighbours.
ORDER = (
    {"fedsp_mpi", "files"},
    {"config"},
    {"tensors", "rng", "log"},
    {"comm", "data", "models", "aggregation", "record"},
    {"training", "report"},
    {"algorithms", "evaluation"},
    {"roles"},
    {"federate"},
    {"run"},
    {"estimate"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
# The public interface: it stands above all rooms, but imports them only when it is used.
INTERFACE = "__init__.py"
HOME = {
    "mpi4py": "comm/",
    "cryptography": "comm/sealing.py",
    "h5py": "record/",
    "datasets": "data/",
    "transformers": "models/",
    "peft": "models/",
    "deepspeed": "training/engine.py",
    "cmaes": "training/cma_es.py",
    "threadpoolctl": "training/cma_es.py",
    "lm_eval": "evaluation/harness.py",
    "matplotlib": "report/plot.py",
    "pydantic": "config/keys.py",
    "jinja2": "report/html.py",
}
TOOLS = {"resources/make_embedded.py"}  # makes what the package ships; not part of a run
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
RANK = {unit: row for row, units in enumerate(ORDER) for unit in units}


def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"), filename=file)


def unit(file: str) -> str:
    """The room or the file that a path belongs to; the package's own __init__ is `fedsp_mpi`."""
    first = file.split("/")[0].removesuffix(".py")
    return "fedsp_mpi" if first == "__init__" else first


def imported(node: ast.Import | ast.ImportFrom, file: str) -> list[str]:
    """Absolute names of what one statement imports; of `from a import b`, a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = ["fedsp_mpi", *file.split("/")[:-1]]
    base = package[: len(package) - node.level + 1] if node.level else []
    base += node.module.split(".") if node.module else []
    return [".".join([*base, alias.name]) for alias in node.names]


def imports(file: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, name) for name in imported(node, file))


def at_import_time(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: not those in functions or for the type
    checker.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            continue
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_import_time(child)


def target(name: str) -> str:
    """The unit that an absolute name of the package belongs to: fedsp_mpi.comm.wire.Wire is in
    comm.
    """
    second = name.split(".")[1] if "." in name else "fedsp_mpi"
    return second if second in RANK else "fedsp_mpi"


def may_import(unit: str, other: str) -> bool:
    return unit == other or RANK[other] < RANK[unit]


def test_every_file_has_its_place_in_the_order():
    assert [
        file
        for file in FILES
        if file not in TOOLS and unit(file) not in RANK and unit(file) != "resources"
    ] == []
    rooms = {unit(file) for file in FILES}
    assert {
        "tensors",
        "comm",
        "models",
        "training",
        "federate",
        "run",
        "cli",
    } <= rooms  # the walk found the package


@pytest.mark.parametrize("file", [file for file in FILES if unit(file) in RANK])
def test_imports_go_one_way(file):
    inside = [(line, name) for line, name in imports(file) if name.split(".")[0] == "fedsp_mpi"]
    wrong = [
        f"{file}:{line} imports {name}"
        for line, name in inside
        if not may_import(unit(file), target(name)) and not is_interface(file, name)
    ]
    assert wrong == []


def is_interface(file: str, name: str) -> bool:
    """Whether an import is one that the public interface makes when it is used."""
    early = [n for node in at_import_time(tree(file)) for n in imported(node, file)]
    return file == INTERFACE and name not in early


def test_no_room_uses_the_public_interface():
    """But the room that has the name of a public function, and is called in its place."""
    uses = {
        (file, name)
        for file in FILES
        for _, name in imports(file)
        if name.split(".")[0] == "fedsp_mpi" and target(name) == "fedsp_mpi"
    }
    beside_version = {(file, name) for file, name in uses if name != "fedsp_mpi.__version__"}
    assert beside_version == {("run/__init__.py", "fedsp_mpi")} and len(uses) > 1


def test_the_order_itself_is_told_apart():
    assert (
        may_import("training", "models")
        and may_import("cli", "commands")
        and may_import("models", "models")
    )
    assert not may_import("models", "data") and not may_import("algorithms", "evaluation")
    assert not may_import("training", "algorithms") and not may_import("files", "config")
    assert (
        target("fedsp_mpi.comm.wire.Wire") == "comm"
        and target("fedsp_mpi.__version__") == "fedsp_mpi"
    )


@pytest.mark.parametrize("library", HOME)
def test_a_heavy_library_has_one_importer(library):
    users = {
        f
        for f in FILES
        if f not in TOOLS and any(name.split(".")[0] == library for _, name in imports(f))
    }
    assert {file for file in users if not file.startswith(HOME[library])} == set()


def test_every_heavy_library_but_peft_is_used_at_all():
    used = {name.split(".")[0] for file in FILES for _, name in imports(file)}
    assert set(HOME) - {"peft"} <= used


def test_modules_are_named_at_run_time_in_two_places_only():
    names = {
        (file, getattr(node, "id", getattr(node, "attr", "")))
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, (ast.Name, ast.Attribute))
    }
    dynamic = {
        (file, name) for file, name in names if name in ("import_module", "__import__", "exec")
    }
    # names of the room that are loaded late; the file of a method
    assert dynamic == {(file, "import_module") for file in ("comm/__init__.py", "run/build.py")}


WITHOUT_TORCH = {
    *("config", "tensors", "rng", "log", "comm", "record", "report", "aggregation", "cli"),
    *("run/__init__.py", "run/execute.py", "run/server.py", "run/folder.py", "run/devices.py"),
}
LATE_TORCH = {"tensors", "rng"}  # imported in functions


def is_without_torch(file: str) -> bool:
    return bool(WITHOUT_TORCH & {file, unit(file)})


@pytest.mark.parametrize("file", list(filter(is_without_torch, FILES)))
def test_what_a_waiting_rank_needs_is_free_of_torch(file):
    """Where tensors, randomness and devices are the matter, torch is imported in functions;
    elsewhere not at all.
    """
    late = unit(file) in LATE_TORCH or file.startswith("run/")
    nodes = at_import_time(tree(file)) if late else ast.walk(tree(file))
    found = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [
        node.lineno
        for node in found
        if any(n.split(".")[0] == "torch" for n in imported(node, file))
    ] == []


def test_mpi_and_deepspeed_are_imported_where_they_are_needed_not_before():
    early = [
        f"{file}:{node.lineno}"
        for file in FILES
        for node in at_import_time(tree(file))
        if any(name.split(".")[0] in ("mpi4py", "deepspeed") for name in imported(node, file))
    ]
    assert early == []


def test_only_the_command_line_prints():
    prints = {
        file
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Name) and node.id == "print" and isinstance(node.ctx, ast.Load)
    }
    assert prints - TOOLS == {"cli.py"}


@pytest.mark.parametrize("file", FILES)
def test_what_is_public_says_what_it_is(file):
    module = tree(file)
    public = [
        node
        for node in module.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
    ]
    silent = [node.name for node in public if not (ast.get_docstring(node) or "").strip()]
    assert (ast.get_docstring(module) is not None, silent) == (True, [])


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after `code`."""
    show = f"{code}\nprint('loaded', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{show}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


HEAVY = {*HOME, "torch", "numpy"}


def test_the_package_itself_imports_nothing():
    assert loaded_after("import fedsp_mpi") & {*HEAVY, "yaml", "argparse"} == set()


def test_the_command_line_imports_nothing_heavy():
    assert loaded_after("import fedsp_mpi.cli") & HEAVY == set()


def test_help_of_every_verb_imports_nothing_heavy():
    code = """
import argparse, contextlib, io
from fedsp_mpi import cli
[verbs] = [a.choices for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
assert {"run", "report", "diff", "bench"} <= set(verbs), list(verbs)
for line in [["--help"], ["--version"], *([verb, "--help"] for verb in verbs)]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(line)
        except SystemExit as end:
            assert end.code == 0, line
    assert line == ["--version"] or "usage: fedsp_mpi" in out.getvalue(), out.getvalue()
"""
    assert loaded_after(code) & HEAVY == set()


def test_the_packages_are_seen_where_they_are_loaded():
    assert "numpy" in loaded_after(
        "import fedsp_mpi.tensors"
    )  # or the two tests above would see nothing
