"""Figures for all stages: grids and films of images, curves, bars, points.

Every function returns a `Picture`: an image together with its description in words. A notebook
shows the PNG, a screen reader and a script's `print` give the words. The functions take tensors
and plain lists, leave pyplot alone, and give the same bytes for the same input. All labels may
hold formulas, such as "$x_t$". `size` is a figure's width and height in pixels of the page; `alt`
is the description, and where it is left out a plain one is made up. Where they live:
`picture.py`, `grids.py`, `plots.py`, `charts.py`.
"""

from .charts import bars, plot_bars, plot_points, plot_tradeoff
from .grids import filmstrip, image_grid, save_images, stack
from .picture import DPI, RATIO, Picture, save_film, styled
from .plots import plot_histograms, plot_lines, plot_loss

__all__ = [
    "DPI",
    "RATIO",
    "Picture",
    "bars",
    "filmstrip",
    "image_grid",
    "plot_bars",
    "plot_histograms",
    "plot_lines",
    "plot_loss",
    "plot_points",
    "plot_tradeoff",
    "save_film",
    "save_images",
    "stack",
    "styled",
]
