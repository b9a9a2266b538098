"""Base against tuned: the same prompts and noise for both, every scorer, paired differences.

A Ray Data job: each row is a part of the prompts, actors make its images and score them, and the driver writes what
comes back as one Parquet file. Interrupted and started again, it does the parts that are missing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.data
from rich.progress import track

from craftor import evaluation_files, held_out, suites
from craftor.baselines import methods
from craftor.checkpoint import digests
from craftor.diffuser import Diffuser, load
from craftor.evaluation_actor import NUM_STRIPS, PAPER, Scorer, Tuned
from craftor.evaluation_files import EvaluationError
from craftor.evaluation_summary import breakdown, samples, summarise
from craftor.prefix_cache import weights_digest
from craftor.recipe import Evaluation, Recipe, Tuning
from craftor_micro.referee import ATTRIBUTES

__all__ = ["Asked", "Scorer", "Tuned", "evaluate", "held_out_prompts", "used_steps"]
NUM_SAMPLES = 16
_NO_MATTER = ("transformers_version", "architectures", "dtype", "torch_dtype")
"""Keys of a configuration that say who wrote it."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation may be asked for beside the recipe's own section."""

    suite: str | None = None
    prompts: str | None = None
    """Where the suite is, or without a suite another file of held-out prompts."""
    category: str | None = None
    limit: int | None = None
    num_seeds: int | None = None
    seed: int | None = None
    """The noise's, by default the recipe's; runs with the same can be compared."""
    num_kept: int = NUM_SAMPLES
    """So many prompts keep their pictures."""
    paper: bool = False
    """Score as TextCraftor did, too."""
    num_strips: int = NUM_STRIPS
    """So many prompts are also made with the weights between base and tuned, for the curve."""


def used_steps(recipe: Recipe) -> tuple[int, int]:
    """The denoising steps in which a tuned encoder acts."""
    assert isinstance(recipe.task, Tuning)
    use_from = recipe.evaluation.use_from if recipe.evaluation else None
    acts = recipe.task.acts()
    return (acts.start if use_from is None else use_from, acts.stop)


def held_out_prompts(evaluation: Evaluation, section: str = "evaluation") -> list[dict[str, Any]]:
    """The first `num_prompts` of the held-out file. Raises HeldOutError where there are fewer."""
    return [
        {"number": i, "index": i, "prompt": row["prompt"], "description": row.get("description")}
        for i, row in enumerate(held_out.read(section, evaluation.prompts, evaluation.num_prompts))
    ]


def suite_prompts(asked: Asked) -> list[dict[str, Any]]:
    """The same of a suite; a prompt's noise follows from its index in the whole suite, whatever is left out."""
    assert asked.suite is not None
    rows = suites.load(asked.suite, asked.prompts)
    return [
        {
            "number": number,
            "index": index,
            "prompt": rows[index].prompt,
            "description": None,
            "categories": list(rows[index].categories),
        }
        for number, index in enumerate(suites.select(asked.suite, rows, asked.category, asked.limit))
    ]


def evaluate(
    recipe: Recipe, tuned: Sequence[Tuned], out: Path, num_actors: int, asked: Asked | None = None
) -> dict[str, Any]:
    """Fill `out` with parts, `samples/`, `images.jsonl`, `samples.json` and `summary.json`; returns the summary.

    The summary has `metrics` (name -> what `statistics.paired` gives, and `held_out`), the `interpolation` curve and,
    of a suite, `categories`. Raises EvaluationError where `out` holds another evaluation, SuiteError for a suite that
    is not what it should be.
    """
    asked = asked or Asked()
    make_images(recipe, {"tuned": tuned}, out, num_actors, asked)
    return _conclude(_with(recipe, asked), out, asked)


def make_images(
    recipe: Recipe, variants: Mapping[str, Sequence[Tuned]], out: Path, num_actors: int, asked: Asked
) -> None:
    """Fill `out` with parts: images of the base and of every variant, each a mixture, scored by the recipe's rewards.

    Several variants in one evaluation share its base's images and denoising steps, and its actors.
    """
    recipe = _with(recipe, asked)
    assert isinstance(recipe.task, Tuning) and recipe.evaluation is not None
    rows = suite_prompts(asked) if asked.suite else held_out_prompts(recipe.evaluation)
    evaluation_files.begin(out, describe(recipe, variants, rows, asked))
    parts = evaluation_files.parts(len(rows))
    if missing := evaluation_files.missing(out, len(parts)):
        todo = [{"part": part, "rows": json.dumps(rows[parts[part].start : parts[part].stop])} for part in missing]
        made = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Scorer,
            fn_constructor_args=(
                recipe.model_dump(by_alias=True),
                {name: [asdict(t) for t in tuned] for name, tuned in variants.items()},
                asked.num_kept,
                asked.paper,
                asked.num_strips,
            ),
            compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(todo))),
            batch_size=1,
            batch_format="numpy",
            num_gpus=1 if recipe.workers.gpu else None,
        )
        said = f"evaluating {len(rows)} prompts, {len(todo)} of {len(parts)} parts to do"
        for part in track(made.iter_rows(), description=said, total=len(todo)):
            evaluation_files.write_part(out, part["part"], part["packed"])


