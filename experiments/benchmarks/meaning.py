"""What is recognized of models that nobody annotated, against what is in them by hand count.

    python -m compax.experiments.benchmarks.meaning [--models=flax_gpt2,tunix_qwen3] [--all] [--markdown]

Claim: attentions, normalizations, feed-forwards and experts of the zoo's models are found in float32 and bfloat16, in
eval and train mode, with a padding mask and in a decode step, with masks, grouping, scales, softcaps, rotary encodings
and activations as their authors wrote them, and at least 99 % of matmul and convolution FLOPs are in them. Found of
those that exist; a star marks what differs from the hand count. Time: a minute, with --all ten.

FLOPs are predicted (counted from the graph), the time of the analysis is measured, the median of three.
"""

import argparse
import collections
import dataclasses
import logging
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

import compax
from compax.analysis.atoms import size_of
from compax.capture import Captured
from compax.composites.base import Attention, Experts, FeedForward, Normalization
from compax.experiments.benchmarks import reporting, zoo
from compax.meaning import Meaning
from compax.models import decoder

COLUMNS = (
    "model", "variant", "FLOPs in composites", "attention", "norm", "feed-forward", "experts", "masks", "positions",
    "axes", "conflicts", "frozen", "ms",
)  # fmt: skip


def covered(program: compax.Program, meaning: Meaning) -> float:
    """Share of matmul and convolution FLOPs in composites with a meaning: all but products of computed values."""
    coverage = program.coverage()
    paths = {node.path for composite in meaning.composites for node in composite.nodes}
    paths |= {node.path for node in meaning.view.linears}  # also where the weight is computed from parameters
    flops = sum(site.flops for site in program.sites() if site.uses or site.path in paths)
    return flops / coverage.flops if coverage.flops else 1.0


def timed(captured: Captured, times: int = 3) -> tuple[Meaning, float]:
    """The meaning of a graph, and the median of the seconds that finding it takes."""
    found = [_timed_once(captured) for _ in range(times)]
    return found[-1][0], statistics.median(seconds for _, seconds in found)


def _timed_once(captured: Captured) -> tuple[Meaning, float]:
    start = time.perf_counter()
    meaning = Meaning(captured)
    return meaning, time.perf_counter() - start


def _found_of(found: int, expected: int, details: bool = True) -> str:
    return f"{found}/{expected}" + ("" if found == expected and details else " *")


def attention_facts(attention: Attention) -> tuple[object, ...]:
    """What the hand count says of an attention, as it was found."""
    mask, rotation = attention.mask, attention.rotation
    window = mask.window[0] + 1 if mask.kind == "window" else None
    return (
        "argument" if mask.given else "causal" if mask.window[1] == 0 else mask.kind,
        attention.num_heads,
        attention.num_groups,
        size_of(attention.head_size),
        _rounded(attention.scale * attention.query_scale),
        "" if rotation is None else f"rope {rotation.form}",
        0 if rotation is None else rotation.size,
        0.0 if rotation is None or rotation.base is None else float(f"{rotation.base:.2g}"),
        window,
        attention.softcap,
        attention.cross,
    )


def expected_facts(attention: zoo.Attention) -> tuple[object, ...]:
    """The same from the hand count."""
    rope = attention.position if attention.position.startswith("rope") else ""
    return (
        attention.mask,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        _rounded(attention.scale),
        rope,
        attention.rotary_dim,
        float(f"{attention.rope_base:.2g}"),
        attention.window,
        attention.softcap,
        attention.cross,
    )


