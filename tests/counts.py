"""Count what makes the package easy or hard to read: `python tests/counts.py [--list] [PATH ...]`.

Prints one line for each measure: its value, its limit where there is one, and with `--list` every
place. `tests/unit/test_readability.py` holds the limits.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fedsp_mpi"

# Names that say nothing of what they hold.
VAGUE_LOCALS = set(
    [
        "more",
        "usual",
        "needs",
        "found",
        "some",
        "told",
        "own",
        "asked",
        "each",
        "whole",
        "kept",
        "known",
        "here",
        "said",
        "mine",
        "others",
        "one",
        "ones",
        "both",
        "rest",
        "wanted",
        "given",
        "made",
        "taken",
        "left",
        "sent",
        "heard",
    ]
)
# First words of a docstring that are no verb.
NOT_A_VERB = set(
    [
        "what",
        "how",
        "whether",
        "the",
        "same",
        "of",
        "where",
        "nothing",
        "as",
        "a",
        "an",
        "all",
        "that",
        "who",
        "which",
        "both",
        "every",
        "it",
        "this",
        "they",
        "those",
        "for",
        "in",
        "on",
        "with",
        "without",
        "by",
        "at",
        "to",
        "from",
        "if",
        "when",
        "and",
        "or",
        "one",
        "its",
    ]
)
# Others call these with fixed positions: argparse calls its actions.
CALLED_BY_PLACE = {"_InPlaceOf.__call__"}
# NamedTensors carry names and shapes of their own, which are checked where they travel.
TENSOR = re.compile(r"\b(Tensor|ndarray)\b")
SHAPE = re.compile(r"\[[^\]]*\]|scalar|same shape|shape of", re.I)

Place = tuple[str, int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """Yield (name of the class or "", function) of all functions that are not inside another."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, node.name)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield owner, node
        elif isinstance(node, (ast.If, ast.Try)):
            yield from functions(node, owner)


def is_public(owner: str, function: Function) -> bool:
    return not function.name.startswith("_") and not owner.startswith("_")


def positional(function: Function) -> list[ast.arg]:
    """Return the parameters that may be passed by place, without self and cls."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return [argument for argument in arguments if argument.arg not in ("self", "cls")]


def refers(text: str) -> bool:
    """Whether a docstring leaves the details to that of the interface which it implements."""
    return re.search(r"\bsee `", text, re.I) is not None


def takes_tensors(function: Function) -> bool:
    hints = [
        argument.annotation for argument in ast.walk(function.args) if isinstance(argument, ast.arg)
    ]
    return any(
        hint is not None and TENSOR.search(ast.unparse(hint)) for hint in [*hints, function.returns]
    )


def vague_locals(path: str, tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)
            and node.id in VAGUE_LOCALS
        ):
            yield path, node.lineno, node.id


def any_hints(path: str, tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "Any":
            yield path, node.lineno, "Any"


def many_positional(path: str, tree: ast.Module) -> Iterator[Place]:
    for owner, function in functions(tree):
        if len(positional(function)) > 6:
            yield path, function.lineno, f"{owner}.{function.name}"


def fourth_by_place(path: str, tree: ast.Module) -> Iterator[Place]:
    for owner, function in functions(tree):
        name = f"{owner}.{function.name}"
        if len(positional(function)) > 3 and name not in CALLED_BY_PLACE:
            yield path, function.lineno, name


def tensors_without_shapes(path: str, tree: ast.Module) -> Iterator[Place]:
    for owner, function in functions(tree):
        text = ast.get_docstring(function) or ""
        if not is_public(owner, function) or not takes_tensors(function) or refers(text):
            continue
        if not SHAPE.search(text):
            yield path, function.lineno, f"{owner}.{function.name}"


def docstrings_without_verb(path: str, tree: ast.Module) -> Iterator[Place]:
    for owner, function in functions(tree):
        text = ast.get_docstring(function)
        decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
        if (
            text
            and "property" not in decorators
            and text.split()[0].lower().strip(",.'") in NOT_A_VERB
        ):
            yield path, function.lineno, f"{owner}.{function.name}: {text.splitlines()[0][:60]}"


def parameters_without_args(path: str, tree: ast.Module) -> Iterator[Place]:
    for owner, function in functions(tree):
        arguments = [*positional(function), *function.args.kwonlyargs]
        text = ast.get_docstring(function) or ""
        if not is_public(owner, function) or len(arguments) < 3 or refers(text):
            continue
        if "Args:" not in text:
            yield path, function.lineno, f"{owner}.{function.name}"


def tuple_assignments(path: str, tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        if any(isinstance(target, ast.Tuple) for target in node.targets):
            yield path, node.lineno, ast.unparse(node)[:60]


def nested_ternaries(path: str, tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            inner = [child for child in ast.walk(node) if child is not node]
            if any(isinstance(child, ast.IfExp) for child in inner):
                yield path, node.lineno, "nested conditional expression"


def hasattr_self(path: str, tree: ast.Module) -> Iterator[Place]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("hasattr(self,"):
            yield path, node.lineno, ast.unparse(node)


Measure = Callable[[str, ast.Module], Iterator[Place]]
MEASURES: dict[str, tuple[Measure, int | None]] = {
    "vague names of locals": (vague_locals, 0),
    "Any": (any_hints, 32),
    "functions with more than 6 positional parameters": (many_positional, 0),
    "functions whose 4th parameter may be passed by place": (fourth_by_place, 0),
    "public functions of tensors without shapes": (tensors_without_shapes, 0),
    "docstrings that do not begin with a verb": (docstrings_without_verb, None),
    "public functions of 3 or more parameters without Args": (parameters_without_args, 0),
    "assignments of several values at once": (tuple_assignments, 0),
    "nested conditional expressions": (nested_ternaries, 0),
    "hasattr(self, ...)": (hasattr_self, 0),
}


def count(paths: list[Path]) -> dict[str, list[Place]]:
    """Return the places of every measure by its name."""
    places: dict[str, list[Place]] = {name: [] for name in MEASURES}
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT).as_posix()
        for measure, (look, _) in MEASURES.items():
            places[measure] += look(name, tree)
    return places


def root_modules() -> list[str]:
    return sorted(path.name for path in PACKAGE.glob("*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show every place")
    parser.add_argument("paths", nargs="*", type=Path, default=[PACKAGE])
    options = parser.parse_args()
    files: list[Path] = []
    for path in options.paths:
        files += sorted(path.resolve().rglob("*.py")) if path.is_dir() else [path.resolve()]
    for name, places in count(files).items():
        limit = MEASURES[name][1]
        print(f"{len(places):5}  {name}" + ("" if limit is None else f" (limit {limit})"))
        if options.list:
            for file, line, what in places:
                print(f"         {file}:{line} {what}")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    print(f"{len(root_modules()):5}  modules at the package's root (limit 8)")
    print(f"{len(lines):5}  lines of README.md (limit 300)")


if __name__ == "__main__":
    main()
