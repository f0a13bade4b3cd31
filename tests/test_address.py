"""`make address`: the address and the version are one value each."""

import re
import shutil
import subprocess
import sys

import jupytext
import nbformat
import pytest
from address import asked_for, fetch_cell, values
from tracked import tracked_files

from notebooks import ROOT, canonicalise, content

# in two parts, as the command changes this file, too
NEW, VERSION = "https://github.com/" + "some-one/a.copy", "7.8.9"


@pytest.fixture
def copy(tmp_path):
    """The repository's text, in a git repository of its own."""
    try:
        files = tracked_files()
    except RuntimeError as reason:
        pytest.skip(f"not here: {reason}")
    for path in files:
        if path.suffix not in (".png", ".pth"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def run(folder, *arguments):
    command = [sys.executable, folder / "tools" / "address.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts]
    return {path.relative_to(folder): path.read_bytes() for path in files if "pyc" not in path.name}


def test_one_command_changes_address_and_version_everywhere_and_back(copy):
    url, version = values()
    assert run(copy).returncode == 0  # as it is
    before = contents(copy)
    found = run(copy, NEW + ".git", VERSION)
    assert found.returncode == 0 and "README.md" in found.stdout, found.stderr
    old = re.compile(re.escape(url.removeprefix("https://github.com/")) + r"(?![\w-])")
    for path, stored in contents(copy).items():
        if path.suffix in (".md", ".py", ".ipynb", ".toml", ".cff", ".yml", ".txt"):
            assert not old.search(stored.decode()), path
    assert f"version: {VERSION}\n" in (copy / "CITATION.cff").read_text(encoding="utf-8")
    nb = nbformat.read(copy / "notebooks" / "01_data.ipynb", 4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert code[0].source == fetch_cell(NEW, VERSION) and NEW in code[0].source
    assert code[0].execution_count == 1 and any(cell.outputs for cell in code)
    script = jupytext.read(copy / "notebooks" / "scripts" / "01_data.py")
    assert content(script) == content(nb) and nb == canonicalise(nbformat.from_dict(nb))

    assert run(copy, url, version).returncode == 0
    assert contents(copy) == before


@pytest.mark.parametrize("argument", ["https://gitlab.com/a/b", "github.com/a/b", "v1.0.0", "1.0"])
def test_what_is_no_address_and_no_version_is_refused_with_the_way_out(argument):
    with pytest.raises(SystemExit, match=f"{argument}(?s:.*)OWNER/NAME"):
        asked_for([argument])
