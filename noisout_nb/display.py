"""Figures for all stages: grids and films of images, curves, and widgets whose picture changes.

Every drawing function returns a `Picture`: an image together with its description in words. A notebook shows the PNG,
a screen reader and a script's `print` give the words. The functions take tensors and plain lists, leave pyplot
alone, and give the same bytes for the same input. All labels may hold formulas, such as "$x_t$". `size` is a figure's
width and height in pixels of the page; `alt` is the description, and where it is left out a plain one is made up.
"""

import html
import io
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from math import ceil
from pathlib import Path

import ipywidgets as widgets
import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
import traitlets
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .data import atomic_file, to_uint8

DPI, RATIO = 100, 2  # of the page; and how much finer a picture is stored than shown, for today's screens
WIDTH = 820  # pixels of the page that a grid of images may take
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, less yellow
LINES = ("-", "--", "-.", (0, (1, 1.2)), (0, (7, 2)), (0, (4, 1, 1, 1, 1, 1)), (0, (2, 1)))  # told apart in grey, too
STYLE = {
    "font.size": 9.5, "axes.labelsize": 10, "figure.constrained_layout.use": True,
    "text.color": "#222222", "axes.labelcolor": "#222222", "xtick.color": "#444444", "ytick.color": "#444444",
    "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "lines.linewidth": 1.7, "lines.markersize": 4,
    "axes.xmargin": 0.02, "legend.frameon": False, "legend.handlelength": 2.8,
}  # fmt: skip
styled = matplotlib.style.context(["default", STYLE])  # as a decorator: the reader's own settings come back afterwards


class Picture:
    """An image and its description: what every function here returns, and what a cell may end with.

    `image`: the PIL image, shown at 1 / RATIO of its size; `alt`: the words, also its `repr`.
    """

    def __init__(self, image: Image.Image, alt: str):
        self.image, self.alt, self.width = image, alt, image.width // RATIO

    @classmethod
    def from_figure(cls, figure: Figure, alt: str, colors: int | None = None, **options) -> "Picture":
        """A `matplotlib.figure.Figure` (one of pyplot's would be shown a second time); `options` go to its `savefig`.

        `colors`: store so many colours at most, up to 256; lines and words look the same in a third of the bytes.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI * RATIO, pil_kwargs={"compress_level": 1}, **options)
        image = Image.open(buffer).convert("RGB")
        return cls(image.quantize(colors, dither=Image.Dither.NONE) if colors else image, alt)

    def png(self, **options) -> bytes:
        """The PNG's bytes, as few as can be: same pixels, same bytes. `compress_level=1` is ten times faster."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", **(options or {"optimize": True}))  # PIL writes neither version nor date
        return buffer.getvalue()

    def marked(self, x: float, y: float | None = None) -> "Picture":
        """A plot of this module with a line at `x` and, where `y` is given, a dot on it: quick enough to follow a slider."""
        marked, axes = Picture(self.image.convert("RGB"), self.alt), self.axes
        pen, height, box = ImageDraw.Draw(marked.image), self.image.height, axes.bbox
        column, row = axes.transData.transform((x, axes.get_ylim()[0] if y is None else y))
        pen.line((column, height - box.y0, column, height - box.y1), fill="#444444", width=RATIO)
        if y is not None:
            pen.circle((column, height - row), 5 * RATIO, fill="#222222", outline="white", width=RATIO)
        return marked

    def save(self, path: str | Path) -> "Picture":
        """Write the PNG, whole or not at all; makes the folder. Returns the picture, so that a cell may end with it."""
        if Path(path).suffix != ".png":
            raise ValueError(f"cannot save {Path(path).name!r}: a Picture is a PNG, so let the name end in .png")
        with atomic_file(path) as file:
            file.write(self.png())
        return self

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": self.png(), "text/plain": self.alt}, {"image/png": {"alt": self.alt, "width": self.width}}


