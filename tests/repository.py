"""Is the repository in order? `make check` runs this for contributors; readers need not ask.

Each failure names the file and the way out.
"""

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib

import nbformat
import pytest
from address import fetch_cell
from links import LIST, links, listed
from tracked import tracked_files

from notebooks import IMAGES, NOTEBOOKS, ROOT, SCRIPTS, canonicalise, cover, difference, names

try:
    FILES = tracked_files()
except RuntimeError as reason:  # a download without git, a folder of another owner
    pytest.skip(f"not here: the files to check are git's, and {reason}", allow_module_level=True)

IPYNB = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = [path for path in FILES if path.suffix in (".md", ".ipynb")]
SOURCES = [path for path in FILES if path.parent.name == "noisout_nb" and path.suffix == ".py"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URL = PROJECT["urls"]["Repository"]
OWNER_AND_NAME = URL.removeprefix("https://github.com/")
COLAB = f"https://colab.research.google.com/github/{OWNER_AND_NAME}/"
BINDER = f"https://mybinder.org/v2/gh/{OWNER_AND_NAME}/"
FETCH = fetch_cell(URL, PROJECT["version"])
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|tmp|home|Users)/\S*")
TOP = """README.md requirements.txt requirements.lock pyproject.toml Makefile LICENSE
CONTRIBUTING.md CITATION.cff CHANGELOG.md demo.png results.png
models notebooks noisout_nb site tests tools"""
LINE = 100

# Modules that stand alone, and the stages in the series' order: each builds on those before it.
ALONE = {"profiles", "flowers", "unet"}
STAGES = ["data", "forward_process", "unet", "training", "sampling", "guidance", "evaluation"]
STAGES += ["editing", "flow_matching"]
# Modules that may need matplotlib or widgets; and those of them that run whole programs.
FIGURES = {"picture", "grids", "plots", "charts", "figures", "diagram", "widgets"}
PROGRAMS = {"commands", "reports"}


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
    return re.sub(
        r"```.*?```|``.*?``|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", prose, flags=re.DOTALL
    )


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
        data = output.get("data", {})
        pieces += [str(data[mime]) for mime in data if mime.split("/")[0] != "image"]
    return "\n".join(pieces)


@pytest.mark.parametrize("name", names())
def test_script_and_notebook_agree(name):
    assert not (problem := difference(name)), problem


@each(IPYNB)
def test_notebook_is_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in cells(path, "code")]
    way_out = f"stale or missing outputs: make record NAME={path.stem}"
    assert counts == list(range(1, len(counts) + 1)), way_out


@each(IPYNB)
def test_notebook_fails_only_where_it_means_to(path):
    for number, cell in enumerate(cells(path, "code"), 1):
        failed = any(output.output_type == "error" for output in cell.outputs)
        meant = "raises-exception" in cell.metadata.get("tags", [])
        assert failed == meant, f"code cell {number}:\n{cell.source}"


@each(IPYNB)
def test_notebook_is_stored_as_record_writes_it(path):
    stored = path.read_text(encoding="utf-8")
    clean = nbformat.writes(canonicalise(nbformat.reads(stored, 4))) + "\n"
    assert json.loads(stored) == json.loads(clean), (
        "metadata, widgets or ids that a recording does not have (saved by hand?): "
        f"make sync NAME={path.stem}"
    )


@each(IPYNB)
def test_cover_is_the_notebooks_own_image_and_the_readme_shows_it(path):
    stored = IMAGES / f"{path.stem}.png"
    assert stored.read_bytes() == cover(nbformat.read(path, 4)), f"make record NAME={path.stem}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f'src="{stored.relative_to(ROOT).as_posix()}"' in readme


@each([path for path in IPYNB if path.stem != "test"])
def test_notebook_has_exercises_and_solutions(path):
    prose = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    code = "\n\n".join(cell.source for cell in cells(path, "code"))
    assert re.search(r'check\(\s*"exercise 1', code), "no cell checks the answer to an exercise"
    solutions = r"<details>\s*<summary>[^<]*Solution.*?</details>"
    assert re.search(solutions, prose, re.DOTALL), "no solution folded away in <details>"


