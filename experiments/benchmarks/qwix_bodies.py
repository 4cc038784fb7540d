"""Twenty-eight ordinary layer bodies, int8 weights and activations: through compax and through Qwix 0.1.8.

Claim: compax quantizes every body in both call orders, and the float model computes the same afterwards. Qwix
intercepts JAX functions while a model runs, so what it quantizes depends on how the body is written and on what was
traced before.

Command: `python -m compax.experiments.benchmarks.qwix_bodies`. About five minutes on two cores.

A cell is the relative error of the quantized output against the float output: about 0.01 for one layer, and up to
0.03 for six in a row, is right. NOOP: it ran and nothing was quantized. `float!`: the float model computes something
else once the quantized one has run. Otherwise the name of the error. Each column runs in a process of its own and
starts every body with empty caches. "float first" is the ordinary script: it calls the float model, then compares the
quantized one with it.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from compax.experiments.benchmarks import reporting
from compax.experiments.benchmarks.bodies import BODIES, Body

NUM_DEVICES = 8
NOOP_BELOW = 1e-6
WRONG_ABOVE = 0.05

Quantized = Callable[..., Any]
Quantizer = Callable[[Body], Quantized]


def qwix_ptq(body: Body) -> Quantized:
    """Post-training quantization by Qwix at its defaults."""
    import qwix

    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    return qwix.quantize_model(body.make(), qwix.PtqProvider(rules), *body.inputs())


def qwix_qt(body: Body) -> Quantized:
    """Quantized training by Qwix at its defaults."""
    import qwix

    rules = [qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")]
    return qwix.quantize_model(body.make(), qwix.QtProvider(rules), *body.inputs())


def compax_stored(body: Body) -> Quantized:
    """Weights stored as int8, activations quantized as they come."""
    return _compax(body, "quantize(weights=int8, activations=int8)")


def compax_simulated(body: Body) -> Quantized:
    """Float weights seen through int8, as in training."""
    return _compax(body, "quantize(weights=int8, activations=int8, train=true)")


def _compax(body: Body, pipeline: str) -> Quantized:
    import compax

    return compax.Pipeline.parse(pipeline)(compax.capture(body.make(), *body.inputs()))


QUANTIZERS: dict[str, Quantizer] = {
    "compax": compax_stored,
    "compax train": compax_simulated,
    "Qwix PTQ": qwix_ptq,
    "Qwix QT": qwix_qt,
}
ORDERS = ("float first", "quantized first")


def cell(body: Body, quantizer: Quantizer, order: str) -> str:
    """Quantizes one body and says how far its output is from the float model's.

    Args:
        body: The body.
        quantizer: What quantizes it.
        order: "float first": the float model is called before the quantized one exists; or "quantized first".

    Returns:
        The text of the table's cell.
    """
    truth = np.asarray(body.make()(*body.inputs()), np.float64)
    jax.clear_caches()
    model = body.make()
    try:
        if order == "float first":
            model(*body.inputs())
            output = quantizer(body)(*body.inputs())
        else:
            output = quantizer(body)(*body.inputs())
    except Exception as error:  # noqa: BLE001 (whatever is raised is the finding)
        return type(error).__name__
    changed = _distance(model(*body.inputs()), truth) > NOOP_BELOW
    error = _distance(output, truth)
    text = "NOOP" if error < NOOP_BELOW else f"{error:.4f}"
    return f"{text} float!" if changed else text


def _distance(actual: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def right(text: str) -> bool:
    """Whether a cell shows a quantized output near the float one, and a float model that is what it was."""
    return text.replace(".", "").isdigit() and float(text) < WRONG_ABOVE


def summary(cells: list[str]) -> tuple[int, int, int, int]:
    """How many cells are right, unquantized, leave another float model behind, and raise or are far off."""
    good = sum(map(right, cells))
    unquantized = sum("NOOP" in text for text in cells)
    changed = sum("float!" in text and "NOOP" not in text for text in cells)
    return good, unquantized, changed, len(cells) - good - unquantized - changed


def column(name: str, order: str) -> list[str]:
    """All cells of one quantizer in one call order; meant for a fresh process."""
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    warnings.simplefilter("ignore")
    return [cell(body, QUANTIZERS[name], order) for body in BODIES]


def missing(name: str) -> str | None:
    """Why a column cannot be filled here, if so."""
    if name.startswith("Qwix") and importlib.util.find_spec("qwix") is None:
        return "not installed"
    return None


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(QUANTIZERS), nargs="+", default=list(QUANTIZERS), help="columns")
    arguments = parser.parse_args()
    headings = [(name, order) for name in arguments.only for order in ORDERS]
    columns: list[list[str]] = []
    for name, order in headings:
        if reason := missing(name):
            columns.append([reason] * len(BODIES))
            continue
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as process:
            columns.append(process.submit(column, name, order).result())
    rows = [(body.name, *(cells[number] for cells in columns)) for number, body in enumerate(BODIES)]
    counts = [" / ".join(map(str, summary(cells))) for cells in columns]
    qwix = "" if missing("Qwix") else f", Qwix {importlib.metadata.version('qwix')}"
    reporting.print_table(
        f"Relative error of int8 weights and activations{qwix}",
        ("body", *(f"{name}\n{order}" for name, order in headings)),
        [*rows, ("in all", *counts)],
        basis="measured",
        footer=["In all: right / NOOP / float! / error."],
    )


if __name__ == "__main__":
    main()