@styled
def image_grid(images: Tensor | Sequence[Tensor], *, columns: int = 8, scale: int | None = None, row_labels=(),
               column_labels=(), arrow: str = "", alt: str = "") -> Picture:  # fmt: skip
    """Images side by side, every pixel a crisp square.

    `images`: (N, 3, H, W) or (N, 1, H, W), float in [-1, 1] (what goes beyond, as a noisy x_t does, is clamped) or
    uint8; or a list of single images. `scale`: pixels of the page per pixel of an image; None takes what fits.
    `row_labels` stand on the left, `column_labels` on top. `arrow` is a caption below, on an arrow to the right.
    Raises ValueError for another shape or dtype, for NaN or infinite values, and where there are not as many labels
    as rows or columns.

    >>> image_grid(torch.zeros(6, 3, 8, 8), columns=3)
    6 images in rows of 3
    """
    pixels = _pixels(images)
    count, _, height, width = pixels.shape
    columns = max(1, min(columns, count))
    rows = ceil(count / columns)
    for labels, places, needed in ((row_labels, "rows", rows), (column_labels, "columns", columns)):
        if len(labels) not in (0, needed):
            raise ValueError(f"{len(labels)} labels for {needed} {places}: give one each ('' for none)")
    gap, zoom = 4 * RATIO, RATIO * int(scale or max(1, min(WIDTH // columns - 5, 128) // max(height, width)))
    canvas = F.pad(pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), [0, gap, 0, gap], value=255)
    canvas = make_grid(canvas, nrow=columns, padding=0)[:, :-gap, :-gap]

    # a figure of the canvas's size holds what stands around it; the canvas is laid on it at the end, pixel by pixel
    figure = Figure(figsize=(canvas.shape[2] / DPI / RATIO, canvas.shape[1] / DPI / RATIO), dpi=DPI * RATIO, layout="none")
    up, across = (DPI * RATIO / 72 / side for side in canvas.shape[1:])  # a printer's point, in parts of the figure
    for i, label in enumerate(column_labels):
        middle = i * (width * zoom + gap) + (width * zoom + 1) / 2
        figure.text(middle / canvas.shape[2], 1 + 3.5 * up, label, ha="center", va="bottom")
    for i, label in enumerate(row_labels):
        middle = i * (height * zoom + gap) + (height * zoom + 1) / 2
        figure.text(-3.5 * across, 1 - middle / canvas.shape[1], label, ha="right", va="center_baseline")
    if arrow:
        figure.add_artist(FancyArrowPatch((0, -15 * up), (1, -15 * up), arrowstyle="-|>", color="#888888", mutation_scale=18, transform=figure.transFigure))
        figure.text(0.5, -15 * up, arrow, ha="center", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 3})
    box = Bbox.union([figure.bbox_inches, figure.get_tightbbox()]).padded(0.04)
    picture = Picture.from_figure(figure, alt or f"{count} image{'s'[: count > 1]} in rows of {columns}", bbox_inches=box)
    corner = round(-box.x0 * DPI * RATIO), round((box.y1 - figure.bbox_inches.y1) * DPI * RATIO)
    picture.image.paste(Image.fromarray(canvas.permute(1, 2, 0).numpy()), corner)
    return picture


def filmstrip(rows: Sequence[Sequence[Tensor]], *, alt: str = "", **labels) -> Picture:
    """A process at several times: every row a sequence of (3, H, W) images, every column one time.

    The forward film is one row, x_0 ... x_T; the reverse film has two, x_t above and the predicted x_0 below.
    Takes `row_labels`, `column_labels`, `arrow` and `scale` as `image_grid` does. Raises ValueError where the rows
    differ in length.

    >>> filmstrip([torch.zeros(5, 3, 8, 8)] * 2, row_labels=["$x_t$", "$x_0$"])
    a film of 5 frames
    """
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"the rows of a film must have equally many frames, got {[len(row) for row in rows]}")
    columns = len(rows[0])
    return image_grid([image for row in rows for image in row], columns=columns, alt=alt or f"a film of {columns} frames", **labels)


