"""One process at a time, for what is to be done once: a download, the decoding of many images."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def one_process_at_a_time(lock: str | Path) -> Iterator[None]:
    """Other processes and threads wait here until the one inside the `with` block has left it.

    `lock` is an empty file that marks the place. Where it cannot be written, as in a read-only
    folder, nobody waits: nothing can be written there at the same time either.
    """
    try:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "ab")  # noqa: SIM115  (closed by the with below)
    except OSError:
        yield
        return
    with file:  # closing it, as the system does for a process that ends, releases the lock
        with suppress(OSError):  # some network drives have no locks
            _lock(file.fileno())
        yield


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    import msvcrt

    while True:
        try:
            return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            time.sleep(0.2)
