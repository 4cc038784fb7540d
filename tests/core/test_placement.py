"""Placements: what they hold, what they refuse, and how a program carries them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import compax
from compax.errors import PlacementError
from compax.placement import DEVICE, HOST, Placement, check_memory

MESH = Mesh(np.asarray(jax.devices()[:2]), ("data",))


def test_the_default_asks_for_nothing() -> None:
    placement = Placement()
    assert placement == Placement()
    assert hash(placement) == hash(Placement())
    assert placement.memories == frozenset()
    assert placement.memory_kind("w") == DEVICE
    placement.check_memory()


def test_specs_and_memories_become_shardings() -> None:
    placement = Placement(MESH, {"w": PartitionSpec("data")}, {"w": HOST}, HOST)
    assert placement.sharding("w").spec == PartitionSpec("data")
    assert placement.sharding("w").memory_kind == HOST
    assert placement.sharding("b").spec == PartitionSpec()
    assert placement.sharding("b").memory_kind == DEVICE
    assert placement.memories == {HOST}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlacementError, match="no memory is called 'disk'"):
        Placement(memory={"w": "disk"})
    with pytest.raises(PlacementError, match="there is no mesh"):
        Placement(specs={"w": PartitionSpec("data")})
    with pytest.raises(PlacementError, match=r"'far away' is wanted, but cpu \(cpu\) reaches only"):
        check_memory(jax.devices()[0], frozenset({"far away"}))


def test_programs_carry_it() -> None:
    program = compax.capture(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    assert program.placement == Placement()
    placed = program.replace(placement=Placement(MESH))
    assert placed.placement.mesh is MESH
    assert jax.tree.map(lambda x: x, placed).placement is placed.placement
    assert jax.tree.structure(placed) != jax.tree.structure(program)
