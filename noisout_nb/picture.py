"""What every figure is: an image with its description in words."""

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import matplotlib.style
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from .files import atomic_file

DPI = 100  # dots per inch of the page
RATIO = 2  # pixels stored per pixel of the page, for high-resolution screens

STYLE = {
    "font.size": 9.5,
    "axes.labelsize": 10,
    "axes.titlesize": 10.5,
    "figure.constrained_layout.use": True,
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "axes.xmargin": 0.02,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
}
styled = matplotlib.style.context(["default", STYLE])  # a decorator; leaves your settings alone


class Picture:
    """An image and its description: what every figure function returns, and a cell may end with.

    `image`: the PIL image, shown at 1 / RATIO of its size; `alt`: the words, also its `repr`;
    `axes`: a plot's matplotlib axes, else None. `colors`: store at most that many, up to 256; lines
    and words look the same in a third of the bytes.
    """

    def __init__(self, image: Image.Image, alt: str, colors: int | None = None):
        self._drawn, self.alt, self.width = image, alt, image.width // RATIO
        self.colors, self.axes = colors, cast(Any, None)

    @cached_property
    def image(self) -> Image.Image:
        """The PIL image, in as few colours as asked for."""
        if self.colors is None:
            return self._drawn
        return self._drawn.quantize(self.colors, dither=Image.Dither.NONE)

    @classmethod
    def from_figure(
        cls, figure: Figure, alt: str, colors: int | None = None, **options
    ) -> "Picture":
        """A `matplotlib.figure.Figure` (one of pyplot's would be shown a second time).

        `options` go to its `savefig`.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI * RATIO, pil_kwargs={"compress_level": 1}, **options)
        return cls(Image.open(buffer).convert("RGB"), alt, colors)

    def png(self, fast: bool = False) -> bytes:
        """The PNG's bytes; same pixels, same bytes. Large images are compressed less, to save time;
        with `fast` all are, and keep their colours: for what a slider moves."""
        image = self._drawn if fast else self.image
        large = image.width * image.height >= 4_000_000
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1 if fast or large else 6)  # no version, no date
        return buffer.getvalue()

    def marked(self, x: float, y: float | None = None) -> "Picture":
        """A plot with a line at `x` and, where `y` is given, a dot on it: fast enough for a slider.

        Raises ValueError for a figure that is not one plot, such as a grid of images.
        """
        if self.axes is None:
            raise ValueError(
                f"only a plot can be marked, this has no axes: {self.alt!r}. Mark what plot_lines "
                "or plot_histograms returns, before stacking it"
            )
        marked, axes = Picture(self.image.convert("RGB"), self.alt), self.axes
        pen, height, box = ImageDraw.Draw(marked.image), self.image.height, axes.bbox
        column, row = axes.transData.transform((x, axes.get_ylim()[0] if y is None else y))
        pen.line((column, height - box.y0, column, height - box.y1), fill="#444444", width=RATIO)
        if y is not None:
            dot = {"fill": "#222222", "outline": "white", "width": RATIO}
            pen.circle((column, height - row), 5 * RATIO, **dot)
        return marked

    def save(self, path: str | Path) -> "Picture":
        """Write the PNG, whole or not at all; makes the folder. Returns the picture itself.

        Raises ValueError for a name that does not end in .png.
        """
        if Path(path).suffix.lower() != ".png":
            raise ValueError(
                f"cannot save {Path(path).name!r}: a Picture is a PNG, so let the name end in .png "
                "(save_film writes a .gif)"
            )
        with atomic_file(path) as file:
            file.write(self.png())
        return self

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {"image/png": self.png(), "text/plain": self.alt}, {
            "image/png": {"alt": self.alt, "width": self.width}
        }


def save_film(
    frames: Sequence[Picture], path: str | Path, *, seconds: float = 0.1, last: float = 2.0
) -> Picture:
    """Write the pictures as an animated GIF that repeats; returns the last frame.

    Each frame is shown for `seconds`, the last one for `last`. Raises ValueError for a name that
    does not end in .gif, for no frames, and for frames of different sizes.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"cannot save {Path(path).name!r}: a film's name must end in .gif")
    sizes = sorted({frame.image.size for frame in frames})
    if len(sizes) != 1:
        raise ValueError(f"a film needs frames of one size, got {sizes or 'no frames'}")
    images = [frame.image.convert("RGB") for frame in frames]
    milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * last)]
    options = {"append_images": images[1:], "duration": milliseconds, "loop": 0}
    with atomic_file(path) as file:
        images[0].save(file, "GIF", save_all=True, **options)
    return frames[-1]
