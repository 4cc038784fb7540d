"""Rematerialization under a memory budget against JAX's own presets.

Claim: `remat(budget=...)` finds within three compiles what the compiler says fits, and computes no more again than the
best of JAX's presets that fits the same budget.

Command: `python -m compax.experiments.benchmarks.remat`; `--quick` for two models on one chip. No accelerator is
needed: programs are compiled for TPUs that are not there. A compile takes half a minute to three on two cores, and
there are some ten for a model and a chip; with JAX_OPTIMIZATION_LEVEL=O0, the compiler's least effort, it takes half to
a tenth of that, and peaks differ by some percent, of presets and plans alike. Unrolled models have `--layers` layers.

The step is Adam's, donated. Budgets: tight is 5 % above the peak of keeping nothing, loose 10 % below that of keeping
everything, middle half way between the two peaks. Presets are applied as a user would: `jax.checkpoint` around each
layer, with a policy. Products are counted in the optimized program, those of the step that keeps everything subtracted,
so that what is counted is what is computed again. On the CPU the steps run too, one after another in turns.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import compax
from compax.compilers import needed_bytes
from compax.errors import BudgetError
from compax.experiments.benchmarks import reporting, third_party, zoo_transformers
from compax.models import decoder
from compax.passes.remat.planning import Planner
from compax.passes.remat.searching import search
from compax.passes.remat.solving import choose
from compax.printing import bytes_text
from compax.rewrites.checkpoint import checkpointed, find_regions, without_checkpoints
from compax.target import Target
from compax.tpu.functions import compile_function

PRESETS = ("nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable", "everything_saveable")
BUDGETS = ("tight", "middle", "loose")
QUICK = (("decoder scanned", "tunix qwen3"), ("v5e",))
_RUNS = 5


def _cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens).mean()


def _decoder(size: str, batch: int, length: int, **changes: Any) -> compax.Program:
    config = dataclasses.replace(decoder.SIZES[size], **changes)
    model = nnx.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return compax.capture(model, tokens, loss=lambda model, tokens: _cross_entropy(model(tokens), tokens))


def _qwen3(layers: int, batch: int, length: int) -> compax.Program:
    source = third_party.tunix_model("qwen3")
    config = source.ModelConfig(
        num_layers=layers,
        vocab_size=32768,
        embed_dim=1024,
        hidden_dim=3072,
        num_heads=16,
        head_dim=128,
        num_kv_heads=8,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.bfloat16,
    )
    with third_party.lazy_sharding():
        model = nnx.eval_shape(lambda: source.Qwen3(config, rngs=nnx.Rngs(0)))

    def loss(model: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (batch, length, length))
        return _cross_entropy(model(tokens, positions, None, mask)[0], tokens)

    return compax.capture(model, jax.ShapeDtypeStruct((batch, length), jnp.int32), loss=loss)


def _transformers(kind: str, config: Any, batch: int, length: int) -> compax.Program:
    model = getattr(zoo_transformers.transformers(), kind)(
        config, input_shape=(1, length), dtype=jnp.bfloat16, _do_init=False
    )
    params = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, length)))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return _cross_entropy(model(tokens, params=params, train=False).logits, tokens)

    return compax.capture(loss, params, jax.ShapeDtypeStruct((batch, length), jnp.int32))


def _gpt2(layers: int, batch: int, length: int) -> compax.Program:
    config = zoo_transformers.transformers().GPT2Config(n_layer=layers)
    return _transformers("FlaxGPT2LMHeadModel", config, batch, length)


def _bert(layers: int, batch: int, length: int) -> compax.Program:
    config = zoo_transformers.transformers().BertConfig(num_hidden_layers=layers)
    return _transformers("FlaxBertForMaskedLM", config, batch, length)


def _scanned(layers: int, batch: int, length: int) -> compax.Program:
    del layers  # one body, whatever their number
    return _decoder("smollm2-135m", batch, length, scan=True, dtype="bfloat16")


def _unrolled(layers: int, batch: int, length: int) -> compax.Program:
    return _decoder("smollm2-135m", batch, length, num_layers=layers, dtype="bfloat16")


MODELS: Mapping[str, Callable[[int, int, int], compax.Program]] = {
    "decoder scanned": _scanned,
    "decoder unrolled": _unrolled,
    "tunix qwen3": _qwen3,
    "HF gpt2": _gpt2,
    "HF bert": _bert,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A compiled step.

    Attributes:
        function: of its arguments in order.
        peak: bytes, compiled.
        flops: of products, compiled.
    """

    function: Callable[..., Any]
    peak: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on a chip under a budget. Times in seconds, bytes and FLOPs of one step on one device."""

    model: str
    chip: str
    budget: str
    budget_bytes: int
    predicted_bytes: int = 0
    compiled_bytes: int | None = None
    compiles: int = 0
    recompute_flops: int = 0
    preset: str = "none fits"
    preset_bytes: int = 0
    preset_recompute_flops: int | None = None
    search_seconds: float = 0.0
    time_ratio: float | None = None
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the claim does."""
        fits = self.compiled_bytes is not None and self.compiled_bytes <= self.budget_bytes and self.compiles <= 3
        # A product that is computed again is thousands of times this; conversions count as none.
        return fits and (self.preset_recompute_flops is None or self.recompute_flops <= self.preset_recompute_flops)


