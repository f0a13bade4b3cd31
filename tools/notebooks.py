"""Keep notebooks/NAME.ipynb in step with its source, notebooks/scripts/NAME.py.

    python tools/notebooks.py sync   [NAME ...]   script -> notebook; unchanged cells keep outputs
    python tools/notebooks.py check  [NAME ...]   does every pair agree, whatever the file times?
    python tools/notebooks.py record [NAME ...]   sync, execute as the tests do, store the outputs
    python tools/notebooks.py run    [NAME ...]   execute a copy, yours to set, in runs/PROFILE/
    python tools/notebooks.py figures             how long and how quiet each notebook is

Without a NAME all notebooks are meant. The script always wins: an edit made only in the notebook is
overwritten. A cell tagged "measurement" shows timings of the machine that recorded it first: they
are kept until the cell changes. The image of the cell tagged "cover" is stored in notebooks/images/
as well, for the README.
"""

import argparse
import asyncio
import base64
import hashlib
import html
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C has no traceback before a notebook runs, either
    signal.signal(signal.SIGINT, lambda *_: sys.exit("stopped"))

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
SCRIPTS, IMAGES = NOTEBOOKS / "scripts", NOTEBOOKS / "images"
JUPYTEXT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["jupytext"]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# a view without its kernel shows nothing but "Loading widget..."
WIDGET = "application/vnd.jupyter.widget-view+json"
MEASUREMENT, COVER = "measurement", "cover"

# Recordings and tests run in this environment, so that both give the same on every machine.
ENVIRONMENT = {
    "NOISOUT_PROFILE": "quick",
    "NOISOUT_RECORD": "1",  # no progress bars
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # the number of threads changes the last bits of a sum
}
IDLE_SECONDS = 0.12  # what `workload` takes on a core with AVX2
STARTS = 3  # of a kernel: another program may be faster to take the ports chosen for it
CELL_SECONDS = 300  # the most that a cell may take on such a core


