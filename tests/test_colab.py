"""A new reader on Colab: one .ipynb in an empty folder, and the repository on the network.

The first cell fetches the version that the notebook belongs to, by its tag; as long as that version
is not released, what there is.
"""

import os
import subprocess

import nbformat
import pytest
from address import fetch_cell, values
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from notebooks import ENVIRONMENT, ROOT, time_limit

URL, VERSION = values()
CHECK = """import noisout_nb, os
assert noisout_nb.__file__.startswith(os.path.abspath("noisOut")), noisout_nb.__file__"""
WHOLE = """from noisout_nb.generate import sample_image
from noisout_nb.widgets import Live"""
GIT = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]


def git(*arguments):
    return subprocess.check_output([*GIT, *arguments], cwd=ROOT, text=True).strip()


try:
    git("rev-parse", "HEAD")
except (OSError, subprocess.CalledProcessError):
    reason = (
        "not here: no git, no clone, or git refuses this folder: there is nothing to fetch from"
    )
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def colab(tmp_path):
    """Runs the first cell and others as Colab would; takes the repository's address here."""
    (tmp_path / "modules" / "google").mkdir(parents=True)
    (tmp_path / "modules" / "google" / "colab.py").write_text("", encoding="utf-8")
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "colab.py").write_text("import google.colab", encoding="utf-8")
    folder = tmp_path / "content"
    folder.mkdir()

    def run(address, *sources):
        redirection = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{address}.insteadOf",
            "GIT_CONFIG_VALUE_0": URL,
        }
        places = {"PYTHONPATH": str(tmp_path / "modules"), "IPYTHONDIR": str(tmp_path / "ipython")}
        cells = map(nbformat.v4.new_code_cell, [fetch_cell(URL, VERSION), *sources])
        nb = nbformat.v4.new_notebook(cells=list(cells))
        resources = {"metadata": {"path": str(folder)}}
        limit = round(time_limit())
        client = NotebookClient(nb, kernel_name="python3", timeout=limit, resources=resources)
        client.execute(env=os.environ | ENVIRONMENT | redirection | places)

    return run


@pytest.fixture
def served(tmp_path):
    """The repository on the network; its branch main holds what is here, uncommitted or not."""
    served = tmp_path / "served"
    git("clone", "-q", "--bare", str(ROOT), str(served))
    for tag in git("--git-dir", str(served), "tag").split():
        git("--git-dir", str(served), "tag", "-d", tag)
    changed = git("stash", "create") or "HEAD"
    git("push", "-q", "--force", str(served), f"{changed}:refs/heads/main")
    git("--git-dir", str(served), "symbolic-ref", "HEAD", "refs/heads/main")
    return served


def test_before_the_release_the_newest_state_is_fetched_once(colab, served):
    colab(served.as_uri(), CHECK, WHOLE)
    colab("file:///nowhere", CHECK)  # what is there already is not fetched again


def test_after_the_release_a_notebook_fetches_its_own_version(colab, served):
    git("--git-dir", str(served), "tag", f"v{VERSION}", "main")
    nothing = git("hash-object", "-t", "tree", "-w", os.devnull)
    later = git("commit-tree", nothing, "-m", "another package, some day")
    git("push", "-q", "--force", str(served), f"{later}:refs/heads/main")
    colab(served.as_uri(), CHECK)


def test_without_the_repository_the_first_cell_says_so(colab):
    with pytest.raises(CellExecutionError, match="git clone"):
        colab("file:///nowhere")
