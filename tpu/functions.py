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
from compax.compilers import needed_bytes
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
        arguments = {"file": str(file), "donated": given_away}
        return compile_for(Request(target, {"device": target.num_devices}, f"{__name__}:build", arguments))


def peak_bytes(function: Callable[..., Any], shapes: tuple[Any, ...], donated: tuple[int, ...], target: Target) -> int:
    """What `compax.compilers.peak_bytes` asks for; of a function that does not fit, what the compiler says it needs."""
    compiled = compile_function(function, shapes, donated, target)
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

    function, shapes = _jax.imported(pathlib.Path(arguments["file"]).read_bytes())
    where = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in shapes]
    jitted = jax.jit(function, donate_argnums=tuple(arguments["donated"]), keep_unused=True)
    return Built(jitted.trace(*placed), {})
