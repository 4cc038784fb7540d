"""Run directories and the checkpoints in them.

    runs/quickstart/
      config.json        the config that the run was started with
      tokenizer.json     the tokenizer it uses
      metrics.jsonl      losses: the same to the bit in every repetition of the run
      timing.jsonl       what the clock said
      checkpoints/200/   parameters, state, optimizer state, place in the data, versions
      compressed/        the program after the passes of `compress`; compress.json is the report

A directory that holds anything else is left alone. Checkpoints are written by Orbax in the background and appear under
their final name only when they are whole, so that a process may be killed at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
import uuid
from collections.abc import Generator
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from compax.errors import CheckpointError, ConfigError
from compax.experiments import config as configs
from compax.experiments.config import Config
from compax.tpu.distributed import ALONE, Processes

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
COMPRESSED = "compressed"
CHOICE = "choice.json"
_LOCK = ".lock"
_JOB = ".job"
_CHECKPOINTS = "checkpoints"
_FORMAT = 1
_WORDS = {1: jnp.uint8, 2: jnp.uint16}


class OpenRun(contextlib.AbstractContextManager["OpenRun"]):
    """A run directory in use: free again when it is closed or the process ends.

    As a context it takes a directory that it made away again, unless the run `begun`.
    """

    def __init__(self, directory: pathlib.Path, lock: TextIO | None, *, made: bool):
        self._directory, self._lock, self._made = directory, lock, made

    def begun(self) -> None:
        """From here on the directory stays."""
        self._made = False

    def close(self) -> None:
        """Gives the directory free."""
        if self._lock is not None:
            self._lock.close()

    def __exit__(self, *error: object) -> None:
        if self._made and error[0] is not None:
            for name in (CONFIG, TOKENIZER, CHOICE, _JOB, _LOCK):
                (self._directory / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what somebody put there stays
                for folder in (self._directory / _CHECKPOINTS, self._directory):
                    if folder.exists():
                        folder.rmdir()
        self.close()


def open_run(config: Config, processes: Processes = ALONE) -> OpenRun:
    """Makes the run directory of a config, or checks that the one there belongs to it, and locks it.

    Of several processes the first one does so, and the others check that they see the same directory.

    Raises:
        CheckpointError: The directory holds something else, a run of another config, is in use, or is not where all
            processes see it.
    """
    directory = configs.run_directory(config)
    if processes.first:
        opened = _opened(config)
        if processes.count > 1:
            job = str(uuid.uuid4())
            write_whole(directory / _JOB, job)
            processes.of_first("run directory", job)
        return opened
    job, path = processes.of_first("run directory"), directory / _JOB
    if not path.is_file() or path.read_text(encoding="utf-8") != job:
        raise CheckpointError(
            f"{processes.name(processes.index)} does not see the run directory {directory.absolute()} of "
            f"{processes.name(0)}: choose a folder that all hosts share, with --config.directory=FOLDER"
        )
    return OpenRun(directory, None, made=False)


def _opened(config: Config) -> OpenRun:
    directory = configs.run_directory(config)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"the run directory {directory} is a file: choose another with --config.directory=FOLDER")
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / CONFIG).exists():
            _refuse_foreign(directory)
        lock = _locked(directory)
        if not (directory / CONFIG).exists():
            write_whole(directory / CONFIG, configs.to_json(config))
    except OSError as error:
        raise CheckpointError(f"cannot use the run directory {directory}: {error.strerror or error}") from None
    different = configs.differences(read_config(directory), config)
    if different:
        lock.close()
        raise CheckpointError(
            f"{directory} holds a run with another config: {'; '.join(different)}; "
            "choose another folder with --config.directory=FOLDER, or delete that run"
        )
    write_whole(directory / CONFIG, configs.to_json(config))
    return OpenRun(directory, lock, made=made)


def _refuse_foreign(directory: pathlib.Path) -> None:
    found = sorted(path.name for path in directory.iterdir() if path.name not in (_LOCK, _JOB))
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise CheckpointError(
            f"{directory} is not a run of compax: it holds {shown} and no {CONFIG}; nothing in it was changed; "
            "choose another folder with --config.directory=FOLDER"
        )


def _locked(directory: pathlib.Path) -> TextIO:
    import fcntl

    lock = open(directory / _LOCK, "w")  # noqa: SIM115 - held until the run ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise CheckpointError(f"another process is training in {directory}") from None
    return lock


def read_config(directory: pathlib.Path) -> Config:
    """Reads the config of a run directory.

    Raises:
        CheckpointError: The folder is no run directory, or its config is damaged.
    """
    path = directory / CONFIG
    if not directory.is_dir():
        raise CheckpointError(f"no run directory {directory}: train first, with compax train --config=FILE")
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a run of compax: it holds no {CONFIG}")
    try:
        config = configs.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"damaged run directory: {error}") from None
    if configs.run_directory(config) != directory:
        # The run was moved, or is named from another working directory.
        config.directory = str(directory)
    return config


def read_choice(directory: pathlib.Path, devices: int) -> str | None:
    """Reads what the passes of a run chose by themselves: the pipeline's text, if it was for as many devices.

    Raises:
        CheckpointError: It is damaged.
    """
    path = directory / CHOICE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return str(found["pipeline"]) if found["devices"] == devices else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"damaged run directory: {path}: {_first_line(error)}") from None


def write_choice(directory: pathlib.Path, devices: int, pipeline: str) -> None:
    """Keeps what passes chose, so that a run that goes on does not choose anew."""
    write_whole(directory / CHOICE, json.dumps({"devices": devices, "pipeline": pipeline}) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def versions() -> dict[str, str]:
    """Returns the versions that decide the numbers of a run."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")}
    return {"compax": importlib.metadata.version("compax"), "python": platform.python_version(), **found}


