"""A cluster, and optionally a recipe -> findings: what would go wrong on some node, and the remedy."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from craftor import preflight, storage, storage_checks, tracking
from craftor.cluster import alive_nodes
from craftor.node_report import report
from craftor.recipe import Recipe, RecipeError, Validation

TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Finding:
    """One check's answer; a warning keeps no run from working. Whatever is not well has a remedy."""

    check: str
    verdict: Literal["ok", "warning", "failure"]
    said: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.verdict == "ok" or self.remedy, f"{self.check}: {self.said}; and no remedy"


def examine(recipe: Recipe | None, source: Path, out: Path, joined: bool) -> list[Finding]:
    """All findings on the cluster that Ray is connected to; `joined` tells it from one started here for the purpose."""
    nodes = alive_nodes()
    home = (recipe.run.storage if recipe else None) or str(out.resolve())
    reports = on_every_node(nodes, report)
    findings = [
        token(os.environ, Path.home(), joined),
        versions(reports),
        gpus(reports, {node["NodeManagerAddress"]: int(node["Resources"].get("GPU", 0)) for node in nodes}, recipe),
        attention(reports),
        precision(reports, recipe),
        home_finding(home, nodes),
        mlflow(out.parent),
    ]
    if recipe is not None:
        findings.append(weights(recipe, source, nodes))
    if recipe is not None and recipe.validation is not None:
        findings.append(validation(recipe.validation, nodes))
    return findings


