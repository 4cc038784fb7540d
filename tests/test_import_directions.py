"""Who may import whom, read from the source: core <- {passes, models} <- tpu <- experiments."""

import ast
import dataclasses
import graphlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator

from layout import FOLDERS, PROJECT, ROOT, modules

MAY_IMPORT = {
    "core": {"core"},
    "passes": {"core", "passes"},
    "models": {"core", "models"},
    "tpu": {"core", "passes", "models", "tpu"},
    "experiments": {"core", "passes", "models", "tpu", "experiments"},
}
MODELS_MAY_IMPORT_OF_CORE = {"compax.errors"}
JAX_INTERNALS = ("jax._src", "jax.core", "jax.extend")
JAX_BOUNDARY = "compax._jax"
MAX_LINES = 500
SHAPELESS_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


@dataclasses.dataclass(frozen=True)
class Import:
    """An import statement, or a use of one of JAX's internals.

    Attributes:
        target: The dotted name that is imported; for `from a import b` it is `a.b`.
        line: Where it stands.
        at_start: Whether it runs when the module is imported: not inside a function.
        types_only: Whether it stands under `if TYPE_CHECKING:`.
    """

    target: str
    line: int
    at_start: bool = True
    types_only: bool = False


def imports(source: str) -> list[Import]:
    """All imports of a module, those inside functions included."""
    return list(_walk(ast.parse(source), at_start=True, types_only=False))


def _walk(node: ast.AST, *, at_start: bool, types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from (Import(alias.name, child.lineno, at_start, types_only) for alias in child.names)
            case ast.ImportFrom():
                assert child.level == 0, f"line {child.lineno}: imports are absolute"
                for alias in child.names:
                    yield Import(f"{child.module}.{alias.name}", child.lineno, at_start, types_only)
            case ast.Attribute() if ast.unparse(child) in JAX_INTERNALS:
                yield Import(ast.unparse(child), child.lineno, at_start, types_only)
            case ast.If() if ast.unparse(child.test).endswith("TYPE_CHECKING"):
                for statement in child.body:
                    yield from _walk(ast.Module([statement], []), at_start=at_start, types_only=True)
                for statement in child.orelse:
                    yield from _walk(ast.Module([statement], []), at_start=at_start, types_only=types_only)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from _walk(child, at_start=False, types_only=types_only)
            case _:
                yield from _walk(child, at_start=at_start, types_only=types_only)


FILES = modules()
IMPORTS = {name: imports(file.read_text()) for name, file in FILES.items()}


def module_of(target: str) -> str | None:
    """The module of ours that an imported name lies in, or None for other people's."""
    while target not in FILES:
        if "." not in target:
            return None
        target = target.rpartition(".")[0]
    return target


def area_of(module: str) -> str:
    """The folder that a module lies in."""
    part = [*module.split("."), ""][1]
    return part if part in MAY_IMPORT else "core"


def unit_of(module: str) -> str:
    """The pass that a module belongs to, `compax.passes.quantize` for all of its parts."""
    return ".".join(module.split(".")[:3])


def distribution(requirement: str) -> str:
    """The normalized name in a requirement: `Orbax_Checkpoint>=0.12; extra` is of `orbax-checkpoint`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def ours() -> Iterator[tuple[str, str, str]]:
    """Each import of one of our modules by another: importer, imported, and where it stands."""
    for importer, found in IMPORTS.items():
        for each in found:
            imported = module_of(each.target)
            if imported is not None:
                yield importer, imported, f"{FILES[importer].relative_to(ROOT)}:{each.line} imports {each.target}"


def test_folders_import_only_what_is_below_them() -> None:
    wrong = [place for importer, imported, place in ours() if area_of(imported) not in MAY_IMPORT[area_of(importer)]]
    assert wrong == []


def test_passes_do_not_import_each_other() -> None:
    wrong = [
        place
        for importer, imported, place in ours()
        if area_of(importer) == area_of(imported) == "passes"
        and importer != "compax.passes"
        and unit_of(importer) != unit_of(imported)
    ]
    assert wrong == []


def test_models_know_only_the_errors_of_core() -> None:
    wrong = [
        place
        for importer, imported, place in ours()
        if area_of(importer) == "models" and area_of(imported) == "core" and imported not in MODELS_MAY_IMPORT_OF_CORE
    ]
    assert wrong == []


def test_jax_internals_stay_in_one_file() -> None:
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{each.line} uses {each.target}"
        for module, found in IMPORTS.items()
        for each in found
        if module != JAX_BOUNDARY and f"{each.target}.".startswith(tuple(f"{name}." for name in JAX_INTERNALS))
    ]
    assert wrong == []


def test_imported_libraries_are_declared_and_declared_ones_imported() -> None:
    required = set(PROJECT["project"]["dependencies"])
    optional = {each for extra in PROJECT["project"]["optional-dependencies"].values() for each in extra}
    tops = {each.target.partition(".")[0] for found in IMPORTS.values() for each in found}
    libraries = tops - {"compax"} - sys.stdlib_module_names
    owners = importlib.metadata.packages_distributions()
    imported = {library: {distribution(name) for name in owners.get(library, [library])} for library in libraries}
    known = {distribution(requirement) for requirement in required | optional}
    assert {library: names for library, names in imported.items() if not names & known} == {}
    assert {distribution(requirement) for requirement in required} - set().union(*imported.values()) == set()


def test_no_import_cycles() -> None:
    edges: dict[str, set[str]] = {}
    for module, found in IMPORTS.items():
        targets = (module_of(each.target) for each in found if each.at_start and not each.types_only)
        edges[module] = {target for target in targets if target is not None}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the cycle


def test_files_hold_one_thing() -> None:
    sources = [*FILES.values(), *(ROOT / "tests").rglob("*.py")]
    lengths = {file: len(file.read_text().splitlines()) for file in sources}
    assert {str(file.relative_to(ROOT)): lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


def test_names_say_what_is_inside() -> None:
    assert [name for name in FILES if SHAPELESS_NAMES.intersection(name.split("."))] == []


def test_every_folder_has_a_readme() -> None:
    folders = [*FOLDERS.values(), "tests"]
    assert [folder for folder in folders if not (ROOT / folder / "README.md").is_file()] == []


def test_the_reader_of_imports_sees_all_of_them() -> None:
    source = """
import jax
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from compax.program import Program
else:
    import compax.ir
try:
    import grain
except ImportError:
    pass
def function():
    from compax import passes
    return jax.core.Tracer, lambda: jax._src.core
"""
    assert [dataclasses.astuple(each) for each in imports(source)] == [
        ("jax", 2, True, False),
        ("typing.TYPE_CHECKING", 3, True, False),
        ("compax.program.Program", 5, True, True),
        ("compax.ir", 7, True, False),
        ("grain", 9, True, False),
        ("compax.passes", 13, False, False),
        ("jax.core", 14, False, False),
        ("jax._src", 14, False, False),
    ]


def test_names_are_resolved_to_modules() -> None:
    assert module_of("compax.errors.CompaxError") == "compax.errors"
    assert module_of("compax.passes.register") == "compax.passes"
    assert module_of("jax.numpy") is None
    assert area_of("compax") == area_of("compax.analysis") == "core"
    assert unit_of("compax.passes.quantize.rules") == "compax.passes.quantize"