@contextmanager
def fixed_environment() -> Iterator[Path]:
    """ENVIRONMENT in place of the user's own settings, and an empty folder for runs and data.

    Yields the folder, which is deleted at the end.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="noisout-", ignore_cleanup_errors=True) as folder:
        for name in before:
            if name.startswith("NOISOUT_") or name == "MPLBACKEND":
                del os.environ[name]
        places = {"NOISOUT_RUNS": f"{folder}/runs", "NOISOUT_DATA": f"{folder}/data"}
        os.environ.update(ENVIRONMENT | places)
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


def workload() -> float:
    """Seconds of processor time for a fixed piece of what training spends its time with."""
    import torch

    x, weight = torch.ones(16, 64, 32, 32), torch.ones(64, 64, 3, 3, requires_grad=True)
    start = time.thread_time()
    for _ in range(4):
        torch.nn.functional.conv2d(x, weight, padding=1).sum().backward()
    return time.thread_time() - start


def time_limit() -> float:
    """Seconds that a cell may take on this machine, as busy as it is now."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = sorted(workload() for _ in range(5))[2]
    torch.set_num_threads(threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 1.0
    contention = max(1.0, load / (os.cpu_count() or 1))
    return CELL_SECONDS * max(1.0, seconds / IDLE_SECONDS) * contention


def names(chosen: list[str] | None = None) -> list[str]:
    """The chosen notebooks, or all that have a script or a notebook."""
    known = sorted({path.stem for path in [*SCRIPTS.glob("*.py"), *NOTEBOOKS.glob("*.ipynb")]})
    chosen = [Path(name).stem for name in chosen or known]
    if unknown := [name for name in chosen if name not in known]:
        choices = ", ".join(known) or "none yet"
        raise SystemExit(f"no notebook is called {unknown[0]!r}: choose from {choices}")
    return chosen


def write(path: Path, content: str | bytes) -> None:
    """Write the file in one go or not at all, and leave it alone where it is right already."""
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def pick(metadata: dict, *keys: str) -> dict:
    return {key: metadata[key] for key in keys if key in metadata}


def script_text(nb: NotebookNode) -> str:
    """The script in the form in which jupytext, and so JupyterLab, writes it."""
    filters = pick(JUPYTEXT, "notebook_metadata_filter", "cell_metadata_filter")
    metadata = {"kernelspec": METADATA["kernelspec"], "jupytext": filters}
    nb = nbformat.from_dict({**nb, "metadata": metadata})
    return jupytext.writes(nb, fmt="py:percent")


def canonicalise(nb: NotebookNode) -> NotebookNode:
    """Drop whatever would make two recordings differ, or would not show on a page; in place."""
    nb.metadata, nb.nbformat, nb.nbformat_minor = nbformat.from_dict(METADATA), 4, 5
    seen = []
    for cell in nb.cells:
        # an id follows from the content, so that other cells may come and go
        seen.append((cell.cell_type, cell.source))
        cell.id = hashlib.sha256(f"{seen[-1]}{seen.count(seen[-1])}".encode()).hexdigest()[:12]
        cell.metadata = nbformat.from_dict(pick(cell.metadata, "tags"))
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data.pop(WIDGET, None)
                images = pick(output.metadata, *output.data)
                shown = {mime: pick(images[mime], "alt", "width") for mime in images}
                output.metadata = nbformat.from_dict(shown)
            elif output.output_type == "error":  # its message, without the paths of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return nb


def content(nb: NotebookNode) -> list[tuple]:
    """What the two files of a pair must agree on."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in nb.cells]


def read_script(name: str) -> NotebookNode:
    path = SCRIPTS / f"{name}.py"
    if not path.exists():
        raise SystemExit(
            f"{name}: there is no {path.relative_to(ROOT)}; a notebook is made from its script"
        )
    return jupytext.read(path)


def difference(name: str) -> str | None:
    """What is wrong with the pair, in one sentence; None if nothing is."""
    script, notebook = SCRIPTS / f"{name}.py", NOTEBOOKS / f"{name}.ipynb"
    for path in (script, notebook):
        if not path.exists():
            return f"{name}: {path.relative_to(ROOT)} is missing"
    nb = jupytext.read(script)
    ours, theirs = content(nb), content(nbformat.read(notebook, 4))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return (
                f"{name}: cell {number + 1} of the notebook differs from the script's, "
                f"which begins {a[1][:60]!r}; `make sync NAME={name}` takes the script's"
            )
    if len(ours) != len(theirs):
        return f"{name}: the script has {len(ours)} cells, the notebook {len(theirs)}"
    if script_text(canonicalise(nb)) != script.read_text(encoding="utf-8"):
        return (
            f"{name}: the script is not laid out as jupytext writes it; "
            f"`make sync NAME={name}` mends it"
        )
    return None


def synced(name: str) -> NotebookNode:
    """The script as a notebook, with the outputs of the cells that the present notebook shares."""
    nb, path = read_script(name), NOTEBOOKS / f"{name}.ipynb"
    old = nbformat.read(path, 4).cells if path.exists() else []
    old = [cell for cell in old if cell.cell_type == "code"]
    for cell in nb.cells:
        match = next((o for o in old if cell.cell_type == "code" and o.source == cell.source), None)
        if match:
            old.remove(match)
            cell.outputs, cell.execution_count = match.outputs, match.execution_count
    return canonicalise(nb)


def cover(nb: NotebookNode) -> bytes | None:
    """The PNG of the cell tagged "cover", if it has been executed."""
    tagged = [cell for cell in nb.cells if COVER in cell.metadata.get("tags", [])]
    outputs = [output.get("data", {}) for cell in tagged for output in cell.outputs]
    pngs = [data["image/png"] for data in outputs if "image/png" in data]
    return base64.b64decode(pngs[0]) if pngs else None


def save(name: str, nb: NotebookNode) -> None:
    nbformat.validate(nb)
    if image := cover(nb):
        write(IMAGES / f"{name}.png", image)
    write(NOTEBOOKS / f"{name}.ipynb", nbformat.writes(nb) + "\n")
    write(SCRIPTS / f"{name}.py", script_text(nb))


def unfinished(nb: NotebookNode) -> str | None:
    """Why the outputs are not those of a whole run, in one sentence; None if they are."""
    for number, cell in enumerate((cell for cell in nb.cells if cell.cell_type == "code"), 1):
        errors = [output.ename for output in cell.outputs if output.output_type == "error"]
        if "KeyboardInterrupt" in errors:
            return f"code cell {number} was interrupted"
        if errors and "raises-exception" not in cell.metadata.get("tags", []):
            return f"code cell {number} raised {errors[0]}"
        if cell.execution_count is None and cell.source.strip():
            return f"code cell {number} was not run"
    return None


class Stopped(Exception):
    """Somebody interrupted the notebook."""


class Client(NotebookClient):
    """A NotebookClient that shows what the cells print and their progress bars, and can be stopped.

    The first interrupt (Ctrl-C, SIGTERM) goes to the cell that is running, so that a training loop
    can save its state; then `Stopped` is raised. The second one ends the kernel.
    """

    figures: Path | None = None  # the folder for what the cells show; without it nothing is echoed
    starting: asyncio.Task | None = None  # while the kernel starts
    interrupts, count = 0, 0
    # the words of the last progress bar, those on the screen, and since when
    bar, shown, at = "", "", 0.0

    def process_message(self, msg, cell, cell_index):
        if self.figures is not None:
            self.echo(msg["msg_type"], msg["content"])
        return super().process_message(msg, cell, cell_index)

    def echo(self, kind: str, content: dict) -> None:
        """Repeat on the screen what a cell prints, how far its progress bar is, what it shows."""
        if kind == "stream":
            self.say(content["text"], end="")
        elif kind == "comm_msg":
            value = content["data"].get("state", {}).get("value")
            if isinstance(value, str) and "[" in value:  # tqdm's 37/100 [00:05<00:09, 7.1it/s]
                self.bar = html.unescape(value).strip()
                self.show_bar()
        elif kind in ("display_data", "execute_result"):
            self.keep(content)

    def keep(self, content: dict) -> None:
        """Store a figure at once, and say where: the first one need not wait for the last cell."""
        live = content.get("transient", {}).get("display_id")  # will be replaced, again and again
        if live or "image/png" not in content["data"]:
            return
        self.count += 1
        path = self.figures / f"{self.count:02}.png"
        write(path, base64.b64decode(content["data"]["image/png"]))
        alt = content.get("metadata", {}).get("image/png", {}).get("alt", "")
        self.say(f"  {os.path.relpath(path)}: {alt}" if alt else f"  {os.path.relpath(path)}")

    def say(self, words: str, end: str = "\n") -> None:
        clear = "\r\x1b[K" if self.shown and sys.stderr.isatty() else ""
        self.shown = ""
        print(f"{clear}{words}", end=end, file=sys.stderr, flush=True)

    def show_bar(self) -> None:
        """Rewrite the line of the bar on a terminal; elsewhere add a line every half minute."""
        if sys.stderr.isatty():
            print(f"\r\x1b[K  {self.bar}", end="", file=sys.stderr, flush=True)
            self.shown = self.bar
        elif time.monotonic() > self.at + 30:
            self.at = time.monotonic()
            print(f"  {self.bar}", file=sys.stderr, flush=True)

    async def async_start_new_kernel(self, **kwargs) -> None:
        self.starting = asyncio.current_task()
        self.listen()
        await super().async_start_new_kernel(**kwargs)

    async def async_start_new_kernel_client(self):
        for _ in range(STARTS - 1):
            try:
                return await super().async_start_new_kernel_client()
            except RuntimeError:  # it died before it answered
                self.km = self.create_kernel_manager()
                await self.async_start_new_kernel()
        return await super().async_start_new_kernel_client()

    def listen(self) -> None:
        """Take interrupts over from nbclient, whose own handler kills the kernel."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(name, self.interrupt)
            except (NotImplementedError, RuntimeError):  # Windows; not the main thread
                return

    def interrupt(self) -> None:
        self.interrupts += 1
        if self.km is None:
            return
        if self.starting is not None:
            self.shutdown_kernel = "immediate"  # gracefully, it would print where it was
            self.starting.cancel()
        elif self.interrupts == 1:
            self.say("stopping after this step; once more to stop at once")
            self.task = asyncio.ensure_future(self.km.interrupt_kernel())
        else:
            self.task = asyncio.ensure_future(self.km.shutdown_kernel(now=True))

    def finished(self, **kwargs) -> None:
        if self.interrupts:
            raise Stopped


def execute(
    nb: NotebookNode, name: str, timeout: float | None, figures: Path | None = None
) -> None:
    """Execute the notebook in place.

    With a folder for `figures`, they are stored there as they appear, and the screen shows what the
    cells print and their progress bars.

    Raises SystemExit with the cell and its traceback where one fails or takes longer than `timeout`
    seconds, Stopped where somebody interrupts it.
    """
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    running = 0

    def start(cell, cell_index):
        nonlocal running
        client.starting = None
        if cell.cell_type == "code":
            running = next(index for index, c in enumerate(code, 1) if c is cell)
            client.say(f"{name}: cell {running} of {len(code)}")

    for cell in code:
        cell.outputs, cell.execution_count = [], None
    client = Client(
        nb,
        kernel_name="python3",
        timeout=None if timeout is None else round(timeout),
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # without the kernel's remarks on its own connection
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        on_cell_execute=start,
    )
    client.on_cell_executed = client.finished
    client.figures = figures
    try:
        client.execute()
    except (CellControlSignal, DeadKernelError, RuntimeError, AssertionError) as error:
        if client.interrupts:  # the kernel was stopped under nbclient's hands
            raise Stopped(client.bar) from None
        if not isinstance(error, (CellControlSignal, DeadKernelError)):
            raise
        raise SystemExit(failure(name, running, code[running - 1].source, error)) from None
    except (Stopped, KeyboardInterrupt, asyncio.CancelledError):
        raise Stopped(client.bar) from None


def failure(name: str, number: int, source: str, error: Exception) -> str:
    if isinstance(error, CellTimeoutError):
        limit = "took longer than this machine's limit"
        return f"{name}: code cell {number} {limit}\n\n{source}\n\n{error}"
    trace = re.sub(r"\x1b\[[\d;]*m", "", getattr(error, "traceback", "") or str(error))
    shown = "" if source in trace else source + "\n\n"
    return f"{name}: code cell {number} failed\n\n{shown}{trace}"


def sync(name: str) -> None:
    save(name, synced(name))
    print(f"{name}: in step with its script")


def record(name: str) -> None:
    began, old, nb = time.time(), synced(name), canonicalise(read_script(name))
    with fixed_environment():
        try:
            execute(nb, name, timeout=time_limit())
        except Stopped:
            raise SystemExit(f"{name}: interrupted, nothing is recorded") from None
    if problem := unfinished(nb):
        raise SystemExit(f"{name}: {problem}, nothing is recorded")
    for cell, before in zip(nb.cells, old.cells, strict=True):
        if MEASUREMENT in cell.metadata.get("tags", []) and before.outputs:
            cell.outputs = before.outputs
    save(name, canonicalise(nb))
    size = (NOTEBOOKS / f"{name}.ipynb").stat().st_size
    print(f"{name}: recorded in {time.time() - began:.0f} s, {size / 1000:.0f} kB")


def run(name: str) -> None:
    for variable in ("NOISOUT_DATA", "NOISOUT_RUNS"):
        if os.environ.get(variable):  # the kernel starts in notebooks/, not in the user's folder
            os.environ[variable] = os.path.abspath(os.environ[variable])
    runs = Path(os.environ.get("NOISOUT_RUNS") or ROOT / "runs")
    folder = runs / (os.environ.get("NOISOUT_PROFILE") or "quick")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(
            f"cannot write to {folder} ({error.strerror}): "
            "set NOISOUT_RUNS to a folder of your own: NOISOUT_RUNS=~/noisout-runs make run"
        ) from None
    nb = canonicalise(read_script(name))
    try:
        execute(nb, name, timeout=None, figures=folder / name)
    except Stopped as stop:
        bar = re.search(r"(\d+)/\d+", str(stop))
        raise SystemExit(
            f"stopped{f' at step {bar[1]}' if bar else ''}; run again to go on"
        ) from None
    finally:
        write(folder / f"{name}.ipynb", nbformat.writes(canonicalise(nb)) + "\n")
    images = [os.path.relpath(path) for path in sorted(folder.glob("*.png"))]
    print("Your images:", *(images or ["none were saved"]), sep="\n  ")
    print(f"All figures: {os.path.relpath(folder / name)}")
    print(f"The whole page: {os.path.relpath(folder / f'{name}.ipynb')}")
    print("Next: `make lab` opens the notebooks in JupyterLab; begin with 00_quickstart.")


def check(name: str) -> str | None:
    problem = difference(name)
    print(problem or f"{name}: the pair agrees")
    return problem


FIGURES = "{:20}{:>6}{:>8}{:>5}{:>9}{:>7}{:>7}{:>9}"


def figures(name: str) -> None:
    """A line of a table: what a reader meets in the notebook."""
    nb = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    lengths = sorted(len(cell.source.splitlines()) for cell in code)
    shown = [bool(cell.outputs) for cell in code]
    first = next((i for i, cell in enumerate(nb.cells, 1) if cell.get("outputs")), "none")
    prose = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    asserts = sum(len(re.findall(r"\bassert", cell.source)) for cell in code)
    median, p90 = lengths[len(lengths) // 2], lengths[len(lengths) * 9 // 10]
    words = sum(len(text.split()) for text in prose)
    share = f"{sum(shown) / len(shown):.0%}"
    print(FIGURES.format(name, len(code), median, p90, share, words, first, asserts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["sync", "check", "record", "run", "figures"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    verbs = {"sync": sync, "check": check, "record": record, "run": run, "figures": figures}
    if arguments.verb == "figures":
        columns = ("cells", "median", "p90", "outputs", "words", "first", "asserts")
        print(FIGURES.format("code", *columns))
    work = verbs[arguments.verb]
    sys.exit(any([work(name) for name in names(arguments.names)]))


if __name__ == "__main__":
    main()
