"""An object encoder on held-out identities -> `runs/bench/object.json`: the steady gauges, and what it draws.

`python -m benchmarks.object RUN [--self-pairs RUN] [--adapter-only RUN] [--plain-cnn RUN] [--no-captions RUN]`.
Losses are on fixed noise.
Pictures are compared on the same references, prompts and noise: of the encoder, of the same model with the object off
(`text_only`), of other runs, and of Textual Inversion and DreamBooth, which are fitted to `N` objects each.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import per_object
from benchmarks.harness import write
from benchmarks.object_drawing import BATCH, Asked, Judges, Scores, asked, in_batches, without_position
from benchmarks.object_page import write_page
from craftor import checkpoint
from craftor.claims.effects import Effect, verdict_of
from craftor.customize import Customizer, Guidance, load
from craftor.locate import locate
from craftor.object_gauges import HeldOut, gauge
from craftor.pictures import save_sheet
from craftor.recipe import load_run
from craftor.statistics import mean, paired
from craftor_micro.captions import Description
from craftor_micro.identity_training import draw_identities
from craftor_micro.object_render import cut_out, render_views
from craftor_micro.objects import sample_views, scene_captions

SEED, VIEWS = 5, 4
"""`VIEWS`: pictures that a per-object method gets of each object; an encoder gets one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--self-pairs", type=Path, help="A run on pairs whose reference is the target.")
    parser.add_argument("--adapter-only", type=Path, help='A run with task.unet = "frozen".')
    parser.add_argument("--plain-cnn", type=Path, help="A run whose image encoder is a plain convolutional classifier.")
    parser.add_argument("--no-captions", type=Path, help="A run on pairs whose captions say nothing.")
    parser.add_argument("--gauged", type=int, default=256, help="Held-out pictures for the losses.")
    parser.add_argument("--drawn", type=int, default=200, help="Held-out identities, each drawn into one scene.")
    parser.add_argument("--fitted", type=int, default=10, help="Of them Textual Inversion and DreamBooth learn; or 0.")
    parser.add_argument("--scenes", type=int, default=10, help="Scenes for each of these.")
    parser.add_argument("--object-weight", type=float, default=4.0)
    parser.add_argument("--text-weight", type=float, default=4.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    runs = {
        "": arguments.run,
        "_no_cross_reference": arguments.self_pairs,
        "_adapter_only": arguments.adapter_only,
        "_plain_cnn": arguments.plain_cnn,
        "_no_captions": arguments.no_captions,
    }
    customizers = {name: load(run) for name, run in runs.items() if run is not None}
    guidance = Guidance(20, arguments.text_weight, arguments.object_weight)
    figures, details = gauges(customizers, held_out_pictures(arguments.gauged))
    _tell(figures, started)
    details["runs"] = {name or "run": _trained(run) for name, run in runs.items() if run is not None}
    details["guidance"] = asdict(guidance)
    judges = Judges()
    scores, more = drawings(customizers, arguments.drawn, guidance, judges, arguments.run)
    figures |= more
    _tell(more, started)
    fitted: dict[str, Scores] = {}
    if arguments.fitted:
        fitted, more = per_object_methods(customizers[""], arguments.fitted, arguments.scenes, guidance, judges)
        figures |= more
        _tell(more, started)
    figures["base_accuracy_change"] = base_accuracy_change(customizers[""], judges)
    details["compared"] = comparisons(scores, fitted, arguments.scenes) + costs(figures)
    path = write("object", figures=figures, details=details, started=started)
    print(json.dumps({**figures, "compared": details["compared"]}, indent=2), path)


def held_out_pictures(num: int) -> HeldOut:
    """Views of held-out identities with other views of them, on the neutral fill."""
    identity = draw_identities(num, SEED, held_out=True)
    views, others = sample_views(identity, SEED + 1), sample_views(identity, SEED + 2)
    rendered = render_views(views, SEED)
    return HeldOut(
        rendered.images, rendered.masks, scene_captions(views, SEED), cut_out(render_views(others, SEED + 1))
    )


def gauges(customizers: Mapping[str, Customizer], held_out: HeldOut) -> tuple[dict[str, float], dict[str, Any]]:
    """Losses of the main run; of the others the losses as details and the copy gap as a figure."""
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, customizer in customizers.items():
        found = gauge(customizer, held_out, SEED)
        details[f"gauges{name}"] = found
        if name == "":
            figures |= {key: value for key, value in found.items() if isinstance(value, float)}
    if "_no_cross_reference" in customizers:
        figures["copy_gap_self_pairs"] = details["gauges_no_cross_reference"]["copy_gap"]
    return figures, details


def drawings(
    customizers: Mapping[str, Customizer], num: int, guidance: Guidance, judges: Judges, run: Path
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Each of `num` objects in one scene, by every run and with the object off; a sheet of some beside the run."""
    of = asked(num, 1, SEED + 100, customizers[""].diffuser.latent_shape)
    draw = {name: _by(customizer, of, guidance) for name, customizer in customizers.items()}
    draw["_text_only"] = _by(customizers[""], of, guidance, shown=False)
    made = {name: in_batches(function, num) for name, function in draw.items()}
    scores = {name: judges(pictures, of) for name, pictures in made.items()}
    columns = [of.references, *made.values(), render_views(of.views).images]
    save_sheet(torch.stack([column[:12] for column in columns]).flatten(0, 1), run / "customized.png", columns=12)
    figures = {f"{key}_accuracy{name}": float(np.nanmean(s[key])) for name, s in scores.items() for key in ACCURACIES}
    figures |= {f"{key}{name}": float(np.nanmean(s[key])) for name, s in scores.items() for key in COPIED}
    for name in customizers:
        silent = without_position(of)
        pictures = in_batches(_by(customizers[name], silent, guidance), num)
        figures[f"position_correlation{name}"] = judges.position_correlation(pictures, silent)
    return scores, figures


ACCURACIES = ("identity", "shape", "colour", "second_colour", "pattern", "near_identical", "prompt")
COPIED = ("copied_position", "copied_background")


def per_object_methods(
    customizer: Customizer, num: int, scenes: int, guidance: Guidance, judges: Judges
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Textual Inversion and DreamBooth, fitted to some pictures of each object, and the encoder, on the same scenes."""
    of = asked(num, scenes, SEED + 200, customizer.diffuser.latent_shape)
    # Not the reference, and none of the scenes that are asked for.
    views = sample_views(of.views.identity()[::scenes].repeat_interleave(VIEWS), SEED + 300)
    images, captions = render_views(views, SEED + 301).images, scene_captions(views, SEED + 302)
    began = time.process_time()
    made = {"": in_batches(_by(customizer, of, guidance), len(of))}
    seconds = {"": (time.process_time() - began) / num}
    figures: dict[str, float] = {}
    for name, fit in METHODS.items():
        pictures, taken, stored = [], 0.0, 0
        for i in range(num):
            own, rows = slice(i * VIEWS, (i + 1) * VIEWS), slice(i * scenes, (i + 1) * scenes)
            fitted = fit(customizer.diffuser, per_object.Pictures(images[own], captions[own]), seed=SEED + i)
            began = time.process_time()
            pictures.append(fitted.draw(of.prompts[rows], of.noise[rows]))
            taken += fitted.seconds + time.process_time() - began
            stored = fitted.num_bytes
            figures[f"fit_seconds{name}"] = figures.get(f"fit_seconds{name}", 0.0) + fitted.seconds / num
        made[name] = torch.cat(pictures).clamp(0, 1)
        seconds[name] = taken / num
        figures[f"bytes_per_object{name}"] = stored
    encoding = _encoding_seconds(customizer, of)
    figures |= {f"seconds_per_object{name}": figures.get(f"fit_seconds{name}", encoding) for name in made}
    figures |= {f"seconds_with_pictures{name}": value for name, value in seconds.items()}
    figures["bytes_per_object"] = 0.0
    scores = {name: judges(pictures, of) for name, pictures in made.items()}
    # The encoder's figures on these few objects are details: its own are those of more.
    figures |= {
        f"{key}_accuracy{name or '_on_fitted'}": float(np.nanmean(s[key]))
        for name, s in scores.items()
        for key in ACCURACIES
    }
    text_only = in_batches(_by(customizer, of, guidance, shown=False), len(of))
    _page(of, made | {"_text_only": text_only}, scores | {"_text_only": judges(text_only, of)}, figures, scenes)
    return scores, {name: value for name, value in figures.items() if not name.startswith("fit_seconds")}


TITLES = {
    "_text_only": "text only",
    "": "object encoder",
    "_textual_inversion": "Textual Inversion",
    "_dreambooth": "DreamBooth",
}


def _page(
    of: Asked, made: Mapping[str, Tensor], scores: Mapping[str, Scores], figures: Mapping[str, float], scenes: int
) -> None:
    """The methods beside text alone, for whoever would rather look."""
    costs = {
        name: f"{figures[f'seconds_per_object{name}']:.3g} s, {figures[f'bytes_per_object{name}'] / 1e6:.3g} MB"
        for name in made
        if name != "_text_only"
    } | {"_text_only": "nothing"}
    pictures, scores, costs = ({title: by[name] for name, title in TITLES.items()} for by in (made, scores, costs))
    write_page(Path("runs/bench/object.html"), of, pictures, scores, costs, per_object=scenes)


METHODS: dict[str, Callable[..., per_object.Fitted]] = {
    "_textual_inversion": per_object.textual_inversion,
    "_dreambooth": per_object.dreambooth,
}


def base_accuracy_change(customizer: Customizer, judges: Judges, num: int = 200) -> float:
    """What the referee reads with the object off, less what it reads of the base, on held-out one-object prompts."""
    lines = Path(locate("micro:held_out.jsonl")).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["description"]["objects"]) == 1][:num]
    described, prompts = [Description.from_json(row["description"]) for row in rows], [row["prompt"] for row in rows]
    of = asked(len(rows), 1, SEED + 400, customizer.diffuser.latent_shape)
    tuned = in_batches(
        lambda r: customizer.generate([prompts[i] for i in r], None, of.noise[r], Guidance(20, 4.0, 4.0)), len(rows)
    )
    base = in_batches(lambda r: per_object.drawn(customizer.diffuser, [prompts[i] for i in r], of.noise[r]), len(rows))
    after, before = (judges.referee.judge(made, described)["accuracy"].mean().item() for made in (tuned, base))
    return after - before


