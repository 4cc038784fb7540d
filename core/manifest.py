"""What a checkpoint says about itself, as JSON: what every array is, and how to tell that no file was damaged."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from compax.encoding import Encoded
from compax.errors import CheckpointError, CompaxError
from compax.program import Program

FORMAT = 1
FILE = "compax.json"


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint.

    Attributes:
        shape: its shape.
        dtype: its dtype's name; of random keys, `key<...>`.
        key: of random keys, the name of their implementation.
    """

    shape: tuple[int, ...]
    dtype: str
    key: str | None


@dataclasses.dataclass(frozen=True)
class StoredValue:
    """One parameter, or one piece of state, of a checkpoint.

    Attributes:
        encoding: the encoding with its static data, such as `QuantizedArray(axes=(), logical_dtype=float32)`; None for
            a dense array.
        arrays: its arrays by name within the encoding; a dense array has one, named "".
    """

    encoding: str | None
    arrays: Mapping[str, StoredArray]

    @classmethod
    def of(cls, value: Any) -> "StoredValue":
        """What describes a parameter, encoded or not."""
        arrays = {
            part: StoredArray(tuple(x.shape), str(x.dtype), str(jax.random.key_impl(x)) if is_key(x) else None)
            for part, x in parts(value)
        }
        return cls(encoding_text(value), arrays)


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint.

    Attributes:
        nbytes: its size.
        crc32: the checksum of its contents (`zlib.crc32`).
    """

    nbytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """What describes a file.

        Raises:
            OSError: it cannot be read.
        """
        nbytes = checksum = 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                nbytes += len(block)
                checksum = zlib.crc32(block, checksum)
        return cls(nbytes, checksum)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        format: version of the format.
        program: the program's name.
        pipeline: text of the passes that it went through; empty if there were none.
        config: what the saver gave to describe the model.
        versions: of the packages that wrote it.
        parameters: by path.
        state: by path.
        frozen: paths of frozen parameters.
        declared: what a person said of the program, as the fields of each `Declaration` that are set.
        files: the files that hold the arrays, by path below their folder.
    """

    format: int
    program: str
    pipeline: str
    config: Any
    versions: Mapping[str, str]
    parameters: Mapping[str, StoredValue]
    state: Mapping[str, StoredValue]
    frozen: tuple[str, ...]
    declared: tuple[Mapping[str, str], ...]
    files: Mapping[str, StoredFile]

    def to_json(self) -> str:
        """The manifest as JSON.

        Raises:
            CheckpointError: JSON cannot hold the config.
        """
        try:
            return json.dumps(dataclasses.asdict(self), indent=1)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the config cannot be saved as JSON: {reason(error)}") from error


def replaced_by(target: Path) -> Path:
    """Where a checkpoint is while another one takes its name."""
    return target.with_name(f".{target.name}.replaced")


