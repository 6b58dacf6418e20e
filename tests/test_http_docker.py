"""What the files that deploy an HTTP service on a cluster promise."""

from pathlib import Path

import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from disagg_ray.config.load import load_config
from disagg_ray.http.settings import KEYS

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
STAGES = ("encoder", "transformer", "decoder")


def test_an_http_service_on_kuberay_is_of_the_same_cluster_and_possible() -> None:
    service = yaml.safe_load((DOCKER / "kuberay" / "rayservice.yaml").read_text())["spec"]
    cluster = yaml.safe_load((DOCKER / "kuberay" / "raycluster.yaml").read_text())
    assert service["rayClusterConfig"] == cluster["spec"]
    serve = yaml.safe_load((DOCKER / "serve.yaml").read_text())
    for deployed in (yaml.safe_load(service["serveConfigV2"]), serve):
        (application,) = ServeDeploySchema.model_validate(deployed).applications
        assert callable(import_attr(application.import_path))
        keys = set(application.args) - {"connect", "config", "name", "overrides"}
        assert keys <= set(KEYS)
    args = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]
    stages = load_config(ROOT / args["config"].removeprefix("/opt/disagg_ray/"), *args["overrides"]).stages
    assert {name: stage.label_selector for name, stage in stages.items()} == {name: {"stage": name} for name in STAGES}
