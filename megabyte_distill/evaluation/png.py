"""How figures become PNG files, and the colours that all of them share."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT = "#22262b", "#b9bec6"


def png_of(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # scripts the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        FigureCanvasAgg(figure).print_figure(content, format="png")
    return content.getvalue()


def save_figure(figure: Figure, target: Path) -> None:
    """Writes a PNG; the folder is made where it is missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png_of(figure))
