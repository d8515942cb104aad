"""What every figure has to hold."""

from __future__ import annotations

from typing import Any


def inside(figure: Any) -> None:
    """No legend, title or label passes the edge of the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.size
    shown = [*figure.legends, *figure.texts]
    shown += [part for legend in figure.legends for part in legend.get_texts()]
    shown += [part for axes in figure.axes for part in (axes.title, axes.xaxis.label)]
    for artist in shown:
        box = artist.get_window_extent()
        assert box.x0 >= -1, artist
        assert box.y0 >= -1, artist
        assert box.x1 <= width + 1, artist
        assert box.y1 <= height + 1, artist
