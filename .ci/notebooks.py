"""Keep notebooks/NAME.ipynb in step with its source, notebooks/scripts/NAME.py.

    python .ci/notebooks.py sync   [NAME ...]   script -> notebook; outputs of unchanged cells are kept
    python .ci/notebooks.py check  [NAME ...]   is every pair identical in content, whatever the file times?
    python .ci/notebooks.py record [NAME ...]   sync, execute as the tests do, store the outputs
    python .ci/notebooks.py run    [NAME ...]   execute a copy with your own settings into runs/PROFILE/

Without a NAME all notebooks are meant. The script always wins: an edit made only in the notebook is overwritten.
A cell tagged "measurement" shows timings of the machine that recorded it first: they are kept until the cell changes.
The picture of the cell tagged "cover" is stored in notebooks/pictures/, too, for the README.
"""

import argparse
import base64
import hashlib
import html
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
SCRIPTS, PICTURES = NOTEBOOKS / "scripts", NOTEBOOKS / "pictures"
JUPYTEXT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["jupytext"]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"  # a view without its kernel shows nothing but "Loading widget..."
MEASUREMENT, COVER = "measurement", "cover"
CLEAR = "\r\x1b[K" if sys.stderr.isatty() else ""  # rubs out the line of a progress bar

# Recordings and tests run in this environment, so that both give the same on every machine.
ENVIRONMENT = {
    "NOISOUT_PROFILE": "quick",
    "NOISOUT_RECORD": "1",  # no progress bars
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "2",  # the number of threads changes the last bits of a sum
}


def fix_environment() -> None:
    """Replace the user's own settings by ENVIRONMENT."""
    for name in [name for name in os.environ if name.startswith("NOISOUT_") or name == "MPLBACKEND"]:
        del os.environ[name]
    os.environ.update(ENVIRONMENT)


def names(chosen: list[str] | None = None) -> list[str]:
    """The chosen notebooks, or all that have a script or a notebook."""
    known = sorted({path.stem for path in [*SCRIPTS.glob("*.py"), *NOTEBOOKS.glob("*.ipynb")]})
    chosen = [Path(name).stem for name in chosen or known]
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"no notebook is called {unknown[0]!r}: choose from {', '.join(known) or 'none yet'}")
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
    nb = nbformat.from_dict({**nb, "metadata": {"kernelspec": METADATA["kernelspec"], "jupytext": filters}})
    return jupytext.writes(nb, fmt="py:percent")


def canonicalise(nb: NotebookNode) -> NotebookNode:
    """Drop whatever would make two recordings differ, or would not show on a page; in place."""
    nb.metadata, nb.nbformat, nb.nbformat_minor = nbformat.from_dict(METADATA), 4, 5
    seen = []
    for cell in nb.cells:
        seen.append((cell.cell_type, cell.source))  # an id follows from the content: other cells may come and go
        cell.id = hashlib.sha256(f"{seen[-1]}{seen.count(seen[-1])}".encode()).hexdigest()[:12]
        cell.metadata = nbformat.from_dict(pick(cell.metadata, "tags"))
        for output in cell.get("outputs", []):
            if "data" in output:
                output.data.pop(WIDGET, None)
                images = pick(output.metadata, *output.data)
                output.metadata = nbformat.from_dict({m: pick(images[m], "alt", "width") for m in images})
            elif output.output_type == "error":  # a shown failure: its message, without the paths of this machine
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return nb


