"""Names of composites and axes, open questions, declarations; and models built to mislead."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
from compax.composites.base import Attention, FeedForward, Normalization
from compax.errors import DeclarationError
from compax.experiments.benchmarks import zoo
from compax.experiments.benchmarks.meaning import compare, covered
from compax.models import decoder

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VARIANTS = [
    pytest.param(name, variant, marks=() if i == 0 else pytest.mark.slow, id=f"{name}-{variant}")
    for name in zoo.ENTRIES
    for i, variant in enumerate(zoo.variants(name))
]


@foreign_warnings
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_what_is_found_is_what_was_counted_by_hand(name: str, variant: zoo.Variant) -> None:
    case = zoo.build(name, dtype=variant.dtype, mode=variant.mode, padding=variant.padding, decode=variant.decode)
    program = case.capture()
    meaning = program.meaning()
    comparison = compare(meaning, zoo.expected(name, decode=variant.decode))
    if name == "tunix_gemma3" and variant.decode:
        # Its window follows from the argument's own contents (an argmax of the mask): counted, but not named.
        assert comparison.attentions[:2] == (6, 6)
    else:
        assert comparison.differences == ()
    assert covered(program, meaning) >= 0.99


def program(**options: Any) -> compax.Program:
    config = decoder.SIZES["tiny"]
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    return compax.capture(model, *decoder.example_inputs(config, sequence=12), mode="eval", **options)


def test_names_come_from_parameters() -> None:
    names = [(composite.name, composite.kind) for composite in program().composites()]
    assert names[:4] == [
        ("blocks.0.attn_norm", "normalization"),
        ("blocks.0.attn", "attention"),
        ("blocks.0.mlp_norm", "normalization"),
        ("blocks.0.mlp", "feed_forward"),
    ]


def test_axes_by_name() -> None:
    meaning = program().meaning()
    hidden = meaning.axis("blocks.1.mlp.hidden")
    assert hidden.size == 80
    assert set(hidden.parameters) == {f"blocks.1.mlp.{name}.kernel" for name in ("gate", "up", "down")}
    assert hidden.fixed == ()
    with pytest.raises(DeclarationError, match=r"blocks\.1\.mlp\.hidden"):
        meaning.axis("blocks.1.mlp.hiden")


def test_a_residual_stream_has_an_addition_for_each_part() -> None:
    (stream,) = program().meaning().streams
    assert len(stream) == 4


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_stream_goes_on_through_activations_and_projections(mode: Any) -> None:
    """A ResNet's: relu after each addition, a strided convolution in place of the identity where the size changes."""
    (stream,) = zoo.build("flax_resnet", mode=mode).capture().meaning().streams
    assert len(stream) == 3


def test_two_products_of_one_value_are_no_stream() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["a"] + jnp.tanh(x @ params["b"])

    params = {name: jnp.ones((4, 4)) for name in "ab"}
    assert not compax.capture(model, params, jnp.ones((2, 4))).meaning().streams


def test_a_mask_that_is_an_argument_is_asked_for_and_can_be_declared() -> None:
    def model(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = (x @ params[name] for name in "qkv")
        return jax.nn.softmax(jnp.where(mask, q @ k.swapaxes(1, 2), -1e9)) @ v

    params = {name: jnp.ones((6, 5)) for name in "qkv"}
    given = compax.capture(model, params, jnp.ones((2, 4, 6)), jnp.ones((2, 4, 4), bool))
    (question,) = given.meaning().questions
    assert "constant=('mask',)" in question.remedy
    declared = given.declare(at="**:attention", mask="causal")
    assert declared.meaning().of_kind(Attention)[0].mask.kind == "causal"
    assert declared.meaning().questions == ()
    assert given.meaning().of_kind(Attention)[0].mask.kind == "full"


def test_axes_can_be_declared() -> None:
    fixed = program().declare(axis="blocks.0.mlp.hidden", kind="fixed")
    assert fixed.meaning().axis("blocks.0.mlp.hidden").fixed == ("declared fixed",)
    assert program().declare(axis="vocabulary", kind="free").meaning().axis("vocabulary").fixed == ()


def test_a_composite_can_be_dismissed() -> None:
    kinds = {x.name for x in program().declare(at="blocks.0.attn:attention", kind="none").composites()}
    assert "blocks.0.attn" not in kinds
    assert "blocks.1.attn" in kinds


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"at": "nothing.here", "mask": "causal"}, "selects no composite"),
        ({"at": "**:attention", "mask": "diagonal"}, "write 'full', 'causal' or 'window N'"),
        ({"at": "**:feed_forward", "mask": "causal"}, "has no mask"),
        ({"axis": "no.such", "kind": "fixed"}, "there is no such axis"),
        ({"axis": "model", "kind": "wide"}, "a kind is one of"),
        ({"at": "**", "axis": "model", "kind": "fixed"}, "not both"),
        ({"axis": "model"}, "say kind="),
    ],
)
def test_declarations_that_fit_nothing(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(DeclarationError, match=words):
        program().declare(**arguments)


def test_declarations_stay_with_a_program_through_passes() -> None:
    declared = program().declare(axis="blocks.0.mlp.hidden", kind="fixed")
    changed = compax.Pipeline.parse("quantize(weights=int8)")(declared)
    assert changed.meaning().axis("blocks.0.mlp.hidden").fixed == ("declared fixed",)


# -- Built to mislead -------------------------------------------------------------------------------------------------


def test_a_model_built_to_mislead() -> None:
    """Everything has the size 8: batch, positions, heads, head size, model, hidden.

    Beside one attention there is a softmax over features, a norm whose result is multiplied with a function of itself,
    two linear layers of different sources that are multiplied, and a mask that is causal for this length alone.
    """
    n = 8

    def model(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        normalized = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        x = x + normalized * jax.nn.sigmoid(normalized @ params["gate"])
        q, k, v = (jnp.einsum("btd,dhk->bhtk", x, params[name]) for name in "qkv")
        seen = jnp.arange(n)[:, None] >= jnp.arange(n)
        weights = jax.nn.softmax(jnp.where(seen, jnp.einsum("bhtk,bhsk->bhts", q, k), -1e9))
        x = x + jnp.einsum("bhts,bhsk,hkd->btd", weights, v, params["o"])
        x = x * jax.nn.softmax(x @ params["mix"])
        return ((x @ params["a"]) * (y @ params["b"])) @ params["c"]

    shapes = dict.fromkeys(("gate", "mix", "a", "b", "c"), (n, n)) | dict.fromkeys("qkvo", (n, n, n))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    x = jax.random.normal(jax.random.key(1), (n, n, n))
    meaning = compax.capture(model, params, x, x).meaning()

    (attention,) = meaning.of_kind(Attention)
    axes = [getattr(attention, name) for name in ("batch", "groups", "queries", "head_size")]
    assert all(len(axis) == 1 for axis in axes)
    assert len(set(axes)) == 4
    assert attention.mask.kind == "causal"
    (norm,) = meaning.of_kind(Normalization)
    assert (norm.type, norm.weight, norm.bias) == ("rms", None, None)
    assert meaning.of_kind(FeedForward) == []
    batch = attention.batch[0]
    assert all(batch is not atom for name in params for atom in dims(meaning, name))


def dims(meaning: Any, path: str) -> list[Any]:
    view = meaning.view
    (x,) = [x for x in view.normal.inputs if x.input.path == path]
    return [atom for factors in view.engine.dims[x] for atom in view.engine.atoms.leaves(factors)]
