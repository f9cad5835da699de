"""The exact mean of low-rank updates: of the products B A, not of their factors."""

from __future__ import annotations

import numpy as np

from fedsp_mpi.aggregation.fedavg import Updates, shares_of
from fedsp_mpi.tensors import NamedTensors

_A = ".lora_A"
_B = ".lora_B"


def mean_of_products(updates: Updates) -> NamedTensors:
    """Return factors of rank r whose products are nearest to the weighted mean of all products.

    Source: FlexLoRA (Bai et al., 2024, arXiv 2402.11505, section 3.2). The mean of B_k A_k over the
    clients k is stacked from its factors, so that no matrix as large as a weight is made, and cut
    to the r largest singular values; each factor has their roots. Signs are chosen such that the
    largest value of each column of B is positive.

    Holds all updates of the round in memory, [updates, values].

    Returns:
        Tensors of the updates' names, fp32, each of the same shape as theirs.

    Raises:
        ValueError: there is no weight above zero.
    """
    shares = shares_of([report.weight for report in updates.reports])
    rows = [NamedTensors(updates.schema, row) for row in updates.rows()]
    merged = NamedTensors(updates.schema, np.zeros(updates.schema.num_values, dtype=np.float32))
    for name in merged:
        if not name.endswith(_A):
            continue
        other = name.removesuffix(_A) + _B
        columns_b = np.concatenate(
            [share * row[other].astype(np.float64) for share, row in zip(shares, rows)], axis=1
        )
        rows_a = np.concatenate([row[name].astype(np.float64) for row in rows])
        factor_b, factor_a = _nearest(columns_b, rows_a, rank=merged[name].shape[0])
        merged[name][...] = factor_a
        merged[other][...] = factor_b
    return merged


def _nearest(
    columns_b: np.ndarray, rows_a: np.ndarray, *, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return factors of the matrix of a rank that is nearest to a product.

    Args:
        columns_b: fp64 [out, inner].
        rows_a: fp64 [inner, in].
        rank: of the result; what there is less is 0.

    Returns:
        fp64 [out, rank] and [rank, in].
    """
    basis_b, core_b = np.linalg.qr(columns_b)
    basis_a, core_a = np.linalg.qr(rows_a.T)
    u, singular, v = np.linalg.svd(core_b @ core_a.T)
    count = min(rank, len(singular))
    directions = basis_b @ u[:, :count]
    places = np.abs(directions).argmax(axis=0)
    signs = np.where(directions[places, np.arange(count)] < 0, -1.0, 1.0)
    roots = np.sqrt(singular[:count]) * signs
    factor_b = np.zeros((len(columns_b), rank))
    factor_a = np.zeros((rank, rows_a.shape[1]))
    factor_b[:, :count] = directions * roots
    factor_a[:count] = (basis_a @ v[:count].T * roots).T
    return factor_b, factor_a
