"""The web addresses that the repository names: does each of them still lead somewhere?

    python tools/links.py          ask every address of tests/links.txt (a workflow does so weekly)
    python tools/links.py write    renew tests/links.txt from the files

`make check` compares the files with the list, offline. The repository's own address is left out:
it is a value of pyproject.toml.
"""

import re
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from tracked import ROOT, tracked_files

LIST = ROOT / "tests" / "links.txt"
HEADER = "# Every web address in the repository's pages and code; `python tools/links.py write`\n"
LINK = re.compile(r"https?://[^\s<>\"'`\\)\]}]+")
# patterns and placeholders of the code, and what is no page for people
NOT_PAGES = re.compile(
    r"[{|*(\[]|//(?:127\.0\.0\.1|localhost)|OWNER/NAME|https?://$|github\.com/?$|/whl/"
)
UNREACHED = (401, 403, 405, 406, 418, 429, 500, 502, 503, 504)  # says nothing about the page


def links(paths: list[Path]) -> dict[str, str]:
    """Web addresses in scripts, Markdown and code, and the first file that names each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = project["urls"]["Repository"].removeprefix("https://github.com/")
    found = {}
    for path in paths:
        if path.suffix not in (".md", ".py", ".toml", ".yml", ".cff", ".txt") or path == LIST:
            continue
        if path.parent == ROOT / "tests":  # made-up ones
            continue
        for link in LINK.findall(path.read_text(encoding="utf-8")):
            link = link.rstrip(".,;:!?")
            if own not in link and not NOT_PAGES.search(link):
                found.setdefault(link, path.relative_to(ROOT).as_posix())
    return dict(sorted(found.items()))


def listed() -> list[str]:
    """The addresses of tests/links.txt."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def problem(link: str, tries: int = 3) -> str | None:
    """Why the address leads nowhere; None if it leads somewhere, or refuses programs."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    reason = ""
    for attempt in range(tries):
        time.sleep(2 * attempt)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                answer.read(1)
            return None
        except urllib.error.HTTPError as error:
            if error.code in UNREACHED:
                print(f"not asked ({error.code}): {link}")
                return None
            reason = f"{error.code} {error.reason}"
        except OSError as error:
            reason = str(error)
    return reason


def main() -> None:
    if sys.argv[1:] == ["write"]:
        found = links(tracked_files())
        LIST.write_text(HEADER + "\n".join(found) + "\n", encoding="utf-8", newline="\n")
        print(f"{len(found)} addresses")
        return
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    known = listed()
    dead = {link: reason for link in known if (reason := problem(link))}
    for link, reason in dead.items():
        print(f"{reason}: {link}")
    print(f"{len(known) - len(dead)} of {len(known)} addresses lead somewhere")
    sys.exit(bool(dead))


if __name__ == "__main__":
    main()
