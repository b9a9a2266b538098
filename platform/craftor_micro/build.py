"""Trains the parts of the micro world: `python -m craftor_micro.build STAGE`, each seeded, each with its scores."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import CLIPModel

from craftor_micro.autoencoder import build_autoencoder, train_decoder
from craftor_micro.base import assemble, export
from craftor_micro.base_scores import score_autoencoder, score_base
from craftor_micro.contrastive import build_clip, train_clip
from craftor_micro.hard_negatives import hard_negative_accuracy
from craftor_micro.object_stages import app as object_stages
from craftor_micro.pairs import write_pairs
from craftor_micro.pool import captions, render_pool
from craftor_micro.preferences import sample_choices, score_choices, train_on_choices
from craftor_micro.prompt_files import write_prompts
from craftor_micro.ratings import image_embeddings, rate, score_head, train_head
from craftor_micro.referee import Referee
from craftor_micro.referee_training import score_referee, train_referee
from craftor_micro.reward_clip import Teacher, train_contrast, train_vision
from craftor_micro.stages import PARTS, WEIGHTS, Out, Renders, Seed, Steps, begin, finish
from craftor_micro.tokenizer import build_tokenizer
from craftor_rewards.aesthetic import Aesthetic
from craftor_rewards.clip import ClipTowers
from craftor_rewards.clip_score import ClipScore
from craftor_rewards.pick_score import PickScore

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
app.add_typer(object_stages)
VisionSteps = Annotated[int, typer.Option(min=1, help="Updates of the image tower alone, before the contrastive ones.")]


@app.command("referee")
def make_referee(
    out: Out = WEIGHTS / "referee", steps: Steps = 6000, renders: Renders = 100_000, seed: Seed = 7001
) -> None:
    """The exact scorer: a classifier of clean renders."""
    started = begin(seed)
    referee = Referee()
    train_referee(referee, render_pool(renders, seed=seed, two_objects=0.5), num_steps=steps, seed=seed + 1)
    referee.save(out)
    held_out = render_pool(3000, seed=seed + 2, held_out=True)
    finish(out, seed, started, score_referee(Referee.load(out), held_out))


@app.command("autoencoder")
def make_autoencoder(
    out: Out = PARTS / "autoencoder", steps: Steps = 1200, renders: Renders = 12_000, seed: Seed = 0
) -> None:
    """The base model's autoencoder: principal components, and a decoder trained to invert them."""
    started = begin(seed)
    pool = render_pool(renders, seed=seed + 11)
    autoencoder = build_autoencoder(pool)
    train_decoder(autoencoder, pool, num_steps=steps, seed=seed)
    autoencoder.save_pretrained(out)
    finish(out, seed, started, score_autoencoder(autoencoder.eval(), Referee.load(WEIGHTS / "referee")))


@app.command("text-encoder")
def make_text_encoder(
    out: Out = PARTS / "text_encoder", steps: Steps = 1000, renders: Renders = 60_000, seed: Seed = 1
) -> None:
    """The base model's own CLIP, trained on captions as careless as the web's."""
    started = begin(seed)
    tokenizer, pool = build_tokenizer(), render_pool(renders, seed=seed + 20)
    clip = build_clip(tokenizer)
    careless = captions(pool.scenes, seed + 21, clean=False)
    scores = train_clip(clip, tokenizer, pool, careless, num_steps=steps, seed=seed - 1)
    clip.save_pretrained(out)
    tokenizer.save_pretrained(out)
    finish(out, seed, started, {name: value for name, value in scores.items() if name != "seconds"})


@app.command("sharpen-text-encoder")
def sharpen_text_encoder(
    start: Annotated[Path, typer.Option(help="The CLIP of the text-encoder stage.")] = PARTS / "text_encoder",
    out: Out = PARTS / "text_encoder_sharp",
    vision_steps: VisionSteps = 500,
    steps: Steps = 600,
    renders: Renders = 30_000,
    seed: Seed = 2,
) -> None:
    """The same CLIP taught outlines and positions by hard negatives: in-batch contrast never needed them."""
    started = begin(seed)
    tokenizer, pool = build_tokenizer(), render_pool(renders, seed=seed + 21, two_objects=0.3)
    clip = ClipTowers(start).clip.requires_grad_(True)
    teacher = Teacher(clip, pool, None)
    train_vision(clip, teacher, pool, num_steps=vision_steps, lr=1e-3, seed=seed + 22)
    train_contrast(clip, tokenizer, teacher, pool, num_steps=steps, lr=1e-3, seed=seed + 23)
    clip.save_pretrained(out)
    tokenizer.save_pretrained(out)
    scores = hard_negative_accuracy(ClipScore(out).towers, render_pool(1000, seed + 24, held_out=True), seed + 25)
    finish(out, seed, started, scores)