class Bench:
    """One model on one chip.

    Attributes:
        presets: the step under each preset.
    """

    def __init__(self, model: str, chip: str, program: compax.Program):
        self.model, self.target = model, Target.parse(chip)
        captured, self.meaning = program.graph(), program.meaning()
        regions = find_regions(captured, self.meaning)
        assert without_checkpoints(captured, regions) is captured, "the models have no rematerialization of their own"
        self.planner = Planner(program, captured, regions, self.target, 2)
        self.compiled: dict[str, Step] = {}
        self.presets = {name: self._preset(name) for name in PRESETS}

    def compile(self, function: Any, shapes: Any, donated: Any) -> Step:
        """A step, compiled for the target; of steps that are the same program, the first."""
        text = jax.jit(function).lower(*shapes).as_text()
        if text not in self.compiled:
            self.compiled[text] = self._compile(function, shapes, donated)
        return dataclasses.replace(self.compiled[text], function=function)

    def _compile(self, function: Any, shapes: Any, donated: Any) -> Step:
        compiled = compile_function(function, shapes, donated, self.target)
        flops = sum(compiled.flops.values())
        if compiled.memory is None:
            assert compiled.shortage is not None
            assert compiled.shortage.needed is not None
            return Step(function, compiled.shortage.needed, 0)
        memory = compiled.memory
        held = memory.arguments + memory.outputs
        return Step(function, needed_bytes(self.target.chip.platform, held, memory.temporaries, memory.peak), flops)

    def _preset(self, name: str) -> Step:
        policy = getattr(jax.checkpoint_policies, name)
        return self.compile(
            *self.planner.step.plain(checkpointed(self.planner.captured, self.planner.regions, {}, policy))
        )

    def row(self, budget: str) -> Row:
        """The pass beside the best preset that fits."""
        low, high = self.presets["nothing_saveable"].peak, self.presets["everything_saveable"].peak
        size = {"tight": 1.05 * low, "middle": (low + high) / 2, "loose": 0.9 * high}[budget]
        row = Row(self.model, self.target.chip.name, budget, round(size))
        if high <= 1.06 * low:
            return dataclasses.replace(row, error=f"no room: {bytes_text(low)} to {bytes_text(high)}, compiled")
        steps: list[Step] = []

        def meter(function: Any, shapes: Any, donated: Any) -> int:
            nonlocal compiling
            started = time.perf_counter()
            steps.append(self.compile(function, shapes, donated))
            compiling += time.perf_counter() - started
            return steps[-1].peak

        compiling, started = 0.0, time.perf_counter()
        base = self.presets["everything_saveable"].flops
        fitting = {name: step for name, step in self.presets.items() if step.peak <= row.budget_bytes}
        if fitting:
            best = min(fitting, key=lambda name: fitting[name].flops)
            row = dataclasses.replace(
                row,
                preset=best,
                preset_bytes=fitting[best].peak,
                preset_recompute_flops=fitting[best].flops - base,
            )
        try:
            found = search(self.planner, row.budget_bytes, meter, self.meaning)
        except BudgetError as error:
            return dataclasses.replace(row, compiles=len(steps), error=str(error))
        chosen = next(step for step, (plan, _) in zip(steps, found.compiled, strict=True) if plan is found.plan)
        row = dataclasses.replace(
            row,
            predicted_bytes=found.plan.predicted.peak,
            compiled_bytes=chosen.peak,
            compiles=len(steps),
            recompute_flops=chosen.flops - base,
            search_seconds=time.perf_counter() - started - compiling,
        )
        if self.target.chip.platform == jax.default_backend() and fitting:
            return dataclasses.replace(row, time_ratio=self._ratio(chosen, fitting[row.preset]))
        return row

    def _ratio(self, ours: Step, preset: Step) -> float:
        """Measured seconds of a step by those of a preset's, in turns."""
        _, shapes, _ = self.planner.step.plain(self.planner.captured)
        random = np.random.default_rng(0)

        def fill(x: Any) -> Any:
            if jnp.issubdtype(x.dtype, jnp.integer):
                return jnp.asarray(random.integers(0, 1000, x.shape), x.dtype)
            return jnp.asarray(0.02 * random.standard_normal(x.shape, np.float32), x.dtype)

        arguments = jax.tree.map(fill, shapes)
        functions = [jax.jit(step.function) for step in (ours, preset)]
        seconds: list[list[float]] = [[], []]
        for _ in range(_RUNS + 1):
            for function, taken in zip(functions, seconds, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(function(*arguments))
                taken.append(time.perf_counter() - started)
        return statistics.median(seconds[0][1:]) / statistics.median(seconds[1][1:])


def solving() -> list[tuple[str, float, float, float]]:
    """Seconds of one solution, of a plan with all its predictions, and of preparing, for large models."""
    found = []
    for size, changes, batch in (
        ("llama2-70b", {"scan": True}, 1),
        ("llama2-7b", {"scan": True}, 1),
        ("llama2-7b", {}, 1),
    ):
        program = _decoder(size, batch, 4096, dtype="bfloat16", **changes)
        captured = program.graph()
        started = time.perf_counter()
        planner = Planner(program, captured, find_regions(captured, program.meaning()), Target.parse("v5p"), 2)
        prepared = time.perf_counter()
        budget = (planner.least.peak + planner.without.peak) // 2
        planner.plan(budget)
        planned = time.perf_counter()
        choose([group.layers for group in planner.groups], budget - planner.least.peak)
        name = f"{size}, {'scanned' if changes else 'unrolled'}"
        found.append((name, time.perf_counter() - planned, planned - prepared, prepared - started))
    return found


def _text(row: Row) -> str:
    gigaflops = "-" if row.preset_recompute_flops is None else f"{row.preset_recompute_flops / 1e9:.1f}"
    ratio = "" if row.time_ratio is None else f", step time x{row.time_ratio:.2f} measured"
    if row.compiled_bytes is None:
        return f"{row.model}, {row.chip}, {row.budget} {bytes_text(row.budget_bytes)}: {row.error}"
    return (
        f"{'ok  ' if row.holds else 'MISS'} {row.model}, {row.chip}, {row.budget} {bytes_text(row.budget_bytes)}: "
        f"{bytes_text(row.predicted_bytes)} predicted, {bytes_text(row.compiled_bytes)} compiled in {row.compiles}; "
        f"again {row.recompute_flops / 1e9:.1f} GFLOP, {row.preset} {gigaflops} ({bytes_text(row.preset_bytes)}), "
        f"compiled; {row.search_seconds:.1f} s of planning measured{ratio}"
    )


def main() -> None:
    """Prints rows as they come, and what the claim amounts to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--chips", default="cpu,v5e,v5p,v6e")
    parser.add_argument("--layers", type=int, default=12, help="of unrolled models")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="two models, one chip")
    parser.add_argument("--solve", action="store_true", help="only the time that planning takes")
    parser.add_argument("--out", help="a JSON file for the rows")
    args = parser.parse_args()
    models, chips = QUICK if args.quick else (args.models.split(","), args.chips.split(","))
    rows: list[Row] = []
    for model in () if args.solve else models:
        for chip in chips:
            program = MODELS[model](args.layers, args.batch, args.length)
            bench = Bench(model, chip, program)
            for name, step in bench.presets.items():
                print(f"     {model}, {chip}, {name}: {bytes_text(step.peak)}, {step.flops / 1e9:.1f} GFLOP compiled")
            for budget in BUDGETS:
                rows.append(bench.row(budget))
                print(_text(rows[-1]), flush=True)
                if args.out:
                    with open(args.out, "w", encoding="utf-8") as file:
                        json.dump([{**dataclasses.asdict(row), "holds": row.holds} for row in rows], file, indent=1)
    counted = [row for row in rows if row.compiled_bytes is not None]
    if rows:
        print(
            f"{sum(row.holds for row in counted)} of {len(counted)} rows hold; {len(rows) - len(counted)} have no plan"
        )
    if args.solve or not args.quick:
        times = [(name, *(f"{seconds:.2f}" for seconds in each)) for name, *each in solving()]
        columns = ("model", "one solution, s", "a plan, s", "preparing, s")
        reporting.print_table("planning", columns, times, basis="measured")


if __name__ == "__main__":
    main()
