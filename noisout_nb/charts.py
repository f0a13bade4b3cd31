"""Bars for categories, and points in the plane."""

from collections.abc import Mapping
from itertools import cycle
from math import ceil
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from .grids import WIDTH
from .picture import DPI, RATIO, Picture, styled
from .plots import COLORS, LINES, finish, grey_lines, log_axis, new_figure, points_of, vector


@styled
def bars(
    values: Mapping[str, float],
    *,
    x_label: str = "",
    title: str = "",
    errors: Mapping[str, float] = {},  # noqa: B006
    number: str = "{:.3g}",
    log_x: bool = False,
    vlines: Mapping[str, float] = {},  # noqa: B006
    width: int = 720,
    alt: str = "",
) -> Picture:
    """One horizontal bar per category, in the order given, with its value at its end.

    `values`: name -> value. `errors`: name -> half the length of its error bar; say in `x_label`
    what it is, such as "mean of 5 seeds, +- one standard error". `number` formats the values, as
    "{:,.0f}" does. `vlines`: label -> position of a thin grey line. Raises ValueError for no
    bars, values that are not finite, and errors of other names.

    >>> bars({"uniform": 0.5, "lambda": 0.25}, x_label="distance")
    distance: uniform 0.5, lambda 0.25
    """
    if not values:
        raise ValueError("there are no bars to draw: values is empty")
    heights = vector("values", [float(value) for value in values.values()])
    if not np.isfinite(heights).all():
        raise ValueError(f"values must be finite, got {dict(values)}")
    for name in errors:
        if name not in values:
            raise ValueError(f"there is no bar {name!r}: the bars are {', '.join(values)}")
    size = width, 50 + 32 * len(values) + 25 * bool(title)
    figure, axes = new_figure(size, x_label, "", title)
    half = [float(errors.get(name, 0)) for name in values] if errors else None
    drawn = axes.barh(list(values), heights, xerr=half, color=COLORS[0], height=0.6, capsize=3)
    texts = [number.format(height) for height in heights]
    axes.bar_label(drawn, texts, padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    if log_x:
        log_axis(axes, "x")
    grey_lines(axes, vlines, {})
    alt = alt or f"{x_label}: {', '.join(map(' '.join, zip(values, texts, strict=True)))}"
    return finish(figure, axes, [], size, alt)


@styled
def plot_bars(
    groups: Mapping,
    *,
    y_label: str = "",
    title: str = "",
    log_y: bool = False,
    hlines: Mapping[str, float] = {},  # noqa: B006
    number: str = "{:.2g}",
    size: tuple[int, int] = (720, 260),
    alt: str = "",
) -> Picture:
    """Upright bars for categories in groups; for one group with long names see `bars`.

    `groups`: group -> {category: value, or (value, error)}; the groups stand side by side at each
    category and are told apart by colour. `hlines`: label -> height of a thin grey line. `number`
    formats the value over each bar. Raises ValueError where the groups' categories differ.

    >>> plot_bars({"precision": {"real": (0.9, 0.02), "noise": 0.1}}, y_label="share")
    share: precision of real 0.9, noise 0.1
    """
    categories = list(next(iter(groups.values()), ()))
    figure, axes = new_figure(size, "", y_label, title)
    width, words = 0.8 / max(1, len(groups)), []
    for i, (group, values) in enumerate(groups.items()):
        if list(values) != categories:
            raise ValueError(f"group {group!r} has {list(values)}, the first one {categories}")
        pairs = [value if isinstance(value, tuple) else (value, 0) for value in values.values()]
        heights = [float(value) for value, _ in pairs]
        errors = [float(error or 0) for _, error in pairs]
        at = np.arange(len(categories)) + (i - (len(groups) - 1) / 2) * width
        look: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "label": group}
        known = {"yerr": errors, "capsize": 3, "ecolor": "#222222"} if any(errors) else {}
        drawn = axes.bar(at, heights, 0.9 * width, **look, **known)
        labels = [number.format(height) for height in heights]
        axes.bar_label(drawn, labels, padding=2, fontsize=8.5)
        words.append(
            f"{group} of " + ", ".join(map(" ".join, zip(categories, labels, strict=True)))
        )
    axes.set_xticks(range(len(categories)), categories)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    if log_y:
        log_axis(axes, "y")
    grey_lines(axes, {}, hlines)
    return finish(figure, axes, list(groups), size, alt or f"{y_label}: {'; '.join(words)}")


