"""Launching on Google Kubernetes Engine: a node pool a slice, and a JobSet over them.

Google Cloud, "Deploy TPU Multislices in GKE", "Plan TPUs in GKE", "Mount Cloud Storage buckets with the CSI driver",
and the JobSet API (jobset.x-k8s.io/v1alpha2), 2025-2026.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compax.errors import LaunchError
from compax.tpu.launch import MOUNT, File, Launch, Step, check_code, wrapped

# The label of nodes, and the machine by chips a host.
_NODES: Mapping[str, tuple[str, str]] = {
    "v4": ("tpu-v4-podslice", "ct4p-hightpu-{}t"),
    "v5e": ("tpu-v5-lite-podslice", "ct5lp-hightpu-{}t"),
    "v5p": ("tpu-v5p-slice", "ct5p-hightpu-{}t"),
    "v6e": ("tpu-v6e-slice", "ct6e-standard-{}t"),
}
_JOBSET = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1/manifests.yaml"
_SPOT = "cloud.google.com/gke-spot"


def notes(launch: Launch) -> list[str]:
    """What a person should know before the first step."""
    several = launch.target.slices > 1
    found = [
        "set by whom: GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES"
        + (", and MEGASCALE_* because it is a JobSet of several replicas" if several else "")
        + ", in every pod that asks for google.com/tpu; JAX finds its peers by them",
    ]
    if several:
        found.append(
            "several slices: one replica of the job a slice, each on a node pool of its own (exclusive-topology); "
            f"give the axis between them first, as in shard(dcn_data={launch.target.slices}, fsdp=-1)"
        )
    if launch.spot:
        found.append("spot: nodes may be taken away; GKE makes new ones, and the JobSet starts all pods again")
    found.append(
        f"after a loss or a failure: JobSet starts all pods again, up to {launch.restarts} time(s) (maxRestarts); the "
        "run goes on from its last checkpoint"
    )
    return found


def steps(launch: Launch) -> list[Step]:
    """The steps.

    Raises:
        LaunchError: an option is missing, or not known for the chip.
    """
    if launch.target.chip.name not in _NODES:
        raise LaunchError(f"{launch.target}: the nodes of {launch.target.chip.name} are not known; those of "
                          f"{', '.join(_NODES)} are")  # fmt: skip
    if not launch.cluster:
        raise LaunchError("--on=gke needs --cluster=NAME, a cluster that exists")
    if not launch.image:
        raise LaunchError("--on=gke needs --image=IMAGE, a container with the code; --build makes it from --code")
    if launch.runtime:
        raise LaunchError("--runtime is of Cloud TPU's own machines: leave it out with --on=gke")
    region = launch.zone.rpartition("-")[0]
    project = (f"--project={launch.project}",) if launch.project else ()
    manifest, variables = f"/tmp/{launch.name}.yaml", f"/tmp/{launch.name}.env"
    found = [
        Step("create", "let kubectl talk to the cluster",
             ("gcloud", "container", "clusters", "get-credentials", launch.cluster, f"--location={region}", *project)),
    ]  # fmt: skip
    found += [Step("create", f"slice {number}: a node pool of {launch.hosts_per_slice} host(s) on one piece of torus",
                   _pool(launch, number, region, project)) for number in range(launch.target.slices)]  # fmt: skip
    found.append(Step("create", "the controller of JobSets, unless the cluster has it",
                      ("kubectl", "apply", "--server-side", "-f", _JOBSET)))  # fmt: skip
    if launch.build:
        recipe = f"/tmp/{launch.name}.Dockerfile"
        code = str(check_code(launch.code))
        found += [
            Step("prepare", "a container with the code and the TPU's libraries",
                 file=File(recipe, _RECIPE, _RECIPE)),
            Step("prepare", "build it", ("docker", "build", "-t", launch.image, "-f", recipe, code)),
            Step("prepare", "and bring it where the nodes find it", ("docker", "push", launch.image)),
        ]  # fmt: skip
    if launch.env:
        apply = (
            f"kubectl create secret generic {launch.name}-env --from-env-file={variables} --dry-run=client -o yaml "
            "| kubectl apply -f -"
        )
        found += [
            Step("prepare", "the variables of the command, for their owner alone",
                 file=File(variables, launch.variables, launch.shown_variables, private=True)),
            Step("prepare", "bring them to the cluster as a Secret", ("sh", "-c", apply)),
        ]  # fmt: skip
    text = "".join(f"{line}\n" for line in yaml(jobset(launch)))
    select = f"jobset.sigs.k8s.io/jobset-name={launch.name}"
    found += [
        Step("run", "the job: every host of every slice runs the command", file=File(manifest, text, text)),
        Step("run", "start it", ("kubectl", "apply", "-f", manifest)),
        Step("run", "wait for its end: 0 if it completed, 1 if it failed after its restarts",
             ("sh", "-c", _wait(launch))),
        Step("look", "the pods, and the nodes that they are on",
             ("kubectl", "get", "pods", "-l", select, "-o", "wide")),
        Step("look", "the logs of all hosts",
             ("kubectl", "logs", "-f", "-l", select, "--prefix", f"--max-log-requests={launch.num_hosts}")),
        Step("look", "why it was started again", ("kubectl", "describe", "jobset", launch.name)),
        Step("delete", "delete the job", ("kubectl", "delete", "jobset", launch.name, "--ignore-not-found")),
    ]  # fmt: skip
    found += [Step("delete", f"delete the nodes of slice {number}",
                   ("gcloud", "container", "node-pools", "delete", f"{launch.name}-{number}",
                    f"--cluster={launch.cluster}", f"--location={region}", *project, "--quiet"))
              for number in range(launch.target.slices)]  # fmt: skip
    return found


def jobset(launch: Launch) -> dict[str, Any]:
    """The manifest."""
    label, _ = _NODES[launch.target.chip.name]
    hosts = launch.hosts_per_slice
    container: dict[str, Any] = {
        "name": "compax",
        "image": launch.image,
        # The default port of the TPU's runtime, and that of its metrics.
        "ports": [{"containerPort": 8471}, {"containerPort": 8431}],
        "command": ["bash", "-c", wrapped(launch.command)],
        "resources": {kind: {"google.com/tpu": launch.chips_per_host} for kind in ("requests", "limits")},
    }
    if launch.env:
        container["envFrom"] = [{"secretRef": {"name": f"{launch.name}-env"}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # A checkpoint has to be written between the warning and the end.
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": launch.topology,
            **({_SPOT: "true"} if launch.spot else {}),
        },
        "containers": [container],
    }
    if launch.target.slices > 1:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if launch.spot:
        pod["tolerations"] = [{"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    metadata: dict[str, Any] = {}
    if launch.storage:
        bucket, _, folder = launch.storage.removeprefix("gs://").partition("/")
        options = "implicit-dirs" + (f",only-dir={folder.rstrip('/')}" if folder else "")
        metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        container["volumeMounts"] = [{"name": "runs", "mountPath": MOUNT}]
        driver = {"driver": "gcsfuse.csi.storage.gke.io",
                  "volumeAttributes": {"bucketName": bucket, "mountOptions": options}}  # fmt: skip
        pod["volumes"] = [{"name": "runs", "csi": driver}]
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one lost host ends the job, and the JobSet starts all of them again
        "template": {**({"metadata": metadata} if metadata else {}), "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": launch.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": launch.restarts},
            "replicatedJobs": [{"name": "slice", "replicas": launch.target.slices, "template": {"spec": job}}],
        },
    }


def yaml(value: Any, indent: int = 0) -> Iterator[str]:
    """A nest of dictionaries, lists and scalars as lines of YAML; texts are quoted as in JSON, which YAML contains."""
    space = "  " * indent
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _entry(f"{space}{key}:", item, indent + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            if isinstance(item, Mapping):
                lines = list(yaml(item, indent + 1))
                yield f"{space}- {lines[0].lstrip()}"
                yield from lines[1:]
            else:
                yield from _entry(f"{space}-", item, indent + 1)
    else:
        yield f"{space}{json.dumps(value)}"


def _entry(head: str, item: Any, indent: int) -> Iterator[str]:
    if isinstance(item, Mapping) or (isinstance(item, Sequence) and not isinstance(item, str)):
        yield head
        yield from yaml(item, indent)
    elif isinstance(item, str) and "\n" in item:
        yield f"{head} |-"
        yield from (f"{'  ' * indent}{line}" for line in item.split("\n"))
    else:
        yield f"{head} {json.dumps(item)}"


def _pool(launch: Launch, number: int, region: str, project: tuple[str, ...]) -> tuple[str, ...]:
    _, machine = _NODES[launch.target.chip.name]
    return (
        "gcloud",
        "container",
        "node-pools",
        "create",
        f"{launch.name}-{number}",
        f"--cluster={launch.cluster}",
        f"--location={region}",
        f"--node-locations={launch.zone}",
        *project,
        f"--machine-type={machine.format(launch.chips_per_host)}",
        f"--num-nodes={launch.hosts_per_slice}",
        *((f"--tpu-topology={launch.topology}",) if launch.hosts_per_slice > 1 else ()),
        *(("--scopes=https://www.googleapis.com/auth/cloud-platform",) if launch.storage else ()),
        *(("--spot",) if launch.spot else ()),
    )


def _wait(launch: Launch) -> str:
    path = "-o=jsonpath={.status.terminalState}"
    return "\n".join(
        (
            f"while state=$(kubectl get jobset {launch.name} {path}); do",
            "  case $state in Completed) exit 0;; Failed) exit 1;; esac",
            "  sleep 30",
            "done",
            "exit 1",
        )
    )


_RECIPE = """\
FROM python:3.12-slim
WORKDIR /code
COPY . .
RUN pip install --no-cache-dir '.[tpu]'
"""
