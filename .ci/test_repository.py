"""Checks of the repository itself. pytest runs them with the notebooks; each failure names the file and the way out."""

import ast
import io
import json
import re
import statistics
import subprocess
import tokenize
import tomllib
from pathlib import Path

import nbformat
import pytest
from notebooks import NOTEBOOKS, PICTURES, ROOT, canonicalise, cover, difference, names

if not (ROOT / ".git").exists():
    pytest.skip("not a git clone: the list of files is git's", allow_module_level=True)

LISTED = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, text=True).split("\0")
FILES = sorted(ROOT / name for name in set(LISTED) if name and (ROOT / name).is_file())
IPYNB = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = [path for path in FILES if path.suffix in (".md", ".ipynb")]
SOURCES = [path for path in FILES if path.parent.name == "noisout_nb" and path.suffix == ".py"]
URL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
COLAB, BINDER = (f"{host}{URL.removeprefix('https://github.com/')}/" for host in ("https://colab.research.google.com/github/", "https://mybinder.org/v2/gh/"))
FETCH = f'''import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 {URL}", shell=True, check=True)
    sys.path.insert(0, "noisOut")'''
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|tmp|home|Users)/\S*")


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def cells(path, cell_type):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == cell_type]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell.outputs]


def markdown(path):
    """The page's prose, without code and formulas, which may look like links."""
    prose = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        prose = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    return re.sub(r"```.*?```|``.*?``|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", prose, flags=re.DOTALL)


def text(path):
    """All that a reader could see of a text file; "" for a binary one."""
    if path.suffix != ".ipynb":
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return ""
    pieces = [cell.source for cell in nbformat.read(path, 4).cells]
    for output in outputs(path):
        pieces += [output.get("text", ""), *output.get("traceback", [])]
        pieces += [str(value) for mime, value in output.get("data", {}).items() if mime.split("/")[0] != "image"]
    return "\n".join(pieces)


def code_lines(source):
    """The number of lines with code on them: no blank lines, comments or docstrings."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", names())
def test_script_and_notebook_agree(name):
    assert not (problem := difference(name)), problem


@each(IPYNB)
def test_notebook_is_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1)), f"stale or missing outputs: make record NAME={path.stem}"


@each(IPYNB)
def test_notebook_fails_only_where_it_means_to(path):
    for number, cell in enumerate(cells(path, "code"), 1):
        failed = any(output.output_type == "error" for output in cell.outputs)
        assert failed == ("raises-exception" in cell.metadata.get("tags", [])), f"code cell {number}:\n{cell.source}"


@each(IPYNB)
def test_notebook_is_stored_as_record_writes_it(path):
    stored = path.read_text(encoding="utf-8")
    clean = nbformat.writes(canonicalise(nbformat.reads(stored, 4))) + "\n"
    assert json.loads(stored) == json.loads(clean), (
        "metadata, widgets or ids that a recording does not have (saved by hand?): "
        f"python .ci/notebooks.py sync {path.stem}"
    )


@each(IPYNB)
def test_cover_is_the_notebooks_own_picture_and_the_readme_shows_it(path):
    stored = PICTURES / f"{path.stem}.png"
    assert stored.read_bytes() == cover(nbformat.read(path, 4)), f"`make record NAME={path.stem}` writes {stored.relative_to(ROOT)}"
    assert f'src="{stored.relative_to(ROOT)}"' in (ROOT / "README.md").read_text(encoding="utf-8")


@each(IPYNB)
def test_notebook_has_exercises_and_solutions(path):
    tags = {tag for cell in cells(path, "code") for tag in cell.metadata.get("tags", [])}
    assert path.stem == "test" or {"exercise", "solution"} <= tags, f"its cells are tagged {sorted(tags)}"


@each(IPYNB)
def test_code_cells_are_short(path):
    lengths = [len(cell.source.splitlines()) for cell in cells(path, "code")]
    assert max(lengths) <= 25, f"code cell {lengths.index(max(lengths)) + 1} has {max(lengths)} lines"
    assert statistics.median(lengths) <= 4, f"half of the code cells have {statistics.median(lengths)} lines or more"


@each(IPYNB)
def test_pictures_in_outputs_have_alt_text(path):
    for output in outputs(path):
        for mime in output.get("data", {}):
            if mime.startswith("image/"):
                alt = output.metadata.get(mime, {}).get("alt", "")
                assert alt.strip(), f"a picture without words, beside {output.data.get('text/plain')!r}"


@each(PAGES)
def test_pictures_in_prose_have_alt_text(path):
    prose = markdown(path)
    silent = re.findall(r"!\[\s*\]\([^)]*\)", prose)
    silent += [tag for tag in re.findall(r"<img\b[^>]*>", prose) if not re.search(r"""\balt=(["'])\s*[^\s"']""", tag)]
    assert not silent


@each(PAGES)
def test_relative_links_lead_somewhere(path):
    targets = re.findall(r"""\]\(\s*<?([^)\s>]+)|\b(?:src|href)=["']([^"']+)""", markdown(path))
    targets = {(a or b).split("#")[0] for a, b in targets if not re.match(r"[a-z]+:|#|//", a or b)}
    known = {*FILES, *(folder for file in FILES for folder in file.parents)}
    assert not [target for target in targets if (path.parent / target).resolve() not in known]


@each(IPYNB)
def test_notebook_opens_on_colab_and_binder(path):
    first, fetch = cells(path, "markdown")[0].source, cells(path, "code")[0].source
    for address in (f"{COLAB}blob/main/notebooks/{path.name}", f"{BINDER}main?labpath=notebooks/{path.name}"):
        assert f"({address})" in first, f"there is no badge that leads to {address}"
    assert fetch == FETCH, "the first code cell must fetch the repository on Colab, and do nothing elsewhere"


@each(PAGES)
def test_badges_lead_to_notebooks_of_this_repository(path):
    for address in re.findall(r"https://(?:colab\.research\.google\.com/github|mybinder\.org/v2)/[^)\s]*", markdown(path)):
        base = next((base for base in (f"{COLAB}blob/main/", f"{BINDER}main?labpath=") if address.startswith(base)), None)
        assert base, f"{address} is not in {URL}"
        assert ROOT / address.removeprefix(base) in FILES, f"{address} leads to a file that is not there"


@each(FILES)
def test_file_is_small(path):
    limit = 1_000_000 if path.suffix == ".ipynb" else 40_000_000
    assert path.stat().st_size < limit


@each(FILES)
def test_file_names_no_folder_of_one_machine(path):
    assert not MACHINE_PATH.findall(text(path))


def test_package_is_an_evenings_reading():
    sizes = {path.name: code_lines(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert sum(sizes.values()) < 1300, f"lines of code: {sizes}"


def test_notebooks_lie_where_they_belong():
    assert not [path for path in IPYNB if path.parent != NOTEBOOKS]
