"""Saving and loading of programs.

```
directory/
  compax.json    the pipeline's text, the model's config, versions, and what every array is (`compax.manifest`)
  arrays/        the arrays, written by Orbax
```

A checkpoint holds no code and no graph, and nothing in it is unpickled: `load` captures the model, replays the pipeline
on shapes alone, and reads the arrays into what came out. It reads a few of them at a time, so that there is never more
in memory than the program as it is stored and its largest array once more. A directory appears under its name only when
it is whole.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from compax.encoding import Encoded, leaf_nbytes
from compax.errors import CaptureError, CheckpointError, CompaxError
from compax.manifest import (
    FILE,
    FORMAT,
    Manifest,
    StoredArray,
    StoredFile,
    StoredValue,
    differences,
    is_key,
    part_name,
    parts,
    read_manifest,
    reason,
    replaced_by,
)
from compax.meaning import Declaration
from compax.pipeline import Pipeline
from compax.program import Program, capture

ARRAYS = "arrays"
GROUP_BYTES = 32 << 20
"""How much is read at a time: enough that small arrays do not cost a call each, little enough to leave no trace."""
PACKAGES = ("compax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
REMEDY = "copy it again, or use another one"

StrPath = str | os.PathLike[str]


# -- saving -----------------------------------------------------------------------------------------------------------


def save(program: Program, directory: StrPath, *, config: Any = None, overwrite: bool = False) -> None:
    """Saves a program's parameters and state, encoded as they are, and what it takes to make the program again.

    With several processes, all of them call this, with a directory that all of them see.

    Args:
        program: what to save; its parameters are arrays, not shapes.
        directory: the folder to make. It appears when it is whole; a failure leaves nothing behind.
        config: anything that describes the model and that JSON can hold; `compax.manifest.read_manifest` returns it.
        overwrite: whether an older checkpoint at `directory` is replaced, once the new one is whole.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the program or config cannot be saved.
    """
    target = Path(directory).absolute()
    _check_target(target, overwrite=overwrite)
    program = program.replace(params=_concrete(program.params), state=_concrete(program.state))
    manifest = Manifest(
        format=FORMAT,
        program=program.name,
        pipeline=_pipeline_text(program),
        config=config,
        versions={name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
        parameters={path: StoredValue.of(x) for path, x in program.params.items()},
        state={path: StoredValue.of(x) for path, x in program.state.items()},
        frozen=tuple(sorted(program.frozen)),
        declared=tuple({k: v for k, v in dataclasses.asdict(x).items() if v is not None} for x in program.declared),
        files={},
    )
    manifest.to_json()  # fails, if at all, before anything is written
    arrays = {
        part_name(f"{kind}.{path}", part): _on_disk(x)
        for kind, store in (("params", program.params), ("state", program.state))
        for path, value in store.items()
        for part, x in parts(value)
        if x.size
    }
    partial, replaced = target.with_name(f".{target.name}.partial"), replaced_by(target)
    first, existed = jax.process_index() == 0, target.exists()
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
        _wait_for_all(f"folder of {target}")
        _write(partial / ARRAYS, arrays)
        _wait_for_all(f"arrays of {target}")
        if first:
            complete = dataclasses.replace(manifest, files=_files(partial / ARRAYS))
            (partial / FILE).write_text(complete.to_json(), encoding="utf-8")
            _rename(partial, target, replaced)
        _wait_for_all(f"end of {target}")
    except Exception as error:
        left = "the older checkpoint is unchanged" if existed else "nothing was left there"
        raise CheckpointError(f"cannot save to {target}: {reason(error)}; {left}") from error
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists; choose another folder, or say overwrite=True")
    if not (target / FILE).is_file():
        raise CheckpointError(f"{target} is no checkpoint of compax, so it is not overwritten; choose another folder")


def _concrete(store: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters or state as JAX arrays.

    Raises:
        CheckpointError: one is a shape, or was given away.
    """
    for path, value in store.items():
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise CheckpointError(f"'{path}' is a shape without values: initialize the program before saving it")
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise CheckpointError(f"'{path}' was donated to a computation and holds no values: save before that")
    return {path: jax.tree.map(jnp.asarray, value) for path, value in store.items()}


def _write(directory: Path, arrays: Mapping[str, Any]) -> None:
    import orbax.checkpoint as orbax

    if arrays:
        with _quiet(), orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(directory, args=orbax.args.PyTreeSave(dict(arrays)))


def _files(directory: Path) -> dict[str, StoredFile]:
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(StoredFile.of, paths))
    return {path.relative_to(directory).as_posix(): file for path, file in zip(paths, found, strict=True)}


def _rename(partial: Path, target: Path, replaced: Path) -> None:
    """Gives a finished folder its name; what had that name comes back if it fails."""
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _wait_for_all(what: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"compax: {what}")


# -- loading ----------------------------------------------------------------------------------------------------------


