"""Compiling a function of this process for one device of a slice that need not be there.

A function that closes over programs has no name that another process could import it by. It goes there as StableHLO,
with which arguments are donated; the compiler makes the same of it as of the function itself.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from compax import _jax
from compax.compilers import StepFigures, needed_bytes
from compax.errors import CompileError
from compax.tpu.compiling import Compiled, Request, check_compiler, compile_for
from compax.tpu.worker import Built

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from compax.target import Target


def compile_function(
    function: Callable[..., Any], shapes: tuple[Any, ...], donated: tuple[int, ...], target: Target
) -> Compiled:
    """Compiles a function for the first device of a target.

    Args:
        function: of arrays, in trees.
        shapes: of its arguments.
        donated: positions of arguments whose memory the results may take.
        target: the slice.

    Raises:
        NoCompilerError: there is no compiler for the target here.
        CompileError: it fails.
    """
    return _compiled(function, shapes, donated, target, {"device": target.num_devices}, None)


def _compiled(
    function: Callable[..., Any],
    shapes: tuple[Any, ...],
    donated: tuple[int, ...],
    target: Target,
    axes: Mapping[str, int],
    specs: list[list[Any]] | None,
) -> Compiled:
    """Compiles a function over a mesh, its arguments by specs as JSON; without them for the first device alone."""
    import jax

    check_compiler(target)
    leaves, tree = jax.tree.flatten(shapes)
    counts = [len(jax.tree.leaves(each)) for each in shapes]
    given_away = [sum(counts[:i]) + j for i in donated for j in range(counts[i])]

    def flat(*arrays: Any) -> list[Any]:
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, arrays)))

    with tempfile.TemporaryDirectory(prefix="compax-function-") as folder:
        file = pathlib.Path(folder) / "function"
        file.write_bytes(_jax.exported(flat, leaves, target.chip.platform))
        arguments = {"file": str(file), "donated": given_away, "specs": specs}
        return compile_for(Request(target, axes, f"{__name__}:build", arguments))


def step_figures(
    function: Callable[..., Any],
    shapes: tuple[Any, ...],
    donated: tuple[int, ...],
    target: Target,
    shardings: tuple[Any, ...],
) -> StepFigures:
    """What `compax.compilers.step_figures` asks for."""
    import jax

    flat = jax.tree.leaves(shardings)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    specs = [[list(names) if isinstance(names, tuple) else names for names in each.spec] for each in flat]
    compiled = _compiled(function, placed, donated, target, dict(flat[0].mesh.shape), specs)
    return StepFigures(
        _needed(compiled, target),
        compiled.shortage is None,
        compiled.flops,
        compiled.traffic,
        compiled.collectives,
    )


def peak_bytes(function: Callable[..., Any], shapes: tuple[Any, ...], donated: tuple[int, ...], target: Target) -> int:
    """What `compax.compilers.peak_bytes` asks for; of a function that does not fit, what the compiler says it needs."""
    return _needed(compile_function(function, shapes, donated, target), target)


def _needed(compiled: Compiled, target: Target) -> int:
    memory, shortage = compiled.memory, compiled.shortage
    if memory is not None:
        return needed_bytes(target.chip.platform, memory.arguments + memory.outputs, memory.temporaries, memory.peak)
    if shortage is None or shortage.needed is None:
        raise CompileError(
            f"the function does not fit into a device of {target}, and the compiler does not say what it needs: "
            f"{shortage.message if shortage else 'no message'}"
        )
    return shortage.needed


def build(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """The function in the child process."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    function, shapes = _jax.imported(pathlib.Path(arguments["file"]).read_bytes())
    where: list[Any] = [jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])] * len(shapes)
    if arguments["specs"] is not None:
        specs = [PartitionSpec(*(tuple(n) if isinstance(n, list) else n for n in each)) for each in arguments["specs"]]
        where = [NamedSharding(mesh, spec) for spec in specs]
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(shapes, where, strict=True)]
    jitted = jax.jit(function, donate_argnums=tuple(arguments["donated"]), keep_unused=True)
    return Built(jitted.trace(*placed), {})
