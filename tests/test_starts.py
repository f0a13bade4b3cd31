"""The ways a reader starts, up to the first cells: those that can be simulated on any machine.

Colab has a file of its own, test_colab.py. CONTRIBUTING.md says what was tried by hand, and when.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from notebooks import ENVIRONMENT, NOTEBOOKS, ROOT, time_limit

UNWANTED = (".git", ".venv", "runs", "data", "build", "_build", "node_modules", "*.egg-info")
UNWANTED += ("__pycache__", ".*_cache", ".virtual_documents")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
USES_GIT = ["tests/repository.py", "tests/test_colab.py", "tests/test_address.py"]
WHERE = """import noisout_nb, os
from noisout_nb.profiles import PROFILES
print(os.path.dirname(os.path.dirname(noisout_nb.__file__)))
print(PROFILES["quick"].published.exists(), PROFILES["quick"].runs)"""


@pytest.fixture(scope="module")
def download(tmp_path_factory):
    """The repository as a zip file brings it: no git, and a folder whose name shells dislike."""
    folder = tmp_path_factory.mktemp("downloads") / "Zoë's flöwers (花) & more"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*UNWANTED))
    return folder


def settings(package, **others):
    """The suite's environment, with the package from `package`; None takes a variable away."""
    known = os.environ | ENVIRONMENT | {"PYTHONPATH": str(package), "PYTHONUTF8": "1"} | others
    return {k: v for k, v in known.items() if v is not None and not k.startswith("PYTEST_")}


def python(*arguments, program=sys.executable, before=(), **options):
    command = [*before, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)


def beginning(name, *more):
    """A notebook's first two code cells, which import what it needs, and others."""
    nb = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    sources = [cell.source for cell in nb.cells if cell.cell_type == "code"][:2]
    nb.cells = [nbformat.v4.new_code_cell(source) for source in [*sources, *more]]
    return nb


# --- a download, other programs than JupyterLab ---


def test_nbconvert_executes_a_downloaded_notebook(download, tmp_path):
    nbformat.write(beginning("02_forward_process", WHERE), download / "notebooks" / "start.ipynb")
    found = python(
        *["-m", "nbconvert", "--execute", "--to", "notebook", "--stdout", "notebooks/start.ipynb"],
        cwd=download,
        env=settings(download, NOISOUT_RUNS=None),
    )
    assert found.returncode == 0, found.stderr[-4000:]
    printed = nbformat.reads(found.stdout, 4).cells[-1].outputs[0].text.splitlines()
    assert printed == [str(download), f"True {download / 'runs' / 'quick'}"]


def test_a_kernel_may_start_in_any_folder(tmp_path):
    """VS Code starts it in the notebook's folder or in the workspace's, as its user has set."""
    client = NotebookClient(
        beginning("02_forward_process", WHERE),
        kernel_name="python3",
        timeout=round(time_limit()),
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=settings(ROOT, NOISOUT_RUNS=None))
    printed = client.nb.cells[-1].outputs[0].text.splitlines()
    assert printed == [str(ROOT), f"True {ROOT / 'runs' / 'quick'}"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["clone", "program", "trust"])
