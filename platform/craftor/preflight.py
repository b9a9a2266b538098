"""Checks that need neither model nor cluster: run before anything is loaded or started."""

import csv
import io
import json
import re
from pathlib import Path

import fsspec

from craftor import held_out
from craftor.locate import locate
from craftor.object_settings import ShownObject
from craftor.recipe import Data, DirectTuning, ObjectEncoder, Recipe, RecipeError, RewardTuning

_PROBE_BYTES = 1 << 20
# Written out here so that a misspelt recipe is refused in a moment, without importing torch or Ray; tests hold these
# equal to `craftor_rewards.REWARDS` and `prompts.FORMATS`.
REWARD_KINDS = ("aesthetic", "clip_score", "compressibility", "hps", "http", "image_reward", "pick_score")
FORMATS = (".csv", ".jsonl", ".parquet", ".tsv", ".txt")


def check(recipe: Recipe, source: Path) -> None:
    """Raise `RecipeError` naming the recipe file and the key whose value cannot work."""
    with _naming(source):
        check_model(recipe.model.path)
        if recipe.model.text_encoder is not None and not Path(recipe.model.text_encoder).is_dir():
            raise ValueError(f"model.text_encoder = {recipe.model.text_encoder!r}: no such folder")
        if isinstance(recipe.task, RewardTuning | DirectTuning):
            for name, reward in recipe.task.rewards.items():
                check_reward(f"task.rewards.{name}", reward.kind, reward.weights)
        if isinstance(recipe.task, ObjectEncoder):
            if not Path(locate(recipe.task.image_encoder)).is_dir():
                check_hub_id("task.image_encoder", recipe.task.image_encoder, "config.json")
            if recipe.task.adapter is not None and not Path(recipe.task.adapter).is_file():
                raise ValueError(f"task.adapter = {recipe.task.adapter!r}: no such file")
            if recipe.task.features is not None:
                check_weights("task.features.weights", recipe.task.features.weights)
        if isinstance(recipe.task, RewardTuning) and recipe.task.shown is not None:
            check_shown(recipe.task.shown)
        if isinstance(recipe.task, RewardTuning):
            check_prompts("data", recipe.data)
        elif not list(Path(locate(recipe.data.path)).glob("*.parquet")):
            raise ValueError(f"data.path = {recipe.data.path!r}: no folder with Parquet files of image-caption pairs")
        if recipe.evaluation is not None:
            held_out.read("evaluation", recipe.evaluation.prompts, recipe.evaluation.num_prompts)
        if recipe.validation is not None:
            held_out.read("validation", recipe.validation.prompts, recipe.validation.num_prompts)


def check_shown(shown: ShownObject) -> None:
    """The object encoder is a run or a bundle, and the references are Parquet."""
    if not any((Path(shown.encoder) / name).is_file() for name in ("recipe.toml", "encoder.toml")):
        raise ValueError(f"task.shown.encoder = {shown.encoder!r}: no run and no bundle of an object encoder there")
    if not list(Path(shown.references).glob("*.parquet")):
        raise ValueError(f"task.shown.references = {shown.references!r}: no folder with Parquet files of references")
    if shown.identity is not None:
        check_weights("task.shown.identity.weights", shown.identity.weights)


def check_model(path: str) -> None:
    """A local folder must be a pipeline; anything that looks like a path must exist; the rest is a hub id."""
    folder = Path(locate(path))
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"model.path = {path!r}: a folder but not a pipeline (no model_index.json in it)")
    if not folder.is_dir():
        check_hub_id("model.path", path, "model_index.json")


def check_hub_id(key: str, path: str, file: str) -> None:
    """`owner/name` may be a hub id; while the hub is offline it must be in the local cache."""
    if path.startswith((".", "/", "~", "runs/")) or path.count("/") != 1:
        raise ValueError(f"{key} = {path!r}: no such folder; allowed: a folder, micro:NAME, or a hub id")
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(path, file), str):
        raise ValueError(
            f"{key} = {path!r}: no such folder, not in the local hub cache, and HF_HUB_OFFLINE is set; "
            f"fetch it where there is a network with: hf download {path}"
        )


def check_reward(key: str, kind: str, weights: str) -> None:
    """Weights are a folder or file, a short name of `craftor_rewards.CATALOGUE`, or a hub id; some kinds have none."""
    if ":" in kind or kind in ("compressibility", "http"):
        return  # the reward's own class judges what its weights mean
    if kind not in REWARD_KINDS:
        raise ValueError(
            f"{key}.kind: unknown reward {kind!r}; available: {', '.join(REWARD_KINDS)}, or module:attr of your own"
        )
    check_weights(f"{key}.weights", weights)


def check_weights(key: str, weights: str) -> None:
    if not Path(locate(weights)).exists() and not is_catalogued(key, weights):
        check_hub_id(key, weights, "config.json")


def is_catalogued(key: str, weights: str) -> bool:
    """Whether public weights go by this short name. Raises ValueError where they are to be fetched and cannot be."""
    if not re.fullmatch(r"[a-z0-9.-]+", weights):
        return False
    from huggingface_hub import constants

    from craftor_rewards.catalogue import CATALOGUE

    if weights not in CATALOGUE:
        raise ValueError(f"{key} = {weights!r}: no such folder; allowed: a folder, a hub id, {', '.join(CATALOGUE)}")
    if constants.HF_HUB_OFFLINE:
        from craftor_rewards.loading import is_here

        if not is_here(weights):
            raise ValueError(
                f"{key} = {weights!r}: not on this machine, and HF_HUB_OFFLINE is set; fetch it where there is a "
                f"network with: craftor rewards fetch {weights}"
            )
    return True


def check_prompts(key: str, data: Data) -> None:
    """The file exists, has the column, is UTF-8 and has at least one prompt in its first mebibyte."""
    source = locate(data.path)
    suffix = Path(source.split("?")[0]).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{key}.path = {data.path!r}: unknown format; allowed: {', '.join(FORMATS)}")
    try:
        with fsspec.open(source, "rb") as file:
            if suffix == ".parquet":
                import pyarrow.parquet

                columns, empty = pyarrow.parquet.read_schema(file).names, False
            else:
                columns, empty = _probe(f"{key}.path = {data.path!r}", suffix, file.read(_PROBE_BYTES))
    except FileNotFoundError:
        raise ValueError(f"{key}.path = {data.path!r}: no such file") from None
    except (OSError, ImportError) as error:  # away or forbidden; no package for its scheme
        raise ValueError(f"{key}.path = {data.path!r}: {error}") from None
    if empty:
        raise ValueError(f"{key}.path = {data.path!r}: holds no prompt")
    if suffix != ".txt" and data.column not in columns:
        raise ValueError(f"{key}.column = {data.column!r}: not in {data.path}; columns there: {', '.join(columns)}")


def _probe(where: str, suffix: str, head: bytes) -> tuple[list[str], bool]:
    """Column names, and whether no row follows them."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < _PROBE_BYTES:
            raise ValueError(
                f"{where}: not UTF-8 at byte {error.start} (0x{head[error.start]:02x}); convert it, by iconv say"
            ) from None
        text = head[: error.start].decode("utf-8")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return [], True
    if suffix == ".txt":
        return ["prompt"], False
    if suffix == ".jsonl":
        try:
            return list(json.loads(lines[0])), False
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: line 1 is not JSON: {error}") from None
    header = next(csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
    return header, len(lines) == 1


class _naming:
    """Turn a ValueError about a value into a RecipeError that also names the recipe file."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, RecipeError):
            raise RecipeError(f"{self.source}: {error}") from None
