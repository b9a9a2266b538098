"""The stages of `craftor_micro.build` for objects with an identity: their scorer, and what an encoder learns from."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from craftor_micro.identity import IdentityScorer
from craftor_micro.identity_training import render_object_pool, score_identity_scorer, train_identity_scorer
from craftor_micro.object_pairs import write_object_pairs
from craftor_micro.object_render import render_views
from craftor_micro.objects import PATTERNS, identities, sample_views
from craftor_micro.plain_cnn import PlainCnn
from craftor_micro.pool import render_pool
from craftor_micro.referee_training import train_referee
from craftor_micro.stages import PARTS, WEIGHTS, Out, Renders, Seed, Steps, begin, finish
from craftor_micro.world import COLOURS, SHAPES

app = typer.Typer()


@app.command("identity")
def make_identity_scorer(
    out: Out = WEIGHTS / "identity",
    steps: Steps = 1300,
    start: Annotated[Path | None, typer.Option(help="Continue from this scorer; give another seed too.")] = None,
    renders: Renders = 15_000,
    seed: Seed = 11_001,
) -> None:
    """The identity scorer: which object of thousands is in an image."""
    started = begin(seed)
    before = json.loads((start / "scores.json").read_text()) if start else None
    scorer = IdentityScorer.load(start).requires_grad_(True) if start else IdentityScorer()
    train_identity_scorer(scorer, render_object_pool(renders, seed), num_steps=steps, seed=seed + 1)
    scorer.save(out)
    scores = score_identity_scorer(IdentityScorer.load(out), 1000, seed + 2)
    finish(out, seed, started, scores, continued=before)


@app.command("plain-cnn")
def make_plain_cnn(
    out: Out = PARTS / "plain_cnn", steps: Steps = 3000, renders: Renders = 50_000, seed: Seed = 15_001
) -> None:
    """A convolutional classifier of scenes: an image encoder to compare the CLIP's with, not shipped."""
    started = begin(seed)
    classifier = PlainCnn()
    train_referee(classifier, render_pool(renders, seed=seed, two_objects=0.5), num_steps=steps, seed=seed + 1)
    classifier.eval().resnet.save_pretrained(out)
    finish(out, seed, started, classifier.scores(render_pool(1000, seed=seed + 2, held_out=True)))


@app.command("object-pairs")
def make_object_pairs(
    out: Out = PARTS / "object_pairs",
    num: int = 48_000,
    domain_share: Annotated[float, typer.Option(help="Share of rows with an object.")] = 0.5,
    self_pairs: Annotated[bool, typer.Option(help="The reference is the target itself.")] = False,
    described: Annotated[bool, typer.Option(help="Captions say what is around an object.")] = True,
    workers: Annotated[int, typer.Option(help="Rendering processes.")] = 2,
    seed: Seed = 1,
) -> None:
    """What recipes/micro_object_encoder.toml learns from: objects with another view of each, and general renders."""
    write_object_pairs(
        WEIGHTS / "base",
        out,
        num=num,
        seed=seed,
        domain_share=domain_share,
        self_pairs=self_pairs,
        described=described,
        num_workers=workers,
    )


@app.command("object")
def draw_object(
    out: Annotated[Path, typer.Option(help="A PNG, transparent around the object.")] = Path("object.png"),
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "ring",
    seed: Seed = 1,
) -> None:
    """A picture of an object that no encoder was trained on, to put into new images."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r}; allowed: {', '.join(SHAPES)}")
    views = sample_views(identities(held_out=True), seed)
    (number, *_) = (views.scenes.shape[:, 0] == SHAPES.index(shape)).nonzero().flatten().tolist()
    view = views[number : number + 1]
    images, masks = render_views(view, seed)
    pixels = (torch.cat([images, masks], dim=1)[0] * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy(), "RGBA").save(out)
    _, colour, second, pattern = (int(value) for value in next(iter(zip(*view.attributes().values(), strict=True))))
    print(f"{out}: a {tuple(COLOURS)[colour]} {shape}, {PATTERNS[pattern]} in {tuple(COLOURS)[second]}")
