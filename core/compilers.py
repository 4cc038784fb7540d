"""What a function needs of a device, or of each over a mesh, by a compiler: the machine's, or one without devices."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from compax.analysis import hlo, hlo_memory
from compax.analysis.hlo import Collective
from compax.errors import CompileError, NoCompilerError
from compax.target import Target

_DEVICELESS: Mapping[str, str] = {"tpu": "compax.tpu.functions"}
"""What compiles for a platform that is not here, by its platform.

Named as text, because what knows slices of TPUs stands above core, and is asked only for where such a slice is meant.
"""


def peak_bytes(function: Callable[..., Any], shapes: tuple[Any, ...], donated: tuple[int, ...], target: Target) -> int:
    """Compiles a function for one device of a target. Compiled, not predicted.

    Args:
        function: of arrays, in trees.
        shapes: of its arguments.
        donated: positions of arguments whose memory the results may take.
        target: the chip.

    Returns:
        Bytes that the device needs at the peak, arguments included; also where it has less.

    Raises:
        NoCompilerError: nothing here compiles for the target; says what to install.
        CompileError: the compiler fails.
    """
    platform = target.chip.platform
    if platform == jax.default_backend():
        return _needed(jax.jit(function, donate_argnums=donated).lower(*shapes).compile(), platform)
    return _deviceless(platform).peak_bytes(function, shapes, donated, target)


@dataclasses.dataclass(frozen=True)
class StepFigures:
    """What a compiler made of a function over a mesh: of one device, in a call.

    Attributes:
        peak: bytes that the device needs, also where it has less.
        fits: whether it has them.
        flops: of matrix products and convolutions, by dtype.
        traffic: bytes between the device and its memory.
        collectives: those of a call.
    """

    peak: int
    fits: bool = True
    flops: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    traffic: int = 0
    collectives: tuple[Collective, ...] = ()


def step_figures(
    function: Callable[..., Any],
    shapes: tuple[Any, ...],
    donated: tuple[int, ...],
    target: Target,
    shardings: tuple[Any, ...],
) -> StepFigures:
    """Compiles a function for all devices of a target.

    Args:
        function: of arrays, in trees.
        shapes: of its arguments.
        donated: positions of arguments whose memory the results may take.
        target: the slice.
        shardings: of the arguments, over one abstract mesh that has as many devices.

    Raises:
        NoCompilerError: nothing here compiles for the target; says what to install.
        CompileError: the compiler fails.
    """
    platform = target.chip.platform
    abstract = jax.tree.leaves(shardings)[0].mesh
    if platform == jax.default_backend() and jax.device_count() == abstract.size:
        sizes, names = tuple(abstract.shape.values()), abstract.axis_names
        mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s.spec)), shapes, shardings
        )
        compiled = jax.jit(function, donate_argnums=donated).lower(*placed).compile()
        peak, module = _needed(compiled, platform), hlo.parse(compiled.as_text() or "")
        traffic = hlo_memory.memory_traffic(module)
        return StepFigures(peak, True, hlo.matmul_flops(module), traffic, hlo.collectives(module))
    return _deviceless(platform).step_figures(function, shapes, donated, target, shardings)


def _needed(compiled: jax.stages.Compiled, platform: str) -> int:
    """What a program needs that was compiled for a device that is here."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise CompileError(f"the compiler of this {platform} says nothing of memory")
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return needed_bytes(platform, held, memory.temp_size_in_bytes, memory.peak_memory_in_bytes)


def _deviceless(platform: str) -> Any:
    """The module that compiles for a platform that is not here."""
    if platform not in _DEVICELESS:
        raise NoCompilerError(f"there is no {platform} here, and only programs for TPUs can be compiled without one")
    return importlib.import_module(_DEVICELESS[platform])


def needed_bytes(platform: str, held: int, temporaries: int, peak: int) -> int:
    """What a program needs of a device's memory, from what its compiler says.

    Temporaries of a TPU are added up over all of its memories and without what shares a place, its peak is the
    compiler's count of what is there at one time. Other compilers may say of the peak what is held alone.

    Args:
        platform: of the device.
        held: bytes of arguments, and of results that take no argument's place.
        temporaries: bytes.
        peak: bytes, as the compiler says.
    """
    return max(held, peak) if platform == "tpu" else max(held + temporaries, peak)
