"""From a name to an encoder that may be used: versions pinned, bundles verified, what does not fit refused."""

import errno
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import tomli_w
import torch
from botocore.exceptions import ClientError
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from craftor import checkpoint, registry, tracking, trainable
from craftor.description import describe
from craftor.diffuser import Diffuser, load
from craftor.encoders import EncoderRefused, UnknownEncoder, load_encoder, resolve, versions
from craftor.recipe import Model, Recipe
from craftor.registry import BundleError
from craftor.train_settings import Part
from encoder_bundles import make_bundle, new_store, recipe_for, register, write_lora


@pytest.fixture
def connected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("CRAFTOR_CACHE", str(tmp_path / "cache"))
    return new_store(tmp_path / "runs")


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return recipe_for(tiny_recipe)


@pytest.fixture
def base(recipe: Recipe) -> Diffuser:
    return load(recipe.model)


@pytest.fixture
def bundle(recipe: Recipe, tmp_path: Path) -> Path:
    return make_bundle(recipe, tmp_path, seed=1)


def reseal(bundle: Path) -> None:
    """A manifest of what is there now, as someone would write who changes a bundle on purpose."""
    (bundle / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.digests(bundle)))


def test_names_become_versions(connected: MlflowClient, bundle: Path) -> None:
    for alias in ("candidate", "champion", "champion"):
        register(connected, bundle, "style", alias)
    register(connected, bundle, "detail")
    assert [resolve(connected, text).version for text in ("style", "style@candidate", "style/2")] == ["3", "1", "2"]
    found = resolve(connected, "models:/style@champion")
    assert (found.uri, found.aliases, found.run_id is None) == ("models:/style/3", ("champion",), False)
    assert [v.uri for v in versions(connected)][:2] == ["models:/detail/1", "models:/style/3"]
    for text, message in (
        ("stile", "no encoder 'stile' in the registry; there are: detail, style"),
        ("style@best", "of style there are: @champion, @candidate, /3, /2, /1"),
        ("style/4", "no encoder 'style/4' in the registry; of style"),
        ("style/3/weights", "expected name, name@alias or name/version"),
        ("st'yle", "expected name, name@alias or name/version"),
    ):
        with pytest.raises(UnknownEncoder, match=message):
            resolve(connected, text)
    connected.set_registered_model_alias("style", "champion", "1")
    assert load_uri(connected, "style@champion") == "models:/style/1"
    assert found.uri == "models:/style/3"  # an alias moves, what was resolved does not


def load_uri(connected: MlflowClient, text: str) -> str:
    return resolve(connected, text).uri


def test_an_encoder_is_loaded_once_from_the_store(connected: MlflowClient, bundle: Path, base: Diffuser) -> None:
    register(connected, bundle, "style", "champion")
    found = resolve(connected, "style@champion")
    encoder = load_encoder(found, base)
    assert (encoder.name, encoder.version, encoder.uri) == ("style", "1", "models:/style/1")
    assert (encoder.part, encoder.window, encoder.run_id) == ("text_encoder", (499, 0), found.run_id)
    assert encoder.sha256 == found.tags["craftor.sha256"] == load_encoder(bundle, base).sha256
    assert not encoder.module.training and not any(p.requires_grad for p in encoder.module.parameters())
    stored = load_file(bundle / "text_encoder" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in encoder.module.state_dict().items())

    store = Path(connected.get_experiment_by_name("craftor").artifact_location.removeprefix("file://"))
    (weights,) = store.rglob("model.safetensors")
    weights.unlink()
    assert load_encoder(found, base).sha256 == encoder.sha256