def load(
    directory: StrPath,
    model: Any,
    *inputs: Any,
    pipeline: str | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    **capture_options: Any,
) -> Program:
    """Loads a program: captures the model, replays the passes on shapes, and reads the arrays.

    Args:
        directory: where `save` put it.
        model: what the program was captured from, or a program of it. Only its structure is used: an abstract model
            (`nnx.eval_shape`) needs no memory. A program without passes gets those of the checkpoint, in all its
            entries; one with passes has to have gone through the same.
        *inputs: example inputs, as for `compax.capture`.
        pipeline: text of the passes that the program shall have gone through; by default, those of the checkpoint. If
            the checkpoint went through the first of them only (none, if it is dense), the others are run once its
            arrays are read, and each parameter is deleted as it is converted.
        shardings: where parameters and state go, by path; an encoding says how its arrays follow. By default they go
            to the default device.
        **capture_options: other options of `compax.capture`.

    Returns:
        The program.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it was saved from another model or pipeline; names
            what is missing, unknown or different, and the likely reason.
        CaptureError: the model cannot be captured, or inputs were given with a program.
        PipelineError: `pipeline` is malformed.
    """
    source = Path(directory).absolute()
    manifest = read_manifest(source)
    _check_files(source / ARRAYS, manifest)
    if not isinstance(model, Program):
        program = capture(model, *inputs, **capture_options)
    elif inputs or capture_options:
        raise CaptureError("example inputs and options of capture go with a model; a program was captured with its own")
    else:
        program = model
    replayed, later = _passes(source, manifest, program, pipeline)
    program = program.replace(params=jax.tree.map(_shape, program.params), state=jax.tree.map(_shape, program.state))
    try:
        program = replayed(program)
    except CompaxError as error:
        raise CheckpointError(
            f"{source} went through '{manifest.pipeline}', which does not fit the model: {reason(error)}"
        ) from error
    if different := differences(manifest, program):
        raise CheckpointError(f"{source} does not fit the model: {different}")
    program = _fill(source, manifest, program, shardings or {})
    return later(program, donate=True) if later.passes else program


def _passes(source: Path, manifest: Manifest, program: Program, text: str | None) -> tuple[Pipeline, Pipeline]:
    """The passes to replay on shapes, and those to run once the arrays are read.

    Raises:
        CheckpointError: the checkpoint went through other passes than it should have.
    """
    try:
        stored = Pipeline.parse(manifest.pipeline)
    except CompaxError as error:
        raise CheckpointError(f"the pipeline of {source} cannot be read: {reason(error)}") from error
    wanted = stored if text is None else Pipeline.parse(text)
    done, count = [record.pass_ for record in program.history], len(stored.passes)
    if done and tuple(done) != stored.passes:
        raise CheckpointError(
            f"{source} went through {_quoted(stored)}, but the program that it is loaded into through "
            f"{_quoted(Pipeline(done))}; capture the model again, and load into that"
        )
    if wanted.passes[:count] != stored.passes:
        raise CheckpointError(
            f"{source} went through {_quoted(stored)}, and {_quoted(wanted)} does not begin with that; load it without "
            "`pipeline`, or load a dense checkpoint"
        )
    return Pipeline(stored.passes[len(done) :]), Pipeline(wanted.passes[count:])


