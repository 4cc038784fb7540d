"""What to launch, and the steps that launch it: commands and files, each with the reason for it.

1. `Launch` says what: a command, on how many slices of which chip, where. It is checked before anything is made.
2. `steps` (`compax.tpu.launch_queued`, `compax.tpu.launch_gke`) turns it into a list of `Step`.
3. `script` prints the list, as a shell script that a person can read; `compax.tpu.launch_run` runs it.

Nothing secret is printed: the values of variables that are called like a secret are left out of the script, and all
variables travel in a file (or a Kubernetes Secret), never on a command line.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

from compax.errors import LaunchError, TargetError
from compax.target import Target

Phase = Literal["create", "prepare", "run", "look", "delete"]

MOUNT = "/mnt/compax"
"""Where the bucket of `Launch.storage` is mounted on every host."""

PHASES: Mapping[Phase, str] = {
    "create": "ask for the machines",
    "prepare": "bring code and variables to every host",
    "run": "train, on all hosts together",
    "look": "meanwhile, in another terminal: state and logs",
    "delete": "give the machines back (they cost money until then)",
}

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")
_PROJECT = re.compile(r"[a-z][-a-z0-9]{4,28}[a-z0-9]")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BUCKET = re.compile(r"gs://[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9](/[^\s'\"]*)?")
_IMAGE = re.compile(r"[a-z0-9][-a-z0-9._:/@]*")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|(^|_)KEY($|_)|AUTH", re.IGNORECASE)
# The platform sets these on each host; a value of the user's would be the same on all of them.
_PLATFORM = re.compile(r"MEGASCALE_.*|TPU_WORKER_.*|TPU_PROCESS_.*|JOB_COMPLETION_INDEX|JAX_PROCESS_ID|LD_PRELOAD")


@dataclasses.dataclass(frozen=True)
class File:
    """A file to write.

    Attributes:
        path: where, on this machine.
        text: what.
        shown: the same with secrets left out.
        private: only its owner may read it.
    """

    path: str
    text: str
    shown: str
    private: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: a command to run, or a file to write.

    Attributes:
        phase: what it is a part of.
        why: one line, for a person.
        command: arguments; the first is the program.
        file: to write instead.
    """

    phase: Phase
    why: str
    command: tuple[str, ...] = ()
    file: File | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """A command on slices of TPUs.

    Attributes:
        name: of everything that is made: lower-case letters, digits and hyphens.
        target: the slices, such as `v6e:16x16*2`.
        command: what runs on every host, one process a host.
        zone: such as us-east5-a.
        project: of Google Cloud; empty: the one that gcloud is set to.
        spot: ask for spot machines, which are cheap and may be taken away.
        restarts: how often the command is started again after a host was lost or the command failed.
        env: variables for the command.
        storage: a bucket, mounted at `MOUNT` on every host: run directories have to lie on what all hosts see.
        code: the folder that is uploaded and installed on every host.
        runtime: the image of the TPU's machines; empty: the one that the vendor names for the chip.
        cluster: GKE's, for `gke`.
        image: the container's, for `gke`.
        build: build the container from `code` and push it, for `gke`.

    Raises:
        LaunchError: something is malformed, or does not go together.
    """

    name: str
    target: Target
    command: tuple[str, ...]
    zone: str
    project: str = ""
    spot: bool = False
    restarts: int = 0
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    storage: str = ""
    code: str = "."
    runtime: str = ""
    cluster: str = ""
    image: str = ""
    build: bool = False

    def __post_init__(self) -> None:
        _match(_NAME, self.name, "--name", "lower-case letters, digits and hyphens, at most 40, as in my-run")
        _match(_ZONE, self.zone, "--zone", "a zone of Google Cloud, as in us-east5-a")
        for text, pattern, what, remedy in (
            (self.project, _PROJECT, "--project", "6 to 30 lower-case letters, digits and hyphens"),
            (self.storage, _BUCKET, "--storage", "a bucket and a folder in it, as in gs://my-bucket/runs"),
            (self.cluster, _NAME, "--cluster", "the name of a cluster of GKE"),
            (self.runtime, _NAME, "--runtime", "an image of TPU machines, as in v2-alpha-tpuv6e"),
            (self.image, _IMAGE, "--image", "a container image, as in us-docker.pkg.dev/PROJECT/REPOSITORY/compax:1"),
        ):
            if text:
                _match(pattern, text, what, remedy)
        if self.target.chip.platform != "tpu":
            raise LaunchError(f"--topology={self.target}: only slices of TPUs can be launched on, as in v5e:16x16")
        if not self.command:
            raise LaunchError("there is nothing to run: give --config=FILE, or a command after --")
        if self.restarts < 0:
            raise LaunchError(f"--restarts={self.restarts}: how often to start again; 0 or more")
        if self.restarts and not self.storage:
            raise LaunchError(
                "--restarts needs --storage=gs://BUCKET/FOLDER: a run goes on from its last checkpoint, and what lies "
                "on the disks of machines that were taken away is gone"
            )
        if self.num_hosts > 1 and not self.storage:
            raise LaunchError(
                f"{self.target} has {self.num_hosts} hosts, and a run directory has to lie where all of them see it: "
                "give --storage=gs://BUCKET/FOLDER"
            )
        _check_variables(self.env)

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine: v5e and v6e have machines of 1, 4 and 8, all others of 4."""
        chips = math.prod(self.target.shape)
        if len(self.target.shape) == 2:
            return chips if chips in (1, 4, 8) else 4
        return min(chips, 4)

    @property
    def hosts_per_slice(self) -> int:
        """Machines of one slice."""
        return math.prod(self.target.shape) // self.chips_per_host

    @property
    def num_hosts(self) -> int:
        """Machines of all slices: so many processes run."""
        return self.hosts_per_slice * self.target.slices

    @property
    def topology(self) -> str:
        """The shape of a slice, as Google Cloud writes it."""
        return "x".join(map(str, self.target.shape))

    @property
    def variables(self) -> str:
        """All variables as lines `NAME=VALUE`, as `docker` and `kubectl` read them."""
        return "".join(f"{name}={value}\n" for name, value in self.env.items())

    @property
    def shown_variables(self) -> str:
        """The same with the values of secrets left out."""
        return "".join(f"{name}={_shown(name, value)}\n" for name, value in self.env.items())


def parse_target(text: str, slices: int) -> Target:
    """The slices that `--topology` and `--slices` name.

    Raises:
        LaunchError: there are no such slices.
    """
    try:
        target = Target.parse(text)
        if slices != 1 and target.slices not in (1, slices):
            raise LaunchError(f"--topology={text} has {target.slices} slices and --slices={slices}: give one of them")
        return dataclasses.replace(target, slices=slices) if slices != 1 else target
    except TargetError as error:
        raise LaunchError(f"--topology={text}: {error}") from error


def parse_variables(texts: Sequence[str]) -> dict[str, str]:
    """Reads `NAME=VALUE` texts.

    Raises:
        LaunchError: one is malformed, or there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise LaunchError(f"--env {_shown(name, name)}: write NAME=VALUE")
        if name in found:
            raise LaunchError(f"--env: {name} is there twice")
        found[name] = value
    return found


