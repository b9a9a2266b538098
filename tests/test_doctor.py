"""`craftor doctor`: a healthy machine passes; each fault is found by name, with its remedy."""

import shutil
from pathlib import Path

import pytest

from craftor.cluster import alive_nodes
from craftor.console import findings_table
from craftor.doctor import attention, examine, gpus, home_finding, precision, token, validation, versions, weights
from craftor.node_report import kernels
from craftor.recipe import Validation, load

REPORT = {
    "versions": {"craftor": "0.1", "python": "3.11", "ray": "2.60", "torch": "2.13"},
    "devices": [],
    "kernels": {},
    "bf16": {"cpu": True},
}


@pytest.mark.ray
def test_a_healthy_machine_passes(cluster: None, tiny_recipe: Path, tmp_path: Path) -> None:
    findings = examine(load(tiny_recipe), tiny_recipe, tmp_path / "runs" / "run", joined=False)
    checks = ["token", "versions", "GPUs", "attention", "precision", "storage", "MLflow", "weights"]
    assert [f.check for f in findings] == checks
    assert all(f.verdict == "ok" for f in findings), findings
    assert findings_table(findings).row_count == len(checks)


@pytest.mark.ray
def test_what_a_node_lacks_is_found(cluster: None, tiny_recipe: Path, tmp_path: Path) -> None:
    gone = tmp_path / "clip"
    shutil.copytree(load(tiny_recipe).task.rewards["clip"].weights, gone)
    recipe = load(tiny_recipe, {"task.rewards.clip.weights": str(gone)})
    shutil.rmtree(gone)
    found = weights(recipe, tiny_recipe, alive_nodes())
    assert found.verdict == "failure" and str(gone) in found.said and "fetch" in found.remedy
    (tmp_path / "file").write_text("")
    found = home_finding(str(tmp_path / "file" / "run"), alive_nodes())
    assert found.verdict == "failure" and "cannot be written" in found.said


@pytest.mark.parametrize(
    ("settings", "verdict", "said"),
    [
        ({}, "ok", "1 CPU: on 10.0.0.1, 10.0.0.2"),
        ({"resources": {"inference": 1}}, "ok", "1 CPU, 1 inference: on 10.0.0.2"),
        ({"num_gpus": 1}, "warning", "no node has 1 CPU, 1 GPU"),
    ],
)
def test_a_validation_that_no_node_has_room_for_is_found(settings: dict, verdict: str, said: str) -> None:
    nodes = [
        {"NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}},
        {"NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 1.0, "inference": 1.0}},
    ]
    found = validation(Validation(prompts="held_out.jsonl", **settings), nodes)
    assert (found.verdict, found.said) == (verdict, said)


def test_an_unreachable_mlflow_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from craftor.doctor import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = mlflow(tmp_path)
    assert found.verdict == "failure" and "127.0.0.1:9" in found.said


@pytest.mark.parametrize(
    ("environment", "file", "verdict", "said"),
    [
        ({}, True, "failure", "the job server is open"),
        ({"RAY_AUTH_MODE": "token"}, False, "failure", "RAY_AUTH_TOKEN is not set"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, False, "ok", "set"),
        ({"RAY_AUTH_MODE": "token"}, True, "ok", "set"),
    ],
)
def test_a_cluster_without_a_token_fails(
    environment: dict[str, str], file: bool, verdict: str, said: str, tmp_path: Path
) -> None:
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x")
    found = token(environment, tmp_path, joined=True)
    assert found.verdict == verdict and said in found.said
    assert ("ray get-auth-token --generate" in found.remedy) == (verdict == "failure")
    assert token(environment, tmp_path, joined=False).verdict == "ok"


def test_versions_that_differ_are_named_with_their_nodes() -> None:
    other = {**REPORT, "versions": REPORT["versions"] | {"torch": "2.12"}}
    assert versions({"a": REPORT, "b": REPORT}).verdict == "ok"
    found = versions({"a": REPORT, "b": other, "c": REPORT})
    assert found.verdict == "failure" and found.said == "torch is 2.13 on a, c and 2.12 on b"
    missing = {**REPORT, "versions": REPORT["versions"] | {"mlflow": "missing"}}
    assert versions({"a": missing}).said == "missing: mlflow"


def test_gpus_that_ray_counts_and_torch_does_not_see(tiny_recipe: Path) -> None:
    wanting = load(tiny_recipe, {"workers.gpu": True, "workers.num": 2})
    two = {**REPORT, "devices": ["A100", "A100"], "kernels": {"sdpa": 0.0}}
    assert gpus({"a": two}, {"a": 2}, wanting).said == "2: A100"
    assert "Ray counts 2 on a, torch sees 0" in gpus({"a": REPORT}, {"a": 2}, None).said
    assert "wants 2 at least, the cluster has 0" in gpus({"a": REPORT}, {"a": 0}, wanting).said
    assert attention({"a": two}).verdict == "warning"


def test_an_attention_kernel_that_computes_something_else_fails() -> None:
    assert kernels("cpu")["sdpa"] < 1e-5
    found = attention({"a": {**REPORT, "kernels": {"sdpa": 0.5}}})
    assert found.verdict == "failure" and "sdpa on a is off by 5.0e-01" in found.said


@pytest.mark.parametrize(
    ("bf16", "wanted", "gpu", "verdict", "said"),
    [
        ({"a": {"cpu": True}, "b": {"cpu": True}}, "auto", False, "ok", "multiplied on 2 node(s)"),
        ({"a": {"cpu": False}, "b": {"cpu": False}}, "auto", False, "ok", 'emulated on a, b: "auto" is fp32'),
        ({"a": {"cpu": True}, "b": {"cpu": False}}, "auto", False, "failure", '"auto" is not one precision'),
        ({"a": {"cpu": True}, "b": {"cpu": False}}, "fp32", False, "ok", "emulated on b"),
        ({"a": {"cpu": True}, "b": {"cpu": False}}, "bf16", False, "warning", "emulated on b"),
        # Workers on GPUs: the nodes without one train nothing.
        ({"a": {"cpu": False, "cuda": True}, "b": {"cpu": False}}, "auto", True, "ok", "multiplied on 1 node(s)"),
        ({"a": {"cpu": True, "cuda": False}}, "bf16", True, "warning", "emulated on a"),
    ],
)
def test_nodes_that_would_not_compute_alike_are_found(
    tiny_recipe: Path, bf16: dict, wanted: str, gpu: bool, verdict: str, said: str
) -> None:
    changes = {"model.precision": wanted, "workers.gpu": gpu, "workers.num": 1}
    found = precision({address: {**REPORT, "bf16": has} for address, has in bf16.items()}, load(tiny_recipe, changes))
    assert found.verdict == verdict and said in found.said