def content(nb: NotebookNode) -> list[tuple]:
    """What the two files of a pair must agree on."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in nb.cells]


def read_script(name: str) -> NotebookNode:
    path = SCRIPTS / f"{name}.py"
    if not path.exists():
        raise SystemExit(f"{name}: there is no {path.relative_to(ROOT)}; a notebook is made from its script")
    return jupytext.read(path)


def difference(name: str) -> str | None:
    """What is wrong with the pair, in one sentence; None if nothing is."""
    script, notebook = SCRIPTS / f"{name}.py", NOTEBOOKS / f"{name}.ipynb"
    for path in (script, notebook):
        if not path.exists():
            return f"{name}: {path.relative_to(ROOT)} is missing"
    nb = jupytext.read(script)
    ours, theirs = content(nb), content(nbformat.read(notebook, 4))
    for number, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return f"{name}: cell {number + 1} of the notebook differs from the script's, which begins {a[1][:60]!r}"
    if len(ours) != len(theirs):
        return f"{name}: the script has {len(ours)} cells, the notebook {len(theirs)}"
    if script_text(canonicalise(nb)) != script.read_text(encoding="utf-8"):
        return f"{name}: the script is not laid out as jupytext does it; `python .ci/notebooks.py sync {name}` mends it"


def synced(name: str) -> NotebookNode:
    """The script as a notebook, with the outputs of those cells that it shares with the present notebook."""
    nb, path = read_script(name), NOTEBOOKS / f"{name}.ipynb"
    old = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"] if path.exists() else []
    for cell in nb.cells:
        match = next((o for o in old if cell.cell_type == "code" and o.source == cell.source), None)
        if match:
            old.remove(match)
            cell.outputs, cell.execution_count = match.outputs, match.execution_count
    return canonicalise(nb)


def cover(nb: NotebookNode) -> bytes | None:
    """The PNG of the cell tagged "cover", if it has been executed."""
    tagged = [cell for cell in nb.cells if COVER in cell.metadata.get("tags", [])]
    pngs = [output.data["image/png"] for cell in tagged for output in cell.outputs if "image/png" in output.get("data", {})]
    return base64.b64decode(pngs[0]) if pngs else None


def save(name: str, nb: NotebookNode) -> None:
    nbformat.validate(nb)
    if picture := cover(nb):
        write(PICTURES / f"{name}.png", picture)
    write(NOTEBOOKS / f"{name}.ipynb", nbformat.writes(nb) + "\n")
    write(SCRIPTS / f"{name}.py", script_text(nb))


class Client(NotebookClient):
    """A NotebookClient that passes on what the cells print and their progress bars' counts."""

    echo = False

    def process_message(self, msg, cell, cell_index):
        if self.echo and msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", file=sys.stderr, flush=True)
        if self.echo and msg["msg_type"] == "comm_msg" and CLEAR:
            value = msg["content"]["data"].get("state", {}).get("value")
            if isinstance(value, str) and "[" in value:  # the words of a tqdm bar: 37/100 [00:05<00:09, 7.1it/s]
                print(f"{CLEAR}{html.unescape(value)}", end="", file=sys.stderr, flush=True)
        return super().process_message(msg, cell, cell_index)


def execute(nb: NotebookNode, name: str, timeout: int | None, echo: bool = False) -> None:
    """Execute the notebook in place; SystemExit with the cell and its traceback where one fails."""
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    running = code[0] if code else None

    def start(cell, cell_index):
        nonlocal running
        if cell.cell_type == "code":
            running = cell
            print(f"{CLEAR}{name}: cell {code.index(cell) + 1} of {len(code)}", file=sys.stderr, flush=True)

    for cell in code:
        cell.outputs, cell.execution_count = [], None
    client = Client(
        nb,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # without the kernel's remarks on its own connection
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        on_cell_execute=start,
    )
    client.echo = echo
    try:
        client.execute()
    except (CellControlSignal, DeadKernelError) as error:
        trace = re.sub(r"\x1b\[[\d;]*m", "", getattr(error, "traceback", "") or str(error))
        source = "" if running.source in trace else running.source + "\n\n"
        raise SystemExit(f"{name}: code cell {code.index(running) + 1} failed\n\n{source}{trace}") from None


def sync(name: str) -> None:
    save(name, synced(name))
    print(f"{name}: in step with its script")


def record(name: str) -> None:
    began, old, nb = time.time(), synced(name), canonicalise(read_script(name))
    execute(nb, name, timeout=300)
    for cell, before in zip(nb.cells, old.cells):
        if MEASUREMENT in cell.metadata.get("tags", []) and before.outputs:
            cell.outputs = before.outputs
    save(name, canonicalise(nb))
    size = (NOTEBOOKS / f"{name}.ipynb").stat().st_size
    print(f"{name}: recorded in {time.time() - began:.0f} s, {size / 1000:.0f} kB")


def run(name: str) -> None:
    for variable in ("NOISOUT_DATA", "NOISOUT_RUNS"):  # the kernel starts in notebooks/, not in the user's folder
        if os.environ.get(variable):
            os.environ[variable] = os.path.abspath(os.environ[variable])
    folder = Path(os.environ.get("NOISOUT_RUNS") or ROOT / "runs") / os.environ.setdefault("NOISOUT_PROFILE", "quick")
    nb = canonicalise(read_script(name))
    try:
        execute(nb, name, timeout=None, echo=True)
    finally:
        write(folder / f"{name}.ipynb", nbformat.writes(canonicalise(nb)) + "\n")
    pictures = [folder / f"{name}.ipynb", *sorted(folder.rglob("*.png"))]
    print("The pictures are in", *[os.path.relpath(path) for path in pictures], sep="\n  ")


def check(name: str) -> str | None:
    print(difference(name) or f"{name}: the pair agrees")
    return difference(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["sync", "check", "record", "run"])
    parser.add_argument("names", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    if arguments.verb == "record":
        fix_environment()
    work = {"sync": sync, "check": check, "record": record, "run": run}[arguments.verb]
    sys.exit(any([work(name) for name in names(arguments.names)]))
