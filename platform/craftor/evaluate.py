"""Base against tuned on held-out prompts: the same noise for both, every scorer, paired differences.

A Ray Data job: each row is a prompt, each actor makes its images for all seeds and variants and scores them. The
noise of an image follows from (prompt number, seed) alone, so any number of actors gives the same images.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn

from craftor import objective, seeds, trainable
from craftor.baselines import methods
from craftor.baselines.sampling import Base
from craftor.baselines.settings import MethodSettings
from craftor.decode import decode
from craftor.denoise import Prompt, State
from craftor.diffuser import load
from craftor.embed import embed
from craftor.locate import locate
from craftor.mixture import Member, sample_mixture
from craftor.recipe import Evaluation, Recipe, Tuning
from craftor.statistics import paired
from craftor_micro.captions import Description
from craftor_micro.referee import ATTRIBUTES, Referee
from craftor_rewards import ClipScore
from craftor_rewards import build as build_reward

STRIP_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUM_STRIPS, NUM_SAMPLES = 48, 16
BATCH = 12


@dataclass(frozen=True)
class Tuned:
    """A tuned encoder's folder, its weight when fully on, and the denoising steps it acts in."""

    folder: str
    weight: float
    steps: tuple[int, int]


def held_out_prompts(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The first `num_prompts` lines of the held-out file. Raises ValueError where there are fewer."""
    lines = Path(locate(evaluation.prompts)).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()][: evaluation.num_prompts]
    if len(rows) < evaluation.num_prompts:
        raise ValueError(
            f"evaluation.num_prompts = {evaluation.num_prompts}: {evaluation.prompts} has {len(rows)} prompts"
        )
    return [
        {"number": i, "prompt": r["prompt"], "description": json.dumps(r.get("description"))}
        for i, r in enumerate(rows)
    ]


def evaluate(recipe: Recipe, tuned: Sequence[Tuned], out: Path, num_actors: int) -> dict[str, Any]:
    """Write `images.jsonl`, `samples/` and `summary.json` to `out`; returns the summary.

    The summary has `metrics` (name -> what `statistics.paired` gives, and `held_out`) and the `interpolation` curve.
    """
    assert isinstance(recipe.task, Tuning) and recipe.evaluation is not None
    (out / "samples").mkdir(parents=True, exist_ok=True)
    rows = ray.data.from_items(held_out_prompts(recipe.evaluation), override_num_blocks=num_actors * 2)
    scored = rows.map_batches(
        Scorer,
        fn_constructor_args=(recipe.model_dump(by_alias=True), [asdict(t) for t in tuned]),
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        batch_size=BATCH,
        batch_format="numpy",
    )
    images = []
    total = recipe.evaluation.num_prompts
    for row in track(scored.iter_rows(), description=f"evaluating {total} held-out prompts", total=total):
        images.extend(_unpack(row, out))
    images.sort(key=lambda image: (image["number"], image["seed"], image["variant"]))
    with (out / "images.jsonl").open("w") as file:
        file.writelines(json.dumps(image) + "\n" for image in images)
    summary = summarise(images, recipe.task, recipe.evaluation.methods)
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    (out / "samples.json").write_text(json.dumps(_samples(images), indent=2))
    return summary


class Scorer:
    """An evaluation actor: prompts -> scored images of the base, the tuned mixture and the weights between."""

    def __init__(self, recipe: dict[str, Any], tuned: list[dict[str, Any]]) -> None:
        self.recipe = Recipe.model_validate(recipe)
        assert isinstance(self.recipe.task, Tuning) and self.recipe.evaluation is not None
        torch.set_num_threads(self.recipe.workers.threads)
        task = self.recipe.task
        self.diffuser = load(self.recipe.model.model_copy(update={"precision": "fp32"}))
        self.guided = self.diffuser.guided(task.rollout)
        self.rewards = {name: build_reward(r.kind, locate(r.weights), **r.options) for name, r in task.rewards.items()}
        self.clip = next(reward for reward in self.rewards.values() if isinstance(reward, ClipScore))
        self.weights = {name: r.weight for name, r in task.rewards.items() if not r.evaluation_only}
        self.tuned = [Tuned(t["folder"], t["weight"], tuple(t["steps"])) for t in tuned]
        parts = [trainable.load(self.diffuser, Path(t.folder)) for t in self.tuned]
        self.encoders = [{**self.diffuser.encoders, **{n: p for n, p in x.items() if n != "unet"}} for x in parts]
        self.unets = [found["unet"] for found in parts if "unet" in found]
        self.tuned_guided = self.diffuser.guided(task.rollout, self.unets[0]) if self.unets else self.guided
        self.referee = Referee.load(locate("micro:referee"))
        base = Base(self.diffuser, task.rollout, self.recipe.seed)
        self.methods = methods.build(self.recipe.evaluation.methods, base, self.rewards)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.recipe.evaluation is not None
        prompts, numbers = [str(p) for p in batch["prompt"]], [int(n) for n in batch["number"]]
        descriptions = [json.loads(d) for d in batch["description"]]
        results: list[list[dict[str, Any]]] = [[] for _ in prompts]
        for seed in range(self.recipe.evaluation.num_seeds):
            for variant, images in self._images(prompts, numbers, seed).items():
                # Every scorer sees what a user would: 8-bit images.
                images = (images * 255).round() / 255
                scores = self._scores(images, prompts, descriptions)
                features = self.clip.towers.image_features(images)
                for i, number in enumerate(numbers):
                    results[i].append(
                        {"number": number, "prompt": prompts[i], "seed": seed, "variant": variant}
                        | {name: _plain(values[i].item()) for name, values in scores.items()}
                        | {"feature": features[i].tolist()}
                        | ({"png": _png(images[i])} if number < NUM_SAMPLES else {})
                    )
        return {"results": np.array([json.dumps(r) for r in results], dtype=object)}

    @torch.no_grad()
    def _images(self, prompts: list[str], numbers: list[int], seed: int) -> dict[str, Tensor]:
        base, *tuned = (self._prompt(encoders, prompts) for encoders in (self.diffuser.encoders, *self.encoders))
        noise = torch.cat(
            [seeds.normal(self.recipe.seed, [seed], f"evaluation {n}", self.diffuser.latent_shape) for n in numbers]
        )
        # The steps before any tuned encoder acts are the same for every variant, unless the UNet itself is another.
        fork = 0 if self.unets else min(t.steps[0] for t in self.tuned)
        common = sample_mixture(self.guided, State(noise), base, [], range(fork))
        strip = seed == 0 and min(numbers) < NUM_STRIPS
        variants = {"base": 0.0, "tuned": 1.0} | ({f"w{w}": w for w in STRIP_WEIGHTS[1:-1]} if strip else {})
        images = {}
        for variant, scale in variants.items():
            members = [
                Member(prompt, scale * t.weight, range(*t.steps)) for prompt, t in zip(tuned, self.tuned, strict=True)
            ]
            guided = self.tuned_guided if scale else self.guided
            final = sample_mixture(guided, common, base, members, range(fork, guided.num_steps))
            images[variant] = decode(self.diffuser.vae, final.latents)
        return {**images, **{name: method(prompts, numbers, seed) for name, method in self.methods.items()}}

    def _prompt(self, encoders: dict[str, nn.Module], prompts: list[str]) -> Prompt:
        return Prompt(embed(encoders, self.diffuser.tokenize(prompts)), self.diffuser.null(encoders))

    @torch.no_grad()
    def _scores(self, images: Tensor, prompts: list[str], descriptions: list[dict | None]) -> dict[str, Tensor]:
        scores = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        scores["total"] = objective.total(scores, self.weights)
        if all(d is not None for d in descriptions):
            scores |= self.referee.judge(images, [Description.from_json(d) for d in descriptions if d])
        return scores


def summarise(
    images: list[dict[str, Any]], task: Tuning, others: Mapping[str, MethodSettings] | None = None
) -> dict[str, Any]:
    """Paired statistics over prompts and seeds, diversity within prompts, and the interpolation curve.

    Other methods are compared with the base as the tuned model is, under `methods`.
    """
    trained = {name for name, reward in task.rewards.items() if not reward.evaluation_only} | {"total"}
    trained |= {*ATTRIBUTES, "accuracy"} if task.oracle_trains else set()
    bookkeeping = ("number", "prompt", "seed", "variant", "feature", "png", "image")
    names = [key for key in images[0] if key not in bookkeeping]
    against_base: dict[str, dict[str, Any]] = {}
    for variant, known in {"tuned": trained, **methods.known_to(others or {})}.items():
        metrics = against_base[variant] = {}
        for name in names:
            base, found = (_grid(images, which, name) for which in ("base", variant))
            if np.isnan(base).all():
                continue  # an attribute that none of these prompts mentions
            metrics[name] = {**paired(base, found), "held_out": name not in known}
        metrics["diversity"] = {**paired(_diversity(images, "base"), _diversity(images, variant)), "held_out": True}
    strips = [i for i in images if i["seed"] == 0 and i["number"] < NUM_STRIPS]
    curve = []
    for weight in STRIP_WEIGHTS:
        variant = {0.0: "base", 1.0: "tuned"}.get(weight, f"w{weight}")
        at = [image for image in strips if image["variant"] == variant]
        means = {name: float(np.nanmean([_number(image[name]) for image in at])) for name in names}
        curve.append({"weight": weight, "reward": means["total"], **means})
    tuned = against_base.pop("tuned")
    return {"metrics": tuned, "interpolation": curve, **({"methods": against_base} if against_base else {})}


def _grid(images: list[dict[str, Any]], variant: str, name: str) -> np.ndarray:
    """Values as (prompts, seeds); `images` is ordered by prompt and seed."""
    num_seeds = 1 + max(image["seed"] for image in images)
    values = [_number(image[name]) for image in images if image["variant"] == variant]
    return np.array(values, dtype=float).reshape(-1, num_seeds)


def _diversity(images: list[dict[str, Any]], variant: str) -> np.ndarray:
    """1 - cosine between CLIP image embeddings, mean over the pairs of one prompt's seeds; (prompts, 1)."""
    num_seeds = 1 + max(image["seed"] for image in images)
    features = np.array([image["feature"] for image in images if image["variant"] == variant])
    features = features.reshape(-1, num_seeds, features.shape[-1])
    similarity = features @ features.transpose(0, 2, 1)
    pairs = np.triu_indices(num_seeds, k=1)
    if not len(pairs[0]):
        return np.full((len(features), 1), np.nan)
    return 1 - similarity[:, pairs[0], pairs[1]].mean(axis=1, keepdims=True)


def _unpack(row: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """One prompt's results; pictures become files under `samples/`."""
    images = json.loads(row["results"])
    for image in images:
        if png := image.pop("png", None):
            image["image"] = f"samples/{image['number']:03d}_{image['seed']}_{image['variant']}.png"
            (out / image["image"]).write_bytes(bytes.fromhex(png))
    return images


def _samples(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    pictures = {(i["number"], i["variant"]): i for i in images if i["seed"] == 0 and "image" in i}
    numbers = sorted({number for number, _ in pictures})
    variants = ["base", *(f"w{w}" for w in STRIP_WEIGHTS[1:-1]), "tuned"]
    return [
        {
            "prompt": pictures[n, "base"]["prompt"],
            "seed": 0,
            "base": pictures[n, "base"]["image"],
            "tuned": pictures[n, "tuned"]["image"],
            "strip": [pictures[n, v]["image"] for v in variants] if all((n, v) in pictures for v in variants) else None,
        }
        for n in numbers
    ]


def _png(image: Tensor) -> str:
    """PNG bytes in hexadecimal, to travel inside JSON."""
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue().hex()


def _plain(value: float) -> float | None:
    """JSON has no NaN: an attribute the prompt does not mention is null."""
    return None if value != value else value


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
