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
        places = [tuple(case.callspec.indices.values()) for case in cases]
        sizes = [max(column) + 1 for column in zip(*places)]
        diagonal = {tuple(k % size for size in sizes) for k in range(max(sizes))}
        for case, place in zip(cases, places):
            if place not in diagonal:
                case.add_marker("slow")
