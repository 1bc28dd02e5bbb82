"""Ray and KubeRay take the cluster files, which fit each other; `cluster.yaml` has test_cluster.py."""

import json
import os
import re
import subprocess
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests.test_cluster import ROOT, Tree, elsewhere

FOLDER = ROOT / "docs" / "cluster"
SCHEMAS = json.loads((ROOT / "tests" / "kuberay" / "schemas.json").read_text(encoding="utf-8"))
"""Schemas of KubeRay v1.7.0, as its `$comment` says."""


def documents(name: str) -> list[Tree]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def one(name: str) -> Tree:
    (only,) = documents(name)
    return only


def faults(manifest: Tree) -> list[str]:
    """Return what the CRD of a manifest's kind does not allow."""
    schema = SCHEMAS["kinds"][manifest["kind"]] | {"$defs": SCHEMAS["$defs"]}
    return [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    ]


def pod_faults(template: Tree) -> list[str]:
    """Return what the CRD does not allow in a pod's template; it has the whole type of Kubernetes."""
    cluster = one("raycluster.yaml")
    cluster["spec"]["headGroupSpec"]["template"] = template
    return faults(cluster)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_takes_it(name: str) -> None:
    assert faults(one(name)) == []


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("raycluster.yaml", ["spec", "authOptions", "mode"], "tokens"),
        ("raycluster.yaml", ["spec", "authOption"], {}),
        ("raycluster.yaml", ["spec", "workerGroupSpecs", 0, "maxReplica"], 3),
        ("raycluster.yaml", ["spec", "workerGroupSpecs", 0, "labels"], {"tier": 1}),
        ("raycluster.yaml", ["spec", "headGroupSpec", "template", "spec", "containers", 0, "imag"], "x"),
        ("rayjob.yaml", ["spec", "entrypoints"], "true"),
        ("rayjob.yaml", ["spec", "backoffLimit"], "none"),
    ],
)
def test_the_schema_of_kuberay_refuses_a_wrong_one(name: str, path: list[Any], value: Any) -> None:
    manifest = deepcopy(one(name))
    inner: Any = manifest
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    assert faults(manifest)


def test_pods_of_the_services_are_pods() -> None:
    kinds = {document["kind"]: document for document in documents("services.yaml")}
    assert set(kinds) == {"PersistentVolumeClaim", "Service", "StatefulSet", "Deployment"}
    for kind in ("StatefulSet", "Deployment"):
        template = deepcopy(kinds[kind]["spec"]["template"])
        assert pod_faults(template) == []
        template["spec"]["containers"][0]["imag"] = "x"
        assert pod_faults(template)


def test_the_manifests_fit_each_other() -> None:
    cluster, job, services = one("raycluster.yaml"), one("rayjob.yaml"), documents("services.yaml")
    named = {(document["kind"], document["metadata"]["name"]) for document in services}
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    texts = {name: (FOLDER / name).read_text(encoding="utf-8") for name in os.listdir(FOLDER)}
    pods = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        (volume,) = spec["volumes"]
        assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in named
        env = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]}
        assert env["MLFLOW_TRACKING_URI"] == "http://mlflow:5000" and ("Service", "mlflow") in named
        assert env["MLFLOW_TRACKING_URI"] in job["spec"]["entrypoint"]
    labels = [tuple(sorted(pod["labels"].items())) for pod in pods]
    assert len(set(labels)) == len(pods), "a label selector can tell all groups apart"
    for secret in (cluster["spec"]["authOptions"]["secretName"], "fedray-postgres"):
        assert f"kubectl create secret generic {secret} " in texts["README.md"]
    images = {image for text in texts.values() for image in re.findall(r"REGISTRY/[\w:.-]+", text)}
    assert len(images) == 1


def test_versions_are_those_of_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    match = re.search(r"^ray(?:\[[^]]*\])?==(\S+)", lock, flags=re.M)
    assert match is not None
    assert one("raycluster.yaml")["spec"]["rayVersion"] == match[1]
    image = re.search(r"^FROM (\S+)", (FOLDER / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    assert image is not None and image[1].startswith(f"rayproject/ray:{match[1]}-py311")


def test_no_secret_is_in_a_file() -> None:
    for file in [*FOLDER.iterdir(), ROOT / "cluster.yaml", ROOT / "cluster-local.yaml"]:
        text = file.read_text(encoding="utf-8")
        assert "stringData" not in text and "kind: Secret" not in text
        assert re.findall(r"://\w+:(?!\$\()[^@/\s]+@", text) == [], "a password in an address"


def test_the_sweep_of_the_job_is_one_that_fedray_takes() -> None:
    import shlex

    from fedray.sweeps.space import Sweep

    command, verb, file, *overrides = shlex.split(one("rayjob.yaml")["spec"]["entrypoint"])
    assert (command, verb) == ("fedray", "sweep")
    local = ROOT / Path(file).relative_to("/home/ray/fedray")
    plan = Sweep.load(local, [o for o in overrides if not o.startswith("storage=")])
    assert plan.configs[0].clients.resources.labels == {"tier": "cpu"}


# ── your own machines


def test_ray_takes_the_file_of_ones_own_machines_and_refuses_a_wrong_one() -> None:
    tree: Tree = yaml.safe_load((ROOT / "cluster-local.yaml").read_text(encoding="utf-8"))
    other_key, no_head = deepcopy(tree), deepcopy(tree)
    other_key["idle_timeout"] = 5
    del no_head["provider"]["head_ip"]
    filled, *refused = elsewhere("read_as_ray_up()", os.environ, [tree, other_key, no_head])
    assert isinstance(filled, dict), filled
    assert filled["max_workers"] == len(tree["provider"]["worker_ips"]) == tree["min_workers"]
    assert "'idle_timeout' was unexpected" in refused[0]
    assert isinstance(refused[1], str) and "head_ip" in refused[1]


def test_commands_of_ones_own_machines_are_ones_that_a_shell_can_read() -> None:
    tree: Tree = yaml.safe_load((ROOT / "cluster-local.yaml").read_text(encoding="utf-8"))
    commands = [c for section, value in tree.items() if section.endswith("_commands") for c in value]
    assert len(commands) >= 7
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "RAY_AUTH_MODE=token" in "".join(tree["setup_commands"])
