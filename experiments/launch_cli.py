"""The command `compax launch`: from its arguments to the steps of `compax.tpu.launch`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compax.errors import LaunchError

if TYPE_CHECKING:
    from compax.experiments.console import Console

LAUNCH_HELP = """\
Runs `compax train --config=FILE` on every host of the slices, or the command after --:

  compax launch --topology=v5e:16x16 --zone=us-west4-a --name=big --storage=gs://BUCKET/runs --config=plan_1b --dry-run
  compax launch --on=gke --cluster=tpus --image=IMAGE --topology=v6e:16x16 --slices=2 --spot --restarts=9 ...

It needs gcloud (and kubectl for GKE). With --dry-run it needs nothing: all commands and files are printed, as a shell
script with the reason of each. The bucket of --storage is mounted on every host as /mnt/compax; the run directory is
/mnt/compax/NAME unless the config is given another."""


def add_launch(parser: argparse.ArgumentParser, config_help: str) -> None:
    """Adds the arguments."""
    parser.add_argument("--config", metavar="FILE", help=config_help)
    parser.add_argument("--topology", metavar="SLICE", required=True, help="such as v5e:16x16, v5p:4x4x8")
    parser.add_argument("--slices", metavar="N", type=int, default=1, help="slices, over the data centre's network")
    parser.add_argument("--name", metavar="NAME", required=True, help="of the machines and the run, such as my-run")
    parser.add_argument("--zone", metavar="ZONE", required=True, help="such as us-east5-a")
    parser.add_argument("--project", metavar="PROJECT", default="", help="by default gcloud's")
    parser.add_argument("--on", choices=("queued", "gke"), default="queued", help="Cloud TPU's machines, or GKE")
    parser.add_argument("--spot", action="store_true", help="cheap machines that may be taken away")
    parser.add_argument("--restarts", metavar="N", type=int, default=0, help="start again after a loss, N times")
    parser.add_argument("--storage", metavar="gs://BUCKET/FOLDER", default="", help="where run directories lie")
    parser.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help="for the command; repeatable")
    parser.add_argument("--code", metavar="FOLDER", default=".", help="what is uploaded and installed (default: here)")
    parser.add_argument("--runtime", metavar="IMAGE", default="", help="of the TPU's machines, unless the usual one")
    parser.add_argument("--cluster", metavar="NAME", default="", help="of GKE")
    parser.add_argument("--image", metavar="IMAGE", default="", help="the container, for GKE")
    parser.add_argument("--build", action="store_true", help="build that container from --code and push it")
    parser.add_argument("--reuse", action="store_true", help="the machines are there from before: do not ask for them")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print everything, do nothing")
    what.add_argument("--delete", action="store_true", help="give the machines back, do nothing else")


def launch(args: argparse.Namespace, console: Console) -> int:
    """Prints the steps, or runs them.

    Raises:
        LaunchError: something is malformed, a tool is missing, or a step failed.
    """
    from compax.tpu import launch as launches
    from compax.tpu import launch_gke, launch_queued, launch_run

    made = launches.Launch(
        name=args.name,
        target=launches.parse_target(args.topology, args.slices),
        command=_command(args),
        env=launches.parse_variables(args.env),
        **{name: getattr(args, name) for name in
           ("zone", "project", "spot", "restarts", "storage", "code", "runtime", "cluster", "image", "build")},
    )  # fmt: skip
    on = launch_gke if args.on == "gke" else launch_queued
    steps = on.steps(made)
    if args.dry_run:
        console.say(launches.script(made, steps, on.notes(made)))
        return 0
    launch_run.check_tools(steps)
    if args.delete:
        launch_run.delete(steps, console.say)
        return 0
    for note in on.notes(made):
        console.say(f"note: {note}")
    launch_run.run(made, steps, console.say, reuse=args.reuse)
    return 0


def _command(args: argparse.Namespace) -> tuple[str, ...]:
    """What runs on every host."""
    from compax.tpu.launch import MOUNT

    if args.after:
        if args.config or args.overrides:
            raise LaunchError("give either --config=FILE or a command after --")
        return tuple(args.after)
    if not args.config:
        raise LaunchError("there is nothing to run: give --config=FILE, or a command after --")
    overrides = dict(args.overrides)
    if args.storage:
        overrides.setdefault("directory", f"{MOUNT}/{args.name}")
    return (
        "compax",
        "train",
        f"--config={args.config}",
        "--distributed",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
    )