def comparisons(scores: Mapping[str, Scores], fitted: Mapping[str, Scores], scenes: int) -> list[dict[str, Any]]:
    """What the method claims, each with the paired difference, its interval over objects, and a verdict."""
    rows = []
    for said, other, keys in CLAIMED:
        found, per = (scores, 1) if other in scores else (fitted, scenes)
        if other not in found:
            rows.append({"said": said, "verdict": "undecided", "reason": "not measured"})
            continue
        for key in keys:
            base, own = (found[name][key].reshape(-1, per) for name in (other, ""))
            compared = paired(base, own)
            effect = Effect(compared["delta"], tuple(compared["ci95"]))
            row = {"said": said, "metric": key, "encoder": compared["tuned"], "other": compared["base"]}
            rows.append({**row, **asdict(effect), "verdict": verdict_of(effect, "above")})
    rows.append(
        {"said": "the encoder's own", **{key: mean(scores[""][key][:, None]) for key in ("identity", "prompt")}}
    )
    return rows


def costs(figures: Mapping[str, float]) -> list[dict[str, Any]]:
    """What a new object takes, against the quicker and the smaller of the methods that are fitted to each."""
    rows = []
    for said, key, times in (
        ("one pass takes a hundredth of the time", "seconds_per_object", 100),
        ("what is stored does not grow with objects", "bytes_per_object", 1),
    ):
        others = [figures[f"{key}{name}"] for name in METHODS if f"{key}{name}" in figures]
        if others:
            own, other = figures[key], min(others)
            verdict = "holds" if other > 0 and other >= times * own else "does not hold"
            rows.append({"said": said, "metric": key, "encoder": own, "other": other, "verdict": verdict})
    return rows


