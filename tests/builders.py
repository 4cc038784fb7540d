"""What child processes of tests build."""

import os
import signal
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compax.errors import ShardingError
from compax.tpu import Built


def product(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """A product whose rows are split over the first axis, and their sum."""
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((arguments["rows"], 128), jnp.float32, sharding=split)
    weight = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=whole)
    print("libraries print what they like")
    facts = {"rows": arguments["rows"], "level": jax.config.jax_optimization_level}
    return Built(jax.jit(lambda x, w: jnp.tanh(x @ w).sum()).trace(rows, weight), facts)


def refused(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """Raises an error of ours."""
    raise ShardingError("a batch of 3 does not divide")


def broken(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """Raises an error of somebody else."""
    raise KeyError("nothing there")


def exhausted(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """Raises what the compiler raises where memory does not suffice."""
    raise RuntimeError(arguments["message"])


def killed(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """Ends as a process does that the kernel kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def left(mesh: Mesh, arguments: Mapping[str, Any]) -> Built:
    """Ends without a word."""
    os._exit(3)
