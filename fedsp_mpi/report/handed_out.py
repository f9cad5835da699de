"""What of the global model clients are given, in a line for people."""

from __future__ import annotations

from collections.abc import Mapping

from fedsp_mpi.report.formatting import as_count


def share_copied(models: Mapping[str, object]) -> float | None:
    """Return the share of the global model's weights that clients hold bit by bit.

    Args:
        models: the record's section of that name.

    Returns:
        A fraction; None where the record does not say it.
    """
    copied = models.get("exact_copies")
    num_values = models.get("global")
    if not isinstance(copied, int) or not isinstance(num_values, int) or not num_values:
        return None
    return copied / num_values


def sentence(models: Mapping[str, object]) -> str | None:
    """Say how much clients are given; None where the record does not say it.

    Args:
        models: the record's section of that name.
    """
    share = share_copied(models)
    held = models.get("auxiliary")
    if share is None or not isinstance(held, int):
        return None
    if held == 0:
        return "nothing of the global model"
    return (
        f"{as_count(held)} parameters; exact copies of {percent(share)} of the global model, "
        f"{models.get('layers_copied')} of its {models.get('layers')} layers"
    )


def percent(share: float) -> str:
    """Write a fraction in percent, such that only all is 100 and only nothing is 0."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"
