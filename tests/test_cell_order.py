"""Cells run out of order, or again, never spoil the weights that `test` and 04 have saved."""

import ast
from dataclasses import replace

import pytest
from slices import execute, functions_of, needed, parsed

from noisout_nb import profiles
from noisout_nb.checkpoints import read_card
from notebooks import read_script

TINY = {
    "train_steps": 5,
    "train_images": 16,
    "batch_size": 4,
    "channels": 32,
    "channel_mults": (1,),
}


class Notebook:
    """The cells with the network, the training and the saving, after what they depend on."""

    def __init__(self, name, folder, monkeypatch):
        quick = replace(profiles.PROFILES["quick"], **TINY)
        monkeypatch.setitem(profiles.PROFILES, "quick", quick)
        monkeypatch.setenv("NOISOUT_RUNS", str(folder))
        monkeypatch.setattr("noisout_nb.training.held_out_loss", lambda *args, **options: 0.5)
        cells = read_script(name).cells
        self.cells = {
            "network": self.find(cells, "model = UNet("),
            "training": self.find(cells, ", Live("),
            "saving": self.find(cells, "save_model("),
        }
        trees = {key: ast.parse(cells[i].source).body for key, i in self.cells.items()}
        before = parsed(cells[: self.cells["training"]])
        names = set().union(*(needed(t, set(), {}, every=True)[1] for t in trees.values()))
        context, _ = needed(before, names, functions_of(before))
        self.trees, self.space = trees, {"__name__": "notebook"}
        execute(context, self.space)
        self.context = [n for n in context if not isinstance(n, ast.Import | ast.ImportFrom)]
        self.weights = quick.weights

    @staticmethod
    def find(cells, text):
        return next(i for i, c in enumerate(cells) if c.cell_type == "code" and text in c.source)

    def run(self, key, steps=None):
        """Run a cell; the training is interrupted after so many steps."""

        def interrupted(run, **_):
            for count, step in enumerate(run, 1):
                yield step
                if count == steps:
                    raise KeyboardInterrupt

        self.space["progress"] = interrupted
        execute(self.trees[key], self.space)

    def saved(self):
        return self.weights.read_bytes()


@pytest.fixture(params=["test", "04_training"])
def notebook(request, tmp_path, monkeypatch):
    return Notebook(request.param, tmp_path, monkeypatch)


def test_saved_weights_survive_every_order_of_cells(notebook):
    with pytest.raises(KeyboardInterrupt):
        notebook.run("training", steps=2)
    with pytest.raises(RuntimeError, match="not finished"):
        notebook.run("saving")  # half-trained
    assert not notebook.weights.exists()

    notebook.run("training")  # goes on
    notebook.run("saving")
    there = notebook.saved()
    assert read_card(notebook.weights)["steps"] == 5

    with pytest.raises(RuntimeError, match="trained already"):
        notebook.run("training")
    notebook.run("network")  # an untrained network, in 04 beside the old average
    with pytest.raises((RuntimeError, ValueError), match="not finished|another network"):
        notebook.run("saving")
    assert notebook.saved() == there

    execute(notebook.context, notebook.space)  # all the cells before: a second run
    with pytest.raises(KeyboardInterrupt):
        notebook.run("training", steps=1)
    with pytest.raises(RuntimeError, match="not finished"):
        notebook.run("saving")
    assert notebook.saved() == there
