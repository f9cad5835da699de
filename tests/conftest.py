"""What all tests share."""

from __future__ import annotations

import os

# One thread a process: workers of pytest and ranks share the cores, and bits are compared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

pytest.register_assert_rewrite("helpers")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave of a product of parameters that is marked `each_once` a few, and the rest to `slow`.

    Every value of every parameter stays in at least one case: the k-th case that stays has of each
    parameter the k-th value, from the beginning again where there are fewer.
    """
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
