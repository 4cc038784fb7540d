"""A program as an NNX module: its variables, and that NNX's own tools work on it."""

import copy
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from compax.errors import CaptureError, SignatureError
from compax.module import Frozen, ProgramModule, Stored
from compax.program import Program, capture
from sample_encodings import Adapted, Integers

D = 8


def rows(count: int = 4, *, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)), jnp.float32)


def flat(module: nnx.Module) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Linear(2 * D, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.mlp = Mlp(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(x)


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.table = nnx.Param(jnp.arange(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.dropout(self.norm(x))


def encoded(program: Program, encode: Any, *paths: str) -> Program:
    return program.replace(params={p: encode(x) if p in paths else x for p, x in program.params.items()})


@pytest.fixture
def program() -> Program:
    return capture(Network(nnx.Rngs(0)), rows(), mode="train", entry="train").with_entry("eval", rows(), mode="eval")


def test_variables_stand_where_the_model_had_them(program: Program) -> None:
    model = Network(nnx.Rngs(0))
    module = ProgramModule(program)
    before, after = flat(model), flat(module)
    assert after.keys() == before.keys()
    for path, variable in after.items():
        expected = Frozen if path == "table" else type(before[path])
        assert type(variable) is expected, path
        assert variable.get_raw_value() is program.params.get(path, program.state.get(path))
    assert module.blocks[1].mlp.up.kernel.shape == (D, 2 * D)


def test_a_state_of_the_model_fits_the_module() -> None:
    model = Mlp(nnx.Rngs(1))
    module = ProgramModule(capture(Mlp(nnx.Rngs(0)), rows()))
    nnx.update(module, nnx.state(model))
    np.testing.assert_allclose(module(rows()), model(rows()), rtol=1e-6)


def test_a_call_updates_state_in_place(program: Program) -> None:
    model = Network(nnx.Rngs(0))
    module = ProgramModule(program)
    for seed in range(2):
        np.testing.assert_allclose(module(rows(seed=seed)), model(rows(seed=seed)), rtol=1e-4, atol=1e-5)
    for path in ("norm.mean", "norm.var", "dropout.rngs.count"):
        np.testing.assert_allclose(flat(module)[path][...], flat(model)[path][...], rtol=1e-5, atol=1e-6)
    assert int(program.state["dropout.rngs.count"]) == 0, "the program's own state stays"


def test_entries_and_modes(program: Program) -> None:
    model = Network(nnx.Rngs(0))
    model.eval()
    module = ProgramModule(program)
    module.eval()
    np.testing.assert_allclose(module(rows()), model(rows()), rtol=1e-5, atol=1e-6)
    module.train()
    assert not np.allclose(module(rows()), model(rows()))
    fresh = ProgramModule(program, "eval")
    np.testing.assert_allclose(fresh(rows()), model(rows()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ProgramModule(program)(rows(), entry="eval"), model(rows()), rtol=1e-5, atol=1e-6)


def test_a_missing_mode_is_refused() -> None:
    module = ProgramModule(capture(Mlp(nnx.Rngs(0)), rows(), mode="train"))
    module.train()
    with pytest.raises(SignatureError, match=r"no entry in mode 'eval'; add one: program\.with_entry\('eval'"):
        module.eval()
    with pytest.raises(SignatureError, match="no attributes to set, such as 'deterministic'"):
        module.train(deterministic=True)
    with pytest.raises(SignatureError, match="no entry 'decode'"):
        ProgramModule(capture(Mlp(nnx.Rngs(0)), rows()), "decode")


def test_the_module_holds_no_second_copy_of_the_arrays(program: Program) -> None:
    module = ProgramModule(program)
    held = module._definition.program
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((held.params, held.state)))


def test_training_with_optimizer_jit_and_grad(program: Program) -> None:
    def loss(model: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((model(x) - 1) ** 2)

    @nnx.jit
    def step(model: Any, optimizer: nnx.Optimizer[Any], x: jax.Array) -> jax.Array:
        value, gradients = nnx.value_and_grad(loss)(model, x)
        optimizer.update(model, gradients)
        return value

    class Trainable(Network):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            del self.table  # NNX cannot differentiate integers

    model, module = Trainable(nnx.Rngs(0)), ProgramModule(program)
    optimizers = [nnx.Optimizer(m, optax.adam(1e-2), wrt=nnx.Param) for m in (model, module)]
    for seed in range(3):
        expected, actual = (step(m, o, rows(seed=seed)) for m, o in zip((model, module), optimizers, strict=True))
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    after = flat(module)
    for path, variable in flat(model).items():
        if not jax.dtypes.issubdtype(variable.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(after[path][...], variable[...], rtol=1e-3, atol=1e-4, err_msg=path)


def test_jit_compiles_once(program: Program) -> None:
    traces = 0

    @nnx.jit
    def run(module: Any, x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return module(x)

    module = ProgramModule(program)
    for seed in range(3):
        run(module, rows(seed=seed))
    run(ProgramModule(program.replace(params=jax.tree.map(lambda p: p + 1, program.params))), rows())
    assert int(module.dropout.rngs.count[...]) == 3
    assert traces <= 2


def test_frozen_parameters_are_no_params(program: Program) -> None:
    paths = {path for path in program.params if path.startswith("blocks.0")}
    module = ProgramModule(program.replace(frozen=frozenset(paths)))
    assert {path for path, v in flat(module).items() if isinstance(v, Frozen)} == paths | {"table"}
    gradients = nnx.grad(lambda m: jnp.mean(m(rows()) ** 2))(module)
    assert {".".join(map(str, path)) for path, _ in nnx.to_flat_state(gradients)} == (
        program.params.keys() - paths - {"table"}
    )
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    moments = [path for path, _ in nnx.to_flat_state(nnx.state(optimizer)) if "kernel" in path]
    assert len(moments) == 2 * 2
    assert not any(0 in path[3:5] and "blocks" in path and path[path.index("blocks") + 1] == 0 for path in moments)


def test_stored_encodings_are_variables_without_gradient(program: Program) -> None:
    path = "blocks.0.mlp.up.kernel"
    quantized = encoded(program, Integers.of, path)
    module = ProgramModule(quantized, "eval")
    variables = flat(module)
    assert type(variables[f"{path}.codes"]) is Stored
    assert type(variables[f"{path}.scale"]) is Stored
    assert variables[f"{path}.codes"].dtype == jnp.int8
    assert path not in variables
    np.testing.assert_allclose(module(rows()), quantized(rows(), entry="eval"), rtol=1e-5, atol=1e-6)
    gradients = nnx.jit(nnx.grad(lambda m: jnp.mean(m(rows()) ** 2)))(module)
    assert ("blocks", 0, "mlp", "up", "kernel", "codes") not in dict(nnx.to_flat_state(gradients))


def test_the_trainable_leaves_of_nested_encodings_are_params(program: Program) -> None:
    path = "blocks.1.mlp.down.kernel"
    adapted = encoded(program, lambda x: Adapted.over(Integers.of(x)), path)
    module = ProgramModule(adapted, "eval")
    kinds = {name: type(v) for name, v in flat(module).items() if name.startswith(path)}
    assert kinds == {
        f"{path}.base.codes": Stored,
        f"{path}.base.scale": Stored,
        **{f"{path}.factors.{i}": nnx.Param for i in (0, 1)},
    }
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    before = module.blocks[1].mlp.down.kernel.base.codes[...]
    optimizer.update(module, nnx.grad(lambda m: jnp.mean(m(rows()) ** 2))(module))
    assert np.any(module.blocks[1].mlp.down.kernel.factors[1][...])
    np.testing.assert_array_equal(module.blocks[1].mlp.down.kernel.base.codes[...], before)


def test_a_frozen_encoding_has_no_params(program: Program) -> None:
    path = "blocks.1.mlp.down.kernel"
    adapted = encoded(program, lambda x: Adapted.over(Integers.of(x)), path)
    module = ProgramModule(adapted.replace(frozen=frozenset({path})))
    assert {type(v) for name, v in flat(module).items() if name.startswith(path)} == {Stored}


def test_capture_works_on_the_module_again(program: Program) -> None:
    module = ProgramModule(program, "eval")
    again = capture(module, rows())
    assert again.params.keys() == program.params.keys() - {"table"}
    assert again.state.keys() == program.state.keys() | {"table"}
    np.testing.assert_array_equal(again(rows()), program(rows(), entry="eval"))
    third = capture(ProgramModule(again), rows())
    np.testing.assert_array_equal(third(rows()), again(rows()))


def test_sequences_with_gaps_keep_their_positions() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(D, D, rngs=rngs), nnx.relu, nnx.Linear(D, D, rngs=rngs))
    module = ProgramModule(capture(model, rows()))
    assert flat(module).keys() == flat(model).keys()
    assert module.layers[2].kernel is not None
    np.testing.assert_allclose(module(rows()), model(rows()), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nnx.clone(module)(rows()), model(rows()), rtol=1e-5, atol=1e-6)


def test_sown_values_become_intermediates() -> None:
    class Sows(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.mlp = Mlp(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = self.mlp(x)
            self.mlp.sow(nnx.Intermediate, "size", jnp.sum(x))
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # sowing outside of nnx.capture
        module = ProgramModule(capture(Sows(nnx.Rngs(0)), rows()))
    for seed in range(2):
        output = nnx.jit(lambda module, x: module(x))(module, rows(seed=seed))
        (size,) = jax.tree.leaves(nnx.state(module, nnx.Intermediate))
        np.testing.assert_allclose(size, output.sum(), rtol=1e-4)
    assert len(nnx.to_flat_state(nnx.pop(module, nnx.Intermediate))) == 1


def test_sown_values_of_modules_without_variables() -> None:
    class Probe(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "total", jnp.sum(x))
            return x

    rngs = nnx.Rngs(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # sowing outside of nnx.capture
        model = nnx.Sequential(Probe(), nnx.Linear(D, D, rngs=rngs), nnx.Sequential(Probe()))
        module = ProgramModule(capture(model, rows()))
    output = module(rows())
    totals = {path: jax.tree.leaves(v)[0] for path, v in flat(module).items() if isinstance(v, nnx.Intermediate)}
    assert set(totals) == {"layers.0.total", "layers.2.layers.0.total"}
    np.testing.assert_allclose(totals["layers.2.layers.0.total"], output.sum(), rtol=1e-4)


def test_caches_among_the_inputs_are_updated_in_place() -> None:
    class Counter(nnx.Module):
        def __init__(self) -> None:
            self.value = nnx.Cache(jnp.zeros((), jnp.int32))

    class Counts(nnx.Module):
        def __init__(self) -> None:
            self.weight = nnx.Param(jnp.ones(D))

        def __call__(self, x: jax.Array, counter: Counter) -> jax.Array:
            counter.value[...] = counter.value[...] + 1
            return x * self.weight

    counter = Counter()
    module = ProgramModule(capture(Counts(), rows(), counter))
    module(rows(), counter)
    nnx.jit(lambda module, x, counter: module(x, counter))(module, rows(), counter)
    assert int(counter.value[...]) == 2


def test_linen_collections_become_their_kinds_of_variable() -> None:
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=False)(nn.Dense(D)(x))

    variables = Normalized().init(jax.random.key(0), rows())
    program = capture(Normalized(), rows(), variables=variables, mutable=["batch_stats"])
    module = ProgramModule(program)
    assert type(module.Dense_0.kernel) is nnx.Param
    assert type(module.batch_stats.BatchNorm_0.mean) is nnx.BatchStat
    _, changed = Normalized().apply(variables, rows(), mutable=["batch_stats"])
    module(rows())
    np.testing.assert_allclose(
        module.batch_stats.BatchNorm_0.mean[...], changed["batch_stats"]["BatchNorm_0"]["mean"], rtol=1e-4, atol=1e-6
    )


def test_functions_with_lists_of_parameters() -> None:
    params = {"layers": [{"w": jnp.eye(D)}, {"w": 2 * jnp.eye(D)}]}
    program = capture(lambda params, x: x @ params["layers"][0]["w"] @ params["layers"][1]["w"], params, rows())
    module = ProgramModule(program)
    np.testing.assert_allclose(module.layers[1].w[...], 2 * jnp.eye(D))
    np.testing.assert_allclose(module(rows()), 2 * rows(), rtol=1e-6)


def test_sparse_numbers_are_no_list() -> None:
    program = capture(lambda params, x: x * params[7_000_000], {7_000_000: jnp.ones(D)}, rows())
    module = ProgramModule(program)
    np.testing.assert_array_equal(module(rows()), rows())


def test_a_path_within_a_path_is_refused() -> None:
    for params in ({"w": jnp.ones(D), "w.b": jnp.ones(D)}, {"w.b": jnp.ones(D), "w": jnp.ones(D)}):
        program = capture(lambda params, x: x * params["w"] + params["w.b"], params, rows())
        with pytest.raises(CaptureError, match="is a variable and the beginning of"):
            ProgramModule(program)


def test_copies_are_independent(program: Program) -> None:
    module = ProgramModule(program)
    for other in (nnx.clone(module), copy.deepcopy(module)):
        other(rows())
        assert int(other.dropout.rngs.count[...]) == 1
        assert int(module.dropout.rngs.count[...]) == 0


def test_abstract_programs_give_abstract_modules() -> None:
    program = capture(nnx.eval_shape(lambda: Mlp(nnx.Rngs(0))), rows())
    module = ProgramModule(program)
    assert isinstance(module.up.kernel.get_raw_value(), jax.ShapeDtypeStruct)
    nnx.update(module, nnx.state(Mlp(nnx.Rngs(0))))
    np.testing.assert_allclose(module(rows()), Mlp(nnx.Rngs(0))(rows()), rtol=1e-6)
