"""A progress bar that recordings leave out."""

import os
from collections.abc import Iterable

from tqdm.auto import tqdm


def progress(iterable: Iterable, total: int | None = None, description: str = "") -> tqdm:
    """`iterable` with a progress bar that disappears when it ends.

    There is no bar where NOISOUT_RECORD is set, as in recordings.

    >>> sum(progress([1, 2, 3]))
    6
    """
    return tqdm(iterable, total=total, desc=description, leave=False, disable=recording())


def recording() -> bool:
    """Is NOISOUT_RECORD set, as it is while notebooks are recorded and tested?"""
    return bool(os.environ.get("NOISOUT_RECORD"))
