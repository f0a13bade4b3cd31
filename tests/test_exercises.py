"""Every exercise: unanswered at first, wrong answers refused, the folded solution accepted.

The cells of the exercises run as a reader runs them, after those statements of the notebook, and
only those, that they depend on; so no network is trained and nothing is drawn for it.
"""

import ast
import builtins
import re

import pytest
import torch
from slices import bound, execute, functions_of, needed, parsed

from noisout_nb import exercises, generate
from notebooks import NOTEBOOKS, read_script

SCRIPTS = sorted(path.stem for path in (NOTEBOOKS / "scripts").glob("[0-9]*.py"))


def is_open(node):
    """Does the statement wait for an answer: `x = None`, `x = ...`, a function without a body?"""
    if isinstance(node, ast.FunctionDef):
        return all(
            isinstance(part, ast.Expr | ast.Return)
            and isinstance(part.value, ast.Constant | None)
            and (part.value is None or part.value.value in (None, ...))
            for part in node.body
        )
    value = node.value if isinstance(node, ast.Assign) else None
    return isinstance(value, ast.Constant) and value.value in (None, ...)


def checks(node):
    """Does the statement call `check`?"""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "check"


def solutions(cells):
    """The code of the first solution among the cells, in blocks or inline, as statements."""
    text = next(cell.source for cell in cells if "<details>" in cell.source)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = blocks or re.findall(r"`(\w+ = [^`]+)`", text)
    assert blocks, "the solution has no code that sets the answer"
    return [ast.parse(block).body for block in blocks]


class Page:
    """The exercises of a notebook and what they need."""

    def __init__(self, name):
        self.cells = read_script(name).cells
        code = [i for i, cell in enumerate(self.cells) if cell.cell_type == "code"]
        trees = {i: ast.parse(self.cells[i].source).body for i in code}
        self.checkers = [i for i in code if any(map(checks, trees[i]))]
        first = next(i for i in code if any(map(is_open, trees[i])) and i >= self.checkers[0] - 2)
        self.exercises = [i for i in code if first <= i <= self.checkers[-1]]
        self.trees = trees
        statements = parsed(self.cells[:first])
        functions = functions_of(statements)
        steps = []
        for i in self.exercises:
            steps += trees[i]
            if i in self.checkers:
                steps += sum(solutions(self.cells[i:]), [])
        names = needed(steps, set(), functions, every=True)[1] - set(dir(builtins))
        self.context = needed(statements, names, functions)[0]


@pytest.fixture(scope="module", params=SCRIPTS)
def page(request):
    return Page(request.param)


@pytest.fixture
def quick(monkeypatch):
    """Images from pretrained weights in two steps: what they show is not asked for here."""
    usual = generate.sample_image
    fast = lambda *args, **options: usual(*args, **options | {"steps": 2})  # noqa: E731
    monkeypatch.setattr(generate, "sample_image", fast)


def wrong_answers(right):
    """Answers of the right kind that are far off, of another shape and of another kind."""
    yield "a word that is no answer"
    try:
        numbers = torch.as_tensor(right, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return
    yield numbers + 1000
    yield torch.full_like(numbers, torch.nan)
    yield torch.stack([numbers, numbers])


def test_unanswered_then_wrong_then_right(page, quick, capsys):
    asked = []

    def recorded(name, answer, correct, *args, **options):
        asked.append((name, answer, correct, args, options))
        exercises.check(name, answer, correct, *args, **options)

    space = {"__name__": "exercise"}
    execute(page.context, space)
    count = 0
    for i in page.exercises:
        capsys.readouterr()
        execute(page.trees[i], space)  # as the notebook comes
        said = capsys.readouterr().out.splitlines()
        if i not in page.checkers:
            continue
        assert said and all(line.endswith("not answered yet") for line in said), said

        blanks = {
            name: node
            for k in page.exercises
            for node in page.trees[k]
            if k <= i and is_open(node)
            for name in bound(node)
        }
        for tree in solutions(page.cells[i:]):  # a further example has to be Python, at least
            if blanks.keys() & {name for node in tree for name in bound(node)}:
                execute(tree, space)
                for node in tree:
                    for name in bound(node):
                        blanks.pop(name, None)
        asked.clear()
        space["check"] = recorded
        execute([node for node in page.trees[i] if not is_open(node)], space)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == len(asked) and all(line.endswith(": right") for line in said), said

        for name, answer, correct, args, options in asked:
            for wrong in wrong_answers(answer):
                exercises.check(name, wrong, correct, *args, **options)
                said = capsys.readouterr().out
                assert said.startswith(f"{name}: not right yet"), f"{wrong!r}: {said}"
        count += len(asked)
    assert count >= 2, "two exercises at least"
