"""`cluster/`: launcher files by Ray's validator, Kubernetes ones by KubeRay's definitions, and all their promises."""

import os
import re
import shutil
import subprocess
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
DEFINITIONS = Path(os.environ.get("CRAFTOR_SHARED_DATA", ROOT.parent / "shared" / "data")) / "kuberay"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", ["aws.yaml", "on_premise.yaml"])
def test_ray_accepts_launcher_files(name: str) -> None:
    prepared = prepare_config(read(name))
    validate_config(prepared)
    assert prepared["docker"]["image"] == "craftor:gpu"
    starts = prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]
    assert any("--head" in command for command in starts) and any("$RAY_HEAD_IP" in command for command in starts)
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in prepared["file_mounts"]


def test_ray_refuses_a_launcher_file_with_a_misspelt_key() -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**read("aws.yaml"), "max_worker": 3}))


def manifests() -> list[Path]:
    found = [path for path in sorted(CLUSTER.glob("*.yaml")) if "ray.io/" in path.read_text()]
    assert {path.name for path in found} >= {"raycluster.yaml", "rayjob.yaml"}
    return found


def schema_of(kind: str) -> dict[str, Any]:
    path = DEFINITIONS / f"ray.io_{KINDS[kind]}.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's resource definitions are not at {path}")
    versions = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    return closed(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema as JSON Schema has it: unknown fields, which an API server would drop, are errors."""
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        schema["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    return schema


def validate(manifest: dict[str, Any]) -> None:
    schema = schema_of(manifest["kind"])
    # A custom resource's definition leaves metadata to the API server.
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("path", manifests(), ids=lambda path: path.name)
def test_kuberay_accepts_manifests(path: Path) -> None:
    for manifest in filter(None, yaml.safe_load_all(path.read_text())):
        if manifest["apiVersion"].startswith("ray.io/"):
            validate(manifest)


def test_a_manifest_with_a_misspelt_field_or_a_wrong_type_is_refused() -> None:
    manifest = read("raycluster.yaml")
    wrong = deepcopy(manifest)
    wrong["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        validate(wrong)
    wrong = deepcopy(manifest)
    wrong["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "three"
    with pytest.raises(jsonschema.ValidationError, match="three"):
        validate(wrong)


def test_clusters_want_a_token_scale_and_have_cheap_nodes() -> None:
    cluster, job, service = (read(f"{name}.yaml")["spec"] for name in ("raycluster", "rayjob", "rayservice"))
    for spec in (cluster, job["rayClusterSpec"], service["rayClusterConfig"]):
        assert spec["authOptions"] == {"mode": "token"}, "without, the image's `ray start` refuses to start"
    assert cluster["enableInTreeAutoscaling"]
    gpus = {
        group["groupName"]: int(
            group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        )
        for group in cluster["workerGroupSpecs"]
    }
    assert gpus == {"trainer": 8, "inference": 1}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in cluster["workerGroupSpecs"])


def test_every_file_names_the_ray_that_is_tested() -> None:
    assert version("ray") == CONSTRAINTS["ray"]
    found = re.findall(r'rayVersion: "(.+)"', "".join(path.read_text() for path in manifests()))
    assert found and set(found) == {CONSTRAINTS["ray"]}


def test_the_image_is_pinned_and_not_run_as_root() -> None:
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    stages = {stage.split("\n")[0].split()[-1]: stage for stage in text.split("\nFROM ")[1:]}
    assert stages.keys() == {"base", "cpu", "gpu"}
    for name in ("cpu", "gpu"):
        assert "--constraint constraints.txt" in stages[name]
        assert re.findall(r"^USER (.+)$", stages[name], re.M) == ["ray"]
    for copied in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / path).exists() for path in copied.split())


def test_compose_has_every_service_with_a_health_check_and_no_secret() -> None:
    compose = read("compose.yaml")
    services = compose["services"]
    assert services.keys() >= {"head", "worker", "mlflow", "database", "store"}
    for name in ("head", "worker", "mlflow", "database", "store"):
        assert services[name]["healthcheck"]["test"], name
    for name, service in services.items():
        assert service["depends_on"].keys() <= services.keys() if "depends_on" in service else name
        for key, value in service.get("environment", {}).items():
            if re.search("TOKEN|PASSWORD|SECRET|ACCESS_KEY", key):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?.+\}", value), f"{name}: {key} must be required, without a default"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
    assert compose["volumes"].keys() == {"database", "store"}


def test_docker_accepts_compose() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed here")
    command = ["docker", "compose", "-f", str(CLUSTER / "compose.yaml"), "config", "--quiet"]
    bare = {"PATH": os.environ["PATH"]}
    missing = subprocess.run(command, env=bare, capture_output=True, text=True)
    assert missing.returncode and "required variable" in missing.stderr
    secrets = {name: "x" for name in ("RAY_AUTH_TOKEN", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "POSTGRES_PASSWORD")}
    subprocess.run(command, env=bare | secrets, check=True)
