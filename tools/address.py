"""Write the repository's address and version wherever they are repeated.

    python tools/address.py                                  as pyproject.toml has them
    python tools/address.py https://github.com/OWNER/NAME    another address
    python tools/address.py 0.3.0                            another version

Badges, links and clone commands repeat the address, CITATION.cff the version, and the first code
cell of every notebook both: on Colab it fetches the tag of that version.
"""

import re
import sys
import tomllib
from pathlib import Path

import nbformat
from tracked import ROOT, tracked_files

from notebooks import NOTEBOOKS, SCRIPTS, canonicalise, write

FETCH_CELL = """import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    clone = "git clone -q --depth 1 {url} noisOut"
    subprocess.run(  # the version that this notebook belongs to; the newest until it is released
        f"test -d noisOut || {{clone}} --branch v{version} || {{clone}}",
        shell=True,
        check=True,
    )
    sys.path.insert(0, "noisOut")"""
PRESENT = re.compile(
    r'import sys\n\nif "google\.colab" in sys\.modules:.*?\n    sys\.path\.insert\(0, "noisOut"\)',
    re.DOTALL,
)
GITHUB = "https://github.com/"


def values() -> tuple[str, str]:
    """Address and version, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"], project["version"]


def fetch_cell(url: str, version: str) -> str:
    """The first code cell of every notebook."""
    return FETCH_CELL.format(url=url, version=version)


def asked_for(arguments: list[str]) -> tuple[str, str]:
    """Address and version that the command line names; what it does not name stays."""
    url, version = values()
    for argument in arguments:
        address = re.fullmatch(rf"({GITHUB}[\w.-]+/[\w.-]+?)(?:\.git)?/?", argument)
        if address:
            url = address[1]
        elif re.fullmatch(r"\d+\.\d+\.\d+", argument):
            version = argument
        else:
            raise SystemExit(f"{argument!r} is no address and no version.\n\n{__doc__}")
    return url, version


class Renewal:
    """From the values of pyproject.toml to others."""

    def __init__(self, url: str, version: str):
        old = re.escape(values()[0].removeprefix(GITHUB))
        self.address = re.compile(rf"(github\.com/|\.com/github/|/v2/gh/){old}(?![\w-])")
        self.name, self.version = url.removeprefix(GITHUB), version
        self.cell = fetch_cell(url, version)

    def text(self, text: str) -> str:
        """Any file's, with the new address."""
        return self.address.sub(lambda found: found[1] + self.name, text)

    def source(self, source: str) -> str:
        """A script's or a cell's, with the new first cell, too."""
        return PRESENT.sub(lambda _: self.cell, self.text(source))

    def notebook(self, stored: str) -> str:
        """A stored notebook, whose outputs and counts stay."""
        nb = nbformat.reads(stored, 4)
        for cell in nb.cells:
            cell.source = self.source(cell.source)
        if nb == nbformat.reads(stored, 4):
            return stored
        return nbformat.writes(canonicalise(nb)) + "\n"

    def file(self, path: Path, text: str) -> str:
        """What the file is to hold."""
        if path.parent == SCRIPTS:
            return self.source(text)
        if path.parent == NOTEBOOKS and path.suffix == ".ipynb":
            return self.notebook(text)
        if path == ROOT / "pyproject.toml":
            text = re.sub(r'(?m)^version = ".*"$', f'version = "{self.version}"', text, count=1)
        if path == ROOT / "CITATION.cff":
            text = re.sub(r"(?m)^version: .*$", f"version: {self.version}", text)
        return self.text(text)


def main() -> None:
    renewal = Renewal(*asked_for(sys.argv[1:]))
    try:
        files = tracked_files()
    except RuntimeError as error:
        raise SystemExit(f"the files to change are those that git knows, but {error}") from None
    for path in files:
        try:
            before = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        after = renewal.file(path, before)
        if after != before:
            write(path, after)
            print(path.relative_to(ROOT).as_posix())


if __name__ == "__main__":
    main()
