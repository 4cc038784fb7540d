"""The pass `shard`: the same losses on eight devices as on one, in every mode, and what it refuses."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tests import zoo

import compax
from compax import Pipeline, Program
from compax.analysis import hlo
from compax.errors import PassError, PipelineError, PlacementError, ShardingError
from compax.models import decoder
from compax.passes import Shard, TileLoss
from compax.target import Target
from compax.transform import Context

STEPS = 20
SHAPE = dataclasses.replace(decoder.SIZES["tiny"], num_heads=4, num_kv_heads=4, head_dim=8, vocab_size=96)
slow = pytest.mark.slow
MODES = (
    "shard(fsdp=8)",
    "shard(fsdp=2, tensor=4, sequence=tensor)",
    pytest.param("shard(data=8)", marks=slow),
    pytest.param("shard(data=2, tensor=4)", marks=slow),
    pytest.param("shard(data=8, zero=1)", marks=slow),
    pytest.param("shard(data=8, zero=2)", marks=slow),
    pytest.param("shard(data=8, zero=3)", marks=slow),
    pytest.param("shard(data=2, model=4, zero=1)", marks=slow),
    pytest.param("shard(fsdp=2, tensor=4)", marks=slow),
    pytest.param("shard(data=2, fsdp=4)", marks=slow),
    pytest.param("shard(data=2, fsdp=2, tensor=2, sequence=tensor)", marks=slow),
    pytest.param("shard(dcn_data=2, fsdp=4)", marks=slow),
    pytest.param("shard(fsdp=8, zero=2)", marks=slow),
)
COMPOSED = (
    "{} | remat(keep=dots)",
    pytest.param("cast(compute=bfloat16) | {}", marks=slow),
    pytest.param("quantize(weights=int8, train=true) | {}", marks=slow),
    pytest.param("{} | flash()", marks=slow),
    pytest.param("{} | tile_loss(tokens=32)", marks=slow),
    pytest.param("cast(compute=bfloat16) | {} | flash(compute=bfloat16) | remat(keep=nothing)", marks=slow),
)


def batch(seed: int = 1) -> dict[str, jax.Array]:
    return {"tokens": jax.random.randint(jax.random.key(seed), (8, 17), 0, 96)}


def capture(**changes: Any) -> Program:
    model = decoder.Decoder(dataclasses.replace(SHAPE, **{"scan": True, **changes}), rngs=nnx.Rngs(0))
    return compax.capture(model, batch(), loss=decoder.loss)


def trained(program: Program, steps: int = STEPS) -> np.ndarray:
    """Losses of AdamW, with everything laid out as the placement says."""
    update_rule, placement = optax.adamw(1e-2), program.placement
    trainable, frozen = program.partition()

    def step(params: Any, moments: Any, tokens: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            output, _, _ = program.apply({**frozen, **trainable}, program.state, tokens)
            return output[0]

        value, gradients = jax.value_and_grad(loss)(params)
        gradients = placement.constrained(gradients, {**placement.specs, **placement.gradients})
        updates, moments = update_rule.update(gradients, moments, params)
        return placement.constrained(optax.apply_updates(params, updates), placement.specs), moments, value

    compiled, params, moments = jax.jit(step), trainable, update_rule.init(trainable)
    losses = []
    for i in range(steps):
        params, moments, value = compiled(params, moments, batch(i % 3))
        losses.append(float(value))
    return np.array(losses)


@pytest.fixture(scope="module")
def base() -> Program:
    return capture()


@pytest.fixture(scope="module")
def expected(base: Program) -> np.ndarray:
    return trained(base)


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_one_device(base: Program, expected: np.ndarray, mode: str) -> None:
    program = Pipeline.parse(mode)(base).place()
    assert program.placement.mesh is not None
    assert program.placement.mesh.size == 8
    np.testing.assert_allclose(trained(program), expected, rtol=2e-5)


@pytest.mark.parametrize("pipeline", COMPOSED)
def test_composed_with_other_passes(base: Program, pipeline: str) -> None:
    mode = "shard(fsdp=2, tensor=4, sequence=tensor)"
    alone = Pipeline.parse(" | ".join(part for part in pipeline.split(" | ") if part != "{}"))(base)
    program = Pipeline.parse(pipeline.format(mode))(base).place()
    rtol = 2e-2 if "bfloat16" in pipeline else 5e-5
    np.testing.assert_allclose(trained(program, 8), trained(alone, 8), rtol=rtol)


def test_unrolled_layers_are_split_as_scanned_ones() -> None:
    program = Pipeline.parse("shard(fsdp=2, tensor=4)")(capture(scan=False))
    specs = program.placement.specs
    assert specs["blocks.0.mlp.up.kernel"] == P("fsdp", "tensor")
    assert specs["blocks.1.mlp.down.kernel"] == P("tensor", "fsdp")
    np.testing.assert_allclose(trained(program.place(), 4), trained(capture(scan=False), 4), rtol=2e-5)


def test_specs_and_what_is_told(base: Program) -> None:
    program = Pipeline.parse("shard(fsdp=2, tensor=4)")(base)
    placement = program.placement
    assert placement.batch == ("fsdp",)
    assert placement.specs["blocks.attn.query.kernel"] == P(None, "fsdp", "tensor")
    assert placement.specs["blocks.mlp.down.kernel"] == P(None, "tensor", "fsdp")
    assert placement.specs["embed.embedding"] == P("tensor", "fsdp")
    assert "norm.scale" not in placement.specs
    sites = {site.name: site for site in program.history[-1].sites}
    assert sites["batch"].reason == "split over fsdp"
    assert sites["norm.scale"].status == "skipped"
    assert "vector" in sites["norm.scale"].reason
    assert sites["blocks.mlp.up.kernel"].reason == "-,-,tensor used, -,fsdp,tensor stored"


def test_stages_of_zero_differ_in_what_is_split(base: Program) -> None:
    path = "blocks.mlp.up.kernel"
    first, second, third = (Pipeline.parse(f"shard(data=8, zero={n})")(base).placement for n in (1, 2, 3))
    split = P(None, "data")
    assert (first.spec(path), first.gradient_spec(path), first.optimizer_spec(path)) == (P(), P(), split)
    assert (second.spec(path), second.gradient_spec(path), second.optimizer_spec(path)) == (P(), split, split)
    assert (third.spec(path), third.gradient_spec(path), third.optimizer_spec(path)) == (split, split, split)


def test_parameters_are_gathered_layer_by_layer_inside_the_loop(base: Program) -> None:
    program = Pipeline.parse("shard(fsdp=8) | remat(keep=nothing)")(base).place()

    def loss(params: Any) -> jax.Array:
        return program.apply(params, program.state, batch())[0][0]

    text = jax.jit(jax.grad(loss)).lower(dict(program.params)).compile().as_text()
    gathered = re.findall(r"f32\[([\d,]+)\]\S* all-gather\(", text)
    stacked = [shape for shape in gathered if shape.startswith(f"{SHAPE.num_layers},32,") or shape.count(",") > 2]
    assert gathered
    assert not stacked


def test_no_whole_stack_is_kept_for_the_backward_pass() -> None:
    program = Pipeline.parse("shard(fsdp=8)")(capture(num_layers=6)).place()

    def loss(params: Any) -> jax.Array:
        return program.apply(params, program.state, batch())[0][0]

    text = jax.jit(jax.grad(loss)).lower(dict(program.params)).compile().as_text()
    assert "f32[32,80]" in text
    assert "f32[6,32,80]" not in text


def test_unrolled_layers_keep_no_gathered_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    program = Pipeline.parse("shard(fsdp=8)")(capture(scan=False)).place()

    def loss(params: Any) -> jax.Array:
        return program.apply(params, program.state, batch())[0][0]

    jax.ad_checkpoint.print_saved_residuals(loss, dict(program.params))
    kept = capsys.readouterr().out.splitlines()
    kernels = [line for line in kept if line.startswith("f32[32,80]")]
    assert len(kernels) == 2 * SHAPE.num_layers
    assert all("from the argument" in line for line in kernels)


@pytest.mark.parametrize("more", ["", pytest.param(", sequence=tensor) | tile_loss(tokens=32", marks=slow)])
def test_what_does_not_divide_is_padded_on_request(more: str) -> None:
    def products(program: Program) -> int:
        step = jax.jit(lambda params: program.apply(params, program.state, batch())[0][0])
        return sum(hlo.matmul_flops(hlo.parse(step.lower(dict(program.params)).compile().as_text())).values())

    base = capture(vocab_size=1023, hidden_dim=66, tied=False)
    laid = Pipeline.parse(f"shard(fsdp=2, tensor=4, pad=true{more})")(base)
    # Stored without the split that does not divide, used with it.
    assert laid.placement.specs["head.kernel"] == P("fsdp")
    program = laid.place()
    np.testing.assert_allclose(trained(program, 4), trained(base, 4), rtol=2e-5)
    np.testing.assert_allclose(program.apply(program.params, program.state, batch())[0][0], base(batch())[0], rtol=2e-5)
    if not more:
        even = capture(vocab_size=1024, hidden_dim=64, tied=False)
        assert products(program) < 1.15 * products(Pipeline.parse("shard(fsdp=2, tensor=4)")(even).place())


def test_what_does_not_divide_says_what_would(base: Program) -> None:
    with pytest.raises(ShardingError, match=r"pad it to 1024 in the model, leave it whole .* with pad=true"):
        Pipeline.parse("shard(fsdp=2, tensor=4)")(capture(vocab_size=1023))


@pytest.mark.slow
def test_a_tiled_loss_splits_the_vocabulary() -> None:
    def products(pipeline: str) -> int:
        program = Pipeline.parse(pipeline)(capture(vocab_size=512, num_layers=1)).place()

        def loss(params: Any) -> jax.Array:
            return program.apply(params, program.state, batch())[0][0]

        text = jax.jit(jax.grad(loss)).lower(dict(program.params)).compile().as_text()
        return sum(hlo.matmul_flops(hlo.parse(text)).values())

    # Logits are computed once more, and each device computes its part of them.
    again = 2 * 8 * 16 * 32 * 512 / 8
    whole, tiled = (products(f"shard(fsdp=2, tensor=4){more}") for more in ("", " | tile_loss(tokens=32)"))
    assert whole < tiled <= whole + 1.1 * again


def test_a_split_vocabulary_is_not_cut_into_chunks(base: Program) -> None:
    program = Pipeline.parse("shard(fsdp=2, tensor=4)")(base)
    (site,) = TileLoss(vocabulary=32).run(program, Context()).sites
    assert site.status == "skipped"
    assert "split over tensor; use tile_loss(tokens=...)" in site.reason


def test_the_print_shows_what_is_split(base: Program) -> None:
    text = str(Pipeline.parse("quantize(weights=int8, at=blocks.mlp.up) | shard(fsdp=2, tensor=4)")(base))
    assert "f32[2,32@tensor,32@fsdp]" in text
    assert "int8[2,32@fsdp,80@tensor]" in text


def test_encoded_parameters_are_split_leaf_by_leaf(base: Program) -> None:
    quantized = Pipeline.parse("quantize(weights=int8)")(base)
    program = Pipeline.parse("shard(data=2, tensor=4)")(quantized).place()
    up = program.params["blocks.mlp.up.kernel"]
    assert {leaf.sharding.spec[-1] for leaf in jax.tree.leaves(up) if leaf.ndim == 3} == {"tensor"}
    np.testing.assert_allclose(program(batch())[0], quantized(batch())[0], rtol=2e-5)


@pytest.mark.parametrize("name", ["tunix_qwen3", "flax_gpt2", "flax_bert", "flax_clip", "flax_whisper"])
@zoo.foreign_warnings
def test_models_that_know_nothing_of_meshes(name: str) -> None:
    model = zoo.load(name)
    base = compax.capture(model.module, *model.inputs, variables=model.variables, **model.kwargs)
    program = Pipeline.parse("shard(fsdp=2, tensor=4, sequence=tensor)")(base).place()
    for ours, theirs in zip(
        jax.tree.leaves(program(*model.inputs, **model.kwargs)),
        jax.tree.leaves(base(*model.inputs, **model.kwargs)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@zoo.foreign_warnings
def test_kernels_of_convolutions_are_not_split_along_their_window() -> None:
    # XLA summed the gradient of such a kernel once for each device of the other axis.
    model = zoo.load("flax_vit")
    base = compax.capture(model.module, *model.inputs, variables=model.variables, **model.kwargs)
    kernel = "vit.embeddings.patch_embeddings.projection.kernel"

    def gradient(program: Program) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            (logits,) = jax.tree.leaves(program.apply(params, program.state, *model.inputs, **model.kwargs)[0])
            return jnp.mean(logits**2)

        return jax.jit(jax.grad(loss))(dict(program.params))[kernel]

    program = Pipeline.parse("shard(fsdp=2, tensor=4)")(base).place()
    assert program.placement.spec(kernel)[:2] == (None, None)
    np.testing.assert_allclose(gradient(program), gradient(base), atol=1e-6)
    with pytest.raises(
        ShardingError, match=r"splits dimension 1 of .*projection\.kernel, along which a convolution moves"
    ):
        Pipeline.parse('shard(fsdp=2, tensor=4, rules=["**.projection.kernel: -,fsdp,-,-"])')(base)


@zoo.foreign_warnings
def test_fused_projections_stay_whole_and_say_so() -> None:
    model = zoo.load("flax_gpt2")
    base = compax.capture(model.module, *model.inputs, variables=model.variables, **model.kwargs)
    program = Pipeline.parse("shard(data=2, tensor=4)")(base)
    (site,) = (site for site in program.history[-1].sites if site.name == "transformer.h.0.attn.c_attn.kernel")
    assert site.status == "skipped"
    assert "side by side" in site.reason


def test_new_shapes_are_sharded_as_well(base: Program) -> None:
    program = Pipeline.parse("shard(data=2, tensor=4)")(base).place()
    longer = {"tokens": jax.random.randint(jax.random.key(5), (4, 33), 0, 96)}
    np.testing.assert_allclose(program(longer)[0], base(longer)[0], rtol=2e-5)


def test_a_whole_torus_of_three_dimensions_has_two_axes_for_fsdp(base: Program) -> None:
    target = Target.parse("v5p:4x4x8")
    assert Shard(fsdp=-1).mesh_axes(target) == {"fsdp": 16, "fsdp_ring": 8}
    assert Shard(fsdp=-1, tensor=4).mesh_axes(target) == {"fsdp": 32, "tensor": 4}
    assert Shard(data=-1).mesh_axes(target) == {"data": 128}
    assert Shard(fsdp=-1).mesh_axes(Target.parse("v5e:16x16")) == {"fsdp": 256}


# -- Rules -------------------------------------------------------------------------------------------------------------


def test_rules_by_axis_by_selector_and_by_regular_expression(base: Program) -> None:
    text = 'shard(data=2, tensor=4, rules=[vocabulary->-, "blocks.attn.out.kernel: -,-,tensor", "re:mlp/(up|gate): -"])'
    pipeline = Pipeline.parse(text)
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)
    program = pipeline(base)
    specs = program.placement.specs
    assert "embed.embedding" not in specs
    assert specs["blocks.attn.out.kernel"] == P(None, None, "tensor")
    assert "blocks.mlp.up.kernel" not in specs
    assert specs["blocks.mlp.down.kernel"] == P(None, "tensor")
    np.testing.assert_allclose(program.place()(batch())[0], base(batch())[0], rtol=2e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shard()", "give the size of an axis"),
        ("shard(data=0)", "a size is 1 or more"),
        ("shard(data=-1, fsdp=-1)", "only one axis can be -1"),
        ("shard(tensor=2, model=2)", "two names of one axis"),
        ("shard(data=8, sequence=tensor)", "there is none: give tensor"),
        ("shard(data=8, zero=4)", "the stages are 0 to 3"),
        ("shard(tensor=8, zero=1)", "splits over 'fsdp' or 'data'"),
        ("shard(fsdp=8, zero=0)", "call the axis 'data'"),
    ],
)
def test_impossible_options(text: str, said: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(said)):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("shard(data=1, tensor=3)", "cannot be split over tensor (3)"),
        ("shard(data=1, tensor=5, rules=[heads->-])", "does not divide over tensor (5)"),
        ("shard(data=4, expert=2)", "has experts that expert=2 could split"),
        ("shard(data=2, tensor=4, rules=[hiden->tensor])", "names no axis"),
        ("shard(data=2, tensor=4, rules=[hidden->tensr])", "did you mean tensor?"),
        ("shard(data=2, tensor=4, rules=[hidden->tensor, blocks.mlp.hidden->-])", "disagree about the axis"),
        ('shard(data=2, tensor=4, rules=["blocks.mlp.upp: -,tensor"])', "blocks.mlp.up"),
        ('shard(data=2, tensor=4, rules=["re:*: -,tensor"])', "no regular expression"),
        ('shard(data=2, tensor=4, rules=["norm.scale: -,tensor"])', "2 entries for 1 dimension"),
    ],
)
def test_what_does_not_fit_the_program(base: Program, text: str, said: str) -> None:
    with pytest.raises((ShardingError, PassError, compax.CompaxError), match=re.escape(said)):
        Pipeline.parse(text)(base)


def test_a_mesh_that_does_not_fit_the_devices(base: Program) -> None:
    program = Pipeline.parse("shard(data=4, tensor=4)")(base)
    with pytest.raises(PlacementError, match="16 devices, and there are 8"):
        program.place()
    with pytest.raises(ShardingError, match="make the sizes multiply to 16"):
        Pipeline.parse("shard(data=8)")(base, target=Target.parse("v5e:4x4"))
    with pytest.raises(PlacementError, match="laid over no mesh"):
        base.place()


def test_a_program_is_sharded_once(base: Program) -> None:
    with pytest.raises(ShardingError, match="over a mesh already"):
        Pipeline.parse("shard(data=8) | shard(tensor=8)")(base)


def test_without_a_batch_nothing_is_guessed() -> None:
    weight = jnp.ones((8, 8))
    program = compax.capture(lambda params, x, y: (x @ params["w"]).sum() + y.sum(), {"w": weight}, weight, weight)
    with pytest.raises(ShardingError, match="declare"):
        Pipeline.parse("shard(data=8)")(program)
