"""Commands on folders that are not what they expect: one line that says so, and no traceback."""

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from craftor import adopt, customize, registry
from craftor.commands import objects, training
from craftor.contact import shortened
from craftor.description import OBJECT_ENCODER
from craftor.prompts import Prepared
from craftor.quickstart import evaluate_runs
from craftor.recipe import Recipe, RecipeError, load
from craftor.registry import BundleError
from craftor.tracking import Tracker

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("name", ["micro_object_encoder.toml", "micro_base.toml"])
def test_what_no_reward_has_tuned_is_not_evaluated(tmp_path: Path, name: str) -> None:
    shutil.copy(RECIPES / name, tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=r"task\.kind = .*; what is evaluated here is what was tuned by reward"):
        evaluate_runs([tmp_path], tmp_path / "out", 1)


@pytest.mark.parametrize("as_markdown", [False, True])
def test_a_run_without_a_report_has_none_to_draw(tmp_path: Path, as_markdown: bool) -> None:
    with pytest.raises(RecipeError, match=r"no report\.json in it, which craftor quickstart writes"):
        training.report(tmp_path, as_markdown)


def test_a_bundle_whose_base_is_elsewhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = {"kind": OBJECT_ENCODER, "base": {"model": "/another/machine/base"}}
    monkeypatch.setattr(registry, "verify_bundle", lambda _: None)
    monkeypatch.setattr(registry, "description_of", lambda _: description)
    (tmp_path / "encoder.toml").touch()
    with pytest.raises(RecipeError, match="the base of .* is not here: .*/another/machine/base"):
        customize.load(tmp_path)


@pytest.mark.parametrize("name", ["../../elsewhere", "/home/me/model", "style/v2", ""])
def test_a_bundle_has_a_name_that_is_no_path(tmp_path: Path, name: str) -> None:
    """Exported files are called by it."""
    window = "[window]\nfirst_timestep = 9\nlast_timestep = 0\n"
    base = '[base]\nmodel = "micro:base"\ntext_encoder_sha256 = "0"\n'
    (tmp_path / "encoder.toml").write_text(f'name = "{name}"\n{window}{base}')
    with pytest.raises(BundleError, match="a name has letters, digits and"):
        registry.description_of(tmp_path)


@pytest.mark.ray
def test_an_actors_mistake_is_one_line(cluster: None, tmp_path: Path) -> None:
    """What is wrong with the settings shows in an actor, and Ray tells at length how it got here."""
    (tmp_path / "photos" / "cup").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "cup" / "1.png")
    settings = tmp_path / "settings.toml"
    settings.write_text(f'images = "{tmp_path}/photos"\n[captioner]\nmodel = "nobody/captions"\n')
    with pytest.raises(RecipeError) as error:
        objects.describe(settings, tmp_path / "out")
    said = str(error.value)
    assert said.startswith(f"{settings}: ValueError: captioner.model = 'nobody/captions': no model there")
    assert "hf download nobody/captions" in said and "\n" not in said


def test_a_run_that_is_adopted_without_its_data_claims_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(RECIPES / "micro_object_encoder.toml", {"data.path": str(tmp_path / "elsewhere")})
    told: list[Prepared | None] = []

    class Entered(Exception):  # noqa: N818  # the way out, and no error
        pass

    def start(connected: object, recipe: Recipe, prepared: Prepared | None) -> Tracker:
        told.append(prepared)
        raise Entered

    monkeypatch.setattr(Tracker, "start", start)
    with pytest.raises(Entered):
        adopt._enter(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), recipe, tmp_path, {"digest": "b" * 64})
    assert told == [None]


def test_long_names_keep_both_ends() -> None:
    names = [f"textcraftor_aesthetic_seed_{seed}" for seed in (1, 2)]
    assert [shortened(name) for name in names] == ["textcraftor_…etic_seed_1", "textcraftor_…etic_seed_2"]
    assert shortened("short") == "short" and shortened("a" * 24) == "a" * 24
