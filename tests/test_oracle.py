"""The oracle itself: it passes what keeps its promises, and catches each promise that is broken."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import zoo
from compax import Program
from compax.contracts import Exact, Tolerance
from compax.errors import ContractError
from compax.models import decoder
from compax.passes.freeze import Freeze
from compax.passes.quantize import Quantize
from compax.transform import Context, Pass, PassResult, SiteReport
from oracle import assert_preserves


class Perceptron(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(32, 16, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


def rows() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (8, 16))


PASSES = {
    "weights": Quantize(weights="int8"),
    "activations": Quantize(weights="int8", activations="int8"),
    "train": Quantize(weights="int8", activations="int8", train=True),
    "freeze": Freeze(at="**"),
}


@pytest.mark.parametrize("pass_", PASSES.values(), ids=PASSES.keys())
def test_perceptron(pass_: Pass) -> None:
    assert_preserves(pass_, Perceptron(), rows())


@pytest.mark.parametrize("options", [{"num_layers": 1}, {"scan": True}], ids=["unrolled", "scanned"])
def test_decoder(options: dict[str, Any]) -> None:
    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    assert_preserves(PASSES["activations"], model, *decoder.example_inputs(config, sequence=8))


@pytest.mark.slow
@zoo.foreign_warnings
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_third_party_model(name: str) -> None:
    model = zoo.load(name)
    pass_ = PASSES["activations"]
    program = assert_preserves(pass_, model.module, *model.inputs, variables=model.variables, **model.kwargs)
    coverage = program.coverage()
    assert coverage.share_in_composites == 1.0
    assert coverage.unpacked == ()
    assert coverage.dense == ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scale(Pass):
    """Multiplies the first kernel, as a pass with a mistake would."""

    by: float = 1.0

    phase: ClassVar[str] = "precision"
    paper: ClassVar[str] = "no paper"
    contract: ClassVar[Any] = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        params = {**program.params, "up.kernel": program.params["up.kernel"] * self.by}
        return PassResult(program.replace(params=params), (SiteReport("up", "linear", "rewritten"),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values(_Scale):
    by: float = 1.01

    name: ClassVar[str] = "broken_values"  # not registered: other tests ask the registry for all passes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idempotence(_Scale):
    name: ClassVar[str] = "broken_idempotence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(_Scale):
    """The same outputs, where all inputs are zero, and other gradients."""

    by: float = 2.0

    name: ClassVar[str] = "broken_gradient"
    contract: ClassVar[Any] = Tolerance(1e-3)


def test_other_values_are_caught() -> None:
    with pytest.raises(ContractError, match="broken_values"):
        assert_preserves(Values(), Perceptron(), rows())


def test_a_second_run_that_changes_something_is_caught() -> None:
    with pytest.raises(AssertionError, match="its own result"):
        assert_preserves(Idempotence(), Perceptron(), rows())
    assert_preserves(Idempotence(), Perceptron(), rows(), idempotent=False)


def test_other_gradients_are_caught() -> None:
    with pytest.raises(AssertionError, match="gradients have"):
        assert_preserves(Gradient(), Perceptron(), jnp.zeros((8, 16)))
