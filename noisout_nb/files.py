"""Files that are written whole or not at all, and read only where they are whole."""

import errno
import glob
import hashlib
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, where nobody can delete a file that another process has open
    fcntl = None


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that replaces `path` at the end of the `with` block, or not at all.

    Whatever interrupts the block, the old file stays. Each writer has a temporary file of its own,
    so the last of several writers wins; what killed writers left behind is removed by the next one.
    Raises OSError where the folder cannot be written to, the disk is full or `path` is a folder.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: a file name is needed")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial, file = _open_partial(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides a full disk behind a RuntimeError of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, f"{cause.strerror} while writing", str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _open_partial(path: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file beside `path`, locked for as long as its writer lives."""
    while True:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        file = open(partial, "x+b")  # noqa: SIM115 (the caller closes it)
        if fcntl is not None:
            with suppress(OSError):  # a network drive without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():  # nobody took it for a leftover before it was locked
            return partial, file
        file.close()


def _remove_leftovers(path: Path) -> None:
    """Delete the temporary files of killed writers: those that no process holds a lock on."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError), open(leftover, "rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def load_safely(path: str | Path) -> Any:
    """`torch.load(weights_only=True)` on the CPU, after all checksums have been verified.

    Raises FileNotFoundError where there is no file, and ValueError for a folder, a damaged file, a
    file of another kind and a pickled object, which could run code. PermissionError and MemoryError
    pass through: they say nothing about the file.
    """
    path = Path(path)
    check_is_file(path)
    with open(path, "rb") as file:
        if is_zip := zipfile.is_zipfile(file):  # torch's old format, before 1.6, was no zip
            _verify(path, file)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _explain(error, path, is_zip) from error


def check_is_file(path: Path) -> None:
    """Raises FileNotFoundError where nothing is at `path`, ValueError where a folder is."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file of weights in it")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file {path}: check the path, or train first (04_training or test.ipynb)"
        )


def _verify(path: Path, file: BinaryIO) -> None:
    try:
        damaged = zipfile.ZipFile(file).testzip()  # torch.load itself overlooks flipped bits
    except Exception as error:
        if _is_from_the_system(error):
            raise
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        raise ValueError(f"{path} is damaged ({damaged}). It was left as it is: use another copy")


def _is_from_the_system(error: Exception) -> bool:
    """Is it the machine's error (no permission, no memory, a failing disk), not the file's?"""
    if isinstance(error, OSError):
        return error.errno not in (None, errno.EINVAL)  # a damaged offset leads to EINVAL
    return isinstance(error, MemoryError)


def _explain(error: Exception, path: Path, is_zip: bool) -> Exception:
    if _is_from_the_system(error):
        return error
    reason = str(error).partition("\n")[0][:120]
    if "allocate" in reason:  # torch's own form of MemoryError
        return MemoryError(f"{path} needs more memory than is free ({reason})")
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return ValueError(
            f"{path} holds a pickled object ({found[1]}), and loading one could run foreign code. "
            "Files of weights hold tensors only: save `model.state_dict()`, not the whole model"
        )
    if is_zip and not isinstance(error, pickle.UnpicklingError):
        return ValueError(f"{path} is a zip file, but not one that torch.save wrote ({reason})")
    return ValueError(
        f"{path} is not a PyTorch file of tensors, or it was cut short ({type(error).__name__}). "
        "It was left as it is: use another copy, or check the path"
    )


def short_name(path: Path) -> str:
    """The file and its folder, without what differs from machine to machine."""
    return "/".join(path.parts[-2:])


def fingerprint(*tensors: Tensor) -> str:
    """A short hash of the tensors' shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
