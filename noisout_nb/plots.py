"""Curves and histograms."""

from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .picture import DPI, RATIO, Picture, styled

# Okabe and Ito's colours, less yellow; and lines that are told apart in grey, too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ((0, (1, 1.2)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 1)))
LINES = ("-", "--", "-.", *DASHES)
GREY = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 1}


@styled
def plot_lines(
    curves: Mapping,
    *,
    x_label: str = "",
    y_label: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool | Collection[str] = (),
    faint: Collection[str] = (),
    bands: Mapping = {},  # noqa: B006  (never changed)
    vlines: Mapping[str, float] = {},  # noqa: B006
    hlines: Mapping[str, float] = {},  # noqa: B006
    x_ticks: Sequence[str] = (),
    size: tuple[int, int] = (720, 320),
    alt: str = "",
) -> Picture:
    """Curves told apart by colour and by line style.

    `curves`: name -> y, or name -> (x, y) as a tuple; each a tensor, array or list of one axis.
    `markers`: True, or the names of the curves whose points are marked; `faint`: of those that stay
    in the background. `bands`: name -> the half width of a shaded band around that curve, one value
    per point. `vlines`, `hlines`: label -> position of a thin grey line. `x_ticks`: words for
    x = 0, 1, 2, ... Raises ValueError for more axes than one, for x, y or band of different lengths
    and for names in `markers`, `faint` or `bands` that are no curve's.

    >>> plot_lines({"linear": [1, 0.5, 0], "cosine": ([0, 2], [1, 0])}, x_label="t", y_label="SNR")
    SNR against t: linear, cosine
    """
    marked = list(curves) if markers is True else markers or ()
    for name in (*marked, *faint, *bands):
        if name not in curves:
            raise ValueError(f"there is no curve {name!r}: the curves are {', '.join(curves)}")
    figure, axes = new_figure(size, x_label, y_label, title)
    for (name, curve), color, line in zip(curves.items(), cycle(COLORS), cycle(LINES)):
        x, y = points_of(name, curve)
        style: dict[str, Any] = {"linestyle": line, "marker": "o" if name in marked else None}
        if name in faint:
            style = {"alpha": 0.4, "linewidth": 0.7}
        axes.plot(x, y, color=color, label=name, **style)
        if name in bands:
            width = vector(name, bands[name])
            if len(width) != len(y):
                raise ValueError(f"band {name!r} has {len(width)} values for {len(y)} points")
            axes.fill_between(x, y - width, y + width, color=color, alpha=0.18, linewidth=0)
    if x_ticks:
        axes.set_xticks(range(len(x_ticks)), x_ticks)
    for which in "x" * log_x + "y" * log_y:
        log_axis(axes, which)
    grey_lines(axes, vlines, hlines)
    alt = alt or f"{y_label} against {x_label}: {', '.join(curves)}"
    return finish(figure, axes, list(curves), size, alt)


def plot_loss(
    losses: Sequence[float],
    *,
    y_label: str = "loss",
    size: tuple[int, int] = (720, 300),
    **options: Any,
) -> Picture:
    """The loss of every step, faint, and its moving average, strong, on a log axis.

    The average is taken over a fiftieth of all steps, half of them before and half after each step,
    so that it does not lag behind a falling loss (and leaves out both ends); and over the
    logarithms, so that on the log axis it runs through the middle of the points. `options` as for
    `plot_lines`.

    >>> plot_loss([1.0, 0.5, 0.3])
    loss over 3 training steps
    """
    values = vector("losses", losses)
    logarithmic = bool((values > 0).all())
    reach = len(values) // 100
    window = np.ones(2 * reach + 1) / (2 * reach + 1)
    average = np.convolve(np.log(values) if logarithmic else values, window, mode="valid")
    steps = np.arange(1, len(values) + 1)
    curves = {
        "moving average": (
            steps[reach : len(values) - reach],
            np.exp(average) if logarithmic else average,
        ),
        "each step": (steps, values),
    }
    options = {"alt": f"{y_label} over {len(values)} training steps"} | options
    options |= {"x_label": "training step", "y_label": y_label}
    return plot_lines(curves, faint=["each step"], log_y=logarithmic, size=size, **options)


def plot_histograms(
    groups: Mapping,
    *,
    x_label: str = "",
    bins: int = 60,
    curves: Mapping = {},  # noqa: B006
    **options: Any,
) -> Picture:
    """Distributions over each other: outlines of histograms, each of area one.

    `groups`: name -> values of any shape, all counted. `curves`: name -> (x, density), for instance
    the normal density that q(x_t) approaches. `options` as for `plot_lines`.

    >>> plot_histograms({"x": torch.zeros(9)}, x_label="pixel value")
    histograms of pixel value: x
    """
    values = {name: vector(name, torch.as_tensor(v).flatten()) for name, v in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate([*values.values()]), bins)
    outlines = {}
    for name, group in values.items():
        density = np.histogram(group, edges, density=True)[0]
        outlines[name] = edges.repeat(2), np.pad(density.repeat(2), 1)
    options = {"alt": f"histograms of {x_label}: {', '.join(groups)}"} | options
    return plot_lines(outlines | dict(curves), x_label=x_label, y_label="density", **options)


def new_figure(size: tuple[int, int], x_label: str, y_label: str, title: str):
    """A figure with one pair of axes."""
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI * RATIO)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    if title:
        axes.set_title(title)
    return figure, axes


def finish(figure: Figure, axes, names: list[str], size: tuple[int, int], alt: str) -> Picture:
    """With a legend above the axes, where it hides no data, in rows as even as they can be."""
    if len(names) > 1:
        fitting = max(1, int(size[0] / (7 * max(map(len, names)) + 50)))
        columns = ceil(len(names) / ceil(len(names) / fitting))
        figure.legend(loc="outside upper center", ncols=columns)
    picture = Picture.from_figure(figure, alt, colors=256)
    picture.axes = axes
    return picture


def grey_lines(axes, vlines: Mapping[str, float], hlines: Mapping[str, float]) -> None:
    """Thin lines across the axes, with their labels."""
    for label, at in dict(vlines).items():
        axes.axvline(at, **GREY)
        place = {"va": "top", "transform": axes.get_xaxis_transform()}
        axes.text(at, 1, f" {label}", color="#555555", **place)
    for label, at in dict(hlines).items():
        axes.axhline(at, **GREY)
        place = {"ha": "right", "va": "bottom", "transform": axes.get_yaxis_transform()}
        axes.text(1, at, label, color="#555555", **place)


def points_of(name: str, curve) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a curve: (x, y), or y alone at 0, 1, 2, ..."""
    y = vector(name, curve[1] if isinstance(curve, tuple) else curve)
    x = vector(name, curve[0]) if isinstance(curve, tuple) else np.arange(len(y))
    if len(x) != len(y):
        raise ValueError(f"{name!r} has {len(x)} x and {len(y)} y: give as many of both")
    return x, y


def vector(name: str, values) -> np.ndarray:
    """Values of one axis as float64; ValueError names what has more."""
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    if values.ndim != 1:
        raise ValueError(
            f"{name!r} must be a list or tensor of one axis, got shape {values.shape}: "
            "try .flatten()"
        )
    return values


def log_axis(axes, which: str) -> None:
    """Make the "x" or the "y" axis logarithmic."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_data_interval()
    if high < 1000 * low:  # a few decades: plain numbers at 1, 2, 5, 10, not bare powers of ten
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
