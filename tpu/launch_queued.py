"""Launching on Cloud TPU's own machines, asked for through its queue (queued resources).

Google Cloud, "Manage queued resources", "Cloud TPU Multislice", "TPU software versions", and the reference of `gcloud
compute tpus queued-resources`, 2025-2026.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping

from compax.errors import LaunchError
from compax.tpu.launch import MOUNT, File, Launch, Phase, Step, check_code, wrapped

# The type's name, and what its number counts of a chip: TensorCores of v4 and v5p, chips of the others.
_TYPES: Mapping[str, tuple[str, str, int]] = {
    "v4": ("v4", "v4", 2),
    "v5e": ("v5litepod", "v5litepod", 1),
    "v5p": ("v5p", "v5p", 2),
    "v6e": ("v6e", "v6e", 1),
}
_RUNTIMES: Mapping[str, str] = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_TPUS = ("gcloud", "compute", "tpus", "queued-resources")
_ENVIRONMENT = "compax-env"

LOST = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")
"""States of a queued resource from which it does not come back."""

_LEFT_OUT = ("__pycache__", ".*_cache", ".venv", "venv", "*.egg-info", "runs")
"""What is not uploaded with the code."""


def notes(launch: Launch) -> list[str]:
    """What a person should know before the first step."""
    found = [
        "set by whom: TPU_WORKER_ID, the list of hosts"
        + (" and MEGASCALE_*" if launch.target.slices > 1 else "")
        + " come from the machines' metadata, where JAX looks for them; nothing is to be set by hand",
    ]
    if launch.target.slices > 1:
        found.append(
            "several slices: one request with --node-count, so that they start together; between them goes the data "
            "centre's network: give that axis first, as in shard(dcn_data=" + str(launch.target.slices) + ", fsdp=-1)"
        )
    if launch.spot:
        found.append("spot: the machines may be taken away; they cannot be restarted, only asked for anew")
    found.append(
        f"after a loss: asked for and started again up to {launch.restarts} time(s) by `compax launch` as long as it "
        "runs (delete, then from the first step); the run goes on from its last checkpoint"
        if launch.restarts
        else "after a loss: nothing is started again (--restarts=0); the same command goes on from the last checkpoint"
    )
    return found


def steps(launch: Launch) -> list[Step]:
    """The steps.

    Raises:
        LaunchError: Cloud TPU's queue does not rent such slices, or an option is of no use there.
    """
    chip = launch.target.chip.name
    if chip not in _TYPES:
        raise LaunchError(f"{launch.target}: Cloud TPU's queue does not rent {chip}; use --on=gke")
    for value, option in ((launch.image, "--image"), (launch.cluster, "--cluster"), (launch.build, "--build")):
        if value:
            raise LaunchError(f"{option} is of GKE: add --on=gke, or leave it out")
    archive, variables, install, start = (
        f"/tmp/{launch.name}{ending}" for ending in (".tar.gz", ".env", "-install.sh", "-run.sh")
    )
    secret = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in launch.env.items())
    shown = "".join(
        f"export {name}={shlex.quote(value)}\n"
        for name, value in (line.split("=", 1) for line in launch.shown_variables.splitlines())
    )
    return [
        Step("create", "queue the request: all slices are granted together or not at all", _create(launch)),
        Step("create", "wait until the machines are there (ACTIVE); ends with 1 if the request failed", _wait(launch)),
        Step(
            "prepare",
            "pack the code, without version control and caches",
            ("tar", "--exclude-vcs", *(f"--exclude={name}" for name in _LEFT_OUT), "-czf", archive,
             "-C", str(check_code(launch.code)), "."),
        ),
        Step("prepare", "the variables of the command, for their owner alone",
             file=File(variables, secret or "# none\n", shown or "# none\n", private=True)),
        _script("prepare", "what installs Python 3.12 and the code with the TPU's libraries, and mounts the bucket",
                install, _install(launch)),
        _script("prepare", "what runs the command, keeps its log, and hands signals on to it", start, _run(launch)),
        Step("prepare", "copy all of it to every host of every slice",
             (*_TPUS, "scp", archive, variables, install, start, f"{launch.name}:", *_all(launch))),
        Step("prepare", "install, on every host", _ssh(launch, f"bash ~/{launch.name}-install.sh")),
        Step("run", "start one process a host; their output comes here, and they find each other",
             _ssh(launch, f"bash ~/{launch.name}-run.sh")),
        Step("look", "the state of the request", (*_TPUS, "describe", launch.name, *_where(launch))),
        Step("look", "the log of one host",
             (*_TPUS, "ssh", launch.name, *_where(launch), "--node=0", "--worker=0",
              "--command=tail -n 100 -f ~/compax.log")),
        Step("look", "stop after the step under way, with a checkpoint: SIGTERM to one host stops all",
             (*_TPUS, "ssh", launch.name, *_where(launch), "--node=0", "--worker=0",
              "--command=kill -TERM $(cat ~/compax.pid)")),
        Step("delete", "delete the request and its machines",
             (*_TPUS, "delete", launch.name, *_where(launch), "--force", "--quiet")),
    ]  # fmt: skip


def state_command(launch: Launch) -> tuple[str, ...]:
    """The command that prints the state of the request."""
    return (*_TPUS, "describe", launch.name, *_where(launch), "--format=value(state.state)")


def _where(launch: Launch) -> tuple[str, ...]:
    return (f"--zone={launch.zone}", *((f"--project={launch.project}",) if launch.project else ()))


def _all(launch: Launch) -> tuple[str, ...]:
    return (*_where(launch), "--node=all", "--worker=all", f"--batch-size={launch.num_hosts}")


def _create(launch: Launch) -> tuple[str, ...]:
    name, kind, unit = _TYPES[launch.target.chip.name]
    shape = launch.target.shape
    if len(shape) == 2:
        size = (f"--accelerator-type={name}-{math.prod(shape) * unit}",)
    else:
        # The number alone leaves it open which of several shapes comes.
        size = (f"--type={kind}", f"--topology={launch.topology}")
    slices = launch.target.slices
    nodes = (f"--node-id={launch.name}",) if slices == 1 else (f"--node-count={slices}", f"--node-prefix={launch.name}")
    return (
        *_TPUS,
        "create",
        launch.name,
        *_where(launch),
        *size,
        f"--runtime-version={launch.runtime or _RUNTIMES[launch.target.chip.name]}",
        *nodes,
        # Read and write to the bucket.
        *(("--scopes=https://www.googleapis.com/auth/cloud-platform",) if launch.storage else ()),
        *(("--spot",) if launch.spot else ()),
    )


def _wait(launch: Launch) -> tuple[str, ...]:
    lines = (
        f'while state=$({" ".join(state_command(launch)[:-1])} "{state_command(launch)[-1]}"); do',
        "  echo $state",
        f"  case $state in ACTIVE) exit 0;; {'|'.join(LOST)}) exit 1;; esac",
        "  sleep 30",
        "done",
        "exit 1",
    )
    return ("sh", "-c", "\n".join(lines))


def _script(phase: Phase, why: str, path: str, text: str) -> Step:
    return Step(phase, why, file=File(path, f"{text}\n", f"{text}\n"))


def _ssh(launch: Launch, command: str) -> tuple[str, ...]:
    return (*_TPUS, "ssh", launch.name, *_all(launch), f"--command={command}")


def _install(launch: Launch) -> str:
    lines = [
        "set -e",
        f"chmod 600 ~/{launch.name}.env",
        "rm -rf ~/compax-code && mkdir ~/compax-code",
        f"tar -xzf ~/{launch.name}.tar.gz -C ~/compax-code",
        "test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh",
        f"~/.local/bin/uv venv --quiet --clear --python 3.12 ~/{_ENVIRONMENT}",
        f"~/.local/bin/uv pip install --quiet --python ~/{_ENVIRONMENT}/bin/python -e ~/compax-code[tpu]",
    ]
    if launch.storage:
        bucket, _, folder = launch.storage.removeprefix("gs://").partition("/")
        only = f" --only-dir {shlex.quote(folder.rstrip('/'))}" if folder else ""
        lines += [
            "if ! command -v gcsfuse > /dev/null; then",
            "  echo 'gcsfuse, which mounts --storage, is not on this image: install it on every host, then --reuse'",
            "  exit 1",
            "fi",
            f"sudo mkdir -p {MOUNT} && sudo chown $(id -u) {MOUNT}",
            f"mountpoint -q {MOUNT} || gcsfuse --implicit-dirs{only} {bucket} {MOUNT}",
        ]
    return "\n".join(lines)


def _run(launch: Launch) -> str:
    return "\n".join(
        (
            f". ~/{launch.name}.env",
            f"export PATH=~/{_ENVIRONMENT}/bin:$PATH",
            "cd ~/compax-code",
            "echo $$ > ~/compax.pid",
            "exec > >(tee ~/compax.log) 2>&1",
            wrapped(launch.command),
        )
    )
