"""What computes attention, as functions of arrays, against attention written out in full."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compax.composites.layout import Arrangement, Layout
from compax.contracts import largest_relative_error, rounding_tolerance
from compax.errors import LoweringError
from compax.passes.flash import blocks, gpu, plain, splash
from compax.passes.flash.lower import attend
from compax.passes.flash.spec import Pattern, Spec, Spread

B, T, S, H, G, K, V = 2, 23, 29, 4, 2, 6, 5
"""Batch, queries, keys, heads, key-value heads, head size, size of values: all different."""

RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.random((T, S)) < 0.4
MATRIX[:, 0] = True
PATTERNS = {
    "full": Pattern(),
    "causal": Pattern("band", -1, 0),
    "causal with an offset": Pattern("band", -1, 0, offset=S - T),
    "window": Pattern("band", 4, 0, offset=3),
    "two-sided window": Pattern("band", 3, 2),
    "chunked": Pattern("chunked", -1, 0, chunk=5),
    "other": Pattern("other", packed=np.packbits(MATRIX).tobytes()),
}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


Q, KEYS, VALUES, DIRECTION = normal(B, T, H, K), normal(B, S, G, K), normal(B, S, G, V), normal(B, T, H, V)


def in_full(q: Any, k: Any, v: Any, bias: Any, pattern: Pattern, scale: float, softcap: Any, seen: Any) -> jax.Array:
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    mask = jnp.asarray(pattern.matrix(q.shape[1], k.shape[1]))[None, None]
    mask = mask if seen is None else mask & seen
    weights = jax.nn.softmax(jnp.where(mask, scores, -3e38), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def assert_close(expected: Any, actual: Any, dtype: str = "float32") -> None:
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert largest_relative_error(np.asarray(one), np.asarray(other)) <= rounding_tolerance(dtype)


EXTRAS = {
    "alone": (None, None, None),
    "capped": (5.0, None, None),
    "bias for each pair": (None, normal(1, H, T, S), None),
    "bias for each key, capped": (3.0, normal(B, 1, 1, S), None),
    "padding": (None, None, jnp.asarray(RANDOM.random((B, 1, 1, S)) < 0.8).at[..., 0].set(True)),
    "pairs and bias": (None, normal(1, H, 1, S), jnp.asarray(RANDOM.random((B, 1, T, S)) < 0.7).at[..., 0].set(True)),
}


COMBINATIONS = [
    *((name, "alone", (8, 16)) for name in PATTERNS),
    *(("causal with an offset", name, (8, 16)) for name in EXTRAS if name != "alone"),
    ("other", "pairs and bias", (8, 16)),
    ("causal", "pairs and bias", (64, 64)),
]


@pytest.mark.parametrize(("pattern", "extra", "sizes"), COMBINATIONS)
def test_blocks_compute_what_is_computed_in_full(pattern: str, extra: str, sizes: tuple[int, int]) -> None:
    softcap, bias, seen = EXTRAS[extra]
    numbers = (0, 1, 2) if bias is None else (0, 1, 2, 3)

    def expected(*args: Any) -> jax.Array:
        return jnp.vdot(in_full(*args, PATTERNS[pattern], 0.4, softcap, seen), DIRECTION)

    def actual(q: Any, k: Any, v: Any, bias: Any) -> jax.Array:
        options: dict[str, Any] = dict(zip(("block_q", "block_k"), sizes, strict=True))
        rest: dict[str, Any] = {"scale": 0.4, "softcap": softcap, "seen": seen, "bias": bias}
        return jnp.vdot(plain.attention(q, k, v, PATTERNS[pattern], **rest, **options)[0], DIRECTION)

    wanted, found = (jax.jit(jax.value_and_grad(f, numbers))(Q, KEYS, VALUES, bias) for f in (expected, actual))
    assert_close(wanted, found)


def test_the_statistics_are_those_of_the_softmax() -> None:
    pattern = PATTERNS["causal"]
    _, lse = plain.attention(Q, KEYS, VALUES, pattern, scale=0.4, block_q=8, block_k=8)
    scores = jnp.einsum("bthk,bshk->bths", Q, jnp.repeat(KEYS, H // G, axis=2)) * 0.4
    scores = jnp.where(jnp.asarray(pattern.matrix(T, S))[None, :, None], scores, -jnp.inf)
    assert_close(jax.nn.logsumexp(scores, axis=-1), lse)


def test_a_query_that_sees_nothing_is_zero_with_infinite_statistics_and_no_gradient() -> None:
    pattern = Pattern("band", -1, 0, offset=-2)

    def function(q: jax.Array) -> Any:
        out, lse = plain.attention(q, KEYS, VALUES, pattern, scale=0.4, block_q=8, block_k=8)
        return out.sum(), (out, lse)

    gradient, (out, lse) = jax.grad(function, has_aux=True)(Q)
    assert (out[:, :2] == 0).all()
    assert jnp.isinf(lse[:, :2]).all()
    assert jnp.isfinite(lse[:, 2:]).all()
    assert (gradient[:, :2] == 0).all()
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_that_are_left_out_hold_nothing(name: str) -> None:
    pattern, sizes = PATTERNS[name], (4, 8)
    matrix = pattern.matrix(T, S)
    computed = {tuple(pair) for pair in blocks.block_pairs(pattern, (T, S), sizes).tolist()}
    for i in range(-(-T // 4)):
        for j in range(-(-S // 8)):
            some = matrix[i * 4 : i * 4 + 4, j * 8 : j * 8 + 8].any()
            assert some == ((i, j) in computed)


def test_half_of_the_blocks_of_a_causal_mask_are_left_out() -> None:
    assert len(blocks.block_pairs(Pattern("band", -1, 0), (64, 64), (8, 8))) == 36
    assert len(blocks.block_pairs(Pattern("band", 7, 0), (64, 64), (8, 8))) == 15
    assert len(blocks.block_pairs(Pattern(), (64, 64), (8, 8))) == 64


def test_blocks_share_a_length_evenly() -> None:
    assert [blocks.even_block(n, 256) for n in (5, 256, 257, 300, 512, 1000)] == [5, 256, 136, 152, 256, 256]


def test_sixteen_bits() -> None:
    pattern, half = PATTERNS["causal"], [x.astype(jnp.bfloat16) for x in (Q, KEYS, VALUES)]
    out, lse = plain.attention(*half, pattern, scale=0.4, block_q=8, block_k=8)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(in_full(Q, KEYS, VALUES, None, pattern, 0.4, None, None), out.astype(jnp.float32), "bfloat16")


# -- Pallas kernels, interpreted --------------------------------------------------------------------------------------

SIZE, LENGTH = 16, 256


def spec_of(
    kernel: Any, pattern: Pattern, *, heads: int = 4, groups: int = 2, length: int = LENGTH, **more: Any
) -> Spec:
    def plainly(*shape: int) -> Arrangement:
        return Arrangement(shape, shape, (), tuple(range(4)), (shape[0], shape[1], shape[2], shape[3]))

    q, k = plainly(B, length, heads, SIZE), plainly(B, length, groups, SIZE)
    options: dict[str, Any] = {"softcap": None, "padding": (), "given": (), "bias": (), "interpret": True}
    dtypes = {"query_dtype": "float32", "value_dtype": "float32"}
    return Spec(kernel, Layout(q, k, k, q), pattern, SIZE**-0.5, **{**options, **dtypes, **more})


def operands(spec: Spec) -> list[jax.Array]:
    shapes = (spec.layout.query.shape, spec.layout.key.shape, spec.layout.value.shape)
    return [normal(*shape) for shape in shapes]


def assert_like_plain(spec: Spec, *more: jax.Array) -> None:
    arrays, direction = operands(spec), normal(*spec.layout.query.shape)

    def run(spec: Spec) -> Any:
        def function(*arrays: Any) -> Any:
            out = attend(spec, [*arrays, *more])
            return jnp.vdot(out, direction), out

        return jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(*arrays)

    expected, actual = run(dataclasses.replace(spec, kernel="plain", block_q=None, block_k=None)), run(spec)
    assert_close(expected[0][1], actual[0][1])
    assert_close(expected[1], actual[1])


PADDING = Spread((0, 1), (0, 1), (B, 1, 1, LENGTH))
PREFIX = Pattern("other", packed=np.packbits(np.tri(LENGTH, dtype=bool) | (np.arange(LENGTH) < 20)).tobytes())
LEFT_PADDED = (np.arange(LENGTH)[None] >= np.asarray([[0], [37]])).astype(np.int32)


@pytest.mark.parametrize(
    ("pattern", "softcap", "padded"),
    [
        pytest.param(Pattern("band", -1, 0), None, True, id="causal with padding"),
        pytest.param(Pattern("band", 40, 0), 5.0, False, id="window, capped", marks=pytest.mark.slow),
        pytest.param(Pattern("chunked", -1, 0, chunk=100), None, False, id="chunked", marks=pytest.mark.slow),
        pytest.param(PREFIX, None, False, id="prefix", marks=pytest.mark.slow),
        pytest.param(Pattern(), None, True, id="full with padding", marks=pytest.mark.slow),
    ],
)
def test_splash(pattern: Pattern, softcap: float | None, padded: bool) -> None:
    spec = spec_of("splash", pattern, softcap=softcap, padding=(PADDING,) if padded else (), block_q=128, block_k=128)
    assert splash.why_not(spec) == ""
    assert_like_plain(spec, *([jnp.asarray(LEFT_PADDED)] if padded else []))


@pytest.mark.slow
def test_splash_fills_lanes_with_keys_that_are_not_there() -> None:
    spec = spec_of("splash", Pattern("band", 20, 10), length=250)
    assert splash.why_not(spec) == ""
    assert_like_plain(spec)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Pattern(), Pattern("band", -1, 0)], ids=["full", "causal"])
def test_triton(pattern: Pattern) -> None:
    spec = spec_of("pallas", pattern, groups=4, length=64)
    assert gpu.why_not_pallas(spec) == ""
    assert_like_plain(spec)


def test_triton_lowers_for_cuda() -> None:
    spec = spec_of("pallas", Pattern("band", -1, 0), groups=4, interpret=False)
    gradient = jax.grad(lambda *arrays: attend(spec, arrays).sum(), (0, 1, 2))
    text = jax.jit(gradient).trace(*operands(spec)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") >= 3


# -- what kernels do not take -----------------------------------------------------------------------------------------

CAUSAL, PAIRS = Pattern("band", -1, 0), Spread((0, 1, 2), (0, 1, 2), (B, 1, LENGTH, LENGTH))
BIAS = Spread((0, 1), (0, 1), (1, 4, 1, LENGTH))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bias": (BIAS,)}, "its scores get a bias"),
        ({"given": (PAIRS,)}, "its mask is an argument for each pair"),
        ({"padding": (PAIRS,)}, "its padding differs between heads or queries"),
        ({"pattern": Pattern("band", 9, 0, offset=300)}, "some of its queries see no key"),
        ({"pattern": Pattern("band", -1, 0, offset=-3)}, "some of its queries see no key"),
        ({"value_dtype": "float16", "query_dtype": "float16"}, "it computes in float16"),
        ({"block_q": 100}, "block_q=100 is no multiple of 128 that divides 256"),
    ],
)
def test_splash_declines(changes: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(spec_of("splash", CAUSAL), **changes)
    assert reason in splash.why_not(spec)


def test_splash_declines_what_would_be_mostly_padding() -> None:
    assert "fill whole blocks of 128 badly" in splash.why_not(spec_of("splash", CAUSAL, length=140))


HALF = {"query_dtype": "bfloat16", "value_dtype": "bfloat16", "interpret": False}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_dtype": "float32"}, "put cast before flash"),
        ({"softcap": 30.0}, "its scores are capped"),
        ({"given": (PAIRS,)}, "its mask is an argument for each pair"),
        ({"pattern": Pattern("chunked", -1, 0, chunk=8)}, "its mask is chunked"),
        ({"pattern": Pattern("band", 3, 2)}, "its window reaches ahead"),
        ({"block_k": 64}, "chooses its blocks itself"),
    ],
)
def test_cudnn_declines(changes: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(spec_of("cudnn", CAUSAL, **HALF), **changes)
    assert reason in gpu.why_not_cudnn(spec)
    assert gpu.why_not_cudnn(spec_of("cudnn", CAUSAL, **HALF)) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "its scores are capped"),
        ({"padding": (PADDING,)}, "neither a bias nor a mask that is an argument"),
        ({"pattern": Pattern("band", 9, 0)}, "neither full nor causal"),
        ({"block_q": 96}, "no power of two"),
    ],
)
def test_triton_declines(changes: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(spec_of("pallas", CAUSAL, groups=4), **changes)
    assert reason in gpu.why_not_pallas(spec)
    assert "4 heads on 2" in gpu.why_not_pallas(spec_of("pallas", CAUSAL))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is cuDNN")
def test_without_cudnn_it_says_what_to_install() -> None:
    spec = spec_of("cudnn", CAUSAL, **HALF)
    with pytest.raises(LoweringError, match=r"install jax\[cuda13\]"):
        attend(spec, operands(spec))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Pattern(), CAUSAL, Pattern("band", 40, 0)], ids=["full", "causal", "window"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_cudnn(pattern: Pattern, padded: bool) -> None:
    spec = spec_of("cudnn", pattern, padding=(PADDING,) if padded else (), **HALF)
    arrays, more = operands(spec), [jnp.asarray(LEFT_PADDED)] if padded else []

    def run(spec: Spec) -> Any:
        return jax.jit(jax.grad(lambda *arrays: jnp.sum(attend(spec, [*arrays, *more]) ** 2), (0, 1, 2)))(*arrays)

    assert_close(run(dataclasses.replace(spec, kernel="plain")), run(spec), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Pattern(), CAUSAL], ids=["full", "causal"])
def test_triton_on_a_gpu(pattern: Pattern) -> None:
    assert_like_plain(spec_of("pallas", pattern, groups=4, interpret=False))


@pytest.mark.tpu
@pytest.mark.parametrize("pattern", [Pattern(), CAUSAL, Pattern("band", 40, 0)], ids=["full", "causal", "window"])
def test_splash_on_a_tpu(pattern: Pattern) -> None:
    spec = spec_of("splash", pattern, interpret=False, **{key: HALF[key] for key in ("query_dtype", "value_dtype")})
    arrays = operands(spec)

    def run(spec: Spec) -> Any:
        return jax.jit(jax.grad(lambda *arrays: jnp.sum(attend(spec, arrays) ** 2), (0, 1, 2)))(*arrays)

    assert_close(run(dataclasses.replace(spec, kernel="plain")), run(spec), "bfloat16")