@pytest.mark.parametrize(("steps", "first", "last"), [((0, 2), 999, 500), ((1, 3), 749, 250), ((2, 4), 499, 0)])
def test_windows_mean_the_same_at_any_number_of_steps(
    tiny_recipe: Path, steps: tuple[int, int], first: int, last: int
) -> None:
    """Trained in these of 4 steps; at 8 and 100 the same part of the chain, to its very end."""
    recipe = recipe_for(tiny_recipe, task__window={"start": steps[0], "stop": steps[1]})
    base = load(recipe.model)
    assert describe(recipe, base)["window"] == {"first_timestep": first, "last_timestep": last}
    for num_steps in (8, 100):
        rollout = recipe.task.rollout.model_copy(update={"num_steps": num_steps})
        inside = [i for i, step in enumerate(base.guided(rollout).schedule) if last <= step.timestep <= first]
        assert inside == list(range(steps[0] * num_steps // 4, steps[1] * num_steps // 4))


def test_lora_and_the_second_encoder_load(recipe: Recipe, base: Diffuser, tiny_recipe: Path, tmp_path: Path) -> None:
    write_lora(base, tmp_path / "adapters", {"text_encoder": Part(method="lora", rank=2)})
    lora = load_encoder(registry.write_bundle(recipe, base, tmp_path / "adapters", tmp_path / "lora"), base)
    ids = base.tokenize(["a red star"])["text_encoder"]
    with torch.no_grad():
        wanted = trainable.load(base, tmp_path / "adapters")["text_encoder"](ids)[0]
        assert torch.equal(lora.module(ids)[0], wanted)
        assert not torch.allclose(wanted, base.text_encoder(ids)[0])

    xl = recipe_for(tiny_recipe, "sdxl")
    both = load_encoder(make_bundle(xl, tmp_path / "xl", 1, ("text_encoder", "text_encoder_2")), load(xl.model))
    assert list(both.modules) == ["text_encoder", "text_encoder_2"] and both.part == "text_encoder"


def drop_weight(bundle: Path) -> None:
    path = bundle / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["final_layer_norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_weight(bundle: Path) -> None:
    path = bundle / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["final_layer_norm.weight"].fill_(float("inf"))
    save_file(tensors, path, metadata={"format": "pt"})


def shorten_weight(bundle: Path) -> None:
    path = bundle / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["final_layer_norm.weight"] = tensors["final_layer_norm.weight"][:5]
    save_file(tensors, path, metadata={"format": "pt"})


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(bundle: Path) -> None:
        path = bundle / name
        as_toml = path.suffix == ".toml"
        content = tomllib.loads(path.read_text()) if as_toml else json.loads(path.read_text())
        change(content)
        path.write_text(tomli_w.dumps(content) if as_toml else json.dumps(content))

    return apply


def swap_tokens(tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


REFUSED = {
    "a missing weight": (drop_weight, "1 weights missing or of another shape, the first is final_layer_norm.weight"),
    "a weight of another shape": (shorten_weight, "models?|mismatch|shape"),
    "no safetensors": (lambda b: (b / "text_encoder" / "model.safetensors").write_bytes(b"{}"), "bundle"),
    "infinite numbers": (spoil_weight, "not finite for the probe prompts"),
    "another width": (
        edit("text_encoder/config.json", lambda c: c.update(hidden_size=10**6)),
        "has hidden_size = 1000000, the base 16",
    ),
    "another activation": (edit("text_encoder/config.json", lambda c: c.update(hidden_act="gelu")), "hidden_act"),
    "another tokenizer": (edit("tokenizer/tokenizer.json", swap_tokens), "tokenizer is not that of the base"),
    "another base": (
        edit("encoder.toml", lambda t: t["base"].update(text_encoder_sha256="0" * 64)),
        "this base has another",
    ),
    "no window": (edit("encoder.toml", lambda t: t.pop("window")), r"not the description of an encoder \(KeyError"),
    "a window backwards": (edit("encoder.toml", lambda t: t["window"].update(first_timestep=-5)), r"window is -5\.\.0"),
    "code": (lambda b: (b / "text_encoder" / "code.py").write_text(""), r"code\.py: not a file of an encoder bundle"),
    "pickled weights": (
        lambda b: (b / "text_encoder" / "pytorch_model.bin").touch(),
        "not a file of an encoder bundle",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bundles_that_do_not_fit_are_refused(bundle: Path, base: Diffuser, what: str) -> None:
    spoil, message = REFUSED[what]
    load_encoder(bundle, base)
    spoil(bundle)
    with pytest.raises(BundleError):  # against the manifest
        load_encoder(bundle, base)
    reseal(bundle)
    with pytest.raises((BundleError, EncoderRefused), match=message):
        load_encoder(bundle, base)


def test_files_beside_the_manifest_and_other_folders_are_refused(bundle: Path, base: Diffuser, tmp_path: Path) -> None:
    shutil.copy(bundle / "text_encoder" / "config.json", bundle / "text_encoder" / "generation_config.json")
    with pytest.raises(BundleError, match=r"generation_config\.json: not a file of an encoder bundle"):
        load_encoder(bundle, base)
    with pytest.raises(BundleError, match=r"not an encoder bundle \(no encoder\.toml\)"):
        load_encoder(tmp_path / "nothing", base)


def test_another_base_only_when_told(bundle: Path, base: Diffuser, tiny: Path) -> None:
    with torch.no_grad():
        base.text_encoder.final_layer_norm.weight.mul_(1.1)
    with pytest.raises(EncoderRefused, match="trained from the text encoder of .*; this base has another"):
        load_encoder(bundle, base)
    assert load_encoder(bundle, base, any_base=True).window == (499, 0)
    xl = load(Model(path=str(tiny / "sdxl")))  # CLIP-L sits in SDXL's first slot too, and here has the same weights
    assert load_encoder(bundle, xl).part == "text_encoder"


def test_a_tuned_unet_is_no_member_of_a_mixture(recipe: Recipe, base: Diffuser, tmp_path: Path) -> None:
    bundle = make_bundle(recipe, tmp_path, 1, ("text_encoder", "unet"))
    with pytest.raises(EncoderRefused, match="tunes unet; of this base can be mixed: text_encoder"):
        load_encoder(bundle, base)


def test_a_bundle_replaced_in_the_store_is_refused(connected: MlflowClient, bundle: Path, base: Diffuser) -> None:
    """Even with a manifest that fits: the registry remembers the hash of the weights."""
    register(connected, bundle, "style")
    store = Path(connected.get_experiment_by_name("craftor").artifact_location.removeprefix("file://"))
    (manifest,) = store.rglob(checkpoint.MANIFEST)
    (manifest.parent / "text_encoder" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.safetensors: missing or changed"):
        load_encoder(resolve(connected, "style"), base)
    reseal(manifest.parent)
    with pytest.raises(EncoderRefused, match="registered was"):
        load_encoder(resolve(connected, "style"), base)


@pytest.mark.parametrize(
    "error",
    [
        requests.HTTPError("403 Client Error: Forbidden for url: http://me:secret@store/style"),
        ClientError({"Error": {"Code": "AccessDenied"}}, "GetObject"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_store_that_does_not_give_a_bundle_is_unreachable(
    connected: MlflowClient, bundle: Path, base: Diffuser, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    register(connected, bundle, "style")
    found = resolve(connected, "style")
    monkeypatch.setattr(registry, "download", raising(error))
    with pytest.raises(tracking.TrackingUnreachable, match="models:/style/1: cannot be fetched") as told:
        load_encoder(found, base)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), torch.OutOfMemoryError("8 GiB")])
def test_what_the_machine_lacks_is_no_refusal(
    bundle: Path, base: Diffuser, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(trainable, "load", raising(error))
    with pytest.raises(type(error)):
        load_encoder(bundle, base)


def raising(error: Exception) -> Callable:
    def call(*_: object) -> None:
        raise error

    return call


def test_two_stores_in_one_process(connected: MlflowClient, bundle: Path, base: Diffuser, tmp_path: Path) -> None:
    register(connected, bundle, "style")
    other = new_store(tmp_path / "others")
    assert other.tracking_uri != connected.tracking_uri and versions(other) == []
    assert load_encoder(resolve(connected, "style"), base).uri == "models:/style/1"


def test_a_server_that_is_away_is_named() -> None:
    with pytest.raises(tracking.TrackingUnreachable, match="MLflow at http://127.0.0.1:9 refused or did not answer"):
        resolve(MlflowClient("http://127.0.0.1:9"), "style")