def _quoted(pipeline: Pipeline) -> str:
    return f"'{pipeline}'" if pipeline.passes else "no pass"


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Raises `CheckpointError` if a file is missing or was changed; each process looks at its share of them."""
    names = sorted(manifest.files)[jax.process_index() :: jax.process_count()]
    for name in names:
        file, nbytes = directory / name, manifest.files[name].nbytes
        if not file.is_file():
            raise CheckpointError(f"the checkpoint is damaged: {file} is missing; {REMEDY}")
        if file.stat().st_size != nbytes:
            raise CheckpointError(
                f"the checkpoint is damaged: {file} has {file.stat().st_size:,} of {nbytes:,} bytes; {REMEDY}"
            )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(StoredFile.of, [directory / name for name in names]))
    for name, file in zip(names, found, strict=True):
        if file != manifest.files[name]:
            raise CheckpointError(f"the checkpoint is damaged: {directory / name} was changed; {REMEDY}")


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """An array to be read.

    Attributes:
        struct: its shape and dtype.
        stored: what the checkpoint says about it.
        sharding: where it goes; the default device, if none is given.
    """

    struct: jax.ShapeDtypeStruct
    stored: StoredArray
    sharding: Sharding | None


def _fill(source: Path, manifest: Manifest, program: Program, shardings: Mapping[str, Sharding]) -> Program:
    """The program with the arrays of a checkpoint in place of shapes."""
    import orbax.checkpoint as orbax

    if unknown := sorted(shardings.keys() - program.params.keys() - program.state.keys()):
        raise CheckpointError(f"shardings are given for '{unknown[0]}', which is no parameter or state of the program")
    wanted: dict[str, _Wanted] = {}
    for kind, store, stored in (
        ("params", program.params, manifest.parameters),
        ("state", program.state, manifest.state),
    ):
        for path in sorted(store):  # as in the leaves of a dictionary
            places = _places(store[path], shardings.get(path))
            for (part, struct), place in zip(parts(store[path]), places, strict=True):
                wanted[part_name(f"{kind}.{path}", part)] = _Wanted(struct, stored[path].arrays[part], place)
    arrays: list[jax.Array] = []
    with _quiet(), orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as checkpointer:
        for group in _groups(wanted):
            arrays += _read(checkpointer, source, group)
    params, state = jax.tree.unflatten(jax.tree.structure((program.params, program.state)), arrays)
    declared = tuple(Declaration(**fields) for fields in manifest.declared)
    declared += tuple(x for x in program.declared if x not in declared)
    return program.replace(params=params, state=state, frozen=frozenset(manifest.frozen), declared=declared)


def _places(value: Any, sharding: Sharding | None) -> list[Sharding | None]:
    """Where each array of a parameter goes."""
    if isinstance(value, Encoded) and isinstance(sharding, NamedSharding):
        specs = jax.tree.leaves(value.spec(sharding.spec), is_leaf=lambda x: isinstance(x, PartitionSpec))
        return [NamedSharding(sharding.mesh, spec) for spec in specs]
    return [sharding] * len(jax.tree.leaves(value))


def _groups(wanted: Mapping[str, _Wanted]) -> Iterator[dict[str, _Wanted]]:
    """Arrays to be read at a time, in order: one, or several that are no larger together than the largest of all."""
    limit = min(GROUP_BYTES, max((leaf_nbytes(each.struct) for each in wanted.values()), default=0))
    group: dict[str, _Wanted] = {}
    filled = 0
    for name, each in wanted.items():
        size = leaf_nbytes(each.struct)
        if group and filled + size > limit:
            yield group
            group, filled = {}, 0
        group[name] = each
        filled += size
    if group:
        yield group


def _read(checkpointer: Any, source: Path, group: Mapping[str, _Wanted]) -> list[jax.Array]:
    """The arrays of a group, in order.

    Raises:
        CheckpointError: they cannot be read.
    """
    import orbax.checkpoint as orbax

    structs = {name: jax.eval_shape(_on_disk, each.struct) for name, each in group.items() if each.struct.size}
    here = SingleDeviceSharding(jax.local_devices()[0])
    arguments = {
        name: orbax.ArrayRestoreArgs(sharding=group[name].sharding or here, global_shape=struct.shape)
        for name, struct in structs.items()
    }
    found: dict[str, Any] = {}
    if structs:
        try:
            found = checkpointer.restore(
                source / ARRAYS,
                args=orbax.args.PyTreeRestore(structs, restore_args=arguments, partial_restore=True),
            )
        except Exception as error:
            raise CheckpointError(f"the checkpoint {source} is damaged: {reason(error)}; {REMEDY}") from error
    arrays: list[jax.Array] = []
    for name, each in group.items():
        if name in found:
            array = found.pop(name)
            if each.sharding is None:  # not bound to a device, as arrays are that nobody placed
                array = jnp.asarray(np.asarray(array))
            array = _from_disk(array, each)
        else:
            array = jnp.zeros(each.struct.shape, each.struct.dtype, device=each.sharding)
        arrays.append(array)
    return arrays


# -- arrays -----------------------------------------------------------------------------------------------------------


_UNKNOWN_TO_TENSORSTORE = {"uint2": jnp.uint8, "uint4": jnp.uint8, "float8_e4m3": jnp.uint8}
"""Dtypes that TensorStore does not write, and what holds their values or bits."""


def _on_disk(x: Any) -> Any:
    """An array as Orbax can write it."""
    if is_key(x):
        return jax.random.key_data(x)
    bits = _UNKNOWN_TO_TENSORSTORE.get(str(x.dtype))
    if bits is None:
        return x
    return x.astype(bits) if jnp.issubdtype(x.dtype, jnp.integer) else jax.lax.bitcast_convert_type(x, bits)


def _from_disk(x: jax.Array, wanted: _Wanted) -> jax.Array:
    """The array that `_on_disk` was given."""
    dtype = wanted.struct.dtype
    if wanted.stored.key is not None:
        return jax.random.wrap_key_data(x, impl=wanted.stored.key)
    if str(dtype) not in _UNKNOWN_TO_TENSORSTORE:
        return x
    return x.astype(dtype) if jnp.issubdtype(dtype, jnp.integer) else jax.lax.bitcast_convert_type(x, dtype)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _pipeline_text(program: Program) -> str:
    return str(Pipeline(record.pass_ for record in program.history))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keeps Orbax from printing the tracebacks of errors that it raises as well."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
