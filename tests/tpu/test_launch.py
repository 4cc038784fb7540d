"""What `compax launch` would do: complete, explained, without secrets; and what it does when something is lost."""

import dataclasses
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from compax.errors import LaunchError
from compax.experiments.cli import main
from compax.tpu import launch_gke, launch_queued, launch_run
from compax.tpu.launch import Launch, parse_target, parse_variables, script, wrapped

CODE = str(Path(__file__).parents[2])


def made(topology: str = "v5e:16x16", slices: int = 1, **changes) -> Launch:
    given = {
        "name": "run",
        "zone": "us-east5-a",
        "storage": "gs://bucket/runs",
        "code": CODE,
        "command": ("compax", "train"),
    }
    return Launch(target=parse_target(topology, slices), **{**given, **changes})


def gke(**changes) -> Launch:
    return made("v6e:16x16", 2, **{"cluster": "tpus", "image": "images/compax:1", **changes})


def text(launch: Launch) -> str:
    on = launch_gke if launch.cluster else launch_queued
    return script(launch, on.steps(launch), on.notes(launch))


@pytest.mark.parametrize(
    ("topology", "slices", "expected"),
    [
        (
            "v5e:16x16",
            1,
            ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=run"],
        ),
        ("v6e:16x16", 2, ["--accelerator-type=v6e-256", "--node-count=2", "--node-prefix=run", "MEGASCALE_*"]),
        ("v5p:4x4x8", 1, ["--type=v5p", "--topology=4x4x8", "--runtime-version=v2-alpha-tpuv5"]),
    ],
)
def test_queued_resources(topology, slices, expected):
    shown = text(made(topology, slices))
    assert all(
        part in shown for part in [*expected, "--worker=all", "--node=all", "gcsfuse", "delete run", "describe run"]
    )
    assert "--spot" not in shown
    assert "--spot" in text(made(topology, slices, spot=True))


def test_jobset_of_two_slices():
    launch = gke(spot=True, restarts=9)
    shown = text(launch)
    assert all(f"node-pools create run-{number}" in shown for number in range(2))
    assert "--machine-type=ct6e-standard-4t" in shown
    job = launch_gke.jobset(launch)
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 9
    (slices,) = job["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    hosts = slices["template"]["spec"]
    assert hosts["parallelism"] == hosts["completions"] == 64
    pod = hosts["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_every_step_says_why_in_one_line():
    for launch, on in ((made(), launch_queued), (gke(build=True, env={"A": "1"}), launch_gke)):
        for step in on.steps(launch):
            assert step.why
            assert "\n" not in step.why
            assert bool(step.command) != bool(step.file)


def test_no_secret_is_shown_or_put_on_a_command_line():
    env = parse_variables(["HF_TOKEN=hush", "STEPS=7"])
    for launch in (made(env=env), gke(env=env)):
        shown = text(launch)
        assert "hush" not in shown
        assert "STEPS=7" in shown
        on = launch_gke if launch.cluster else launch_queued
        steps = on.steps(launch)
        assert not any("hush" in word for step in steps for word in step.command)
        assert [step.file.private for step in steps if step.file and "hush" in step.file.text] == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Run_1"}, "--name='Run_1' is malformed"),
        ({"zone": "us-east5"}, "--zone='us-east5' is malformed"),
        ({"storage": "bucket"}, "--storage='bucket' is malformed"),
        ({"storage": ""}, "give --storage=gs://BUCKET/FOLDER"),
        ({"topology": "v5e:1x1", "storage": "", "restarts": 3}, "--restarts needs --storage"),
        ({"topology": "v5e:3x3"}, "v5e has no such slice"),
        ({"topology": "h100:8"}, "only slices of TPUs"),
        ({"topology": "v6e:4x4*2", "slices": 3}, "give one of them"),
        ({"env": {"TPU_WORKER_ID": "0"}}, "set by the platform"),
        ({"env": {"A": "1\n2"}}, "goes over several lines"),
        ({"command": ()}, "nothing to run"),
    ],
)
def test_bad_requests(changes, message):
    with pytest.raises(LaunchError, match=message.replace("(", r"\(")):
        made(**changes)