@styled
def plot_tradeoff(
    curves: Mapping,
    *,
    x_label: str = "",
    y_label: str = "",
    size: tuple[int, int] = (720, 420),
    alt: str = "",
) -> Picture:
    """Two measures against each other as a setting varies, with the setting written at each point.

    `curves`: name -> list of (setting, x, y), x and y the values of repeated measurements, 1-D of
    equal length: a point lies at their means, its bars are one standard error long to each side,
    and the points are joined in the order given. Raises ValueError for a curve without points.

    >>> plot_tradeoff({"a": [("1", [0.9, 1.0], [0.1, 0.2])]}, x_label="recall", y_label="precision")
    precision against recall: a
    """
    figure, axes = new_figure(size, x_label, y_label, "")
    for (name, points), color, line in zip(
        curves.items(), cycle(COLORS), cycle(LINES), strict=False
    ):
        if not points:
            raise ValueError(f"curve {name!r} has no points: give a list of (setting, x, y)")
        pairs = [points_of(name, (x, y)) for _, x, y in points]
        x, y = np.array([[values.mean() for values in pair] for pair in pairs]).T
        spread = [[values.std(ddof=1) if len(values) > 1 else 0 for values in p] for p in pairs]
        errors = np.array(spread).T / np.sqrt([len(x) for x, _ in pairs])
        look: dict[str, Any] = {"color": color, "linestyle": line, "marker": "o", "capsize": 2}
        axes.errorbar(x, y, errors[1], errors[0], elinewidth=1, label=name, **look)
        for (setting, _, _), at in zip(points, zip(x, y, strict=True), strict=True):
            place: dict[str, Any] = {"xytext": (5, 5), "textcoords": "offset points"}
            axes.annotate(str(setting), at, color=color, fontsize=9, **place)
    alt = alt or f"{y_label} against {x_label}: {', '.join(curves)}"
    return finish(figure, axes, list(curves), size, alt)


@styled
def plot_points(
    panels: Mapping,
    *,
    colors=None,
    arrows: Mapping | None = None,
    paths: Tensor | Mapping | None = None,
    limits: tuple[float, float] | None = None,
    columns: int = 4,
    point_size: float = 4,
    x_label="",
    y_label="",
    alt: str = "",
) -> Picture:
    """Points in the plane, in one panel or in several side by side.

    `panels`: title -> (N, 2) tensor, or title -> (x, y) as a tuple. `colors`: RGB in 0..1, (N, 3)
    for all panels, or title -> (N, 3). `arrows`: title -> (start, step, rgb), a vector field:
    both (M, 2) and (M, 3). `paths`: (K, N, 2), a line through K positions for each point, or
    title -> (K, N, 2).
    `limits`: the same range for both axes of all panels, which are then drawn without ticks.

    >>> plot_points({"data": ([0, 1], [0, 2])})
    points: data
    """
    columns = min(columns, len(panels))
    rows, side = ceil(len(panels) / columns), min(4.4, WIDTH / DPI / columns)
    figure = Figure(figsize=(columns * side, rows * (side + 0.2)), dpi=DPI * RATIO)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, points) in zip(grid.flat, panels.items(), strict=False):
        x, y = points if isinstance(points, tuple) else points.T
        rgb = colors.get(title) if isinstance(colors, Mapping) else colors
        rgb = COLORS[0] if rgb is None else rgb.numpy()
        axes.scatter(vector("x", x), vector("y", y), s=point_size, c=rgb, linewidths=0, zorder=3)
        if arrows and title in arrows:
            start, step, arrow_rgb = (tensor.detach().numpy() for tensor in arrows[title])
            axes.quiver(*start.T, *step.T, color=arrow_rgb, angles="xy", width=0.005, zorder=4)
        line = paths.get(title) if isinstance(paths, Mapping) else paths
        if line is not None:
            lines = list(line.transpose(0, 1).numpy())
            axes.add_collection(LineCollection(lines, colors=rgb, linewidths=0.6, alpha=0.3))
        axes.set(title=title, xlabel=x_label, ylabel=y_label if axes in grid[:, 0] else "")
        if limits:
            axes.set(xlim=limits, ylim=limits, aspect="equal", xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    return Picture.from_figure(
        figure,
        alt or f"points: {', '.join(panels)}",
        colors=48,
        bbox_inches="tight",
        pad_inches=0.05,
    )
