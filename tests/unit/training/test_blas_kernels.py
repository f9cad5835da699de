"""Searches do not depend on the processor, although OpenBLAS kernels pick other eigenvectors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from helpers import blas_kernels
from helpers.paths import ROOT

PROGRAM = """
import json
import numpy as np
from threadpoolctl import threadpool_info
from fedsp_mpi.training.cma_es import CmaEs
search = CmaEs.of({"mean": np.zeros(20), "step_size": np.ones(1)})
for generation in range(10):
    points = search.sample(6, generation)
    search.update(points, np.square(points - np.arange(20)).sum(1))
vectors = np.linalg.eigh(np.eye(20) + 1e-12 * np.outer(np.arange(20), np.arange(20)))[1]
libraries = [library for library in threadpool_info() if library["internal_api"] == "openblas"]
result = {
    "kernel": [library["architecture"] for library in libraries],
    "search": search.mean.tolist(),
    "vectors": np.abs(vectors).ravel().tolist(),
}
print(json.dumps(result))
"""


def run_under(kernel: str) -> dict:
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_search_is_the_same_under_every_kernel():
    kernels = blas_kernels.available()
    if len(kernels) < 2:
        pytest.skip(
            f"this processor runs {len(kernels)} of the OpenBLAS kernels that the test compares"
        )
    results = {kernel: run_under(kernel) for kernel in kernels}
    if len({str(result["kernel"]) for result in results.values()}) < len(kernels):
        pytest.skip("this numpy does not let OPENBLAS_CORETYPE choose its kernel")
    first = results[kernels[0]]
    for result in results.values():
        assert result["search"] == pytest.approx(first["search"], rel=1e-9)
    # The eigenvectors themselves do differ, or the test would show nothing.
    assert any(
        result["vectors"] != pytest.approx(first["vectors"], abs=1e-3)
        for result in results.values()
    )