@app.command("reward-clip")
def make_reward_clip(
    out: Out = WEIGHTS / "reward_clip",
    vision_steps: VisionSteps = 1000,
    steps: Steps = 500,
    start: Annotated[Path | None, typer.Option(help="Continue from this CLIP; give another seed too.")] = None,
    renders: Renders = 30_000,
    seed: Seed = 8001,
) -> None:
    """The alignment reward: a CLIP of clean captions and hard negatives that also keeps quality."""
    started = begin(seed)
    tokenizer, pool = build_tokenizer(), render_pool(renders, seed=seed, two_objects=0.35)
    before = json.loads((start / "scores.json").read_text()) if start else None
    clip = ClipTowers(start).clip.requires_grad_(True) if start else build_clip(tokenizer, width=96, num_layers=3)
    teacher = Teacher(clip, pool, rate(pool.scenes, seed + 1))
    train_vision(clip, teacher, pool, num_steps=vision_steps, seed=seed + 2)
    train_contrast(clip, tokenizer, teacher, pool, num_steps=steps, seed=seed + 5)
    _save_clip(clip, out)
    held_out = render_pool(1000, seed + 3, held_out=True)
    scores = hard_negative_accuracy(ClipScore(out).towers, held_out, seed + 4)
    finish(out, seed, started, scores, continued=before)


@app.command("aesthetic")
def make_aesthetic(
    out: Out = WEIGHTS / "aesthetic",
    clip: Annotated[str, typer.Option(help="The CLIP below, relative to --out.")] = "../reward_clip",
    steps: Steps = 3000,
    renders: Renders = 20_000,
    seed: Seed = 9001,
) -> None:
    """The style reward: a head on the reward CLIP's image embedding, trained on noisy ratings."""
    started = begin(seed)
    out.mkdir(parents=True, exist_ok=True)
    towers = ClipScore(out / clip).towers
    pool, held_out = render_pool(renders, seed=seed), render_pool(2000, seed + 1, held_out=True)
    features = image_embeddings(towers, pool, torch.Generator().manual_seed(seed + 2))
    head = train_head(features, rate(pool.scenes, seed + 3), hidden=64, num_steps=steps, seed=seed + 4)
    head.save(out, clip=clip)
    held_out_features = image_embeddings(towers, held_out, None)
    finish(out, seed, started, score_head(Aesthetic(out).head, held_out_features, held_out.scenes))


@app.command("preference")
def make_preference(
    out: Out = WEIGHTS / "preference",
    vision_steps: VisionSteps = 800,
    steps: Steps = 300,
    choice_steps: Annotated[int, typer.Option(min=1, help="Updates on choices, after the contrastive ones.")] = 300,
    renders: Renders = 24_000,
    seed: Seed = 10_001,
) -> None:
    """The evaluation-only reward: another CLIP, tuned on choices between two images."""
    started = begin(seed)
    tokenizer, pool = build_tokenizer(), render_pool(renders, seed=seed, two_objects=0.35)
    clip = build_clip(tokenizer, width=96, num_layers=2)
    teacher = Teacher(clip, pool, None)
    train_vision(clip, teacher, pool, num_steps=vision_steps, seed=seed + 1)
    train_contrast(clip, tokenizer, teacher, pool, num_steps=steps, seed=seed + 3)
    choices = sample_choices(renders // 2, seed + 2)
    train_on_choices(clip, tokenizer, choices, num_steps=choice_steps, seed=seed + 10)
    _save_clip(clip, out)
    reward, held_out = PickScore(out), sample_choices(1500, seed + 11, held_out=True)
    first, second = (
        torch.cat(
            [reward(p.batch(torch.arange(i, i + 250)), held_out.prompts[i : i + 250]) for i in range(0, 1500, 250)]
        )
        for p in (held_out.first, held_out.second)
    )
    negatives = hard_negative_accuracy(reward.towers, held_out.first, seed + 20)
    finish(out, seed, started, {**score_choices(first, second, held_out), **negatives})


@app.command("assemble")
def make_untrained(
    out: Out = PARTS / "untrained",
    text_encoder: Annotated[Path, typer.Option(help="The CLIP whose text tower conditions.")] = PARTS
    / "text_encoder_sharp",
    unet: Annotated[Path | None, typer.Option(help="Run folder whose averaged UNet to start from.")] = None,
    seed: Seed = 0,
) -> None:
    """The base model's pipeline before training: what `recipes/micro_base.toml` starts from."""
    assemble(PARTS / "autoencoder", text_encoder, out, seed, unet)


@app.command("pairs")
def make_pairs(out: Out = PARTS / "pairs", num: int = 100_000, seed: Seed = 1) -> None:
    """Captioned renders as latents in Parquet, by Ray Data: what the UNet learns from."""
    write_pairs(PARTS / "untrained", out, num=num, seed=seed)


@app.command("prompts")
def make_prompts(out: Out = Path("platform/craftor_micro/prompts")) -> None:
    """Training prompts and held-out prompts."""
    write_prompts(out)


@app.command("base")
def make_base(
    trained: Annotated[Path, typer.Option(help="Run folder of recipes/micro_base.toml.")] = Path("runs/micro-base"),
    out: Out = WEIGHTS / "base",
) -> None:
    """The trained pipeline in half precision, with what the referee says of its images."""
    export(PARTS / "untrained", trained, PARTS / "autoencoder", out)
    scores = score_base(out, WEIGHTS / "referee", Path("platform/craftor_micro/prompts/held_out.jsonl"))
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


def _save_clip(clip: CLIPModel, out: Path) -> None:
    """Half precision in Hugging Face layout, with its tokenizer."""
    clip.half().save_pretrained(out)
    build_tokenizer().save_pretrained(out)


if __name__ == "__main__":
    app()