def read_manifest(directory: str | Path) -> Manifest:
    """Reads what a checkpoint says about itself.

    Args:
        directory: where `compax.save` put it.

    Raises:
        CheckpointError: there is no checkpoint, its description is damaged, or a newer compax wrote it.
    """
    source = Path(directory).absolute()
    if not source.is_dir():
        why = "it is a file" if source.exists() else "no such folder"
        if not source.exists() and replaced_by(source).is_dir():
            why = f"a process was killed while it replaced it; the one before is {replaced_by(source)}"
        raise CheckpointError(f"no checkpoint at {source}: {why}")
    file = source / FILE
    if not file.is_file():
        raise CheckpointError(f"{source} is no checkpoint of compax: it holds no {FILE}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version, writer = int(content["format"]), content["versions"]["compax"]
        manifest = _from_json(content) if version <= FORMAT else None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint is damaged: {file} cannot be read ({reason(error)})") from error
    if manifest is None:
        raise CheckpointError(
            f"{source} has format {version}, written by compax {writer}, and this one reads format {FORMAT}: install a "
            "newer compax"
        )
    return manifest


def _from_json(content: dict[str, Any]) -> Manifest:
    def values(store: dict[str, Any]) -> dict[str, StoredValue]:
        return {
            path: StoredValue(
                encoding=value["encoding"],
                arrays={
                    part: StoredArray(tuple(x["shape"]), x["dtype"], x["key"]) for part, x in value["arrays"].items()
                },
            )
            for path, value in store.items()
        }

    return Manifest(
        format=content["format"],
        program=content["program"],
        pipeline=content["pipeline"],
        config=content["config"],
        versions=content["versions"],
        parameters=values(content["parameters"]),
        state=values(content["state"]),
        frozen=tuple(content["frozen"]),
        declared=tuple(content.get("declared", ())),
        files={name: StoredFile(int(file["nbytes"]), int(file["crc32"])) for name, file in content["files"].items()},
    )


def differences(manifest: Manifest, program: Program) -> str | None:
    """In what a checkpoint is not what a program needs, with the likely reason; None if it fits.

    Args:
        manifest: of the checkpoint.
        program: with arrays or shapes.
    """
    problems: list[str] = []
    names = encodings = False
    for what, stored, store in (
        ("parameter", manifest.parameters, program.params),
        ("state", manifest.state, program.state),
    ):
        missing, extra = sorted(store.keys() - stored.keys()), sorted(stored.keys() - store.keys())
        names = names or bool(missing or extra)
        problems += [f"it lacks the {what} '{path}'" for path in missing]
        problems += [f"it has the {what} '{path}', which the model does not have" for path in extra]
        for path in sorted(store.keys() & stored.keys()):
            there, here = stored[path].encoding, encoding_text(store[path])
            if there != here:
                encodings = True
                problems.append(f"the {what} '{path}' is {there or 'dense'} there, and {here or 'dense'} in the model")
            else:
                problems += _other_arrays(what, path, stored[path], store[path])
    if not problems:
        return None
    if names:
        why = "it was saved from another model, or one of another depth"
    elif encodings:
        why = "its passes work otherwise in this version of compax"
    else:
        why = "it was saved from a model of another size or dtype"
    if manifest.config is not None:
        why += f" (its config is in {FILE})"
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return f"{'; '.join(problems[:3])}{more}; {why}"


def _other_arrays(what: str, path: str, stored: StoredValue, value: Any) -> list[str]:
    problems: list[str] = []
    for part, x in parts(value):
        held = stored.arrays.get(part)
        here = f"{x.dtype}{list(x.shape)}"
        there = f"{held.dtype}{list(held.shape)}" if held is not None else "missing"
        if here != there:
            problems.append(f"the {what} '{part_name(path, part)}' is {there} there, and {here} in the model")
    return problems


# -- the arrays of a parameter ----------------------------------------------------------------------------------------


def parts(value: Any) -> list[tuple[str, Any]]:
    """The arrays of a parameter by name within its encoding; a dense one is its only array, named ""."""
    flat, _ = jax.tree_util.tree_flatten_with_path(value)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in flat]


def part_name(path: str, part: str) -> str:
    """The name of an array of the parameter at `path`."""
    return f"{path}:{part}" if part else path


def encoding_text(value: Any) -> str | None:
    """An encoding with its static data and the encodings within it; None for a dense array."""
    if not isinstance(value, Encoded):
        return None
    flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda x: x is not value and isinstance(x, Encoded))
    told = {jax.tree_util.keystr(path, simple=True, separator="."): encoding_text(part) for path, part in flat}
    if dataclasses.is_dataclass(value):
        dynamic = {jax.tree_util.keystr(path[:1], simple=True) for path, _ in flat}
        static = {field.name for field in dataclasses.fields(value)} - dynamic
        told |= {name: _static_text(getattr(value, name)) for name in static}
    return f"{type(value).__name__}({', '.join(f'{name}={told[name]}' for name in sorted(told) if told[name])})"


def _static_text(x: Any) -> str:
    if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
        return np.dtype(x).name
    if isinstance(x, tuple):
        return f"({', '.join(map(_static_text, cast('tuple[Any, ...]', x)))})"
    return repr(x) if isinstance(x, (bool, int, float, str)) or x is None else type(x).__name__


def is_key(x: Any) -> bool:
    """Whether an array, or a shape, is one of random keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def reason(error: BaseException) -> str:
    """An error as part of a line; what libraries add in further lines is in the traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else ""
    return text if isinstance(error, CompaxError) else f"{type(error).__name__}: {text}"
