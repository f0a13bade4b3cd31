"""A new reader on Colab: nothing but one .ipynb in an empty folder, and the repository somewhere on the network."""

import os
import shutil
import subprocess
import tomllib

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import ENVIRONMENT, NOTEBOOKS, ROOT

URL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
CHECK = "import noisout_nb, os; assert noisout_nb.__file__.startswith(os.path.abspath('noisOut')), noisout_nb.__file__"

if not (ROOT / ".git").exists() or not shutil.which("git"):
    pytest.skip("not a git clone: there is nothing to fetch from", allow_module_level=True)


def git(*arguments):
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


@pytest.fixture
def colab(tmp_path):
    """Runs a notebook as Colab would: a function that takes the repository's address on this machine."""
    (tmp_path / "modules" / "google").mkdir(parents=True)
    (tmp_path / "modules" / "google" / "colab.py").write_text("")
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab")
    folder = tmp_path / "content"
    folder.mkdir()

    def run(name, address):
        redirection = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{address}.insteadOf", "GIT_CONFIG_VALUE_0": URL}
        places = {"PYTHONPATH": str(tmp_path / "modules"), "IPYTHONDIR": str(tmp_path / "ipython")}
        nb = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
        nb.cells.append(nbformat.v4.new_code_cell(CHECK))
        client = NotebookClient(nb, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(folder)}})
        client.execute(env=os.environ | ENVIRONMENT | redirection | places)

    return run


def test_a_notebook_alone_fetches_the_repository(colab, tmp_path):
    served = tmp_path / "served"
    git("clone", "-q", "--bare", str(ROOT), str(served))
    git("push", "-q", "--force", str(served), f"{git('stash', 'create') or 'HEAD'}:refs/heads/main")  # with uncommitted changes
    colab("02_forward_process", served.as_uri())
    colab("03_unet", "file:///nowhere")  # what is there already is not fetched again


def test_without_the_repository_the_first_cell_says_so(colab):
    with pytest.raises(CellExecutionError, match="git clone"):
        colab("02_forward_process", "file:///nowhere")
