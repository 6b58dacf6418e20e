"""What the files for containers promise: one version each, no root, no port open to others, one cluster twice."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from disagg_ray.config.load import load_config

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
CLUSTER, JOB = (
    yaml.safe_load((DOCKER / "kuberay" / f"{name}.yaml").read_text())["spec"] for name in ("raycluster", "rayjob")
)
STAGES = {"encoder", "transformer", "decoder"}


def pods() -> list[dict]:
    templates = [CLUSTER["headGroupSpec"]["template"], *(group["template"] for group in CLUSTER["workerGroupSpecs"])]
    return [template["spec"] for template in templates]


def files() -> list[Path]:
    return sorted(path for path in DOCKER.rglob("*") if path.suffix in {".yaml", ".yml", ".json"})


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(DOCKER)))
def test_file_parses(path: Path) -> None:
    parse = json.loads if path.suffix == ".json" else lambda text: list(yaml.safe_load_all(text))
    assert parse(path.read_text())


def test_images_install_the_versions_that_the_tests_passed_with() -> None:
    installs = re.findall(r"pip install (.+)", DOCKERFILE)
    assert len(installs) == 2
    assert all("-c constraints.txt" in install for install in installs)
    extras = set(re.findall(r"'\.\[(\w+),serve\]'", DOCKERFILE))
    wheels = {re.match(r"[\w-]+", line)[0] for extra in extras for line in PROJECT["optional-dependencies"][extra]}
    assert len(wheels) == 2
    assert all(re.search(rf"^{wheel}==", CONSTRAINTS, re.MULTILINE) for wheel in wheels)


def test_every_image_names_its_version() -> None:
    bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) - set(re.findall(r"AS (\S+)", DOCKERFILE))
    images = bases | {service["image"] for service in COMPOSE.values()}
    assert [image for image in images if not re.search(r":[\w.${}:-]+$", image) or image.endswith("latest")] == []


def test_manifests_name_the_ray_that_is_installed() -> None:
    pinned = re.search(r"^ray==(.+)$", CONSTRAINTS, re.MULTILINE)
    assert pinned and CLUSTER["rayVersion"] == pinned[1]


def test_images_do_not_run_as_root() -> None:
    finals = [stage for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE) if "CMD" in stage]
    assert [stage.split()[2] for stage in finals] == ["cuda", "cpu"]
    assert all(re.search(r"^USER 1000$", stage, re.MULTILINE) for stage in finals)


def test_pods_do_not_run_as_root() -> None:
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods())
    assert all(not c["securityContext"]["allowPrivilegeEscalation"] for pod in pods() for c in pod["containers"])


def test_images_and_setup_install_what_mooncake_links_to() -> None:
    setup = (ROOT / ".ci" / "setup").read_text()
    for package in ("libcurl4", "libibverbs1", "libnuma1"):
        assert package in DOCKERFILE and package in setup


def test_compose_publishes_ports_on_loopback_only() -> None:
    published = [port for service in COMPOSE.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert all("network_mode" not in service for service in COMPOSE.values())


def test_every_node_of_compose_wants_a_token() -> None:
    nodes = {name: service for name, service in COMPOSE.items() if "ray start" in service.get("command", "")}
    assert nodes.keys() == {"head", *STAGES}
    for service in nodes.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["secrets"] == ["ray_token"]


def test_no_service_of_compose_has_privileges() -> None:
    assert all(service["cap_drop"] == ["ALL"] and "privileged" not in service for service in COMPOSE.values())


def test_mounted_files_exist() -> None:
    sources = [mount.split(":")[0] for service in COMPOSE.values() for mount in service.get("volumes", [])]
    assert [source for source in sources if source.startswith(".") and not (DOCKER / source).is_dir()] == []
    copied = re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE, re.MULTILINE)
    assert [name for names in copied for name in names.split() if not (ROOT / name).exists()] == []
    kept = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert [name for names in copied for name in names.split() if f"!{name}" not in kept] == []


def test_stages_ask_for_the_labels_that_nodes_carry() -> None:
    wanted = load_config(DOCKER / "tiny_t2v.yaml").stages
    assert {name: stage.label_selector for name, stage in wanted.items()} == {name: {"stage": name} for name in STAGES}
    assert {name for name in STAGES if f"--labels=stage={name} " in COMPOSE[name]["command"]} == STAGES
    assert {group["groupName"]: group["labels"] for group in CLUSTER["workerGroupSpecs"]} == {
        name: {"stage": name} for name in STAGES
    }


def test_job_brings_up_the_same_cluster() -> None:
    assert JOB["rayClusterSpec"] == CLUSTER
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_job_configuration_is_possible_and_fits_the_cluster() -> None:
    command, *arguments = JOB["entrypoint"].split()
    config = ROOT / arguments[arguments.index("--config") + 1].removeprefix("/opt/disagg_ray/")
    overrides = [argument for argument in arguments if re.match(r"(stages\.\w+\.[\w.]+|share_gpu)=", argument)]
    stages = load_config(config, *overrides).stages
    assert command in PROJECT["scripts"]
    assert {name: (stage.replicas, stage.label_selector, stage.num_gpus) for name, stage in stages.items()} == {
        group["groupName"]: (group["replicas"], group["labels"], 1) for group in CLUSTER["workerGroupSpecs"]
    }


def test_others_reach_only_ports_that_want_a_token_or_a_key_and_prometheus_the_metrics() -> None:
    documents = list(yaml.safe_load_all((DOCKER / "kuberay" / "shared.yaml").read_text()))
    (policy,) = (document["spec"] for document in documents if document["kind"] == "NetworkPolicy")
    labels = policy["podSelector"]["matchLabels"].items()
    templates = [CLUSTER["headGroupSpec"]["template"], *(group["template"] for group in CLUSTER["workerGroupSpecs"])]
    assert all(labels <= template["metadata"]["labels"].items() for template in templates)
    open_to_all = [port["port"] for rule in policy["ingress"] if "from" not in rule for port in rule["ports"]]
    assert open_to_all == [8265, 8000]
    (metrics,) = (rule for rule in policy["ingress"] if "from" in rule and "ports" in rule)
    assert metrics["ports"] == [{"port": 8080}]