def test_without_git_the_suite_runs_and_says_what_it_leaves_out(missing, download, tmp_path):
    folder = download if missing == "clone" else ROOT
    if missing == "trust" and not shutil.which("git"):
        pytest.skip("not here: git is not installed")
    given = {
        "clone": {"GIT_CEILING_DIRECTORIES": str(download.parent)},
        "program": {"PATH": str(tmp_path)},  # an empty folder
        "trust": {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"},  # a container, a mounted drive
    }[missing]
    found = python(
        *["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *USES_GIT],
        cwd=folder,
        env=settings(os.pathsep.join([str(folder), str(folder / "tools")]), **given),
    )
    assert found.returncode == 0, found.stdout[-4000:]
    word = {
        "clone": "not a git repository",
        "program": "git is not installed",
        "trust": "dubious ownership",
    }[missing]
    assert word in found.stdout and " passed" in found.stdout


# --- pip install, without a clone ---


def test_an_installed_package_brings_its_weights_and_writes_where_it_is_used(download, tmp_path):
    copy, site, place = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(download, copy)  # pip builds in the folder that it is given
    place.mkdir()
    pip_install(copy, "--target", site)
    environment = settings(site, NOISOUT_RUNS=None, NOISOUT_DATA=None)
    sample = ["-m", "noisout_nb", "sample", "rose", "--count", "1", "--steps", "1"]
    found = python(*sample, "--profile", "flowers64", cwd=place, env=environment)
    assert found.returncode == 0, found.stderr
    assert [path.suffix for path in place.iterdir()] == [".png"]

    shutil.rmtree(site / "noisout_nb" / "models")
    found = python(*sample, cwd=place, env=environment)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert "clone" in found.stderr and "noisout_nb train" in found.stderr
    assert str(place / "runs") in found.stderr  # not site-packages
    assert not {"runs", "data", "models"} & {path.name for path in site.iterdir()}


def pip_install(*arguments, program=sys.executable):
    """pip, with the setuptools that is there if it is new enough."""
    try:
        present = int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        present = False
    isolated = ["--no-build-isolation"] if present else []
    command = ["-m", "pip", "install", "-q", "--no-deps", *isolated]
    found = python(*command, *arguments, program=program, env=settings("", PYTHONPATH=None))
    assert found.returncode == 0, found.stderr


# --- Binder ---


def test_binder_has_what_the_package_needs():
    spec = (ROOT / ".binder" / "environment.yml").read_text(encoding="utf-8")
    given = dict(re.findall(r"(?m)^  - ([\w-]+)(.*)$", spec))
    assert "channels: [conda-forge]" in spec
    there = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base"}  # their names there
    for requirement in PROJECT["dependencies"]:
        name, limit = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        assert given[there.get(name, name)] in (limit, "=8"), requirement
    python_version = given["python"].removeprefix("=")
    assert f"Programming Language :: Python :: {python_version}" in PROJECT["classifiers"]
    assert {"pip", "jupyterlab"} <= set(given)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert build["requires"] == ["setuptools" + given["setuptools"]]


@pytest.mark.skipif(os.name == "nt", reason="not here: Binder's machines have a shell")
def test_binders_last_step_makes_the_package_importable(download, tmp_path):
    copy = tmp_path / "a copy"
    shutil.copytree(download, copy)
    program = environment_of_its_own(tmp_path / "environment")
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    given = settings("", PYTHONPATH=None, PATH=path)
    found = subprocess.run([copy / ".binder" / "postBuild"], cwd=copy, env=given)
    assert found.returncode == 0
    found = python("-c", WHERE, program=program, cwd=tmp_path, env=given)
    assert found.stdout.splitlines()[0] == str(copy), found.stderr


def environment_of_its_own(folder):
    """A virtual environment in which this one's packages, but not noisout_nb, can be imported."""
    venv.create(folder, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    inside = Path(sysconfig.get_path("purelib", "venv", scheme))
    (inside / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"


# --- folders and systems of all kinds ---

LOAD = """from noisout_nb.data import FolderImages
print(len(FolderImages(16)), len(FolderImages(16, "val")))"""


def without_power():
    """What starts a program for which a folder's permissions hold: root's are above them."""
    if os.name == "nt":
        pytest.skip("not here: Windows has other permissions")
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("not here: root without setpriv, who may write everywhere")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def test_images_in_a_read_only_folder_are_read(tmp_path):
    images, runs = tmp_path / "images", tmp_path / "runs"
    for folder in (images, runs):
        folder.mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), (9 * number, 0, 0)).save(images / f"é {number}.png")
    before = sorted(images.iterdir())
    given = settings(ROOT, NOISOUT_DATA=str(images), NOISOUT_RUNS=str(runs))
    for folder in (images, runs):
        folder.chmod(0o555)
    try:
        found = python("-c", LOAD, before=without_power(), env=given)
    finally:
        for folder in (images, runs):
            folder.chmod(0o755)
    assert found.returncode == 0 and found.stdout.split() == ["3", "1"], found.stderr
    assert sorted(images.iterdir()) == before and not list(runs.iterdir())


def test_the_programs_speak_where_the_console_has_256_characters():
    """Windows' cp1252, which a redirected output has there."""
    from noisout_nb.__main__ import _parser
    from noisout_nb.checkpoints import read_card
    from noisout_nb.profiles import PROFILES

    parser = _parser()
    commands = parser._subparsers._group_actions[0].choices.values()
    words = [each.format_help() for each in (parser, *commands)]
    for name in ("quick", "flowers64"):
        words += read_card(PROFILES[name].published)["classes"]
    assert "\n".join(words).encode("cp1252")
