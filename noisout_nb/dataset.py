"""Images in memory with their labels, checked at the door; conversion between uint8 and [-1, 1]."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "val")


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., H, W) in 0..255 -> float32 in [-1, 1]. Raises ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: to_float takes uint8 in 0..255")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (..., H, W) in [-1, 1] -> uint8 in 0..255, clamped and rounded.

    A plain cast would truncate. Raises ValueError for an integer dtype.
    """
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: to_uint8 takes floats in [-1, 1]")
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


class ImageDataset(Dataset):
    """Images in memory with their labels.

    Attributes: `images` uint8 (N, C, H, W) in 0..255, C being 3 or 1 (grey); `labels` int64 (N,),
    each in 0..len(classes)-1; `classes` the names. `dataset[i]` is `(image, label)`: float32 (C,
    H, W) in [-1, 1] and an int. Raises ValueError for images, labels or classes of another form,
    and says how to convert them.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]):
        _check_images(images)
        if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
            raise ValueError(f"classes is {classes!r}: a list of names is needed, such as ['rose']")
        if len(set(classes)) != len(classes):
            twice = next(name for name in classes if list(classes).count(name) > 1)
            raise ValueError(
                f"class {twice!r} appears more than once: each class needs its own name"
            )
        _check_labels(labels, len(images), len(classes))
        self.images, self.labels, self.classes = images, labels, tuple(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_float(self.images[index]), int(self.labels[index])


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        way = "torch.as_tensor(images)" if hasattr(images, "__array__") else "torch.stack(images)"
        raise ValueError(
            f"images is a {type(images).__name__}: one uint8 tensor (N, C, H, W) is needed; "
            f"see {way}"
        )
    if images.ndim != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
        channels_last = images.ndim == 4 and images.shape[3] in (1, 3)
        way = "; channels come first: images.permute(0, 3, 1, 2)" if channels_last else ""
        raise ValueError(
            f"images have shape {tuple(images.shape)}: (N, 3, H, W) or (N, 1, H, W) is needed{way}"
        )
    if images.dtype != torch.uint8:
        low, high = images.min().item(), images.max().item()
        raise ValueError(
            f"images are {images.dtype} from {low:.3g} to {high:.3g}: uint8 in 0..255 is needed. "
            "data.to_uint8(images) converts floats in [-1, 1], data.to_uint8(2 * images - 1) "
            "those in [0, 1], images.to(torch.uint8) whole numbers in 0..255"
        )


def _check_labels(labels: Tensor, count: int, classes: int) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels is a {type(labels).__name__}: an int64 tensor is needed; "
            "see torch.as_tensor(labels)"
        )
    if labels.shape != (count,):
        one_hot = "; one-hot labels become numbers by labels.argmax(1)"
        column = "; a column becomes a row by labels.flatten()"
        way = "" if labels.ndim != 2 else column if labels.shape[1] == 1 else one_hot
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}: one number per image, ({count},), "
            f"is needed{way}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: int64 is needed; see labels.long()")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        way = "; labels that begin at 1 need labels - 1" if (low, high) == (1, classes) else ""
        raise ValueError(
            f"labels run from {low} to {high}: with {classes} classes they lie in "
            f"0..{classes - 1}{way}"
        )


def species_labels(names: str | Sequence[str], classes: Sequence[str]) -> Tensor:
    """int64 labels (N,) of one species or several, by name.

    Raises ValueError for an unknown name, and suggests the nearest ones.

    >>> species_labels(["daisy", "cosmos"], ("daisy", "poppy", "rose", "cosmos")).tolist()
    [0, 3]
    """
    names = [names] if isinstance(names, str) else names
    if not classes:
        raise ValueError(f"there are no classes to find {list(names)} in: sample with y=None")
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(str(name), classes, n=3, cutoff=0.5)
            near = near or sorted(classes)[:3]
            raise ValueError(
                f"unknown species {name!r}: did you mean {' or '.join(map(repr, near))}? "
                f"All {len(classes)} are in `classes`"
            )
    return torch.tensor([classes.index(name) for name in names], dtype=torch.int64)


def check_split(split: str) -> None:
    """ValueError for a name that is none of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