def describe(
    recipe: Recipe, variants: Mapping[str, Sequence[Tuned]], rows: Sequence[dict[str, Any]], asked: Asked
) -> dict[str, Any]:
    """What an evaluation's images and scores depend on."""
    assert isinstance(recipe.task, Tuning) and recipe.evaluation is not None
    base = load(recipe.model.model_copy(update={"precision": "fp32"}))
    prompts = hashlib.sha256(json.dumps([[r["index"], r["prompt"], r["description"]] for r in rows]).encode())
    return {
        "name": recipe.name,
        "base_sha256": _base_sha256(base),
        "variants": {
            name: [{"sha256": _sha256(t.folder), "weight": t.weight, "steps": list(t.steps)} for t in tuned]
            for name, tuned in variants.items()
        },
        "prompts": {"suite": asked.suite, "num": len(rows), "sha256": prompts.hexdigest()},
        "seed": recipe.seed,
        "num_seeds": recipe.evaluation.num_seeds,
        "rollout": recipe.task.rollout.model_dump(),
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"prompts"}),
        "rewards": {
            name: r.model_dump(include={"kind", "weights", "options", "weight", "scale", "evaluation_only"})
            for name, r in recipe.task.rewards.items()
        },
        "trained": sorted(trained_metrics(recipe.task)),
        "methods": {name: method.model_dump() for name, method in recipe.evaluation.methods.items()},
        "paper": asked.paper,
        "num_kept": asked.num_kept,
        "num_strips": asked.num_strips,
    }


def _conclude(recipe: Recipe, out: Path, asked: Asked) -> dict[str, Any]:
    """Pictures as files, records as lines of JSON, and the statistics."""
    assert isinstance(recipe.task, Tuning)
    (out / "samples").mkdir(exist_ok=True)
    images = evaluation_files.read(out).images
    for image in images:
        if png := image.pop("png"):
            image["image"] = f"samples/{image['number']:03d}_{image['seed']}_{image['variant']}.png"
            (out / image["image"]).write_bytes(png)
    with (out / "images.jsonl").open("w") as file:
        file.writelines(json.dumps(image) + "\n" for image in images)
    assert recipe.evaluation is not None
    summary = summarise(images, trained_metrics(recipe.task), methods.known_to(recipe.evaluation.methods))
    if asked.suite:
        summary["categories"] = breakdown(images, suites.SUITES[asked.suite].columns)
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    (out / "samples.json").write_text(json.dumps(samples(images), indent=2))
    return summary


def trained_metrics(task: Tuning) -> set[str]:
    """What is no evidence of anything else: the trained rewards, and all that an oracle judges where one trains."""
    trained = {*task.factors, "total"}
    trained |= {name + PAPER for name in trained}
    return trained | ({*ATTRIBUTES, "accuracy"} if task.oracle_trains else set())


def _with(recipe: Recipe, asked: Asked) -> Recipe:
    """The recipe as asked for. Raises EvaluationError for options that do not go together."""
    assert recipe.evaluation is not None
    if asked.category is not None and asked.suite is None:
        raise EvaluationError(f"--category {asked.category} goes with --suite; allowed: {', '.join(suites.SUITES)}")
    changes: dict[str, Any] = {}
    if asked.num_seeds is not None:
        changes["num_seeds"] = asked.num_seeds
    if asked.suite is None and asked.prompts is not None:
        changes["prompts"] = asked.prompts
    if asked.suite is None and asked.limit is not None:
        changes["num_prompts"] = asked.limit
    evaluation = recipe.evaluation.model_copy(update=changes)
    seed = recipe.seed if asked.seed is None else asked.seed
    return recipe.model_copy(update={"evaluation": evaluation, "seed": seed})


def _base_sha256(base: Diffuser) -> str:
    """Of weights, and of what else decides their images: activations, noise schedule, what the UNet predicts."""
    modules = [*base.encoders.values(), base.unet, base.vae]
    found = hashlib.sha256(weights_digest(modules).encode())
    for part in (*modules, base.scheduler):
        config: Any = part.config
        plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        kept = {key: value for key, value in plain.items() if not key.startswith("_") and key not in _NO_MATTER}
        found.update(json.dumps(kept, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _sha256(folder: str) -> str:
    """Of a checkpoint's or bundle's tuned weights, without the optimiser's state."""
    found = {name: sha for name, sha in digests(Path(folder)).items() if name.endswith(".safetensors")}
    weights = {name: sha for name, sha in found.items() if not name.startswith("trainer/")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
