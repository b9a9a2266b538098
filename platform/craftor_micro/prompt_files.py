"""The prompts that ship with the micro world: training ones as plain text, held-out ones with what they claim."""

import json
from pathlib import Path

from craftor_micro.captions import describe
from craftor_micro.pool import captions
from craftor_micro.world import sample_scenes

TWO_OBJECTS = 0.25


def write_prompts(folder: Path, *, num_train: int = 4000, num_held_out: int = 400, seed: int = 90) -> None:
    """`train_prompts.txt`, one a line, and `held_out.jsonl` with the `description` that the referee judges by."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(num_train, seed, two_objects=TWO_OBJECTS)
    lines = captions(scenes, seed, clean=True)
    (folder / "train_prompts.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    scenes = sample_scenes(num_held_out, seed + 1, held_out=True, two_objects=TWO_OBJECTS)
    rows = zip(captions(scenes, seed + 1, clean=True), describe(scenes), strict=True)
    held_out = [json.dumps({"prompt": prompt, "description": claim.to_json()}) for prompt, claim in rows]
    (folder / "held_out.jsonl").write_text("\n".join(held_out) + "\n")
