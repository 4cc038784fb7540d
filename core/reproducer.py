"""Reproducers: one text file that `python -m compax.reproducer FILE [--model MODULE:FUNCTION]` replays.

A file is JSON: the pipeline up to the failing pass, the error, the modules that passes come from, versions, the printed
program, the seed, and the sample inputs (small arrays by value, larger ones by shape, dtype and range). It holds no
parameters: the model is made again by a function of the user's. Replaying imports the modules that the file names and
runs their code; nothing is unpickled.

Exit status: 1 where the failure comes again, 0 where it does not, 2 where the file or the model cannot be used.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compax.errors import CompaxError, PipelineError
from compax.pipeline import Pipeline
from compax.program import Program, capture
from compax.program_text import program_text
from compax.transform import Context, Inputs, Pass

FORMAT = "compax reproducer 1"
LARGEST_BY_VALUE = 4096
_NOTHING = type(None)
_CONTENT: Mapping[str, type | tuple[type, ...]] = {
    "pipeline": str,
    "pass": str,
    "error": dict,
    "modules": list,
    "model": (dict, _NOTHING),
    "entry": dict,
    "seed": int,
    "inputs": (dict, _NOTHING),
    "versions": dict,
}
_PACKAGES = ("compax", "jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a piece of Python code is found again.

    Attributes:
        module: the name of its module.
        file: the module's source, for a module that cannot be imported by its name (a script, a test).
    """

    module: str
    file: str | None

    @classmethod
    def of(cls, thing: Any) -> "Place":
        """The place of a class or a function."""
        return cls(thing.__module__, _file(sys.modules.get(thing.__module__)))

    def load(self) -> ModuleType:
        """The module.

        Raises:
            PipelineError: it can neither be imported nor found.
        """
        loaded = sys.modules.get(self.module)
        if loaded is not None and (self.module != "__main__" or _file(loaded) == self.file):
            return loaded
        problem: Exception | str = "it was a script"
        if self.module != "__main__":
            try:
                return importlib.import_module(self.module)
            except ImportError as error:
                problem = error
        if self.file is None or not Path(self.file).is_file():
            raise PipelineError(
                f"the module '{self.module}' cannot be imported ({problem}), and its source "
                f"{self.file or 'is unknown'}; run this where it can be imported"
            )
        name = Path(self.file).stem if self.module == "__main__" else self.module
        spec = importlib.util.spec_from_file_location(name, self.file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise PipelineError(f"{self.file} fails when it is run: {type(error).__name__}: {error}") from error
        return module


def _file(module: ModuleType | None) -> str | None:
    file = getattr(module, "__file__", None)
    return str(Path(file).resolve()) if file else None


def write(
    directory: Path,
    model: str | Callable[[], Any] | None,
    pass_: Pass,
    program: Program,
    context: Context,
    error: Exception,
) -> Path:
    """Writes the file of a failure; `Reproducer` calls this.

    Args:
        directory: where to; no file in it is overwritten.
        model: what makes the model again, or nothing.
        pass_: the pass that failed.
        program: what it was given.
        context: likewise.
        error: how it failed.

    Returns:
        The file.
    """
    passes = [*(record.pass_ for record in program.history), pass_]
    inputs = context.inputs
    entry = program.entry(inputs.entry if inputs else None)
    content = {
        "format": FORMAT,
        "pipeline": str(Pipeline(passes)),
        "pass": str(pass_),
        "error": {"type": type(error).__name__, "message": str(error)},
        "traceback": "".join(traceback.format_exception(error.__cause__ or error)).splitlines(),
        "modules": [dataclasses.asdict(place) for place in dict.fromkeys(Place.of(type(p)) for p in passes)],
        "model": _locate(model),
        "entry": {
            "name": entry.name,
            "mode": entry.mode,
            "constant": list(entry.constant),
            "static": list(entry.static),
        },
        "seed": context.seed,
        "inputs": None if inputs is None else {"args": _encode(inputs.args), "kwargs": _encode(dict(inputs.kwargs))},
        "versions": _versions(),
        "program": program_text(program, entry.name, ops=True).splitlines(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    text = "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in content.items()) + "\n}\n"
    for number in range(1, 1_000_000):
        path = directory / (f"{pass_.name}.json" if number == 1 else f"{pass_.name}-{number}.json")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise OSError(f"{directory} is full of reproducers")


def _lines(value: Any) -> str:
    """JSON in which a list of texts, and nothing else, stands line by line."""
    by_line = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return json.dumps(value, indent=1 if by_line else None)


def _locate(model: str | Callable[[], Any] | None) -> dict[str, Any] | None:
    if model is None:
        return None
    if isinstance(model, str):
        module, function = _split(model)
        return {"module": module, "file": None, "function": function}
    return {**dataclasses.asdict(Place.of(model)), "function": model.__qualname__}


def _split(model: str) -> tuple[str, str]:
    module, colon, function = model.partition(":")
    if not (module and colon and function):
        raise PipelineError(f"a model is named as module:function, not '{model}'")
    return module, function


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _encode(x: Any) -> Any:
    """A value as JSON. Scalars stand for themselves, everything else for a dictionary with one telling key."""
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, Mapping):
        return {"dict": [[key, _encode(value)] for key, value in x.items()]}
    if type(x) in (tuple, list):
        return {type(x).__name__: [_encode(item) for item in x]}
    if isinstance(x, jax.ShapeDtypeStruct):
        return {"shape_of": str(x.dtype), "shape": list(x.shape)}
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return {"key": str(jax.random.key_impl(x)), "data": _encode(jax.random.key_data(x))}
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return {"array": str(x.dtype), "shape": list(x.shape), **_encode_values(np.asarray(x))}
    return {"unavailable": f"{type(x).__module__}.{type(x).__qualname__}"}


def _encode_values(array: np.ndarray) -> dict[str, Any]:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return {"real": _encode_values(np.real(array)), "imaginary": _encode_values(np.imag(array))}
    inexact = jnp.issubdtype(array.dtype, jnp.floating)
    if array.size <= LARGEST_BY_VALUE:
        flat = array.ravel()
        return {"values": flat.astype(np.float64).tolist() if inexact else [int(value) for value in flat]}
    if inexact:
        wide = array.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        return {"normal": [float(finite.mean()), float(finite.std())] if finite.size else [0.0, 1.0]}
    return {"uniform": [int(array.min()), int(array.max())]}


def _decode(x: Any, seed: int) -> Any:
    """What `_encode` wrote; arrays that were written by range are drawn again from `seed`."""
    if not isinstance(x, dict):
        return x
    match x:
        case {"dict": items}:
            return {key: _decode(value, seed) for key, value in items}
        case {"tuple": items}:
            return tuple(_decode(item, seed) for item in items)
        case {"list": items}:
            return [_decode(item, seed) for item in items]
        case {"shape_of": dtype, "shape": shape}:
            return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
        case {"key": implementation, "data": data}:
            return jax.random.wrap_key_data(_decode(data, seed), impl=implementation)
        case {"array": dtype, "shape": shape}:
            return jnp.asarray(_decode_values(x, tuple(shape), seed).astype(jnp.dtype(dtype)))
        case {"unavailable": name}:
            raise PipelineError(
                f"an input is a {name}, which no text holds: the model's function has to give the inputs"
            )
        case _:
            raise PipelineError(f"an input is written in an unknown way: {list(x)}")


def _decode_values(x: Mapping[str, Any], shape: tuple[int, ...], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    match x:
        case {"values": values}:
            return np.asarray(values).reshape(shape)
        case {"normal": [mean, deviation]}:
            return generator.normal(mean, deviation, shape)
        case {"uniform": [low, high]}:
            return generator.integers(low, high, shape, endpoint=True)
        case {"real": real, "imaginary": imaginary}:
            return _decode_values(real, shape, seed) + 1j * _decode_values(imaginary, shape, seed)
        case _:
            raise PipelineError(f"an input's values are written in an unknown way: {list(x)}")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a reproducer.

    Raises:
        PipelineError: there is no such file, or it is none of ours, or damaged.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PipelineError(f"{os.fspath(path)} cannot be read as a reproducer: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PipelineError(f"{os.fspath(path)} is no reproducer: its format is not '{FORMAT}'")
    for key, kinds in _CONTENT.items():
        if key not in content or not isinstance(content[key], kinds):
            raise PipelineError(f"{os.fspath(path)} is damaged: it has no '{key}', or another kind of value there")
    return content


def replay(path: str | os.PathLike[str], model: str | Callable[[], Any] | None = None) -> Program:
    """Runs the pipeline of a reproducer again.

    Args:
        path: the file.
        model: what makes the model, in place of the function that the file names: a function without arguments that
            returns the captured program, the model, or a tuple `(program or model, *inputs)`; or its name as
            "module:function".

    Returns:
        The transformed program, if nothing fails any more.

    Raises:
        CompaxError: the recorded failure, where it comes again.
        PipelineError: the file cannot be used, or nothing says how to make the model.
    """
    content = read(path)
    return _run(*_prepare(content, model), seed=content["seed"])


def _run(program: Program, pipeline: Pipeline, inputs: Inputs | None, *, seed: int) -> Program:
    if inputs is None:
        return pipeline(program, seed=seed)
    return pipeline(program, *inputs.args, entry=inputs.entry, seed=seed, **inputs.kwargs)


def _prepare(
    content: Mapping[str, Any], model: str | Callable[[], Any] | None = None
) -> tuple[Program, Pipeline, Inputs | None]:
    """The program, the pipeline and the sample inputs that a reproducer tells of."""
    for place in content["modules"]:
        Place(**place).load()
    pipeline = Pipeline.parse(content["pipeline"])
    function = _function(content, model)
    try:
        made = function()
    except Exception as error:
        raise PipelineError(f"the function that makes the model fails: {type(error).__name__}: {error}") from error
    given: tuple[Any, ...] = ()
    if isinstance(made, tuple):
        made, *rest = made
        given = tuple(rest)
    inputs = _recorded_inputs(content, given)
    if isinstance(made, Program):
        return made, pipeline, inputs
    if inputs is None:
        raise PipelineError("no inputs were recorded to capture the model with: its function has to return the program")
    entry = content["entry"]
    program = capture(
        made,
        *inputs.args,
        mode=entry["mode"],
        constant=entry["constant"],
        static=entry["static"],
        entry=entry["name"],
        **inputs.kwargs,
    )
    return program, pipeline, inputs


def _recorded_inputs(content: Mapping[str, Any], given: tuple[Any, ...]) -> Inputs | None:
    entry = content["entry"]["name"]
    if given:
        return Inputs(given, {}, entry)
    if content["inputs"] is None:
        return None
    seed = content["seed"]
    return Inputs(_decode(content["inputs"]["args"], seed), _decode(content["inputs"]["kwargs"], seed), entry)


def _function(content: Mapping[str, Any], model: str | Callable[[], Any] | None) -> Callable[[], Any]:
    if callable(model):
        return model
    if model is not None:
        module, name = _split(model)
        place = Place(module, None)
    elif content["model"] is not None:
        name = content["model"]["function"]
        place = Place(content["model"]["module"], content["model"]["file"])
    else:
        raise PipelineError("the file does not say how to make the model: name a function, --model module:function")
    function: Any = place.load()
    for attribute in name.split("."):
        function = getattr(function, attribute, None)
    if not callable(function) or inspect.isclass(function):
        raise PipelineError(f"the module '{place.module}' has no function '{name}' that makes the model")
    return function


def _same(content: Mapping[str, Any], error: Exception) -> bool:
    """Whether an error is the recorded one, addresses in memory and what instruments added left aside."""

    def essence(message: str) -> str:
        return re.sub(r"0x[0-9a-f]+", "0x", message)

    recorded = content["error"]
    return type(error).__name__ == recorded["type"] and essence(str(error)).startswith(essence(recorded["message"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m compax.reproducer", description="Replays a failing pass.")
    parser.add_argument("file", help="what the Reproducer instrument wrote")
    parser.add_argument("--model", help="module:function that makes the model, in place of the one that the file names")
    options = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        content = read(options.file)
        program, pipeline, inputs = _prepare(content, options.model)
    except CompaxError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    changed = [f"{k} {v} (now {_versions()[k]})" for k, v in content["versions"].items() if _versions().get(k) != v]
    sys.stdout.write(f"pipeline: {pipeline}\n" + (f"recorded with {', '.join(changed)}\n" if changed else ""))
    try:
        _run(program, pipeline, inputs, seed=content["seed"])
    except CompaxError as error:
        verdict = (
            "the same failure" if _same(content, error) else f"another failure than the recorded {content['error']}"
        )
        sys.stdout.write(f"{verdict}: {type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(f"it no longer fails; recorded: {content['error']['type']}: {content['error']['message']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
