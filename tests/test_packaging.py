"""The package as it is installed: what the wheel holds, and what importing it costs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from layout import PROJECT, ROOT, modules

# What `import compax` must leave to the functions that use it; as modules, not as distributions.
HEAVY = {
    "array_record",
    "gguf",
    "grain",
    "matplotlib",
    "ml_collections",
    "optax",
    "orbax",
    "qwix",
    "rich",
    "safetensors",
    "tensorboardX",
    "tokenizers",
    "transformers",
}


def run(code: str, *arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process, in folder `cwd`, with `path` before the installed packages."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def output(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr
    return process.stdout


def packages() -> list[str]:
    return sorted(name for name, file in modules().items() if file.name == "__init__.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: setuptools would add what it built there before."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for file in modules().values():
        copy = source / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    output(run("import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])", str(target), cwd=source))
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, which is what installing a wheel of pure Python does."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_list_of_packages_is_the_folders() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == packages()


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {file.parent for file in modules().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_module_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    expected = {
        name.replace(".", "/") + ("/__init__.py" if file.name == "__init__.py" else ".py")
        for name, file in modules().items()
    }
    assert held == expected


def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    # An editable install of the checkout would fill the gaps of a wheel, so every file has to be the wheel's.
    code = "import importlib, sys; [print(importlib.import_module(name).__file__) for name in sys.argv[1:]]"
    files = output(run(code, *packages(), cwd=tmp_path, path=installed)).split()
    assert [Path(file).is_relative_to(installed) for file in files] == [True] * len(packages()), files


def test_the_command_line_of_the_wheel_exists(installed: Path, tmp_path: Path) -> None:
    module, function = PROJECT["project"]["scripts"]["compax"].split(":")
    code = "import importlib, sys; print(callable(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])))"
    assert output(run(code, module, function, cwd=tmp_path, path=installed)).strip() == "True"


def test_importing_core_from_the_checkout_says_what_to_do() -> None:
    process = run("import core", cwd=ROOT)
    assert process.returncode != 0
    assert "ImportError" in process.stderr
    assert "pip install -e ." in process.stderr


def test_importing_compax_brings_in_little() -> None:
    """Modules and CPU time that `import compax` adds to those of what it is built on."""
    code = """
import sys, time
import numpy, jax, jaxtyping, flax.linen, flax.nnx
before, start = set(sys.modules), time.process_time()
import compax
print(time.process_time() - start, start, *sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    seconds, base_seconds, *added = output(run(code, cwd=ROOT.parent)).split()
    assert HEAVY.intersection(added) == set()
    assert float(seconds) < float(base_seconds) / 2