def test_what_one_platform_does_not_have():
    with pytest.raises(LaunchError, match="use --on=gke"):
        launch_queued.steps(made("tpu7x:4x4x4"))
    with pytest.raises(LaunchError, match="--image is of GKE"):
        launch_queued.steps(made(image="a:1"))
    with pytest.raises(LaunchError, match="needs --cluster"):
        launch_gke.steps(made())
    with pytest.raises(LaunchError, match=r"no pyproject\.toml"):
        launch_queued.steps(made(code="/"))


class Cloud:
    """Answers commands: the run fails so often, and the machines are then in that state."""

    def __init__(self, failures: int, state: str):
        self.failures, self.state, self.seen = failures, state, []

    def __call__(self, command):
        kind = next(
            (word for word in ("create", "scp", "delete", "-install.sh", "-run.sh") if word in " ".join(command)), ""
        )
        self.seen.append(kind)
        failed = kind == "-run.sh" and self.seen.count("-run.sh") <= self.failures
        return SimpleNamespace(returncode=int(failed), stdout=self.state)


def run(launch: Launch, cloud: Cloud, tmp_path) -> list[str]:
    steps = [
        step if step.file is None else dataclasses.replace(
            step, file=dataclasses.replace(step.file, path=str(tmp_path / step.file.path.rpartition("/")[2]))
        )
        for step in launch_queued.steps(launch)
    ]  # fmt: skip
    told: list[str] = []
    launch_run.run(launch, steps, told.append, cloud)
    return told


def test_machines_that_were_taken_away_are_asked_for_anew(tmp_path):
    cloud = Cloud(1, "SUSPENDED")
    run(made(restarts=2, env={"A_TOKEN": "hush"}), cloud, tmp_path)
    assert cloud.seen.count("create") == 2
    assert cloud.seen.count("delete") == 1
    assert (tmp_path / "run.env").stat().st_mode & 0o077 == 0


def test_a_failed_command_is_started_again_on_the_same_machines(tmp_path):
    cloud = Cloud(2, "ACTIVE")
    run(made(restarts=2), cloud, tmp_path)
    assert cloud.seen.count("create") == 1
    assert cloud.seen.count("-run.sh") == 3


def test_restarts_are_used_up(tmp_path):
    with pytest.raises(LaunchError, match=r"restart.* used up"):
        run(made(restarts=1), Cloud(5, "ACTIVE"), tmp_path)


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match=r"gcloud not found .* With --dry-run"):
        launch_run.check_tools(launch_queued.steps(made()))


def test_a_stopped_command_does_not_look_finished():
    process = subprocess.Popen(["bash", "-c", wrapped(["bash", "-c", "trap 'exit 0' TERM; echo on; sleep 20 & wait"])],
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == b"on\n"
    process.terminate()
    assert process.wait(10) == 143
    process.stdout.close()
    assert subprocess.run(["bash", "-c", wrapped(["bash", "-c", "exit 7"])], check=False).returncode == 7


def test_the_command_line(capsys):
    arguments = [
        "launch",
        "--topology=v5e:16x16",
        "--zone=us-west4-a",
        "--name=big",
        "--storage=gs://bucket",
        f"--code={CODE}",
    ]
    assert main([*arguments, "--dry-run", "--config=plan_1b", "--config.steps=5"]) == 0
    shown = capsys.readouterr().out
    assert "compax train --config=plan_1b --distributed --config.steps=5 --config.directory=/mnt/compax/big" in shown
    assert main([*arguments, "--dry-run", "--", "python", "a.py", "--config.x=1"]) == 0
    assert "python a.py --config.x=1 &" in capsys.readouterr().out
    assert main([*arguments, "--dry-run"]) == 2
    assert "nothing to run" in capsys.readouterr().err