def only_imports(source):
    """Whether a cell does nothing else; one with a magic or `!` in it does."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return False
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in statements)


@each(IPYNB)
def test_code_cells_are_short(path):
    sources = [cell.source for cell in cells(path, "code") if not only_imports(cell.source)]
    lengths = [len(source.splitlines()) for source in sources]
    # a network is read best in one piece
    limits = {source: 55 if source.startswith("class ") else 25 for source in sources}
    long = [
        source.splitlines()[0] for source in sources if len(source.splitlines()) > limits[source]
    ]
    assert not long, f"cells of more than 25 lines (55 for a class), which begin with {long}"
    assert statistics.median(lengths) <= 12, "half of the code cells are longer than 12 lines"


@each(sorted(SCRIPTS.glob("*.py")))
def test_lines_of_scripts_fit_the_screen(path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    long = [number for number, line in lines if len(line) > LINE and "](" not in line]
    assert not long, f"more than {LINE} columns in lines {long}"


@each(IPYNB)
def test_images_in_outputs_have_alt_text(path):
    for output in outputs(path):
        for mime in output.get("data", {}):
            if mime.startswith("image/"):
                alt = output.metadata.get(mime, {}).get("alt", "")
                assert alt.strip(), f"no alt text beside {output.data.get('text/plain')!r}"


@each(PAGES)
def test_images_in_prose_have_alt_text(path):
    prose = markdown(path)
    silent = re.findall(r"!\[\s*\]\([^)]*\)", prose)
    tags = re.findall(r"<img\b[^>]*>", prose)
    silent += [tag for tag in tags if not re.search(r"""\balt=(["'])\s*[^\s"']""", tag)]
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
    colab = f"{COLAB}blob/main/notebooks/{path.name}"
    for address in (colab, f"{BINDER}main?labpath=notebooks/{path.name}"):
        assert f"({address})" in first, f"there is no badge that leads to {address}"
    assert fetch == FETCH, "the first code cell is not that of tools/address.py: make address"


@each(PAGES)
def test_badges_lead_to_notebooks_of_this_repository(path):
    hosts = r"https://(?:colab\.research\.google\.com/github|mybinder\.org/v2)/[^)\s]*"
    bases = (f"{COLAB}blob/main/", f"{BINDER}main?labpath=")
    for address in re.findall(hosts, markdown(path)):
        base = next((base for base in bases if address.startswith(base)), None)
        assert base, f"{address} is not in {URL}: make address URL=... changes them all"
        file = address.removeprefix(base)
        assert ROOT / file in FILES, f"{address} leads to a file that is not there"


# where people publish code; an origin elsewhere (a folder, a company's server) says nothing
PUBLIC = r"(?:[\w.-]+\.)?(?:github\.com|gitlab\.com|bitbucket\.org|codeberg\.org|sr\.ht)"


def public_address(remote):
    """https://HOST/OWNER/NAME of a remote on a public host, in whatever form git has it."""
    form = rf"(?:(?:https?|ssh|git)://)?(?:[^@/]+@)?({PUBLIC})(?::\d+)?[/:](.+?)(?:\.git)?/?"
    found = re.fullmatch(form, remote.strip(), re.IGNORECASE)
    return found and f"https://{found[1].lower().removeprefix('www.')}/{found[2]}"


def remotes():
    """Name -> address of git's remotes."""
    found = subprocess.run(["git", "remote", "-v"], cwd=ROOT, capture_output=True, text=True)
    lines = [line.split() for line in found.stdout.splitlines() if line.endswith("(fetch)")]
    return {words[0]: public_address(words[1]) for words in lines}


@pytest.mark.parametrize(
    "remote, address",
    [
        ("https://github.com/some/fork", "https://github.com/some/fork"),
        ("https://me:secret@www.github.com/some/fork.git", "https://github.com/some/fork"),
        ("git@github.com:some/fork.git", "https://github.com/some/fork"),
        ("ssh://git@GitLab.com:22/some/fork/", "https://gitlab.com/some/fork"),
        ("/srv/some/fork.git", None),
        ("http://127.0.0.1:3000/some/fork.git", None),
        ("git@intranet:some/fork.git", None),
        ("https://notgithub.com/some/fork", None),
    ],
)
def test_public_remotes_are_recognised(remote, address):
    assert public_address(remote) == address


def test_badges_lead_to_where_this_repository_is_published():
    found = remotes()
    origin = found.get("origin")
    assert origin is None or URL.lower() in [str(address).lower() for address in found.values()], (
        f"git's origin is {origin}, but badges and clone commands lead to {URL}, which may not be "
        f"yours: make address URL={origin} (or, in a fork whose changes go back there, "
        f"git remote add upstream {URL})"
    )


def test_versions_agree():
    version = PROJECT["version"]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in cited, "make address writes it"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+?),? ", changes, re.MULTILINE)[1]
    assert newest == version, "the newest heading of CHANGELOG.md is the version in pyproject.toml"


def test_external_links_are_those_of_the_list():
    found, known = links(FILES), listed()
    new = {link: file for link, file in found.items() if link not in known}
    way_out = f"open them once, then: python tools/links.py write (it writes {LIST.name})"
    assert not new, f"addresses that are not in the list: {new}; {way_out}"
    assert not set(known) - set(found), f"addresses that nothing names any more; {way_out}"
    assert known == sorted(found) and all(link.startswith("https://") for link in known)


@each(PAGES)
def test_labels_of_papers_are_their_addresses(path):
    for label, target in re.findall(r"\[arXiv:([^]]*)\]\(([^)]*)\)", markdown(path)):
        assert target == f"https://arxiv.org/abs/{label}"
        assert re.fullmatch(r"\d{4}\.\d{4,5}", label), f"{label} is no number of arXiv's"


@each(FILES)
def test_file_is_small(path):
    limit = 1_000_000 if path.suffix == ".ipynb" else 40_000_000
    assert path.stat().st_size < limit


def test_file_names_work_on_windows_and_macos():
    names = [path.relative_to(ROOT).as_posix() for path in FILES]
    odd = [name for name in names if re.search(r'[<>:"\\|?*\x00-\x1f]|[ .](?:/|$)', name)]
    device = r"(?:^|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|/|$)"
    odd += [name for name in names if re.search(device, name, re.IGNORECASE)]
    assert not odd and max(map(len, names)) < 120
    assert len({name.lower() for name in names}) == len(names), "names that differ in case alone"


@each(FILES)
def test_file_names_no_folder_of_one_machine(path):
    assert not MACHINE_PATH.findall(text(path))


def test_everything_lies_where_the_design_has_it():
    top = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert not {name for name in top if not name.startswith(".")} - set(TOP.split())
    assert not [path for path in IPYNB if path.parent != NOTEBOOKS]


def test_pins_agree():
    def pins(name):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        found = (re.match(r"([\w.-]+)(?:\[\w+\])?==(\S+)", line) for line in lines)
        return {match[1].lower(): match[2] for match in found if match}

    required, locked = pins("requirements.txt"), pins("requirements.lock")
    assert required.items() <= locked.items(), "requirements.lock is stale: see CONTRIBUTING.md"
    extras = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert {re.match(r"[\w.-]+", name)[0] for name in extras} == set(required)
    assert not re.search(r"://| @ ", (ROOT / "requirements.lock").read_text(encoding="utf-8"))


# --- the package's import graph ---


def imports(path):
    """The package's modules that a module imports, and the names of others at its top level."""
    inside, outside = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            inside |= {node.module} if node.module else {alias.name for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(node.module.split(".")[0])
    return inside, outside


GRAPH = {path.stem: imports(path) for path in SOURCES if path.stem not in ("__init__", "__main__")}


def reached(module):
    """The module and all that it imports, directly or not."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += GRAPH[name][0]
    return found


def outside(module):
    return set().union(*(GRAPH[name][1] for name in reached(module)))


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_run_from_later_stages_to_earlier_ones(module):
    inside, _ = GRAPH[module]
    assert not any(module in reached(name) for name in inside), "the imports form a circle"
    if module in ALONE:
        assert not inside, f"{module} imports nothing of the package, not {sorted(inside)}"
    if module in STAGES:
        later = STAGES[STAGES.index(module) + 1 :]
        assert not reached(module) & set(later), f"{module} needs {reached(module) & set(later)}"


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_metrics_draw_nothing_and_figures_train_nothing(module):
    assert "noisout_nb" not in outside(module), "imports of the package itself are relative"
    if module in FIGURES:
        found = {"training", "sampling", "guidance", "generate"} & reached(module)
        assert not found, f"{module} only draws, but imports {found}"
    elif module not in PROGRAMS:
        found = {"matplotlib", "IPython", "ipywidgets"} & outside(module)
        assert not found, f"{module} computes, but imports {found}"


def test_sampling_imports_little():
    assert outside("sampling") <= {"torch", "tqdm", *sys.stdlib_module_names}


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@each(SOURCES)
def test_functions_fit_a_screen(path):
    for node in functions(path):
        docstring = ast.get_docstring(node) is not None
        start = node.body[0].end_lineno if docstring else node.body[0].lineno - 1
        length = node.end_lineno - start
        assert length <= 50, f"{node.name} has {length} lines below its docstring"