def on_every_node(nodes: list[dict[str, Any]], task: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """`task(*arguments)` run on each node, by address; a node that does not answer gives its error."""
    calls = {
        node["NodeManagerAddress"]: ray.remote(task)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(*arguments)
        for node in nodes
    }
    answers: dict[str, Any] = {}
    for address, call in calls.items():
        try:
            answers[address] = ray.get(call, timeout=TIMEOUT_SECONDS)
        except RayError as error:
            answers[address] = error
    return answers


def token(environment: Mapping[str, str], home: Path, joined: bool) -> Finding:
    """Whoever reaches a cluster without one runs code on it."""
    if not joined:
        return Finding("token", "ok", "not needed: this cluster is on this machine and ends with this command")
    remedy = (
        "on this machine: ray get-auth-token --generate; the same token in ~/.ray/auth_token or RAY_AUTH_TOKEN, and "
        "RAY_AUTH_MODE=token, on every node before `ray start` and wherever jobs are submitted"
    )
    if environment.get("RAY_AUTH_MODE") != "token":
        return Finding("token", "failure", "RAY_AUTH_MODE is not 'token': the job server is open", remedy)
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    if not environment.get("RAY_AUTH_TOKEN") and not path.is_file():
        return Finding("token", "failure", f"RAY_AUTH_TOKEN is not set and {path} does not exist", remedy)
    return Finding("token", "ok", "set")


def versions(reports: Mapping[str, Any]) -> Finding:
    """Equal on all nodes: objects and checkpoints travel between them."""
    if silent := _silent("versions", reports):
        return silent
    by_package: dict[str, dict[str, list[str]]] = {}
    for address, found in reports.items():
        for package, number in found["versions"].items():
            by_package.setdefault(package, {}).setdefault(number, []).append(address)
    differing = [
        f"{package} is " + " and ".join(f"{number} on {', '.join(where)}" for number, where in numbers.items())
        for package, numbers in by_package.items()
        if len(numbers) > 1
    ]
    missing = [package for package, numbers in by_package.items() if "missing" in numbers]
    if differing or missing:
        said = "; ".join(differing) or f"missing: {', '.join(missing)}"
        return Finding("versions", "failure", said, "one image on every node: cluster/Dockerfile, or constraints.txt")
    some = next(iter(reports.values()))["versions"]
    listed = ", ".join(f"{name} {some[name]}" for name in ("craftor", "python", "ray", "torch"))
    return Finding("versions", "ok", f"the same on {len(reports)} node(s): {listed}")


def gpus(reports: Mapping[str, Any], counted: Mapping[str, int], recipe: Recipe | None) -> Finding:
    """As many as Ray counts, on every node, and as many as the recipe wants."""
    if silent := _silent("GPUs", reports):
        return silent
    for address, found in reports.items():
        if len(found["devices"]) != counted[address] and counted[address]:
            said = f"Ray counts {counted[address]} on {address}, torch sees {len(found['devices'])}"
            return Finding("GPUs", "failure", said, "driver and container toolkit there, or `ray start --num-gpus`")
    total, wanted = sum(counted.values()), recipe.workers.least if recipe and recipe.workers.gpu else 0
    if total < wanted:
        remedy = "more nodes, an autoscaling group, or a smaller workers.num ([least, most] takes what there is)"
        return Finding("GPUs", "failure", f"the recipe wants {wanted} at least, the cluster has {total}", remedy)
    names = sorted({name for found in reports.values() for name in found["devices"]})
    return Finding("GPUs", "ok", f"{total}: {', '.join(names)}" if total else "none, and none wanted")


def attention(reports: Mapping[str, Any]) -> Finding:
    if silent := _silent("attention", reports):
        return silent
    wrong = [
        f"{name} on {address} is off by {error:.1e}"
        for address, found in reports.items()
        for name, error in found["kernels"].items()
        if not error < 1e-2
    ]
    if wrong:
        remedy = 'model.attention = "sdpa", or an xformers that was built for this torch'
        return Finding("attention", "failure", "; ".join(wrong), remedy)
    found = sorted({name for report in reports.values() for name in report["kernels"]})
    lacking = [a for a, report in reports.items() if report["devices"] and "xformers" not in report["kernels"]]
    if lacking:
        remedy = "pip install 'craftor[gpu]': sdpa works, xformers is faster on some devices"
        return Finding("attention", "warning", f"no xformers on {', '.join(lacking)}", remedy)
    return Finding("attention", "ok", f"{', '.join(found)} agree with plain attention")


def precision(reports: Mapping[str, Any], recipe: Recipe | None) -> Finding:
    """Workers compute alike, or the run is refused at its start; and emulated bf16 is slower than fp32 by far."""
    if silent := _silent("precision", reports):
        return silent
    kind = "cuda" if recipe and recipe.workers.gpu else "cpu"
    multiplied = {address: found["bf16"][kind] for address, found in reports.items() if kind in found["bf16"]}
    slow = ", ".join(address for address, answer in multiplied.items() if not answer)
    where = f"bf16 is emulated on {slow}" if slow else f"bf16 is multiplied on {len(multiplied)} node(s)"
    wanted = recipe.model.precision if recipe else "fp32"
    if slow and wanted == "bf16":
        remedy = 'model.precision = "auto" computes in fp32 there, if all nodes are alike; or "fp32"'
        return Finding("precision", "warning", f'{where}, and the recipe says "bf16"', remedy)
    if wanted == "auto" and len(set(multiplied.values())) > 1:
        remedy = 'model.precision = "fp32", or "bf16", which is slow there; or workers of one kind'
        return Finding("precision", "failure", f'{where} and multiplied elsewhere: "auto" is not one precision', remedy)
    return Finding("precision", "ok", f'{where}: "auto" is fp32' if slow and wanted == "auto" else where)


def home_finding(url: str, nodes: list[dict[str, Any]]) -> Finding:
    """Writable and atomic from every node."""
    try:
        storage_checks.check_shared(url, nodes)
    except storage.StorageError as error:
        return Finding("storage", "failure", str(error), "credentials on every node, free space, a URL all can reach")
    return Finding("storage", "ok", f"{url}: written, renamed and read from {len(nodes)} node(s)")


def mlflow(runs: Path) -> Finding:
    try:
        tracking.client(runs)
    except tracking.TrackingUnreachable as error:
        return Finding("MLflow", "failure", str(error), "start the server, or mend MLFLOW_TRACKING_URI")
    return Finding("MLflow", "ok", os.environ.get("MLFLOW_TRACKING_URI") or f"an SQLite file in {runs}")


def weights(recipe: Recipe, source: Path, nodes: list[dict[str, Any]]) -> Finding:
    """Model, rewards and prompts, on every node."""
    missing = {
        a: said for a, said in on_every_node(nodes, _missing, recipe.model_dump(by_alias=True), source).items() if said
    }
    if missing:
        said = "; ".join(f"{address}: {reason}" for address, reason in missing.items())
        remedy = "hf download MODEL and craftor rewards fetch NAME on those nodes, or paths on a folder that all share"
        return Finding("weights", "failure", said, remedy)
    return Finding("weights", "ok", f"model, rewards and prompts are there on {len(nodes)} node(s)")


def validation(settings: Validation, nodes: list[dict[str, Any]]) -> Finding:
    """A node with all that a validation reserves; an autoscaler may still bring one."""
    wanted = {"CPU": settings.num_cpus, "GPU": settings.num_gpus, **settings.resources}
    wanted = {name: amount for name, amount in wanted.items() if amount}
    fitting = [
        node["NodeManagerAddress"]
        for node in nodes
        if all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
    ]
    listed = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    if not fitting:
        remedy = (
            "a node group with them (`ray start --resources='{\"NAME\": 1}'` names a node's own), or "
            "less in [validation]; without, training ends only after validation.timeout_s for each checkpoint"
        )
        return Finding("validation", "warning", f"no node has {listed}", remedy)
    return Finding("validation", "ok", f"{listed}: on {', '.join(fitting)}")


def _missing(recipe: dict[str, Any], source: Path) -> str:
    try:
        preflight.check(Recipe.model_validate(recipe), source)
    except RecipeError as error:
        return str(error)
    return ""


def _silent(check: str, reports: Mapping[str, Any]) -> Finding | None:
    dead = {address: answer for address, answer in reports.items() if isinstance(answer, RayError)}
    if not dead:
        return None
    said = "; ".join(f"{address}: {str(error).splitlines()[-1]}" for address, error in dead.items())
    return Finding(check, "failure", f"no answer from {said}", "is craftor installed there, or shipped by runtime_env?")
