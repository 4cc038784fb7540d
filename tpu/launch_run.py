"""Runs the steps of a launch, and starts again what was lost."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable, Sequence

from compax.errors import LaunchError
from compax.tpu.launch import PHASES, Launch, Step
from compax.tpu.launch_queued import LOST, state_command

_REMEDIES = {
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and run `gcloud auth login`",
    "kubectl": "install it with `gcloud components install kubectl gke-gcloud-auth-plugin`",
    "docker": "install Docker, or build the image elsewhere and leave out --build",
}

Call = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def check_tools(steps: Sequence[Step]) -> None:
    """Finds out whether every program that the steps call is there.

    Raises:
        LaunchError: one is not; says which, and how it is installed.
    """
    wanted = [tool for tool in _REMEDIES if any(_calls(step, tool) for step in steps)]
    missing = [tool for tool in wanted if shutil.which(tool) is None]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} not found on this machine: {'; '.join(_REMEDIES[tool] for tool in missing)}. "
            "With --dry-run all commands are printed, to be run where they are there"
        )


def _calls(step: Step, tool: str) -> bool:
    return bool(step.command) and (step.command[0] == tool or (step.command[0] == "sh" and tool in step.command[-1]))


def run(
    launch: Launch,
    steps: Sequence[Step],
    say: Callable[[str], None],
    call: Call | None = None,
    *,
    reuse: bool = False,
) -> None:
    """Runs the phases create, prepare and run; what is lost is asked for and started again.

    On GKE the JobSet starts again by itself. The machines stay in the end: the last step deletes them.

    Args:
        launch: what.
        steps: its steps.
        say: takes a line to print.
        call: runs a command, for tests; by default on this machine, its output where this process's goes.
        reuse: the machines are there: do not ask for them.

    Raises:
        LaunchError: a step failed, and may not be tried again.
    """
    call = call or _call
    queued = not launch.cluster
    left = launch.restarts if queued else 0
    phases = ["prepare", "run"] if reuse else ["create", "prepare", "run"]
    while True:
        failed = _phases(steps, phases, say, call)
        if failed is None:
            say(f"{launch.name} is done; its machines cost money until they are deleted: --delete")
            return
        lost = queued and _state(launch, call) in LOST
        if not left or (failed.phase != "run" and not lost):
            raise LaunchError(
                f"{PHASES[failed.phase]}: failed at '{failed.why}'; what it printed is above"
                + (f", and the {launch.restarts} restart(s) are used up" if launch.restarts and not left else "")
                + "; --delete gives back what was made"
            )
        left -= 1
        say(f"{'the machines were taken away' if lost else 'the command failed'}: starting again, {left} time(s) left")
        if lost:
            delete(steps, say, call)
        phases = ["create", "prepare", "run"] if lost else ["run"]


def delete(steps: Sequence[Step], say: Callable[[str], None], call: Call | None = None) -> None:
    """Runs the steps that give the machines back, each even if one before it failed.

    Raises:
        LaunchError: one failed.
    """
    call = call or _call
    failed: list[str] = []
    for step in (step for step in steps if step.phase == "delete"):
        say(step.why)
        if call(step.command).returncode:
            failed.append(step.why)
    if failed:
        raise LaunchError(f"could not {'; '.join(failed)}: what it printed is above; look before it costs more")


def _phases(steps: Sequence[Step], phases: Sequence[str], say: Callable[[str], None], call: Call) -> Step | None:
    """Runs steps in order; returns the one that failed."""
    for step in steps:
        if step.phase not in phases:
            continue
        say(step.why)
        if step.file is not None:
            path = pathlib.Path(step.file.path)
            path.unlink(missing_ok=True)  # a file of other permissions keeps them
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(step.file.text)
        elif call(step.command).returncode:
            return step
    return None


def _state(launch: Launch, call: Call) -> str:
    return (call(state_command(launch)).stdout or "").strip()


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    told = any(word.startswith("--format=") for word in command)
    return subprocess.run(list(command), check=False, text=True, stdout=subprocess.PIPE if told else None)
