"""What is imported is declared, what is declared is pinned, and the version stands in one place."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

import fedsp_mpi
from helpers.paths import ROOT

SETUP = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
ON_DEMAND = {"lm-eval", "matplotlib", "tensorboardx"}  # of a verb or an option, whose extra says so


def normal(requirement: str) -> str:
    """The name in a requirement, as package indexes compare names."""
    found = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def declared() -> set[str]:
    """The names in install_requires."""
    keywords = [node for node in ast.walk(SETUP) if isinstance(node, ast.keyword)]
    [listed] = [keyword.value for keyword in keywords if keyword.arg == "install_requires"]
    return {normal(item) for item in ast.literal_eval(listed)}


def extras() -> set[str]:
    """The names in the lists that the extras are made of."""
    lists = [
        node.value
        for node in SETUP.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    ]
    items = [item.value for each in lists for item in each.elts if isinstance(item, ast.Constant)]
    return {normal(item) for item in items}


def imported() -> Iterator[str]:
    """Top-level names that the package imports, in functions too."""
    for path in (ROOT / "fedsp_mpi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield str(node.module).split(".")[0]


def test_what_is_imported_is_declared():
    homes = importlib.metadata.packages_distributions()
    others = set(imported()) - sys.stdlib_module_names - {"fedsp_mpi"}
    needed = {normal(homes[name][0]) for name in others}
    assert needed - ON_DEMAND == declared()
    assert needed.intersection(extras()) >= ON_DEMAND


def test_what_is_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\w[\w.]*", pin) for pin in pins)
    names = [normal(pin) for pin in pins]
    assert len(names) == len(set(names)) and {"mpich", "pytest"} <= extras()
    assert (declared() | extras()) - set(names) == set()


def test_the_version_stands_in_one_place():
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == fedsp_mpi.__version__, done.stderr
    constants = [node.value for node in ast.walk(SETUP) if isinstance(node, ast.Constant)]
    assert fedsp_mpi.__version__ not in constants and "fedsp_mpi" in constants


def test_lower_bounds_are_what_was_tested():
    """Each requirement names a least version, of the same minor line as the pinned one."""
    pins = dict(
        re.findall(
            r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M
        )
    )
    tested = {normal(name): version.split(".")[:2] for name, version in pins.items()}
    keywords = [node for node in ast.walk(SETUP) if isinstance(node, ast.keyword)]
    [listed] = [keyword.value for keyword in keywords if keyword.arg == "install_requires"]
    bounds = {normal(item): item.partition(">=")[2].split(".") for item in ast.literal_eval(listed)}
    assert bounds == {name: tested[name] for name in bounds}
