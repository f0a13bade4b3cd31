"""Figures for all stages: grids and films of images, curves, heat maps, and a slot that changes while a loop runs.

Every drawing function returns a `Picture`: a PNG together with its description in words. A notebook shows the PNG,
a screen reader and a script's `print` give the words. The functions take tensors and plain lists, leave pyplot
alone, and give the same bytes for the same input. All labels may hold formulas, such as "$x_t$". `size` is a figure's
width and height in pixels of the page; `alt` is the description, and where it is left out a plain one is made up.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import IdentityTransform
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .data import to_uint8

DPI, RATIO = 100, 2  # of the page; and how much finer a picture is stored than shown, for today's screens
WIDTH = 820  # pixels of the page that a grid of images may take
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, less yellow
LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 1)))  # told apart in grey, too
STYLE = {
    "font.size": 9.5, "axes.labelsize": 10, "figure.titlesize": 10.5, "figure.constrained_layout.use": True,
    "text.color": "#222222", "axes.labelcolor": "#222222", "xtick.color": "#444444", "ytick.color": "#444444",
    "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "lines.linewidth": 1.7, "lines.markersize": 4,
    "axes.xmargin": 0.02, "legend.frameon": False, "legend.handlelength": 2.8, "legend.title_fontsize": 10.5,
}  # fmt: skip
styled = matplotlib.style.context(["default", STYLE])  # as a decorator: the reader's own settings come back afterwards


class Picture:
    """PNG bytes and their description: what every function here returns, and what a cell may end with.

    `png`: the bytes; `alt`: the words, also its `repr`; `width`: the pixels of the page that it takes.
    """

    def __init__(self, png: bytes, alt: str, width: int):
        self.png, self.alt, self.width = png, alt, width

    @classmethod
    def from_image(cls, image: Image.Image, alt: str) -> "Picture":
        """A PIL image, stored as it is and shown at 1 / RATIO of its size."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)  # PIL writes neither version nor date: same pixels, same bytes
        return cls(buffer.getvalue(), alt, image.width // RATIO)

    @classmethod
    def from_figure(cls, figure: Figure, alt: str, colors: int | None = None) -> "Picture":
        """A `matplotlib.figure.Figure` (one of pyplot's would be shown a second time).

        `colors`: store so many colours at most, up to 256; lines and words look the same in a third of the bytes.
        """
        figure.set_dpi(DPI * RATIO)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        return cls.from_image(image.quantize(colors, dither=Image.Dither.NONE) if colors else image, alt)

    def save(self, path: str | Path) -> "Picture":
        """Write the PNG, whole or not at all; makes the folder. Returns the picture, so that a cell may end with it."""
        path = Path(path)
        if path.suffix != ".png":
            raise ValueError(f"cannot save {path.name!r}: a Picture is a PNG, so let the name end in .png")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_bytes(self.png)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return self

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": self.png, "text/plain": self.alt}, {"image/png": {"alt": self.alt, "width": self.width}}


@styled
def image_grid(images: Tensor | Sequence[Tensor], *, columns: int = 8, scale: int | None = None, titles=(),
               row_labels=(), column_labels=(), arrow: str = "", alt: str = "") -> Picture:  # fmt: skip
    """Images side by side, every pixel a crisp square.

    `images`: (N, 3, H, W) or (N, 1, H, W), float in [-1, 1] (what goes beyond, as a noisy x_t does, is clamped) or
    uint8; or a list of single images. `scale`: pixels of the page per pixel of an image; None takes what fits.
    `titles` stand above every image, `row_labels` to the left, `column_labels` on top. `arrow` is a caption below,
    on an arrow to the right. Raises ValueError for another shape or dtype, for NaN or infinite values, and where
    there are not as many labels as images, rows or columns.

    >>> image_grid(torch.zeros(6, 3, 8, 8), columns=3)
    6 images in rows of 3
    """
    pixels = _pixels(images)
    count, height, width = pixels.shape[:3]
    columns = max(1, min(columns, count))
    rows = ceil(count / columns)
    titles, row_labels, column_labels = ([str(x) for x in y or ()] for y in (titles, row_labels, column_labels))
    for labels, places in ((titles, "images"), (row_labels, "rows"), (column_labels, "columns")):
        if labels and len(labels) != (needed := {"images": count, "rows": rows, "columns": columns}[places]):
            raise ValueError(f"{len(labels)} labels for {needed} {places}: give one each ('' for none)")

    # All lengths are stored pixels from here on: how much room do the words need, and where does each image go?
    gap, line = 4 * RATIO, 17 * RATIO
    zoom = RATIO * int(scale or max(1, min(WIDTH // columns - 5, 128) // max(height, width)))
    figure = Figure(dpi=DPI * RATIO)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def room(texts):  # for the longest text and for the most lines
        extents = [Figure(dpi=figure.dpi).text(0, 0, text).get_window_extent(renderer).width for text in texts]
        lines = [1 + text.count("\n") for text in texts]
        return ceil(max(extents, default=0)), line * max(lines, default=0) + gap * bool(lines)

    left, top, above = room(row_labels)[0] + 2 * gap * bool(row_labels), room(column_labels)[1], room(titles)[1]
    cell = max(width * zoom, room([*titles, *column_labels])[0] + gap), above + height * zoom
    x = [gap + left + i * (cell[0] + gap) for i in range(columns)]
    y = [gap + top + i * (cell[1] + gap) for i in range(rows)]
    right, bottom = x[-1] + cell[0], y[-1] + cell[1] + gap + room([arrow] if arrow else [])[1] + gap * bool(arrow)
    canvas = np.full((bottom, right + gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels.repeat(zoom, 1).repeat(zoom, 2)):
        across, down = x[i % columns] + (cell[0] - width * zoom) // 2, y[i // columns] + above
        canvas[down : down + height * zoom, across : across + width * zoom] = image
    # half a pixel more, since Agg rounds inches times dpi down
    figure.set_size_inches((canvas.shape[1] + 0.5) / figure.dpi, (canvas.shape[0] + 0.5) / figure.dpi)
    figure.figimage(canvas)

    def write(text, at_x, at_y, ha, va, **how):
        figure.text(at_x, bottom - at_y, text, ha=ha, va=va, transform=IdentityTransform(), **how)

    for i, text in enumerate(titles):
        write(text, x[i % columns] + cell[0] / 2, y[i // columns] + above - gap / 2, "center", "bottom")
    for text, at in zip(column_labels, x):
        write(text, at + cell[0] / 2, top, "center", "bottom")
    for text, at in zip(row_labels, y):
        write(text, left, at + above + height * zoom / 2, "right", "center")
    if arrow:
        at = bottom - line / 2 - gap
        figure.add_artist(FancyArrowPatch((x[0], bottom - at), (right, bottom - at), arrowstyle="-|>", color="#888888",
                          mutation_scale=18, shrinkA=0, shrinkB=0, transform=IdentityTransform()))  # fmt: skip
        box = {"facecolor": "white", "edgecolor": "none", "pad": 3}
        write(arrow, (x[0] + right) / 2, at, "center", "center", bbox=box)
    return Picture.from_figure(figure, alt or f"{count} image{'s'[: count > 1]} in rows of {columns}")


def filmstrip(rows: Sequence[Sequence[Tensor]], *, alt: str = "", **labels) -> Picture:
    """A process at several times: every row a sequence of (3, H, W) images, every column one time.

    The forward film is one row, x_0 ... x_T; the reverse film has two, x_t above and the predicted x_0 below.
    Takes `row_labels`, `column_labels`, `titles`, `arrow` and `scale` as `image_grid` does. Raises ValueError where
    the rows differ in length.

    >>> filmstrip([torch.zeros(5, 3, 8, 8)] * 2, row_labels=["$x_t$", "$x_0$"])
    a film of 5 frames
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise ValueError(f"the rows of a film must have equally many frames, got {[len(row) for row in rows]}")
    columns = lengths.pop()
    frames = [image for row in rows for image in row]
    return image_grid(frames, columns=columns, alt=alt or f"a film of {columns} frames", **labels)


@styled
def plot_lines(curves: Mapping, *, x_label="", y_label="", title="", log_x=False, log_y=False, markers=(),
               vlines=(), hlines=(), x_ticks=(), size=(720, 320), alt: str = "") -> Picture:  # fmt: skip
    """Curves told apart by colour and by line style.

    `curves`: name -> y, or name -> (x, y) as a tuple; each a tensor, array or list of one axis. `markers`: True, or
    the names of the curves whose points are marked. `vlines`, `hlines`: positions of thin grey lines, or
    {label: position}. `x_ticks`: words for x = 0, 1, 2, ... Raises ValueError for more axes than one, and where x and
    y differ in length.

    >>> plot_lines({"linear": [1, 0.5, 0], "cosine": ([0, 2], [1, 0])}, x_label="t", y_label="signal")
    signal against t: linear, cosine
    """
    figure, axes = _axes(size, x_label, y_label)
    for (name, curve), color, line in zip(curves.items(), cycle(COLORS), cycle(LINES)):
        y = _vector(name, curve[1] if isinstance(curve, tuple) else curve)
        x = _vector(name, curve[0]) if isinstance(curve, tuple) else np.arange(len(y))
        if len(x) != len(y):
            raise ValueError(f"curve {name!r} has {len(x)} x and {len(y)} y: give as many of both")
        marker = "o" if markers is True or name in (markers or ()) else None
        axes.plot(x, y, color=color, linestyle=line, marker=marker, label=name)
    if x_ticks:
        axes.set_xticks(range(len(x_ticks)), x_ticks)
    if log_x:
        _log(axes, "x")
    if log_y:
        _log(axes, "y")
    grey = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 1}
    for label, at in _labelled(vlines):
        axes.axvline(at, **grey)
        axes.text(at, 1, f" {label}", color="#555555", va="top", transform=axes.get_xaxis_transform())
    for label, at in _labelled(hlines):
        axes.axhline(at, **grey)
        axes.text(1, at, label, color="#555555", ha="right", va="bottom", transform=axes.get_yaxis_transform())
    return _finish(figure, axes, title, alt or f"{y_label} against {x_label}: {', '.join(curves)}")


@styled
def plot_heatmap(matrix: Tensor, *, x_label="", y_label="", value_label="", title="", size=None,
                 alt: str = "") -> Picture:  # fmt: skip
    """A matrix as colours with their scale, row 0 on top; square where the matrix is square.

    Raises ValueError for anything but two axes.

    >>> plot_heatmap(torch.eye(4), x_label="key", y_label="query")
    4 rows (query) by 4 columns (key) as colours
    """
    matrix = torch.as_tensor(matrix).detach().cpu().float().numpy()
    if matrix.ndim != 2:
        raise ValueError(f"plot_heatmap takes one matrix (rows, columns), got shape {matrix.shape}")
    rows, columns = matrix.shape
    figure, axes = _axes(size or ((400, 340) if rows == columns else (720, 320)), x_label, y_label)
    figure.set_layout_engine("compressed")  # so that the colour bar is as high as a square matrix
    # shrink numbers, not colours: that keeps to the colour scale
    shown = axes.imshow(matrix, aspect="equal" if rows == columns else "auto", interpolation_stage="data")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, label=value_label, pad=0.02).outline.set_visible(False)
    return _finish(figure, axes, title, alt or f"{rows} rows ({y_label}) by {columns} columns ({x_label}) as colours")


@styled
def plot_loss(losses: Sequence[float], *, smooth: float | None = None, title="", y_label="loss", size=(720, 300),
              alt: str = "") -> Picture:  # fmt: skip
    """The loss of every step, faint, and its moving average, strong, on a logarithmic axis.

    `smooth`: decay of the exponential moving average, 0 <= smooth < 1; None averages over a fiftieth of all steps.
    The start is corrected for having started from nothing, as Adam's averages are. ValueError for another `smooth`.

    >>> plot_loss([1.0, 0.5, 0.3])
    loss over 3 training steps
    """
    losses, average, mean = _vector("losses", losses), [], 0.0
    smooth = 1 - 1 / max(1, len(losses) / 50) if smooth is None else smooth
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth must be at least 0 and below 1 (0.98 averages over about 50 steps), got {smooth}")
    for step, loss in enumerate(losses, 1):
        mean = smooth * mean + (1 - smooth) * loss
        average.append(mean / (1 - smooth**step))
    figure, axes = _axes(size, "training step", y_label)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=COLORS[0], alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(steps, average, color=COLORS[0], linewidth=2, label="moving average")
    _log(axes, "y")
    if len(losses):  # a log axis without data stays as it is
        axes.set_xlim(0, max(2, 1.02 * len(losses)))
    return _finish(figure, axes, title, alt or f"{y_label} over {len(losses)} training steps")


@styled
def plot_histograms(groups: Mapping, *, x_label="", bins=60, curves: Mapping | None = None, title="", size=(720, 320),
                    alt: str = "") -> Picture:  # fmt: skip
    """Distributions over each other: outlines of histograms, each of area one.

    `groups`: name -> values of any shape, all counted. `curves`: name -> (x, density), thin and black, for
    instance the normal density that q(x_t) approaches.

    >>> plot_histograms({"x": torch.zeros(9)}, x_label="pixel value")
    histograms of pixel value: x
    """
    figure, axes = _axes(size, x_label, "density")
    values = {name: _vector(name, torch.as_tensor(group).flatten()) for name, group in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate([*values.values()]), bins)
    for (name, group), color, line in zip(values.items(), cycle(COLORS), cycle(LINES)):
        axes.stairs(np.histogram(group, edges, density=True)[0], edges, color=color, ls=line, lw=1.6, label=name)
    for name, (x, density) in (curves or {}).items():
        axes.plot(_vector(name, x), _vector(name, density), color="#222222", linewidth=1, label=name)
    return _finish(figure, axes, title, alt or f"histograms of {x_label}: {', '.join(groups)}")


def side_by_side(*pictures: Picture, alt: str = "") -> Picture:
    """Several pictures as one, from left to right."""
    return _join(pictures, (1, 0), alt)


def stack(*pictures: Picture, alt: str = "") -> Picture:
    """Several pictures as one, from top to bottom."""
    return _join(pictures, (0, 1), alt)


class Live:
    """A place in the notebook whose picture changes while a loop runs.

        with Live("the training loss, falling") as live:
            for step in train(...):
                losses.append(step.loss)
                live.update(lambda: plot_loss(losses))

    `update` takes a Picture or, better, a function that draws one: it is called at most every `interval` seconds, and
    less often where it is slow, so that drawing stays below 5 % of the time. The end of the `with` block, or
    `close()`, draws the last state. The description is `alt` throughout. Outside a notebook nothing is drawn.
    """

    def __init__(self, alt: str, interval: float = 1.0):
        self.alt, self.interval = alt, interval
        self._slot, self._waiting, self._next = None, None, 0.0
        self._visible = hasattr(get_ipython(), "kernel")

    def update(self, picture: Picture | Callable[[], Picture], *, force: bool = False) -> None:
        """Show `picture` if it is time to, or if `force`; else remember it for `close`."""
        self._waiting, start = picture, time.monotonic()
        if not self._visible or (start < self._next and not force):
            return
        drawn = picture() if callable(picture) else picture
        drawn = Picture(drawn.png, self.alt, drawn.width)
        if self._slot is None:
            self._slot = display(drawn, display_id=True)
        else:
            self._slot.update(drawn)
        self._waiting, now = None, time.monotonic()
        # a recording keeps the last picture alone, so there nothing between the first and the last is worth drawing
        self._next = float("inf") if _recording() else now + max(self.interval, 20 * (now - start))

    def close(self) -> None:
        """Draw what was given last, if that has not been shown yet."""
        if self._waiting is not None:
            self.update(self._waiting, force=True)

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def progress(iterable: Iterable, total: int | None = None, description: str = "") -> tqdm:
    """`iterable` with a progress bar that goes when it ends; no bar where NOISOUT_RECORD is set, as in recordings.

    >>> sum(progress([1, 2, 3]))
    6
    """
    return tqdm(iterable, total=total, desc=description, leave=False, disable=_recording())


def _recording() -> bool:
    return bool(os.environ.get("NOISOUT_RECORD"))


def _pixels(images: Tensor | Sequence[Tensor]) -> np.ndarray:
    """Images in any accepted form -> uint8 (N, H, W, 3)."""
    if not isinstance(images, Tensor):
        if len({image.shape for image in images}) != 1:
            raise ValueError(f"images must have one shape, not {[tuple(image.shape) for image in images]}")
        images = torch.stack([*images])
    images = images.detach().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be (N, 3, H, W) or (N, 1, H, W), not {tuple(images.shape)}; one is image[None]")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ValueError(f"images must be float in [-1, 1] or uint8, got {images.dtype}: convert with .float()")
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"images[{bad[0]}] holds NaN or infinite values ({len(bad)} of {len(images)} images do)")
        images = to_uint8(images)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def _vector(name: str, values) -> np.ndarray:
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    if values.ndim != 1:
        raise ValueError(f"{name!r} must be a list or tensor of one axis, got shape {values.shape}: try .flatten()")
    return values


def _labelled(lines):
    return lines.items() if isinstance(lines, Mapping) else [("", at) for at in lines or ()]


def _axes(size, x_label: str, y_label: str):
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI * RATIO)
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _log(axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_data_interval()
    if high < 1000 * low:  # a few decades at most: plain numbers at 1, 2, 5, 10, ... instead of bare powers of ten
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, axes, title: str, alt: str) -> Picture:
    names = axes.get_legend_handles_labels()[1]
    if len(names) > 1:  # above the axes, where it hides no data, in rows as even as they can be
        fitting = max(1, int(figure.get_figwidth() * DPI / (7 * max(map(len, names)) + 50)))
        columns = ceil(len(names) / ceil(len(names) / fitting))
        figure.legend(loc="outside upper center", title=title or None, ncols=columns)
    elif title:
        figure.suptitle(title)
    return Picture.from_figure(figure, alt, colors=256)


def _join(pictures: Sequence[Picture], direction: tuple[int, int], alt: str) -> Picture:
    """On white, centred; `direction` is (1, 0) to the right or (0, 1) down."""
    images = [Image.open(io.BytesIO(picture.png)) for picture in pictures]
    sizes = np.array([image.size for image in images])
    total = np.where(direction, sizes.sum(0), sizes.max(0))
    canvas, corner = Image.new("RGB", tuple(map(int, total)), "white"), np.zeros(2, int)
    for image, size in zip(images, sizes):
        canvas.paste(image, tuple(map(int, np.where(direction, corner, (total - size) // 2))))
        corner += size
    return Picture.from_image(canvas, alt or "; ".join(picture.alt for picture in pictures))