CLAIMED = (
    ("one pass beats text alone", "_text_only", ("identity",)),
    ("one pass beats Textual Inversion", "_textual_inversion", ("identity", "prompt")),
    ("one pass beats DreamBooth", "_dreambooth", ("identity", "prompt")),
    ("cross-reference beats self-pairs", "_no_cross_reference", ("identity", "prompt")),
    ("the whole network beats the adapter alone", "_adapter_only", ("identity", "prompt")),
    ("a CLIP beats a plain convolutional classifier", "_plain_cnn", ("identity", "prompt")),
    ("captions of the scene beat none", "_no_captions", ("identity", "prompt")),
)


def _by(customizer: Customizer, of: Asked, guidance: Guidance, shown: bool = True) -> Callable[[Tensor], Tensor]:
    return lambda rows: customizer.generate(
        [of.prompts[i] for i in rows], of.references[rows] if shown else None, of.noise[rows], guidance
    )


def _tell(figures: Mapping[str, float], started: float) -> None:
    """A part takes minutes: what it found is shown at once."""
    print(
        f"{time.perf_counter() - started:.0f} s", json.dumps({k: round(v, 4) for k, v in figures.items()}), flush=True
    )


def _trained(run: Path) -> dict[str, Any]:
    """Which run it is, and how far it went: one that was stopped has fewer steps than its recipe."""
    last, recipe = checkpoint.latest(run), load_run(run)
    assert last is not None
    asked_for = {"num_steps": recipe.run.num_steps, "batch_size": recipe.run.batch_size}
    return {"run": str(run), "step": checkpoint.step_of(last), **asked_for}


def _encoding_seconds(customizer: Customizer, of: Asked) -> float:
    """Of the processor, for one reference to its tokens: all that an encoder does for a new object."""
    references = of.references[:BATCH]
    customizer.encoder(references[:1])
    began = time.process_time()
    for reference in references:
        customizer.encoder(reference[None])
    return (time.process_time() - began) / len(references)


if __name__ == "__main__":
    main()
