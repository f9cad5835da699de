"""What pictures show: their panels before they become a file, and the texts of a file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch


def panels(draw: Callable[[Path], None]) -> list[Any]:
    """Return the axes of a picture that is drawn, instead of a file."""
    from matplotlib.figure import Figure

    figures = []

    def keep(figure: Any, *_: object, **__: object) -> None:
        figures.append(figure)

    with TemporaryDirectory() as folder, patch.object(Figure, "savefig", keep):
        draw(Path(folder) / "picture.png")
    return figures[0].axes


def texts(path: Path) -> list[str]:
    """Return all texts of an SVG picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
