"""Axes reordered and narrowed everywhere they occur: the proof that they are what the analysis says."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compax
from compax.analysis.axes import Axis
from compax.contracts import largest_relative_error, rounding_tolerance
from compax.errors import RewriteError
from compax.experiments.benchmarks import third_party, zoo
from compax.models import decoder
from compax.rewrites.reindex import reindex

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def free(program: compax.Program) -> list[Axis]:
    """The axes of parameters whose indices may move, those made of no others."""
    return [a for a in program.axes() if a.parameters and not a.fixed and a.size > 1 and not a.atom.segments]


def outputs(program: compax.Program, case: zoo.Case) -> np.ndarray:
    return np.asarray(case.output(program(*case.arguments(), **case.kwargs)), np.float32)


def assert_close(expected: np.ndarray, actual: np.ndarray, dtype: str = "float32") -> None:
    assert np.isfinite(expected).all()
    assert largest_relative_error(expected, actual) <= rounding_tolerance(jnp.dtype(dtype))


def variants(name: str) -> Sequence[zoo.Variant]:
    return [v for v in zoo.variants(name) if v.dtype == "float32"]


CASES = [
    pytest.param(name, variant, marks=() if i == 0 else pytest.mark.slow, id=f"{name}-{variant}")
    for name in zoo.ENTRIES
    for i, variant in enumerate(variants(name))
]


@foreign_warnings
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_permuting_every_free_axis_changes_nothing(name: str, variant: zoo.Variant) -> None:
    case = zoo.build(name, dtype=variant.dtype, mode=variant.mode, padding=variant.padding, decode=variant.decode)
    program = case.capture()
    axes = free(program)
    if not axes:  # batch statistics are returned, and so fix every channel
        assert (name, variant.mode) == ("flax_resnet", "train")
        return
    random = np.random.default_rng(0)
    permuted = reindex(program, {axis: random.permutation(axis.size).tolist() for axis in axes})
    compax.verify(permuted)
    assert any((np.asarray(x) != np.asarray(permuted.params[path])).any() for path, x in program.params.items())
    assert_close(outputs(program, case), outputs(permuted, case))


@foreign_warnings
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tunix_qwen3_experts", "flax_bloom", "flax_gptj", "flax_whisper", "flax_wav2vec2"])
def test_permuting_axes_one_by_one_changes_nothing(name: str) -> None:
    case = zoo.build(name)
    program = case.capture()
    expected = outputs(program, case)
    for axis in free(program):
        order = np.random.default_rng(1).permutation(axis.size).tolist()
        assert_close(expected, outputs(reindex(program, {axis: order}), case))


def zeroed(program: compax.Program, keep: dict[Axis, list[int]]) -> compax.Program:
    """The program with the dropped entries of its parameters zeroed, along every dimension that has the axis."""
    params = {path: np.array(x) for path, x in program.params.items()}
    view = program.meaning().view
    for x in view.normal.inputs:
        if x.input is None or x.input.kind != "parameter":
            continue
        for dim, factors in enumerate(view.engine.dims[x]):
            gone = np.zeros(x.shape[dim], bool)
            for axis, indices in keep.items():
                gone |= dropped(view.engine.atoms, factors, axis, indices)
            if gone.any():
                index = [slice(None)] * len(x.shape)
                index[dim] = gone  # type: ignore[call-overload]
                params[x.input.path][tuple(index)] = 0
    return program.replace(params={path: jnp.asarray(x) for path, x in params.items()})


def dropped(atoms: Any, factors: Any, axis: Axis, indices: list[int]) -> np.ndarray:
    """Which indices of a dimension are among those that an axis loses: bool[size]."""
    result = np.zeros(1, bool)
    for atom in atoms.expand(factors):
        if atom.segments:
            part = np.concatenate([dropped(atoms, segment, axis, indices) for segment in atom.segments])
        elif atom is atoms.find(axis.atom):
            part = ~np.isin(np.arange(atom.size), indices)
        else:
            part = np.zeros(atom.size, bool)
        result = (result[:, None] | part).reshape(-1)
    return result


NARROWED = (
    "tunix_llama3",
    "flax_gpt2",
    "flax_bert",
    "tunix_gemma",
    "flax_vit",
    "flax_whisper",
    "compax_decoder_scanned",
)
KINDS: dict[str, Callable[[str], bool]] = {
    "hidden": lambda name: name.endswith(".hidden"),
    "groups": lambda name: name.endswith((".groups", ".heads", ".repeats")),
    "model": lambda name: name == "model" or name.endswith(".model"),
}


@foreign_warnings
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NARROWED)
def test_narrowing_by_a_third_is_zeroing(name: str, kind: str) -> None:
    case = zoo.build(name)
    program = case.capture()
    axes = [axis for axis in free(program) if KINDS[kind](axis.name)]
    assert axes
    random = np.random.default_rng(2)
    keep = {
        axis: sorted(random.permutation(axis.size)[: max(1, axis.size - -(-axis.size // 3))].tolist()) for axis in axes
    }
    narrow = reindex(program, keep)
    compax.verify(narrow)
    sizes = [sum(x.size for x in p.params.values()) for p in (program, narrow)]
    assert sizes[1] < sizes[0]
    assert_close(outputs(zeroed(program, keep), case), outputs(narrow, case))


@foreign_warnings
def test_a_narrowed_llama_is_bitwise_the_smaller_one_of_its_authors() -> None:
    source = third_party.tunix_model("llama3")

    def make(hidden: int) -> nnx.Module:
        shape = source.ModelConfig(
            num_layers=2,
            vocab_size=48,
            embed_dim=32,
            hidden_dim=hidden,
            num_heads=4,
            head_dim=8,
            num_kv_heads=2,
            rope_theta=10_000,
            norm_eps=1e-6,
        )
        with third_party.lazy_sharding():
            return source.Llama3(shape, rngs=nnx.Rngs(0))

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    inputs = (tokens, positions, None, jnp.broadcast_to(jnp.tril(jnp.ones((9, 9), bool)), (2, 9, 9)))
    program = compax.capture(make(96), *inputs)
    keep = {axis: list(range(0, 96, 3)) for axis in free(program) if axis.name.endswith(".hidden")}
    narrow = reindex(program, keep)
    smaller = compax.capture(make(32), *inputs)
    assert {path: x.shape for path, x in narrow.params.items()} == {p: x.shape for p, x in smaller.params.items()}
    theirs = smaller.replace(params=narrow.params)
    assert (np.asarray(narrow(*inputs)[0]) == np.asarray(theirs(*inputs)[0])).all()


def scanned() -> tuple[compax.Program, jax.Array]:
    config = dataclasses.replace(decoder.SIZES["tiny"], scan=True, remat=True)
    (tokens,) = decoder.example_inputs(config, sequence=10)
    return compax.capture(decoder.Decoder(config, rngs=nnx.Rngs(0)), tokens, mode="eval"), tokens


def test_narrowed_programs_have_gradients_and_go_through_transformations() -> None:
    program, tokens = scanned()
    (hidden,) = [axis for axis in free(program) if axis.name == "blocks.mlp.hidden"]
    narrow = reindex(program, {hidden: list(range(50))})

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.mean(narrow.apply(params, narrow.state, tokens)[0] ** 2)

    gradients = jax.jit(jax.grad(loss))(narrow.params, tokens)
    assert gradients["blocks.mlp.up.kernel"].shape == (2, 32, 50)
    each = jax.vmap(lambda row: narrow.apply(narrow.params, narrow.state, row[None].repeat(2, 0))[0])(tokens)
    assert each.shape == (2, 2, 10, 96)


def test_gradients_of_a_derivative_rule_stay_those_of_the_rule() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    params = {"up": jax.random.normal(jax.random.key(0), (4, 9)), "down": jax.random.normal(jax.random.key(1), (9, 3))}
    x = jnp.ones((2, 4))
    program = compax.capture(model, params, x)
    keep = [0, 3, 4, 8]
    (hidden,) = [axis for axis in free(program) if axis.size == 9]
    narrow = reindex(program, {hidden: keep})
    small = {"up": params["up"][:, jnp.asarray(keep)], "down": params["down"][jnp.asarray(keep)]}
    ours = jax.grad(lambda p: narrow.apply(p, {}, x)[0].sum())(narrow.params)
    theirs = jax.grad(lambda p: model(p, x).sum())(small)
    assert all((np.asarray(ours[name]) == np.asarray(theirs[name])).all() for name in small)


def test_what_is_fixed_is_refused_with_the_reason() -> None:
    program, _ = scanned()
    axes = {axis.name: axis for axis in program.axes()}
    with pytest.raises(RewriteError, match="addressed by"):
        reindex(program, {axes["vocabulary"]: [0, 1]})
    with pytest.raises(RewriteError, match="turns of a loop"):
        reindex(program, {axes["layers"]: [0]})
    with pytest.raises(RewriteError, match="different indices"):
        reindex(program, {axes["model"]: [0, 99]})


def test_nothing_to_do_gives_the_same_program() -> None:
    program, _ = scanned()
    (model,) = [axis for axis in program.axes() if axis.name == "model"]
    assert reindex(program, {model: list(range(model.size))}) is program


def test_the_program_that_is_given_stays_as_it_is() -> None:
    program, tokens = scanned()
    before = np.asarray(program(tokens))
    (hidden,) = [axis for axis in free(program) if axis.name == "blocks.mlp.hidden"]
    reindex(program, {hidden: [1, 2, 3]})
    assert program.params["blocks.mlp.up.kernel"].shape == (2, 32, 80)
    assert (np.asarray(program(tokens)) == before).all()
