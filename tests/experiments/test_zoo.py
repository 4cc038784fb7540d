"""The zoo: every model and variant is captured and computes what the model itself computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compax
import zoo as basic
from compax import ir
from compax.experiments.benchmarks import zoo
from compax.experiments.benchmarks.zoo import Case, Variant, VariantError

TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
BASIC = Variant()
VARIANTS = [(name, variant) for name in zoo.ENTRIES for variant in zoo.variants(name)]


def build(name: str, variant: Variant = BASIC) -> Case:
    try:
        return zoo.build(name, **dataclasses.asdict(variant))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def assert_same(case: Case, dtype: str) -> None:
    ours, theirs = case.run(case.capture()), case.reference()
    assert ours.dtype == theirs.dtype
    ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
    assert np.all(np.isfinite(theirs))
    assert np.std(theirs) > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES[dtype] * np.abs(theirs).max())


@basic.foreign_warnings
@pytest.mark.parametrize("name", zoo.ENTRIES)
def test_basic_variant(name: str) -> None:
    assert_same(build(name), "float32")


@pytest.mark.slow
@basic.foreign_warnings
@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=lambda x: str(x))
def test_variant(name: str, variant: Variant) -> None:
    assert_same(build(name, variant), variant.dtype)


@basic.foreign_warnings
@pytest.mark.parametrize("name", ["tunix_qwen3", "flax_gpt2", "flax_bart", "compax_decoder"])
def test_the_arguments_are_what_capture_takes(name: str) -> None:
    case = build(name, Variant(decode=True))
    variables = {} if case.variables is None else {"variables": case.variables}
    program = compax.capture(case.module, *case.inputs, **variables, **case.options, **case.kwargs)
    expected = case.run(program)  # first, since the call below moves a cache that is an object
    np.testing.assert_array_equal(case.output(program(*case.inputs, **case.kwargs)), expected)


@basic.foreign_warnings
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("tunix_llama3", Variant(padding=True)),
        ("flax_gpt2", Variant(padding=True)),
        ("flax_gpt2", Variant(mode="train")),
        ("flax_bart", Variant(padding=True)),
        ("flax_wav2vec2", Variant(padding=True)),
        ("flax_resnet", Variant(mode="train")),
        ("compax_decoder", Variant(mode="train")),
        ("compax_decoder_scanned", Variant(mode="train")),
    ],
    ids=str,
)
def test_a_variant_is_another_computation(name: str, variant: Variant) -> None:
    basic_output, output = (case.run(case.capture()) for case in (build(name), build(name, variant)))
    assert basic_output.shape == output.shape
    assert float(jnp.abs(basic_output - output).max()) > 0.1


def with_cache_changed_at(case: Case, place: int) -> Case:
    """A case of tunix or transformers with other keys and values at one place of every cache."""

    def change(x: jax.Array) -> jax.Array:
        return x.at[:, place].add(1.0) if x.ndim == 4 else x

    if case.variables is None:
        return dataclasses.replace(case, inputs=jax.tree.map(change, case.inputs))
    cache = jax.tree.map(change, case.variables["cache"])
    return dataclasses.replace(case, variables={**case.variables, "cache": cache})


@basic.foreign_warnings
@pytest.mark.parametrize("name", ["tunix_llama3", "tunix_gemma3", "flax_gpt_neo", "flax_mistral", "flax_whisper"])
def test_a_step_reads_what_is_in_the_cache_and_nothing_behind(name: str) -> None:
    case, filled = build(name, Variant(decode=True)), zoo.WIDTHS.filled
    output = case.reference()
    np.testing.assert_array_equal(with_cache_changed_at(case, filled + 1).reference(), output)
    assert float(jnp.abs(with_cache_changed_at(case, filled - 1).reference() - output).max()) > 1e-3


# Roots of sums of squares that are no norm: an embedding's length, and a norm whose result nothing reads.
OTHER_ROOTS = {"flax_clip": 2, "flax_gpt_neo": 1}


@basic.foreign_warnings
@pytest.mark.parametrize(
    "name", [name for name in zoo.ENTRIES if name not in ("flax_resnet", "compax_decoder_scanned")]
)
def test_what_was_counted_by_hand_agrees_with_what_is_traced(name: str) -> None:
    known = zoo.expected(name)
    ops = [op for _, op in ir.walk(build(name).capture().graph().graph)]
    softmaxes = sum(op.name == "reduce_max" for op in ops)
    roots = sum(op.name in ("sqrt", "rsqrt") and op.outputs[0].shape[-1:] == (1,) for op in ops)
    assert softmaxes == sum(attention.count for attention in known.attentions) + known.experts
    assert roots == sum(known.norms.values()) + OTHER_ROOTS.get(name, 0)


@basic.foreign_warnings
@pytest.mark.parametrize("name", [name for name in zoo.ENTRIES if zoo.expected(name).tied is not None])
def test_a_head_that_is_not_tied_has_a_kernel(name: str) -> None:
    params = build(name).capture().params
    assert zoo.expected(name).tied != any(path in ("lm_head.kernel", "lm_head.w", "head.kernel") for path in params)


def test_widths_differ() -> None:
    widths = zoo.WIDTHS
    values = [*dataclasses.asdict(widths).values(), widths.heads_dim, widths.num_kv_heads * widths.head_dim]
    assert len(set(values)) == len(values)


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(VariantError, match="tunix_llama3 has no variant float32-train: the code has neither dropout"):
        zoo.build("tunix_llama3", mode="train")
    with pytest.raises(VariantError, match="no author's code decodes in train mode"):
        zoo.build("flax_gpt2", mode="train", decode=True)
    with pytest.raises(VariantError, match="no model 'flax_t5' in the zoo; it has tunix_llama3"):
        zoo.variants("flax_t5")


def test_no_name_stands_twice() -> None:
    assert len(zoo.ENTRIES) == len({entry.make for entry in zoo.ENTRIES.values()})
    assert all(entry.description.endswith(".") for entry in zoo.ENTRIES.values())
    assert all(len(set(zoo.variants(name))) == len(zoo.variants(name)) for name in zoo.ENTRIES)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["zoo"])
    zoo.main()
    text = capsys.readouterr().out
    assert all(name in text for name in zoo.ENTRIES)
