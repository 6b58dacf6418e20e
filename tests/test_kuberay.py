"""The manifests for KubeRay: their fields exist, and the pods get what a stage on Kubernetes needs.

KUBERAY_CRDS=FOLDER names the CRDs of KubeRay's release (ray-operator/config/crd/bases there); without it, only our own
schema of the fields that we use is held against them.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from schemas import closed, errors

DOCKER = Path(__file__).parent.parent / "docker"
FILES = sorted((DOCKER / "kuberay").glob("*.yaml"))
DOCUMENTS = {each["kind"]: each for path in FILES for each in yaml.safe_load_all(path.read_text())}
RAY = [kind for kind in DOCUMENTS if kind.startswith("Ray")]
CLUSTER = DOCUMENTS["RayCluster"]["spec"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
PODS = [group["template"]["spec"] for group in GROUPS]
SCHEMA = Path(__file__).with_name("kuberay.yaml")
CRDS = os.environ.get("KUBERAY_CRDS")


def crd(kind: str) -> dict[str, Any]:
    (path,) = Path(CRDS or "").glob(f"*{kind.lower()}s.yaml")
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}  # which Kubernetes itself checks
    return schema


def misspelt(document: Any) -> Iterator[Any]:
    """Yield the document once for each mapping in it with a field more, those of free keys left out."""

    def walk(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(node, dict):
            if path and path[-1] not in FREE:
                yield path
            for key, each in node.items():
                yield from walk(each, (*path, key))
        elif isinstance(node, list):
            for index, each in enumerate(node):
                yield from walk(each, (*path, index))

    for path in walk(document, ()):
        wrong = copy.deepcopy(document)
        node = wrong
        for key in path:
            node = node[key]
        node["nosuchfield"] = {}
        yield wrong


FREE = {"labels", "matchLabels", "rayStartParams", "nodeSelector", "requests", "limits"}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_manifest_has_only_fields_that_exist(kind: str) -> None:
    assert errors(SCHEMA, kind, DOCUMENTS[kind]) == []


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_misspelt_field_is_found_wherever_it_is(kind: str) -> None:
    wrong = list(misspelt(DOCUMENTS[kind]))
    assert len(wrong) > 2
    assert all(any("nosuchfield" in error for error in errors(SCHEMA, kind, each)) for each in wrong)


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS names no folder of KubeRay's CRDs")
@pytest.mark.parametrize("kind", RAY)
def test_manifest_is_valid_by_the_release_s_crd(kind: str) -> None:
    validator = Draft202012Validator(closed(crd(kind)))
    assert [f"{each.json_path}: {each.message}" for each in validator.iter_errors(DOCUMENTS[kind])] == []
    wrong = (each for each in misspelt(DOCUMENTS[kind]) if "nosuchfield" not in each["metadata"])
    assert not any(validator.is_valid(each) for each in wrong)


def test_every_pod_has_requests_limits_and_a_memory_of_its_own_at_dev_shm() -> None:
    for group, pod in zip(GROUPS, PODS, strict=True):
        (container,) = pod["containers"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == "/dev/shm")
        (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
        assert int(group["rayStartParams"]["object-store-memory"]) < 2**30


def test_every_pod_is_looked_after_and_stops_in_peace() -> None:
    for pod in PODS:
        (container,) = pod["containers"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}  # wants no token
        stop = container["lifecycle"]["preStop"]["exec"]["command"]
        assert stop[:2] == ["ray", "stop"] and int(stop[-1]) < pod["terminationGracePeriodSeconds"]
    assert PODS[0]["containers"][0]["readinessProbe"]["httpGet"]["port"] == 52365
    # A worker's is KubeRay's: in a RayService it is false where no proxy runs, which keeps the pod out of the Service.
    assert all("readinessProbe" not in pod["containers"][0] for pod in PODS[1:])


def test_workers_choose_their_nodes_and_the_head_has_the_port_of_the_service() -> None:
    assert all(pod["nodeSelector"] and pod["tolerations"] for pod in PODS[1:])
    ports = {port["name"]: port["containerPort"] for port in PODS[0]["containers"][0]["ports"]}
    serve = yaml.safe_load(DOCUMENTS["RayService"]["spec"]["serveConfigV2"])
    assert ports["serve"] == serve["http_options"]["port"]
