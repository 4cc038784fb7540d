"""Printing programs: `compax inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

import compax
from compax.analysis.coverage import coverage
from compax.errors import ConfigError
from compax.experiments import generate, programs, runs
from compax.experiments.config import Config, closest
from compax.experiments.console import Console
from compax.experiments.tokenizer import Tokenizer
from compax.instruments import Instrument, Journal
from compax.meaning_text import axes_text, composites_text
from compax.models import decoder, load_decoder, load_tokenizer
from compax.price import COLUMNS, Price, price_pairs, price_rows
from compax.transform import PassRecord

_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Views:
    """What to print of a program, in place of its sites and coverage.

    Attributes:
        axes: Its axes.
        composites: Its attentions, norms, feed-forwards and experts, with all that is known of them.
        draw: The file to draw it to.
        cost: What it computes and moves, and what each pass changed of that: on a target such as `v5e:4x4`, or on
            none where this is empty.

    Raises:
        ConfigError: The file is neither `.svg` nor `.html`.
    """

    axes: bool = False
    composites: bool = False
    draw: str | None = None
    cost: str | None = None

    def __post_init__(self) -> None:
        if self.draw is not None and not self.draw.endswith((".svg", ".html")):
            raise ConfigError(f"--draw={self.draw}: a drawing is a file that ends in .svg or .html")


def inspect_config(config: Config, pipeline: str, console: Console, views: Views, *, abstract: bool) -> None:
    """Prints the training program of a config.

    Args:
        config: The config; of a tokenizer that is trained, its size is taken as configured.
        pipeline: More passes to apply.
        console: Where to print.
        views: What to print.
        abstract: Shapes alone, without parameters.

    Raises:
        CompaxError: The model or the pipeline is not valid.
    """
    vocabulary = config.tokenizer.vocabulary
    if config.tokenizer.file:
        vocabulary = runs.tokenizer.load(config.tokenizer.file).vocabulary
    watching = instruments(views)
    program = programs.build_program(config, vocabulary, abstract=abstract, instruments=watching)
    samples = () if abstract else (programs.example_batch(config),)
    show(compax.Pipeline.parse(pipeline, watching)(program, *samples), console, views, watching)


def inspect_run(config: Config, pipeline: str, console: Console, views: Views) -> None:
    """Prints the trained program of a run; what passes cost, of those of `pipeline`.

    Raises:
        CompaxError: There is no usable checkpoint, or the pipeline is not valid.
    """
    run = runs.restore(config)
    console.say(f"{run.directory} at step {run.step}")
    watching = instruments(views)
    show(runs.transformed(run, pipeline, watching), console, views, watching)


def inspect_model(model: str, pipeline: str, console: Console, views: Views, *, abstract: bool) -> None:
    """Prints the program of a named size of the decoder, or of weights.

    Raises:
        ConfigError: There is no such size.
        WeightsError: The weights cannot be loaded.
    """
    watching = instruments(views)
    if model in generate.KNOWN_WEIGHTS and not abstract:
        path = generate.weights_path(model)
        ids = Tokenizer(load_tokenizer(path)).encode(generate.SAMPLE)
        show(generate.captured(load_decoder(path), pipeline, model, ids, watching), console, views, watching)
        return
    if model not in decoder.SIZES:
        raise ConfigError(f"no model '{model}'{closest(model, decoder.SIZES)}")
    shape = decoder.SIZES[model]

    def make() -> decoder.Decoder:
        return decoder.Decoder(shape, rngs=nnx.Rngs(0))

    tokens = jnp.zeros((1, min(_TOKENS, shape.context_length)), jnp.int32)
    program = compax.capture(nnx.eval_shape(make) if abstract else make(), tokens, mode="eval", name="decoder")
    samples = () if abstract else (tokens,)
    show(compax.Pipeline.parse(pipeline, watching)(program, *samples), console, views, watching)


def instruments(views: Views) -> tuple[Instrument, ...]:
    """What watches the passes, so that the views can be shown.

    Raises:
        TargetError: There is no such target.
    """
    return () if views.cost is None else (Price(views.cost or None), Journal())


def show(program: compax.Program, console: Console, views: Views, watching: Sequence[Instrument] = ()) -> None:
    """Prints a program and its coverage, both predicted from its graph, or the views that were asked for."""
    for journal in watching:
        if isinstance(journal, Journal):
            show_prices(journal.records, console)
    texts = [axes_text(program)] * views.axes + [composites_text(program)] * views.composites
    if views.cost is not None:
        texts.append(str(program.cost(views.cost or None)))
    if views.draw is not None:
        program.draw().save(views.draw)
        texts.append(f"drawn to {views.draw}")
    console.say("\n\n".join(texts or [str(program), str(coverage(program))]))


def show_prices(records: Sequence[PassRecord], console: Console) -> None:
    """Prints what a program cost before and after each pass."""
    if not records:
        console.say("no pass was applied, so there is nothing to compare")
    for record in records:
        console.table(f"price of {record.text}", COLUMNS, price_rows(price_pairs(record)))
        for note in record.notes:
            console.say(f"  note: {note}")
