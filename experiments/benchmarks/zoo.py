"""Tiny models that others wrote, unmodified, and our decoder, each in several variants, with what is known of them.

    case = build("flax_gpt2", dtype="bfloat16", padding=True)
    program = compax.capture(case.module, *case.inputs, variables=case.variables, **case.options, **case.kwargs)

NNX from google-tunix, Linen from transformers. Layers are two where the structure needs no more, widths a few dozen.
Every structural choice (grouped queries, tied head, experts, sliding window, cross attention) is the author's.

Command: `python -m compax.experiments.benchmarks.zoo` prints which models and variants there are.
"""

import argparse
import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from compax.experiments.benchmarks import reporting, zoo_case, zoo_encoders, zoo_transformers, zoo_tunix
from compax.experiments.benchmarks.zoo_case import (
    Attention,
    Case,
    Dtype,
    Entry,
    Expected,
    FeedForward,
    Mode,
    Variant,
    VariantError,
    Widths,
)
from compax.models import decoder

__all__ = [
    "ENTRIES",
    "WIDTHS",
    "Attention",
    "Case",
    "Entry",
    "Expected",
    "FeedForward",
    "Variant",
    "VariantError",
    "Widths",
    "build",
    "expected",
    "main",
    "variants",
]

WIDTHS = Widths()


def _decoder(widths: Widths, variant: Variant, *, scan: bool) -> Case:
    config = dataclasses.replace(
        decoder.SIZES["tiny"],
        scan=scan,
        dtype=variant.dtype,
        dropout=zoo_case.DROPOUT if variant.mode == "train" else 0.0,
    )
    random = np.random.default_rng(0)
    module = decoder.Decoder(config, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] = zoo_case.fill(path, variable.shape, variable.dtype, random)
    options = {"mode": variant.mode}
    ids = zoo_case.tokens(widths.batch, 1 if variant.decode else widths.length, config.vocab_size)
    if not variant.decode:
        return Case(module, None, (ids,), {}, lambda output: output, options)
    cache = module.init_cache(widths.batch, widths.cache)
    for path, variable in nnx.to_flat_state(nnx.state(cache, nnx.Cache)):
        filled = path[-1] != "position"
        variable[...] = (
            zoo_case.fill(path, variable.shape, variable.dtype, random) if filled else jnp.int32(widths.filled)
        )
    return Case(module, None, (ids, cache), {}, lambda output: output, options)


def compax_decoder(widths: Widths, variant: Variant) -> Case:
    """Our decoder, unrolled: RMSNorm, rotary positions, grouped queries, gated feed-forward, tied head."""
    return _decoder(widths, variant, scan=False)


def compax_decoder_scanned(widths: Widths, variant: Variant) -> Case:
    """Our decoder with its layers, and their caches, stacked and scanned over."""
    return _decoder(widths, variant, scan=True)


def _decoder_expected() -> Expected:
    config = decoder.SIZES["tiny"]
    attention = Attention(
        2,
        "causal",
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.head_dim**-0.5,
        position="rope half",
        rotary_dim=config.head_dim,
        rope_base=config.rope_theta,
    )
    return Expected((attention,), {"rms": 5}, (FeedForward(2, config.activation, gated=True),), tied=True)


_NO_MASK = "the decoder takes no mask: it masks the future by itself"

ENTRIES: dict[str, Entry] = {
    one.name: one
    for one in (
        *zoo_tunix.ENTRIES,
        *zoo_transformers.ENTRIES,
        *zoo_encoders.ENTRIES,
        # Counted by layer, also where a scan holds one body for all of them. Attention weights are never dropped.
        zoo_case.entry(compax_decoder, _decoder_expected(), padding=_NO_MASK),
        zoo_case.entry(compax_decoder_scanned, _decoder_expected(), padding=_NO_MASK),
    )
}
"""The zoo by name."""


def _entry(name: str) -> Entry:
    if name not in ENTRIES:
        raise VariantError(f"no model '{name}' in the zoo; it has {', '.join(ENTRIES)}")
    return ENTRIES[name]


def variants(name: str) -> tuple[Variant, ...]:
    """The variants of a model that exist; the first one is the basic one.

    Raises:
        VariantError: There is no such model.
    """
    return _entry(name).variants


def expected(name: str, *, decode: bool = False) -> Expected:
    """What a model consists of at the default widths, or what its decode step consists of.

    Raises:
        VariantError: There is no such model.
    """
    entry = _entry(name)
    return (decode and entry.decoding) or entry.expected


def build(
    name: str,
    dtype: Dtype = "float32",
    mode: Mode = "eval",
    padding: bool = False,
    decode: bool = False,
    *,
    widths: Widths = WIDTHS,
) -> Case:
    """Builds a model with its inputs.

    Args:
        name: A key of `ENTRIES`.
        dtype: What it computes in.
        mode: `train` has dropout active, and batch statistics from the batch.
        padding: A mask with padding in it is an array among the inputs. Otherwise masks of transformers' models are
            arrays of ones, which `Case.options` declare constant. Masks of tunix are always arrays.
        decode: One token is computed, from a cache.
        widths: Sizes; our decoder takes no others than batch, length and cache from it.

    Raises:
        ModuleNotFoundError: The author's package is not installed; says which.
        VariantError: There is no such model or variant; says why and what there is.
    """
    return _entry(name).build(Variant(dtype, mode, padding, decode), widths)


def main() -> None:
    """Prints the models with the variants that exist."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[tuple[str, ...]] = []
    for name, entry in ENTRIES.items():
        every = {(v.mode, v.padding, v.decode) for v in entry.variants}
        columns = (("train", False, False), ("eval", True, False), ("eval", False, True), ("eval", True, True))
        known = entry.expected
        parts = (
            sum(attention.count for attention in known.attentions),
            sum(known.norms.values()),
            sum(feed_forward.count for feed_forward in known.feed_forwards),
            known.experts,
        )
        marks = ("yes" if column in every else "-" for column in columns)
        rows.append((name, *marks, str(len(entry.variants)), *map(str, parts)))
    reporting.print_table(
        f"{len(rows)} models, each in float32 and bfloat16",
        (
            "model",
            *("train", "padding", "decode", "decode with padding", "variants"),
            *("attentions", "norms", "feed-forwards", "experts"),
        ),
        rows,
        basis="predicted",
        footer=(f"{sum(len(entry.variants) for entry in ENTRIES.values())} variants in all",),
    )


if __name__ == "__main__":
    main()