class Checkpoints:
    """The checkpoints of a run directory.

    A checkpoint holds arrays by name and a small dict `meta` that JSON can hold. Of several processes all save and
    restore together; each one writes and reads its part of the arrays.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int = 1, read_only: bool = False):
        """Opens them.

        Args:
            directory: The run directory.
            keep: How many of the last ones are kept.
            read_only: Nothing is made or deleted.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        import orbax.checkpoint as orbax

        self.directory = (directory / _CHECKPOINTS).absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is a file where a folder of checkpoints should be")
        options = orbax.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        handlers = {"arrays": orbax.PyTreeCheckpointHandler(), "meta": orbax.JsonCheckpointHandler()}
        try:
            self._manager = orbax.CheckpointManager(self.directory, options=options, item_handlers=handlers)
            self.latest: int | None = self._manager.latest_step()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot open the checkpoints in {self.directory}: {_first_line(error)}") from None

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Begins to save: the arrays are copied before this returns, and written while training goes on.

        Args:
            step: Steps done so far; a checkpoint of that step must not exist.
            tree: Any pytree of arrays.
            meta: What JSON can hold.

        Raises:
            CheckpointError: It cannot be written (the disk is full, say).
        """
        import orbax.checkpoint as orbax

        # Buffers that are donated to the next step must not be read by the thread that writes.
        arrays = jax.tree.map(jnp.copy, named(tree))
        # What Orbax writes carries no checksum of the arrays: a flipped bit would be trained on.
        meta = {"format": _FORMAT, "step": step, "versions": versions(), "digests": digests(arrays), **meta}
        try:
            self._manager.save(
                step,
                args=orbax.args.Composite(arrays=orbax.args.PyTreeSave(arrays), meta=orbax.args.JsonSave(meta)),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot save checkpoint {step} in {self.directory}: {_first_line(error)}") from error
        self.latest = step

    def wait(self) -> None:
        """Waits until all that was saved is on disk.

        Raises:
            CheckpointError: It could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot save into {self.directory}: {_first_line(error)}") from error

    def close(self) -> None:
        """Waits and gives up the threads."""
        self.wait()
        self._manager.close()

    def meta(self, step: int) -> dict[str, Any]:
        """Reads what was saved beside the arrays.

        Raises:
            CheckpointError: It is damaged, or of another kind.
        """
        import orbax.checkpoint as orbax

        try:
            meta = self._manager.restore(step, args=orbax.args.Composite(meta=orbax.args.JsonRestore()))["meta"]
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise CheckpointError(f"checkpoint {step} in {self.directory} was not written by this version of compax")
        return meta

    def restore(self, step: int, like: Any) -> Any:
        """Reads arrays into the shape of a pytree.

        Args:
            step: Which checkpoint.
            like: A pytree of arrays (or shapes with shardings); its leaves say what is read and where it goes.

        Returns:
            A pytree like `like`.

        Raises:
            CheckpointError: The checkpoint is damaged, or holds other arrays than `like`; names the first of them.
        """
        import orbax.checkpoint as orbax

        wanted = named(like)
        try:
            held = self._manager.item_metadata(step).arrays.tree
        except Exception as error:
            raise self._damaged(step, _first_line(error)) from error
        self._compare(step, wanted, held)
        shapes = jax.tree.map(orbax.utils.to_shape_dtype_struct, wanted)
        arguments = orbax.args.PyTreeRestore(
            shapes,
            restore_args=orbax.checkpoint_utils.construct_restore_args(shapes),
            partial_restore=len(wanted) < len(held),
        )
        found, reason = None, ""
        with _quiet_threads():
            try:
                found = self._manager.restore(step, args=orbax.args.Composite(arrays=arguments))["arrays"]
            except Exception as error:  # noqa: BLE001 - whatever a damaged file makes Orbax raise
                reason = _first_line(error)
            if found is None:
                _collect_reads()
                raise self._damaged(step, reason)
        expected = self.meta(step)["digests"]
        for name, digest in digests(found).items():
            if digest != expected.get(name):
                raise self._damaged(step, f"{name} is not what was saved")
        return _unnamed(found, like)

    def _compare(self, step: int, wanted: dict[str, Any], held: dict[str, Any]) -> None:
        for name, leaf in wanted.items():
            where = f"checkpoint {step} in {self.directory}"
            if name not in held:
                raise CheckpointError(f"{where} does not hold {name}: it belongs to another model or pipeline")
            shape, dtype = tuple(held[name].shape), jnp.dtype(held[name].dtype)
            if shape != tuple(leaf.shape) or dtype != leaf.dtype:
                raise CheckpointError(
                    f"{where} holds {name} as {dtype}{list(shape)}, the model has {leaf.dtype}{list(leaf.shape)}: "
                    "it belongs to another model or pipeline"
                )

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {step} in {self.directory} is damaged ({reason}); "
            f"delete the folder {self.directory / str(step)} to go on from the one before"
        )


