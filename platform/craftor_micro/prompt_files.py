"""The prompts that ship with the micro world: training ones as plain text, held-out ones with what they claim."""

import json
from pathlib import Path

from craftor_micro.captions import describe
from craftor_micro.pool import captions
from craftor_micro.world import Scenes, sample_scenes

TWO_OBJECTS = 0.25


def write_prompts(
    folder: Path, *, num_train: int = 4000, num_held_out: int = 400, num_search: int = 128, seed: int = 90
) -> None:
    """`train_prompts.txt`, one a line; `held_out.jsonl` with the `description` that the referee judges by.

    `search.jsonl` is of the same form, to choose among encoders by: of the combinations seen in training, and of
    prompts that are neither trained on nor held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes(num_train, seed, two_objects=TWO_OBJECTS)
    lines = captions(scenes, seed, clean=True)
    (folder / "train_prompts.txt").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    scenes = sample_scenes(num_held_out, seed + 1, held_out=True, two_objects=TWO_OBJECTS)
    held_out = _claims(scenes, seed + 1)
    (folder / "held_out.jsonl").write_text("\n".join(line for _, line in held_out) + "\n")
    others = dict(_claims(sample_scenes(2 * num_search, seed + 2, two_objects=TWO_OBJECTS), seed + 2))
    used = {*lines, *(prompt for prompt, _ in held_out)}
    fresh = [line for prompt, line in others.items() if prompt not in used]
    (folder / "search.jsonl").write_text("\n".join(fresh[:num_search]) + "\n")


def _claims(scenes: Scenes, seed: int) -> list[tuple[str, str]]:
    """Each prompt, and the JSON line that has it."""
    rows = zip(captions(scenes, seed, clean=True), describe(scenes), strict=True)
    return [(prompt, json.dumps({"prompt": prompt, "description": claim.to_json()})) for prompt, claim in rows]
