"""From image files of any kind to tensors of one size, decoded once and kept in a cache."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from .files import atomic_file
from .locks import one_process_at_a_time
from .profiles import REPOSITORY
from .progress import progress

DECODER = 1  # part of each cache's key: a change of the pixels that come out needs a new number


def read_image(file: str | Path) -> Image.Image:
    """The image in `file`, upright and in RGB, whatever its format.

    A rotation noted by the camera (EXIF) is applied, transparency is laid over white, 16 bits are
    scaled to 8, and of an animation the first frame is taken. Raises what PIL raises for a file
    that it cannot read, and ValueError for pixels in floating point, whose range nobody knows.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise ValueError("pixels in floating point: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, *size): resized to cover `size`, then cropped in the centre.

    Resizing is bicubic, with antialiasing. `size` is the side of a square, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = image.shape[-2:]
    if rows * width < columns * height:  # too wide: the height decides
        covering = [height, int(height * columns / rows)]
    else:
        covering = [int(width * rows / columns), width]
    image = F.resize(image, covering, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(image, [height, width])


def decode_images(
    files: Sequence[Path], root: Path, size: int | tuple[int, int], part: str = ""
) -> tuple[Tensor, dict[str, str]]:
    """All `files` below `root` as uint8 (N, 3, H, W), and the errors of unreadable ones.

    The errors map a file's name below `root` to the reason; such files have no row in the tensor.
    Decoded once: the result is kept in `cache_folder()` for as long as the files' names, sizes
    and dates stay the same; `part` tells several lists of files below one `root` apart. A cache
    that is damaged or out of date is made anew. Several processes wait for the first one instead
    of decoding the same files.
    """
    names = [file.relative_to(root).as_posix() for file in files]
    stats = [file.stat() for file in files]
    facts = [
        [name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)
    ]
    key = hashlib.sha256(json.dumps([DECODER, size, facts]).encode()).hexdigest()
    place = hashlib.sha256(json.dumps([str(root.resolve()), size, part]).encode()).hexdigest()
    cache = cache_folder() / f"images-{place[:16]}.npz"
    with one_process_at_a_time(cache.with_suffix(".lock")):
        if (found := _load(cache, key)) is None:
            images, reasons = _decode(files, size)
            errors = {names[i]: reason for i, reason in reasons.items()}
            found = images, errors
            _save(cache, key, images, errors)
    return found


def cache_folder() -> Path:
    """Where decoded images are kept: `cache/` in NOISOUT_RUNS, or in `runs/` of the repository.

    It is safe to delete.
    """
    return Path(os.environ.get("NOISOUT_RUNS") or REPOSITORY / "runs") / "cache"


def _decode(files: Sequence[Path], size: int | tuple[int, int]) -> tuple[Tensor, dict[int, str]]:
    """The images that could be read, and the numbers of the other files with the reason."""

    def decode(file: Path) -> Tensor | str:
        try:
            return resize_and_crop(F.pil_to_tensor(read_image(file)), size)
        except Exception as error:  # PIL's decoders raise many kinds for damaged files
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor() as pool:
        results = [*progress(pool.map(decode, files), len(files), "decoding images")]
    images = [result for result in results if isinstance(result, Tensor)]
    reasons = {i: result for i, result in enumerate(results) if isinstance(result, str)}
    return torch.stack(images) if images else torch.empty(0, 3, 1, 1, dtype=torch.uint8), reasons


def _save(cache: Path, key: str, images: Tensor, errors: dict[str, str]) -> None:
    try:
        with atomic_file(cache) as file:
            np.savez(
                file, key=np.array(key), images=images.numpy(), errors=np.array(json.dumps(errors))
            )
    except OSError:
        pass  # a full or read-only disk: decode again next time


def _load(cache: Path, key: str) -> tuple[Tensor, dict[str, str]] | None:
    try:
        with np.load(cache, allow_pickle=False) as saved:
            if str(saved["key"]) != key:
                return None
            return torch.from_numpy(saved["images"]), json.loads(str(saved["errors"]))
    except Exception:  # not there, or damaged: zip, NumPy and json each raise their own kinds
        return None
