"""Images side by side: grids, the stages of a process, and files of single images."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from .dataset import to_uint8
from .files import atomic_file
from .picture import DPI, RATIO, Picture, styled

WIDTH = 820  # pixels of the page that a grid may take
GAP = 4 * RATIO  # between images
MARGIN = 4 * RATIO  # around the grid


def image_grid(
    images: Tensor | Sequence[Tensor],
    *,
    columns: int | None = None,
    scale: int | None = None,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    arrow: str = "",
    alt: str = "",
) -> Picture:
    """Images side by side, every pixel a crisp square.

    `images`: (N, 3, H, W) or (N, 1, H, W), float in [-1, 1] (values beyond, as in a noisy x_t, are
    clamped) or uint8; or a list of single images. `columns`: None takes 8, and more for more than
    64 images, so that the grid is about square. `scale`: pixels of the page per pixel of an image;
    None takes what fits. `row_labels` stand on the left, `column_labels` on top. `arrow` is a
    caption below, on an arrow to the right. Raises ValueError for another shape or dtype, for NaN
    or infinite values, and where there are not as many labels as rows or columns.

    >>> image_grid(torch.zeros(6, 3, 8, 8), columns=3)
    6 images in rows of 3
    """
    pixels = _pixels(images)
    count, _, height, width = pixels.shape
    columns = max(8, ceil(count**0.5)) if columns is None else columns
    columns = max(1, min(columns, count))
    rows = ceil(count / columns)
    for labels, places, needed in ((row_labels, "rows", rows), (column_labels, "columns", columns)):
        if len(labels) not in (0, needed):
            raise ValueError(
                f"{len(labels)} labels for {needed} {places}: give one each ('' for none)"
            )
    if scale is not None and scale < 1:
        raise ValueError(f"scale is {scale}: at least 1 pixel of the page per pixel is needed")
    fitting = min(WIDTH // columns - 5, 128) // max(height, width)
    zoom = RATIO * int(max(1, fitting) if scale is None else scale)
    alt = alt or f"{count} image{'s'[: count > 1]} in rows of {columns}"
    canvas = _canvas(pixels, rows, columns, zoom)
    if not (arrow or any(row_labels) or any(column_labels)):
        size = canvas.width + 2 * MARGIN, canvas.height + 2 * MARGIN
        plain = Image.new("RGB", size, "white")
        plain.paste(canvas, (MARGIN, MARGIN))
        return Picture(plain, alt)
    return _with_labels(canvas, row_labels, column_labels, arrow, alt)


def _canvas(pixels: Tensor, rows: int, columns: int, zoom: int) -> Image.Image:
    """uint8 (N, 3, H, W) -> one image: zoomed, on white, with a gap between."""
    count, channels, height, width = pixels.shape
    tiles = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    tiles = F.pad(tiles, [0, GAP, 0, GAP], value=255)
    blank = tiles.new_full((rows * columns - count, *tiles.shape[1:]), 255)
    tiles = torch.cat([tiles, blank]).unflatten(0, (rows, columns))
    canvas = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return Image.fromarray(canvas[:-GAP, :-GAP].contiguous().numpy())


@styled
def _with_labels(
    canvas: Image.Image,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    arrow: str,
    alt: str,
) -> Picture:
    """A figure of the canvas's size holds what stands around it; the canvas is pasted at the
    end."""
    inches = canvas.width / DPI / RATIO, canvas.height / DPI / RATIO
    figure = Figure(figsize=inches, dpi=DPI * RATIO)
    figure.set_layout_engine("none")
    across, up = 1 / 72 / inches[0], 1 / 72 / inches[1]  # one point, in parts of the figure
    for i, label in enumerate(column_labels):
        middle = _middle(i, len(column_labels), canvas.width)
        figure.text(middle, 1 + 3.5 * up, label, ha="center", va="bottom")
    for i, label in enumerate(row_labels):
        middle = 1 - _middle(i, len(row_labels), canvas.height)
        figure.text(-3.5 * across, middle, label, ha="right", va="center_baseline")
    if arrow:
        start, end = (0, -15 * up), (1, -15 * up)
        look = {"arrowstyle": "-|>", "color": "#888888", "mutation_scale": 18}
        figure.add_artist(FancyArrowPatch(start, end, transform=figure.transFigure, **look))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 3}
        figure.text(0.5, -15 * up, arrow, ha="center", va="center", bbox=box)
    margin = MARGIN / DPI / RATIO
    box = Bbox.union([figure.bbox_inches, figure.get_tightbbox()]).padded(margin)
    picture = Picture.from_figure(figure, alt, bbox_inches=box)
    corner = round(-box.x0 * DPI * RATIO), round((box.y1 - inches[1]) * DPI * RATIO)
    picture.image.paste(canvas, corner)
    return picture


def _middle(index: int, count: int, length: int) -> float:
    """Where the middle of one of `count` images is along a canvas of `length` pixels, in 0..1."""
    side = (length + GAP) / count
    return (index * side + (side - GAP + 1) / 2) / length


def filmstrip(rows: Sequence[Sequence[Tensor]], *, alt: str = "", **labels) -> Picture:
    """A process at several timesteps: each row a sequence of (3, H, W) images, each column a step.

    The forward process is one row, x_0 ... x_T; the reverse process has two, x_t above and the
    predicted x_0 below. Takes `row_labels`, `column_labels`, `arrow` and `scale` as `image_grid`
    does. Raises ValueError where the rows differ in length.

    >>> filmstrip([torch.zeros(5, 3, 8, 8)] * 2, row_labels=["$x_t$", "$x_0$"])
    a film of 5 frames
    """
    if len({len(row) for row in rows}) != 1:
        lengths = [len(row) for row in rows]
        raise ValueError(f"the rows of a film must have equally many frames, got {lengths}")
    columns = len(rows[0])
    images = [image for row in rows for image in row]
    return image_grid(images, columns=columns, alt=alt or f"a film of {columns} frames", **labels)


def stack(*pictures: Picture, alt: str = "") -> Picture:
    """Several pictures as one, centred, from top to bottom. Raises ValueError for none."""
    if not pictures:
        raise ValueError("there is nothing to stack: give at least one picture")
    width = max(picture.image.width for picture in pictures)
    height = sum(picture.image.height for picture in pictures)
    canvas = Image.new("RGB", (width, height), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture.image, ((width - picture.image.width) // 2, top))
        top += picture.image.height
    if all(picture.image.mode == "P" for picture in pictures):  # plots stay as small as they were
        canvas = canvas.quantize(256, dither=Image.Dither.NONE)
    return Picture(canvas, alt or "; ".join(picture.alt for picture in pictures))


def save_images(
    images: Tensor | Sequence[Tensor], folder: str | Path, name: str = "sample"
) -> list[Path]:
    """Write each image at its own size, one pixel per pixel, as `folder`/`name`_000.png, _001, ...

    `images` as for `image_grid`. Returns the paths. Files of the same names are replaced.
    """
    pixels = _pixels(images)
    digits = max(3, len(str(len(pixels) - 1)))
    paths = [Path(folder) / f"{name}_{i:0{digits}}.png" for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        with atomic_file(path) as file:
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return paths


def _pixels(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Images in any accepted form -> uint8 (N, 3, H, W)."""
    if not isinstance(images, Tensor):
        shapes = [tuple(image.shape) for image in images]
        if len(set(shapes)) != 1:
            raise ValueError(f"images must have one shape, not {shapes}")
        images = torch.stack([*images])
    images = images.detach().cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images must be (N, 3, H, W) or (N, 1, H, W), not {tuple(images.shape)}; "
            "one is image[None]"
        )
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ValueError(
                f"images must be float in [-1, 1] or uint8, got {images.dtype}: "
                "convert with .float()"
            )
        bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"images[{bad[0]}] holds NaN or infinite values "
                f"({len(bad)} of {len(images)} images do)"
            )
        images = to_uint8(images)
    return images.expand(-1, 3, -1, -1)
