"""The notebooks' own code, cell by cell, for tests that need not run a whole notebook."""

from notebooks import read_script


def cell(name: str, words: str) -> str:
    """The source of the one code cell of a notebook's script that has these words in it."""
    sources = [cell.source for cell in read_script(name).cells if cell.cell_type == "code"]
    [found] = [source for source in sources if words in source]
    return found
