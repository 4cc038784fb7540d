"""Lays the mapped packages out under build/typing/compax as symlinks, for type checkers.

The folders stand at the root of the repository and setuptools maps them into one namespace, which type checkers do not
follow. Run it before pyright: `python .ci/typing_tree.py && pyright`.
"""

import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typing"


def folder(package: str, mapping: dict[str, str]) -> Path:
    """Returns the folder that holds a package: that of its longest mapped prefix, and the rest of its name."""
    prefix = max((name for name in mapping if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT.joinpath(mapping[prefix], *package.removeprefix(prefix).strip(".").split("."))


def main() -> None:
    """Replaces the tree by one symlink for every module of every package in pyproject.toml."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shutil.rmtree(TREE, ignore_errors=True)
    for package in setuptools["packages"]:
        place = TREE.joinpath(*package.split("."))
        place.mkdir(parents=True, exist_ok=True)
        for module in folder(package, setuptools["package-dir"]).glob("*.py"):
            (place / module.name).symlink_to(module)


if __name__ == "__main__":
    main()
