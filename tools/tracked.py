"""The repository's files, as git has them."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked_files() -> list[Path]:
    """The files that git knows or would add, sorted; RuntimeError says why git cannot list them."""
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except OSError:
        raise RuntimeError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"git says: {error.stderr.strip()}") from None
    found = {ROOT / name for name in listed.stdout.split("\0") if name}
    return sorted(path for path in found if path.is_file())
