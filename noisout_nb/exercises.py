"""Exercises: say whether the reader's answer is right."""

from collections.abc import Callable
from typing import Any

import torch


def check(
    name: str,
    answer: Any,
    correct: Any | Callable[[Any], Any],
    tolerance: float | None = None,
    hint: str = "",
) -> None:
    """Print whether `answer` is right, wrong (with `hint`) or, while it is None or `...`, missing.

    `correct`: the right answer (a word, a number, a tensor, or a list of numbers), or a function
    that takes the answer and returns whether it is right. `tolerance`: how far each number may be
    off; None allows for rounding alone. An answer of another kind or shape is wrong, not an error.

    >>> check("exercise 1", None, 4)
    exercise 1: not answered yet
    >>> check("exercise 1", 5, 4, hint="A pixel has three channels.")
    exercise 1: not right yet. A pixel has three channels.
    >>> check("exercise 1", 4.001, 4, tolerance=0.01)
    exercise 1: right
    """
    if answer is None or answer is ...:
        print(f"{name}: not answered yet")
        return
    holds = _holds(correct, answer) if callable(correct) else _agree(answer, correct, tolerance)
    print(f"{name}: right" if holds else f"{name}: not right yet. {hint}".rstrip())


def _holds(condition: Callable[[Any], Any], answer: Any) -> bool:
    try:
        return bool(condition(answer))
    except Exception:  # of whatever kind: the condition was made for another kind of answer
        return False


def _agree(answer: Any, correct: Any, tolerance: float | None) -> bool:
    if isinstance(correct, str):
        return isinstance(answer, str) and answer.strip().lower() == correct.lower()
    try:
        given = torch.as_tensor(answer, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # such as words, or None inside a list
        return False
    wanted = torch.as_tensor(correct, dtype=torch.float64, device="cpu")
    if given.shape != wanted.shape:
        return False
    rtol, atol = (1e-5, 1e-6) if tolerance is None else (0.0, tolerance)
    return torch.allclose(given, wanted, rtol=rtol, atol=atol)