def _rounded(number: float) -> float:
    """To what bfloat16 holds, in which some models keep their constants."""
    return float(jnp.asarray(number, jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found beside what is there.

    Attributes:
        attentions: found, existing, and whether all facts agree.
        norms: likewise, by kind.
        feed_forwards: likewise, with activation and form.
        experts: found and existing.
        differences: in words.
    """

    attentions: tuple[int, int, bool]
    norms: tuple[int, int, bool]
    feed_forwards: tuple[int, int, bool]
    experts: tuple[int, int]
    differences: tuple[str, ...]


def compare(meaning: Meaning, expected: zoo.Expected) -> Comparison:
    """Compares what was found with the hand count."""
    scanned = max((composite.loops[0] for composite in meaning.composites if composite.loops), default=1)

    def repeated(items: Iterable[tuple[object, tuple[int, ...]]]) -> collections.Counter[object]:
        return collections.Counter(item for item, loops in items for _ in range(scanned if loops else 1))

    attentions = repeated((attention_facts(a), a.loops) for a in meaning.of_kind(Attention))
    wanted: collections.Counter[object] = collections.Counter()
    for attention in expected.attentions:
        wanted[expected_facts(attention)] += attention.count
    kind = {"batch_running": "batch"}
    norms = repeated((kind.get(n.type, n.type), n.loops) for n in meaning.of_kind(Normalization))
    networks = repeated(((f.activation, f.gated), f.loops) for f in meaning.of_kind(FeedForward))
    wanted_networks: collections.Counter[object] = collections.Counter()
    for network in expected.feed_forwards:
        wanted_networks[network.activation, network.gated] += network.count
    differences = [
        f"{name}: found {dict(found)}, hand count {dict(there)}"
        for name, found, there in (
            ("attention", attentions, wanted),
            ("norm", norms, collections.Counter(expected.norms)),
            ("feed-forward", networks, wanted_networks),
        )
        if +found != +there
    ]
    return Comparison(
        (attentions.total(), wanted.total(), +attentions == +wanted),
        (norms.total(), sum(expected.norms.values()), +norms == collections.Counter(expected.norms)),
        (networks.total(), wanted_networks.total(), +networks == +wanted_networks),
        (len(meaning.of_kind(Experts)), expected.experts),
        tuple(differences),
    )


def row(name: str, variant: zoo.Variant) -> tuple[list[str], tuple[str, ...]]:
    """The line of one variant of a model, and what differs from the hand count."""
    case = zoo.build(name, dtype=variant.dtype, mode=variant.mode, padding=variant.padding, decode=variant.decode)
    program = case.capture()
    meaning, seconds = timed(program.graph())
    comparison = compare(meaning, zoo.expected(name, decode=variant.decode))
    masks = collections.Counter(str(a.mask) for a in meaning.of_kind(Attention))
    positions = collections.Counter(
        str(a.rotation) if a.rotation is not None else "alibi" if a.alibi else "" for a in meaning.of_kind(Attention)
    )
    frozen = meaning.view.engine.frozen
    cells = [
        name,
        str(variant),
        f"{covered(program, meaning):.1%}",
        _found_of(*comparison.attentions),
        _found_of(*comparison.norms),
        _found_of(*comparison.feed_forwards),
        _found_of(*comparison.experts),
        "; ".join(f"{count} {text}" for text, count in masks.items()),
        "; ".join(text for text in positions if text),
        str(len(meaning.axes)),
        str(len(meaning.view.engine.conflicts)),
        ", ".join(f"{count} {operation}" for operation, count in frozen.items()) or "0",
        f"{1e3 * seconds:.0f}",
    ]
    return cells, tuple(f"{name} {variant}: {text}" for text in comparison.differences)


def chosen(names: Sequence[str], *, everything: bool) -> Iterator[tuple[str, zoo.Variant]]:
    """The variants to show: float32 in eval mode, or all there are."""
    for name in names:
        variants = zoo.variants(name)
        yield from ((name, variant) for variant in (variants if everything else variants[:1]))


def large() -> list[list[str]]:
    """The analysis of large shapes, parameters abstract."""
    rows = []
    for name, scan in (("llama2-7b", False), ("llama2-70b", False), ("llama2-70b", True)):
        config = dataclasses.replace(decoder.SIZES[name], scan=scan)
        model = nnx.eval_shape(lambda config=config: decoder.Decoder(config, rngs=nnx.Rngs(0)))
        program = compax.capture(model, jax.ShapeDtypeStruct((1, config.context_length), jnp.int32), mode="eval")
        meaning, seconds = timed(program.graph())
        kinds = collections.Counter(composite.kind for composite in meaning.composites)
        layers = "scanned" if scan else "unrolled"
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        rows.append([name, f"{config.num_layers} layers, {layers}", found, f"{seconds:.2f}"])
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(zoo.ENTRIES), help="names, with commas between them")
    parser.add_argument("--all", action="store_true", help="all variants: dtypes, modes, padding, decode")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # deprecations inside the packages are their authors' business
    rows: list[list[str]] = []
    differences: list[str] = []
    for name, variant in chosen(options.models.split(","), everything=options.all):
        cells, different = row(name, variant)
        rows.append(cells)
        differences += different
    if options.markdown:
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        for cells in rows:
            print("| " + " | ".join(cells) + " |")
        print(f"\n{reporting.hardware()}")
    else:
        reporting.print_table("Recognition", COLUMNS, rows, basis="measured", footer=differences)
    columns = ("shape", "layers", "found", "seconds")
    reporting.print_table("Large shapes, abstract parameters", columns, large(), basis="measured")


if __name__ == "__main__":
    main()
