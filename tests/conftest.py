"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

# One thread a process: workers of pytest and ranks share the cores, and bits are compared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The ranks that tests start keep the compiled package, and do not compile it each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

pytest.register_assert_rewrite("helpers")

# The test modules that take longest, these first: no worker is left with one of them at the end.
LONGEST = (
    "ranks/test_golden.py",
    "ranks/test_run.py",
    "unit/commands/test_sweep.py",
    "unit/commands/test_fetch.py",
    "unit/commands/test_check.py",
    "unit/data/test_tasks.py",
    "unit/algorithms/test_private_model.py",
    "ranks/test_silos.py",
    "unit/training/test_training.py",
    "unit/algorithms/test_oracle.py",
    "unit/models/test_hub_cache.py",
    "unit/algorithms/test_fedbpt.py",
    "unit/test_style.py",
    "unit/models/test_models.py",
    "unit/data/test_sources.py",
    "ranks/test_server_ranks.py",
    "ranks/test_progress.py",
    "ranks/test_bad_input.py",
    "ranks/test_wire.py",
    "unit/commands/test_evaluate.py",
    "unit/estimate/test_plan.py",
    "unit/algorithms/test_variants.py",
)
_TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist hand out the modules as they are ordered here, not those with most tests first."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first; leave most of a product marked `each_once` to `slow`.

    Every value of every parameter stays in at least one case: the k-th case that stays has of each
    parameter the k-th value, from the beginning again where there are fewer.
    """
    places = {_TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    products: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("each_once"):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in products.values():
        ids = [case.callspec._idlist for case in cases]  # one id for each parametrisation
        axes = [list(dict.fromkeys(axis)) for axis in zip(*ids)]
        stay = {tuple(a[k % len(a)] for a in axes) for k in range(max(map(len, axes)))}
        assert stay <= set(map(tuple, ids)), f"{cases[0].nodeid}: found no product of parameters"
        for case, own in zip(cases, ids):
            if tuple(own) not in stay:
                case.add_marker("slow")
