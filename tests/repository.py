"""Is the repository in order? `make check` runs this for contributors; readers need not ask.

Each failure names the file and the way out.
"""

import ast
import json
import re
import statistics
import subprocess
import tomllib

import nbformat
import pytest

from notebooks import IMAGES, NOTEBOOKS, ROOT, SCRIPTS, canonicalise, cover, difference, names


def tracked_files():
    """The files that git knows or would add; without git all is skipped, with a word."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except OSError:
        pytest.skip("not here: git is not installed", allow_module_level=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"not here: git says: {error.stderr.strip()}", allow_module_level=True)
    found = {ROOT / name for name in listed.stdout.split("\0") if name}
    return sorted(path for path in found if path.is_file())


FILES = tracked_files()
IPYNB = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = [path for path in FILES if path.suffix in (".md", ".ipynb")]
SOURCES = [path for path in FILES if path.parent.name == "noisout_nb" and path.suffix == ".py"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URL = PROJECT["urls"]["Repository"]
OWNER_AND_NAME = URL.removeprefix("https://github.com/")
COLAB = f"https://colab.research.google.com/github/{OWNER_AND_NAME}/"
BINDER = f"https://mybinder.org/v2/gh/{OWNER_AND_NAME}/"
FETCH = f"""import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run(
        "test -d noisOut || git clone -q --depth 1 {URL} noisOut",
        shell=True,
        check=True,
    )
    sys.path.insert(0, "noisOut")"""
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|tmp|home|Users)/\S*")
TOP = """README.md requirements.txt requirements.lock pyproject.toml Makefile LICENSE
CONTRIBUTING.md CITATION.cff CHANGELOG.md demo.png results.png
models notebooks noisout_nb site tests tools"""
LINE = 100

# Modules that stand alone, and the stages in the series' order: each builds on those before it.
ALONE = {"profiles", "flowers", "unet"}
STAGES = ["data", "forward_process", "unet", "training", "sampling", "guidance", "evaluation"]
STAGES += ["editing", "flow_matching"]


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
    long = [source.splitlines()[0] for source in sources if len(source.splitlines()) > 25]
    assert not long, f"cells of more than 25 lines, which begin with {long}"
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
    assert fetch == FETCH, "the first code cell fetches the repository on Colab, and nothing else"


@each(PAGES)
def test_badges_lead_to_notebooks_of_this_repository(path):
    hosts = r"https://(?:colab\.research\.google\.com/github|mybinder\.org/v2)/[^)\s]*"
    bases = (f"{COLAB}blob/main/", f"{BINDER}main?labpath=")
    for address in re.findall(hosts, markdown(path)):
        base = next((base for base in bases if address.startswith(base)), None)
        assert base, f"{address} is not in {URL}: make address URL=... changes them all"
        file = address.removeprefix(base)
        assert ROOT / file in FILES, f"{address} leads to a file that is not there"


def test_an_origin_on_github_is_the_address_that_the_badges_name():
    command = ["git", "remote", "get-url", "origin"]
    origin = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = re.fullmatch(r"(?:https://|git@)github\.com[/:]([^/]+/[^/]+?)(?:\.git)?/?", origin)
    address = found and f"https://github.com/{found[1]}"
    assert address in (None, URL), f"badges would lead to {URL}: make address URL={address}"


@each(FILES)
def test_file_is_small(path):
    limit = 1_000_000 if path.suffix == ".ipynb" else 40_000_000
    assert path.stat().st_size < limit


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


def test_metrics_draw_nothing_and_figures_train_nothing():
    for module in ("evaluation", "sampling", "training", "generate"):
        assert not {"matplotlib", "IPython", "ipywidgets"} & outside(module), module
    assert not {"training", "sampling", "guidance", "generate"} & reached("figures")


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