def check_code(folder: str) -> pathlib.Path:
    """The folder that is uploaded.

    Raises:
        LaunchError: it cannot be installed.
    """
    path = pathlib.Path(folder)
    if not (path / "pyproject.toml").is_file():
        raise LaunchError(
            f"--code={folder}: there is no pyproject.toml, so it cannot be installed on the hosts; give a checkout of "
            "compax, or a project of yours that depends on it"
        )
    return path.absolute()


def wrapped(command: Sequence[str]) -> str:
    """A shell script that runs a command, hands SIGTERM on to it, and then ends with 143 however the command ended.

    A run that is told to stop saves, and ends with 0: whoever watches the host would take it for finished.
    """
    return "\n".join(
        (
            f"{shlex.join(command)} &",
            "child=$!; stopped=",
            "trap 'stopped=1; kill -TERM $child' TERM",
            "wait $child; code=$?",
            'if [ -n "$stopped" ]; then wait $child; exit 143; fi',
            "exit $code",
        )
    )


def script(launch: Launch, steps: Sequence[Step], notes: Sequence[str]) -> str:
    """The steps as a shell script, with the reason of each."""
    lines = [
        _title(launch),
        *(f"# {note}" for note in notes),
    ]
    phase = None
    for number, step in enumerate(steps, 1):
        if step.phase != phase:
            phase = step.phase
            lines += ["", f"## {PHASES[phase]}"]
        lines += ["", f"# {number}. {step.why}"]
        if step.file is not None:
            mode = "umask 077; " if step.file.private else ""
            lines += [f"{mode}cat > {shlex.quote(step.file.path)} <<'END'", step.file.shown.rstrip("\n"), "END"]
        else:
            lines += [_command_text(step.command)]
    return "\n".join([*lines, ""])


def _title(launch: Launch) -> str:
    target = launch.target
    return (
        f"# {launch.name}: {target.slices} slice(s) of {target.chip.name} {launch.topology}, {target.num_chips} chips, "
        f"{launch.num_hosts} hosts of {launch.chips_per_host} chips, one process a host"
    )


def _command_text(command: Sequence[str]) -> str:
    """A command over several lines, an option a line."""
    lines = [""]
    for word in command:
        lines += [""] if word.startswith("--") else []
        lines[-1] += f" {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    short = sum(map(len, lines)) < 100 or any("\n" in word for word in command)
    return (" " if short else " \\\n    ").join(lines)


def _match(pattern: re.Pattern[str], text: str, option: str, remedy: str) -> None:
    if not pattern.fullmatch(text):
        raise LaunchError(f"{option}={text!r} is malformed: {remedy}")


def _check_variables(env: Mapping[str, str]) -> None:
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name):
            raise LaunchError(f"--env: {name!r} is no name of a variable: letters, digits and _")
        if _PLATFORM.fullmatch(name):
            raise LaunchError(f"--env: {name} is set by the platform, for each host in its own way: leave it out")
        if "\n" in value:
            raise LaunchError(
                f"--env: the value of {name} goes over several lines: put it into a file, and its path here"
            )


def _shown(name: str, value: str) -> str:
    return "(not shown)" if _SECRET.search(name) else value