@styled
def plot_lines(curves: Mapping, *, x_label="", y_label="", log_x=False, log_y=False, markers=(), faint=(),
               vlines=(), hlines=(), x_ticks=(), size=(720, 320), alt: str = "") -> Picture:  # fmt: skip
    """Curves told apart by colour and by line style.

    `curves`: name -> y, or name -> (x, y) as a tuple; each a tensor, array or list of one axis. `markers`: True, or
    the names of the curves whose points are marked; `faint`: of those that stay in the background. `vlines`, `hlines`:
    label -> position of a thin grey line. `x_ticks`: words for x = 0, 1, 2, ... Raises ValueError for more axes than one,
    and where x and y differ in length.

    >>> plot_lines({"linear": [1, 0.5, 0], "cosine": ([0, 2], [1, 0])}, x_label="t", y_label="signal")
    signal against t: linear, cosine
    """
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI * RATIO)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    for (name, curve), color, line in zip(curves.items(), cycle(COLORS), cycle(LINES)):
        y = _vector(name, curve[1] if isinstance(curve, tuple) else curve)
        x = _vector(name, curve[0]) if isinstance(curve, tuple) else np.arange(len(y))
        if len(x) != len(y):
            raise ValueError(f"curve {name!r} has {len(x)} x and {len(y)} y: give as many of both")
        marker = "o" if markers is True or name in (markers or ()) else None
        style = {"alpha": 0.4, "linewidth": 0.7} if name in faint else {"linestyle": line, "marker": marker}
        axes.plot(x, y, color=color, label=name, **style)
    if x_ticks:
        axes.set_xticks(range(len(x_ticks)), x_ticks)
    for which in "x" * log_x + "y" * log_y:
        _log(axes, which)
    grey = {"color": "#777777", "linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 1}
    for label, at in dict(vlines).items():
        axes.axvline(at, **grey)
        axes.text(at, 1, f" {label}", color="#555555", va="top", transform=axes.get_xaxis_transform())
    for label, at in dict(hlines).items():
        axes.axhline(at, **grey)
        axes.text(1, at, label, color="#555555", ha="right", va="bottom", transform=axes.get_yaxis_transform())
    if len(curves) > 1:  # the legend stands above the axes, where it hides no data, in rows as even as they can be
        fitting = max(1, int(size[0] / (7 * max(map(len, curves)) + 50)))
        figure.legend(loc="outside upper center", ncols=ceil(len(curves) / ceil(len(curves) / fitting)))
    picture = Picture.from_figure(figure, alt or f"{y_label} against {x_label}: {', '.join(curves)}", colors=256)
    picture.axes = axes
    return picture


def plot_loss(losses: Sequence[float], *, y_label="loss", size=(720, 300), alt: str = "") -> Picture:
    """The loss of every step, faint, and its moving average over a fiftieth of all steps, strong, on a log axis.

    The average's start is corrected for having started from nothing, as Adam's averages are.

    >>> plot_loss([1.0, 0.5, 0.3])
    loss over 3 training steps
    """
    losses, average, mean = _vector("losses", losses), [], 0.0
    decay = 1 - 1 / max(1, len(losses) / 50)
    for step, loss in enumerate(losses, 1):
        mean = decay * mean + (1 - decay) * loss
        average.append(mean / (1 - decay**step))
    steps = range(1, len(losses) + 1)
    curves = {"moving average": (steps, average), "each step": (steps, losses)}
    return plot_lines(curves, faint=["each step"], x_label="training step", y_label=y_label, log_y=True, size=size,
                      alt=alt or f"{y_label} over {len(losses)} training steps")  # fmt: skip


def plot_histograms(groups: Mapping, *, x_label="", bins=60, curves=(), size=(720, 320), alt: str = "") -> Picture:
    """Distributions over each other: outlines of histograms, each of area one.

    `groups`: name -> values of any shape, all counted. `curves`: name -> (x, density), for instance the normal density
    that q(x_t) approaches.

    >>> plot_histograms({"x": torch.zeros(9)}, x_label="pixel value")
    histograms of pixel value: x
    """
    values = {name: _vector(name, torch.as_tensor(group).flatten()) for name, group in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate([*values.values()]), bins)
    outlines = {name: (edges.repeat(2), np.pad(np.histogram(group, edges, density=True)[0].repeat(2), 1)) for name, group in values.items()}
    return plot_lines(outlines | dict(curves), x_label=x_label, y_label="density", size=size, alt=alt or f"histograms of {x_label}: {', '.join(groups)}")


def stack(*pictures: Picture, alt: str = "") -> Picture:
    """Several pictures as one, centred, from top to bottom."""
    canvas = Image.new("RGB", (max(p.image.width for p in pictures), sum(p.image.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(picture.image, ((canvas.width - picture.image.width) // 2, sum(above.image.height for above in pictures[:i])))
    return Picture(canvas, alt or "; ".join(picture.alt for picture in pictures))


class _Image(widgets.Image):
    description = traitlets.Unicode().tag(sync=True)  # without one, the page fails to show the tooltip


class Slot(widgets.VBox):
    """A place on the page whose picture can be replaced, below some widgets; GitHub and paper show the last picture."""

    def __init__(self, above: Sequence[widgets.Widget] = ()):
        self.picture, self._image = None, _Image(layout={"align_self": "flex-start", "max_width": "100%", "height": "auto"})
        super().__init__([*above, self._image])
        self.add_class("noisout-slot")

    def show(self, picture: Picture) -> None:
        """Replace the picture."""
        self.picture = picture
        with self._image.hold_sync():  # one message instead of three
            self._image.width, self._image.tooltip = str(picture.width), picture.alt
            self._image.value = picture.png(compress_level=1)

    def _repr_mimebundle_(self, **kwargs):
        data, metadata = self.picture._repr_mimebundle_()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, **data}, metadata

    _ipython_display_ = None  # ipywidgets 7, which Colab has, would show the widget without its picture


class Explorer(Slot):
    """Controls and the picture that they change: `draw(**values)` is called again whenever one of them moves.

        Explorer(lambda t: image_grid(noisy(t)), t=widgets.IntSlider(500, 0, 999))

    `draw` returns a `Picture`, or is a generator that yields how much is done, 0 to 1, shown as a bar, and at last the
    `Picture`. `controls`: any widgets with a `value`, labelled with their names where they have no description; `Again`
    is a button for them. `play`: the name of a slider that a play button moves. The first picture is drawn at once, and its errors
    are raised; later ones are told in place of the picture's.

    Raises ValueError where `draw` yields no picture.
    """

    def __init__(self, draw: Callable, play: str = "", **controls: widgets.Widget):
        self._draw, self._controls = draw, controls
        self._bar = widgets.FloatProgress(max=1, layout={"visibility": "hidden", "height": "12px"})
        self._message = widgets.HTML()
        for name, control in controls.items():
            control.description = control.description or name
            control.observe(self._moved, "value")
        row = [*controls.values()]
        if play:
            slider = controls[play]
            row.insert(0, widgets.Play(slider.value, slider.min, slider.max, slider.step, interval=150))
            widgets.jslink((row[0], "value"), (slider, "value"))
        super().__init__([widgets.Box(row, layout={"flex_flow": "row wrap", "align_items": "center"}), self._bar, self._message])
        self._draw_now()

    def _draw_now(self) -> None:
        drawn = self._draw(**{name: control.value for name, control in self._controls.items()})
        if isinstance(drawn, Iterator):
            for drawn in drawn:
                if isinstance(drawn, float):
                    self._bar.layout.visibility, self._bar.value = "visible", drawn
        if not isinstance(drawn, Picture):
            raise ValueError(f"there is nothing to show: the function that draws gave {drawn!r}, not a Picture")
        self.show(drawn)

    def _moved(self, change) -> None:
        try:
            self._message.value = ""
            self._draw_now()
        except Exception as error:  # in a callback it would end in a log that nobody reads
            self._message.value = f'<p role="alert" style="color: #b3261e">{html.escape(f"{type(error).__name__}: {error}")}</p>'
        self._bar.layout.visibility = "hidden"


class Again(widgets.Button):
    """A button whose `value`, a seed, is the number of clicks so far."""

    value = traitlets.Int(0)

    def __init__(self, description: str):
        super().__init__(description=description)
        self.on_click(lambda button: button.set_trait("value", button.value + 1))


class Live(Slot):
    """A place in the notebook whose picture changes while a loop runs.

        steps = train(...)
        with Live("the training loss, falling") as live:
            for step in steps:
                losses.append(step.loss)
                live.update(lambda: plot_loss(losses))
                if live.stopped:
                    steps.close()

    `update` takes a function that draws a `Picture`, and calls it at most every `interval` seconds, and less often
    where it is slow, so that drawing stays below 5 % of the time. The end of the `with` block draws the last state.
    The description is `alt` throughout. Outside a notebook nothing is drawn. `stopped` becomes true when the reader presses
    the stop button above the picture or interrupts the cell; who interrupts a second time means it.
    """

    def __init__(self, alt: str, interval: float = 1.0):
        self._button = widgets.Button(description="stop", icon="stop", tooltip="end the loop after this step")
        self._button.on_click(lambda button: setattr(self, "stopped", True))
        vars(self._button.comm).pop("_reply_subshell_id", None)  # else ipykernel 7.4 lets a click wait until the cell has ended
        super().__init__([self._button])
        self.alt, self.interval, self.stopped = alt, interval, False
        self._waiting, self._handle, self._next = None, None, 0.0

    def update(self, draw: Callable[[], Picture]) -> None:
        """Show what `draw` draws, if it is time to; else remember it for the end."""
        self._waiting = draw
        if time.monotonic() >= self._next:
            self._show_waiting()

    def _show_waiting(self) -> None:
        draw, self._waiting, start = self._waiting, None, time.monotonic()
        if draw is None or not hasattr(get_ipython(), "kernel"):
            return
        self.show(Picture(draw().image, self.alt))
        self._handle = self._handle or display(self, display_id=True)
        # a recording keeps the last picture alone, so there nothing between the first and the last is worth drawing
        self._next = float("inf") if _recording() else time.monotonic() + max(self.interval, 20 * (time.monotonic() - start))

    def _interrupted(self, *args) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def __enter__(self) -> "Live":
        self._usual = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self._usual)
        self._show_waiting()
        if self._handle is not None:
            self._button.layout.display = "none"
            self._handle.update(self)  # so that the page keeps the last picture, not the first


def progress(iterable: Iterable, total: int | None = None, description: str = "") -> tqdm:
    """`iterable` with a progress bar that goes when it ends; no bar where NOISOUT_RECORD is set, as in recordings.

    >>> sum(progress([1, 2, 3]))
    6
    """
    return tqdm(iterable, total=total, desc=description, leave=False, disable=_recording())


def _recording() -> bool:
    return bool(os.environ.get("NOISOUT_RECORD"))


def _pixels(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Images in any accepted form -> uint8 (N, 3, H, W)."""
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
    return images.expand(-1, 3, -1, -1)


def _vector(name: str, values) -> np.ndarray:
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    if values.ndim != 1:
        raise ValueError(f"{name!r} must be a list or tensor of one axis, got shape {values.shape}: try .flatten()")
    return values


def _log(axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_data_interval()
    if high < 1000 * low:  # a few decades at most: plain numbers at 1, 2, 5, 10, ... instead of bare powers of ten
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
