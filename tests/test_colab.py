"""A new reader on Colab: one .ipynb in an empty folder, and the repository on the network."""

import os
import subprocess
import tomllib

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from notebooks import ENVIRONMENT, NOTEBOOKS, ROOT, time_limit

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URL = PROJECT["urls"]["Repository"]
CHECK = """import noisout_nb, os
assert noisout_nb.__file__.startswith(os.path.abspath("noisOut")), noisout_nb.__file__"""


def git(*arguments):
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


try:
    git("rev-parse", "HEAD")
except (OSError, subprocess.CalledProcessError):
    reason = (
        "not here: no git, no clone, or git refuses this folder: there is nothing to fetch from"
    )
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def colab(tmp_path):
    """Runs a notebook as Colab would; takes its name and the repository's address here."""
    (tmp_path / "modules" / "google").mkdir(parents=True)
    (tmp_path / "modules" / "google" / "colab.py").write_text("")
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab")
    folder = tmp_path / "content"
    folder.mkdir()

    def run(name, address):
        redirection = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{address}.insteadOf",
            "GIT_CONFIG_VALUE_0": URL,
        }
        places = {"PYTHONPATH": str(tmp_path / "modules"), "IPYTHONDIR": str(tmp_path / "ipython")}
        nb = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        nb.cells.append(nbformat.v4.new_code_cell(CHECK))
        resources = {"metadata": {"path": str(folder)}}
        limit = round(time_limit())
        client = NotebookClient(nb, kernel_name="python3", timeout=limit, resources=resources)
        client.execute(env=os.environ | ENVIRONMENT | redirection | places)

    return run


def test_a_notebook_alone_fetches_the_repository(colab, tmp_path):
    served = tmp_path / "served"
    git("clone", "-q", "--bare", str(ROOT), str(served))
    changed = git("stash", "create") or "HEAD"  # uncommitted changes, too
    git("push", "-q", "--force", str(served), f"{changed}:refs/heads/main")
    colab("02_forward_process", served.as_uri())
    colab("03_unet", "file:///nowhere")  # what is there already is not fetched again


def test_without_the_repository_the_first_cell_says_so(colab):
    with pytest.raises(CellExecutionError, match="git clone"):
        colab("02_forward_process", "file:///nowhere")
