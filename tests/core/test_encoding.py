"""The contract of encodings, held by every encoding that there is: what it stands for, its bytes, leaves and specs.

That decoding commutes with layout is in `test_encoding_layout.py`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from compax import ir, lowering
from compax.encoding import format_of, leaf_nbytes, nbytes
from compax.errors import EncodingError
from compax.passes.quantize.encoding import SeenArray, SimulatedArray, quantize_array
from encoded import SHAPE, Maker, assert_same_bits, decoded, dense, every_encoding, mesh

# -- What an encoding is ----------------------------------------------------------------------------------------------


@every_encoding
def test_stands_for_an_array(make: Maker) -> None:
    x = make()
    array = x.decode()
    assert (x.shape, x.dtype, x.ndim, x.size) == (array.shape, array.dtype, array.ndim, array.size)
    assert format_of(x) == x.format
    np.testing.assert_array_equal(jax.jit(lambda x: x.decode())(x), array)


@every_encoding
def test_bytes_are_those_of_the_leaves(make: Maker) -> None:
    x = make()
    assert nbytes(x) == x.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(x))


@pytest.mark.parametrize("dtype", ["int4", "uint2", "int8", "bfloat16", "float8_e4m3fn", "float32", "bool"])
def test_bytes_of_narrow_types_are_packed(dtype: str) -> None:
    bits = {"int4": 4, "uint2": 2, "int8": 8, "bfloat16": 16, "float8_e4m3fn": 8, "float32": 32, "bool": 8}[dtype]
    assert leaf_nbytes(jax.ShapeDtypeStruct((3, 5), jnp.dtype(dtype))) == -(-15 * bits // 8)


@every_encoding
def test_leaves_keep_the_leading_dimensions(make: Maker) -> None:
    for leaf in jax.tree.leaves(make()):
        assert leaf.ndim == len(SHAPE)
        assert all(size in (1, full) for size, full in zip(leaf.shape, SHAPE, strict=True))


@every_encoding
def test_stacked_leaves_can_be_scanned(make: Maker) -> None:
    x = make().stacked(SHAPE[0])
    assert all(leaf.shape[0] == SHAPE[0] for leaf in jax.tree.leaves(x))
    assert_same_bits(x.decode(), make().decode())
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], x).decode() for i in range(SHAPE[0])]
    assert_same_bits(jnp.stack(layers), x.decode())
    assert_same_bits(jax.vmap(lambda layer: layer.decode())(x), x.decode())


@every_encoding
def test_is_a_pytree(make: Maker) -> None:
    x = make()
    leaves, tree = jax.tree.flatten(x)
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is type(x)
    assert jax.tree.structure(make()) == tree
    assert hash(jax.tree.structure(make())) == hash(tree)
    assert_same_bits(again.decode(), x.decode())
    shapes = jax.eval_shape(lambda x: x, x)
    assert (shapes.shape, shapes.dtype, shapes.nbytes) == (x.shape, x.dtype, x.nbytes)


@every_encoding
@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(),
        PartitionSpec("a"),
        PartitionSpec(None, "b"),
        PartitionSpec("a", "b", "c"),
        PartitionSpec(None, None, ("a", "b")),
    ],
    ids=str,
)
def test_specs_fit_the_leaves(make: Maker, spec: PartitionSpec) -> None:
    x = make()
    specs = x.spec(spec)
    placed = jax.tree.map(lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh(), s)), x, specs)
    assert_same_bits(placed.decode(), x.decode())
    names = {name for part in spec if part is not None for name in ((part,) if isinstance(part, str) else part)}
    largest = max(jax.tree.leaves(placed), key=lambda leaf: leaf.size)
    shards = math.prod(mesh().shape[name] for name in names)
    assert largest.addressable_shards[0].data.size * shards == largest.size


@every_encoding
def test_a_spec_with_too_many_dimensions_is_refused(make: Maker) -> None:
    with pytest.raises(EncodingError, match="dimensions"):
        make().spec(PartitionSpec("a", None, None, "b"))


def test_a_spec_of_a_simulated_parameter() -> None:
    x = SimulatedArray(dense(*SHAPE), (-2,))
    assert x.spec(PartitionSpec("a")).master == PartitionSpec("a")
    with pytest.raises(EncodingError, match="dimensions"):
        x.spec(PartitionSpec("a", None, None, "b"))


# -- Stored and simulated ---------------------------------------------------------------------------------------------


def test_a_stored_parameter_gets_no_gradient() -> None:
    x = quantize_array(dense(4, 6), (0,))
    assert not x.trainable
    assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype("int8"), jnp.dtype("float32")}


def test_a_simulated_parameter_is_a_master_seen_through_the_format() -> None:
    """The same numbers as stored, and gradients reach the master unchanged."""
    master = dense(4, 6)
    simulated = SimulatedArray(master, (-2,))
    assert simulated.trainable
    assert isinstance(simulated.prepared(), SeenArray)
    assert simulated.prepared().trainable
    assert_same_bits(simulated.decode(), quantize_array(master, (0,)).decode())
    weights = dense(4, 6, seed=3)
    gradient = jax.grad(lambda x: jnp.vdot(x.prepared().decode(), weights))(simulated)
    assert_same_bits(gradient.master, weights)


def test_scales_are_those_of_the_whole_parameter() -> None:
    """Slices and transposes of a simulated parameter keep the scales that it has as a whole."""
    x = SimulatedArray(dense(4, 6).at[3, 2].set(1000.0), (-2, -1))
    whole = x.decode()
    graph = ir.trace(lambda w: w[:2].T, jax.ShapeDtypeStruct(x.shape, x.dtype))
    (result,) = lowering.Evaluator().run(graph, [x.prepared()])
    assert_same_bits(decoded(result), whole[:2].T)


def test_zeros_stay_zeros() -> None:
    for x in (quantize_array(jnp.zeros((3, 4)), (0,)), SimulatedArray(jnp.zeros((3, 4)), (-2,))):
        np.testing.assert_array_equal(x.decode(), np.zeros((3, 4)))


def test_shapes_encode_to_shapes() -> None:
    abstract = quantize_array(jax.ShapeDtypeStruct((4, 6), jnp.bfloat16), (0,))
    concrete = quantize_array(dense(4, 6, dtype=jnp.bfloat16), (0,))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert abstract.nbytes == concrete.nbytes == 24 + 6 * 4
