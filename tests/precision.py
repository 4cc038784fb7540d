"""What the tests of mixed precision share: casting a program, and reading off in which dtypes it computes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax import Program, capture, ir, verify
from compax.passes import Cast
from compax.transform import Context

BFLOAT16 = jnp.dtype(jnp.bfloat16)
FLOAT32 = jnp.dtype(jnp.float32)


def cast(program: Program, **options: Any) -> Program:
    """The program after the pass, verified."""
    result = Cast(**options).run(program, Context())
    assert result.changed
    verify(result.program)
    return result.program


def cast_function(function, params, *inputs, **options) -> Program:
    return cast(capture(function, params, *inputs), **options)


def operations(program: Program) -> list[ir.Op]:
    (captured,) = program.graphs.values()
    return [op for _, op in ir.walk(captured.graph)]


def dtypes(program: Program, name: str) -> list[str]:
    """The dtypes of the floating operands of all operations of a name."""
    found = []
    for op in operations(program):
        if op.name == name:
            floats = {str(x.dtype) for x in op.inputs if jnp.issubdtype(x.dtype, jnp.floating)}
            found.append("+".join(sorted(floats)))
    return found


def relative(x: Any, y: Any) -> float:
    return float(jnp.linalg.norm(jnp.ravel(x - y)) / jnp.linalg.norm(jnp.ravel(x)))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


W = normal(16, 16) / 4
X = normal(8, 16, seed=1)


def two_layers(params, x):
    return jnp.tanh(x @ params["first"]["w"] + params["first"]["b"]) @ params["second"]["w"]


TWO = {"first": {"w": W, "b": normal(16)}, "second": {"w": W}}
