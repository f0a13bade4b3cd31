"""Give the repository another address, in every file that names it.

    python tools/address.py https://github.com/OWNER/NAME

The present one is the value `Repository` in pyproject.toml.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    old = project["urls"]["Repository"].removeprefix("https://github.com/")
    new = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", "".join(sys.argv[1:]))
    if new is None:
        raise SystemExit(f"{__doc__}\nIt is {old!r} now.")
    pattern = rf"(github\.com/|\.com/github/|/v2/gh/){re.escape(old)}(?![\w-])"
    command = ["git", "grep", "-lI", "--untracked", "-F", old]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        text = (ROOT / name).read_bytes().decode()
        changed, count = re.subn(pattern, rf"\g<1>{new[1]}", text)
        if count:
            (ROOT / name).write_bytes(changed.encode())
            print(f"{name}: {count}")


if __name__ == "__main__":
    main()
