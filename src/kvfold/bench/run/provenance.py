"""Where a result comes from: the revision of the source, the versions of what it stands on.

Read without importing any of it. What cannot be known is left out or None, never guessed.
"""

import subprocess
from importlib import metadata
from pathlib import Path
from platform import python_version

from kvfold.version import __version__

STANDS_ON = ("torch", "transformers", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """The version of kvfold, of Python and of each package that can move a number."""
    return {"kvfold": __version__, "python": python_version()} | {
        name: metadata.version(name) for name in STANDS_ON if _is_installed(name)
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def git_revision() -> str | None:
    """The commit of the source tree, with a plus where tracked files differ from it; None outside a checkout."""
    home = Path(__file__).resolve().parents[4]
    if not (home / ".git").exists():
        return None  # an installed wheel may lie inside somebody else's checkout
    try:
        commit = _git(home, "rev-parse", "HEAD").strip()
        return commit + ("+" if _git(home, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(home: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(home), *arguments], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout
