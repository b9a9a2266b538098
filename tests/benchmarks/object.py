"""An object encoder on held-out identities -> `runs/bench/object.json`: the steady gauges, and what it draws.

`python -m benchmarks.object RUN [--self-pairs RUN]`. Losses are on fixed noise; pictures are judged by the
identity scorer and, for what their prompts say, by the referee, neither of which shares anything with the encoder.
`text_only` is the same model with the object off.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import write
from craftor import seeds
from craftor.customize import Customizer, Guidance, load
from craftor.locate import locate
from craftor.object_gauges import HeldOut, gauge
from craftor.pictures import save_sheet
from craftor_micro.captions import Description, describe
from craftor_micro.identity import IdentityScorer
from craftor_micro.identity_training import draw_identities
from craftor_micro.object_render import cut_out, render_views
from craftor_micro.objects import Views, sample_views, scene_captions
from craftor_micro.referee import Referee

SEED, BATCH = 5, 25
WITHOUT_COLOUR = ("count", "shape", "size", "position", "background", "texture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--self-pairs", type=Path, help="A run on pairs whose reference is the target.")
    parser.add_argument("--gauged", type=int, default=256, help="Held-out pictures for the losses.")
    parser.add_argument("--drawn", type=int, default=100, help="Held-out identities drawn into new scenes; 0 for none.")
    parser.add_argument("--object-weight", type=float, default=4.0)
    parser.add_argument("--text-weight", type=float, default=4.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    customizer, _ = load(arguments.run)
    held_out = held_out_pictures(arguments.gauged)
    found = gauge(customizer, held_out, SEED)
    figures = {name: value for name, value in found.items() if isinstance(value, float)}
    details: dict = {name: value for name, value in found.items() if isinstance(value, dict)}
    if arguments.self_pairs:
        other = gauge(load(arguments.self_pairs)[0], held_out, SEED)
        figures["copy_gap_self_pairs"] = other["copy_gap"]
        details["self_pairs"] = other
    if arguments.drawn:
        guidance = Guidance(20, arguments.text_weight, arguments.object_weight)
        figures |= draw(customizer, arguments.drawn, guidance, arguments.run / "customized.png")
    details["run"] = str(arguments.run)
    path = write("object", figures=figures, details=details, started=started)
    print(json.dumps(figures, indent=2), path)


def held_out_pictures(num: int) -> HeldOut:
    """Views of held-out identities with other views of them, on the neutral fill."""
    views, others = _two_views(num, SEED)
    rendered = render_views(views, SEED)
    return HeldOut(
        rendered.images, rendered.masks, scene_captions(views, SEED), cut_out(render_views(others, SEED + 1))
    )


@torch.no_grad()
def draw(customizer: Customizer, num: int, guidance: Guidance, sheet: Path) -> dict[str, float]:
    """Each held-out identity in the scene of another view of it; shares of pictures that show both as they should."""
    views, others = _two_views(num, SEED + 100)
    references = cut_out(render_views(others, SEED + 101))
    prompts, described = scene_captions(views, SEED + 102), describe(views.scenes)
    noise = seeds.normal(SEED, range(num), "drawn", customizer.diffuser.latent_shape)
    scorer, referee = IdentityScorer.load(locate("micro:identity")), Referee.load(locate("micro:referee"))
    figures: dict[str, float] = {}
    pictures: dict[str, Tensor] = {}
    for name, shown in (("", references), ("_text_only", None)):
        made = torch.cat(
            [
                customizer.generate(
                    [prompts[i] for i in rows], None if shown is None else shown[rows], noise[rows], guidance
                ).clamp(0, 1)
                for rows in torch.arange(num).split(BATCH)
            ]
        )
        pictures[name] = made
        for key, value in scorer.judge(made, views.attributes()).items():
            figures[f"{key}_accuracy{name}"] = value.mean().item()
        judged = referee.judge(made, [_without_colour(description) for description in described])
        said = torch.stack([judged[key] for key in ("size", "position", "background", "texture")])
        figures[f"prompt_accuracy{name}"] = (said == 1).all(0).float().mean().item()
        for key in WITHOUT_COLOUR:
            figures[f"prompt_{key}{name}"] = judged[key].nanmean().item()
        read = referee.read(made).descriptions
        for key, of in (("layout", "position"), ("background", "background")):
            figures[f"copied_{of}{name}"] = _copied(read, described, describe(others.scenes), key)
    rows = torch.stack(
        [references[:16], pictures[""][:16], pictures["_text_only"][:16], render_views(views).images[:16]]
    )
    save_sheet(rows.flatten(0, 1), sheet, columns=16)
    return figures


def _copied(read: list[Description], asked: list[Description], shown: list[Description], key: str) -> float:
    """How often a picture has an attribute of the reference where its prompt asks for another; chance is one in all."""
    pairs = [
        getattr(seen, key) == getattr(reference, key)
        for seen, prompt, reference in zip(read, asked, shown, strict=True)
        if getattr(prompt, key) != getattr(reference, key)
    ]
    return sum(pairs) / len(pairs)


def _without_colour(description: Description) -> Description:
    return replace(description, objects=(replace(description.objects[0], colour=None),))


def _two_views(num: int, seed: int) -> tuple[Views, Views]:
    identity = draw_identities(num, seed, held_out=True)
    return sample_views(identity, seed + 1), sample_views(identity, seed + 2)