@contextlib.contextmanager
def _quiet_threads() -> Generator[None]:
    """Keeps what fails in other threads, or while garbage is collected, from being printed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _collect_reads() -> None:
    """Collects the reads that a failed restore leaves unfinished.

    Orbax closes its event loop while they are under way. What awaits them lives until they are through, and fails then
    because its loop is closed: so they are waited for, as long as reads of a file may take.
    """
    until = time.monotonic() + 10
    while True:
        gc.collect()
        time.sleep(0.02)  # a thread that is about to fail gets its turn
        if time.monotonic() > until or not any(map(_is_abandoned, gc.get_objects())):
            break


def _is_abandoned(value: object) -> bool:
    return type(value) is asyncio.Task and not value.done() and value.get_loop().is_closed()


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by name, such as `params/blocks.0.mlp.up.kernel`; random keys as their data."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): _data(leaf) for path, leaf in leaves}
    assert len(found) == len(leaves)
    return found


def shapes(tree: Any) -> Any:
    """Returns a pytree of arrays as shapes with shardings, as `Checkpoints.restore` takes it; random keys stay."""

    def of(leaf: Any) -> Any:
        return leaf if _is_key(leaf) else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(of, tree)


def digests(arrays: dict[str, jax.Array]) -> dict[str, list[int]]:
    """Returns two 32-bit checksums of each array's bits, computed where the array is."""
    # One after the other: on CPUs, 32 programs under way that wait for other processes never end (jax 0.10.2).
    found = {name: jax.device_get(_digester(array.sharding)(array)) for name, array in arrays.items()}
    return {name: [int(part) for part in both] for name, both in found.items()}


@functools.cache
def _digester(sharding: Sharding) -> Any:
    # Whole on each device, so that each process reads it.
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    return jax.jit(_digest, out_shardings=whole)


def _digest(array: jax.Array) -> jax.Array:
    """Sums the bits as unsigned integers, once plainly and once weighted by place; order does not matter to either.

    Each device sums its part of the array: nothing is gathered.
    """
    array = jax.device_put(array, jax.memory.Space.Device)  # it may live in the host's memory
    integral = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_
    words = array if integral else jax.lax.bitcast_convert_type(array, _WORDS.get(array.dtype.itemsize, jnp.uint32))
    words, places, stride = words.astype(jnp.uint32), jnp.uint32(1), 2
    for dim in reversed(range(words.ndim)):
        places = places + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    return jnp.stack([words.sum(dtype=jnp.uint32), (words * places).sum(dtype=jnp.uint32)])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _unnamed(found: dict[str, Any], like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    restored = [
        jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value
        for leaf, value in zip(leaves, (found[name] for name in named(like)), strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines up to the first line that is not whole (the process was killed while it wrote)."""
    found: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                value = json.loads(line) if line.endswith("\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            found.append(value)
    return found
