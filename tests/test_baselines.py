"""Methods that train nothing: longer prompts, the best of several, and how `evaluate` sets them beside the base."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from craftor.baselines.extenders import ByLanguageModel, ExtenderError, by_rules
from craftor.baselines.methods import BestOfDraws, Extended
from craftor.baselines.sampling import Base
from craftor.diffuser import load
from craftor.recipe import Evaluation, Model, Recipe, RecipeError, Rollout
from craftor.recipe import load as load_recipe
from craftor_micro.captions import read_claims
from craftor_micro.tokenizer import build_tokenizer

PROMPTS = ["a small red star", "a large blue ring"]


@pytest.fixture(scope="module")
def base(tiny: Path) -> Base:
    return Base(load(Model(path=str(tiny / "pipeline"))), Rollout(num_steps=3, guidance_scale=3.0), run_seed=7)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 that knows the micro world's words."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), build_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id
    )
    GPT2LMHeadModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


class Brightness:
    differentiable, needs_prompt = False, False

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))


def test_rules_keep_what_a_prompt_says_and_add_what_it_does_not() -> None:
    given = ["a red star", "a little grey backdrop with a ring above a big blue cross", *PROMPTS]
    for prompt, longer in zip(given, by_rules(given), strict=True):
        said, found = read_claims(prompt), read_claims(longer)
        assert len(longer) > len(prompt)
        for before, after in zip(said.objects, found.objects, strict=True):
            assert before.shape == after.shape and before.colour in (None, after.colour) and after.size
            assert before.size in (None, after.size)
        assert said.layout in (None, found.layout) and said.background in (None, found.background)
        assert found.layout and found.background and found.texture
    assert by_rules(given)[1:3] == by_rules(given[1:3])


def test_a_language_model_continues_each_prompt_by_itself(language_model: Path) -> None:
    extend = ByLanguageModel(str(language_model), max_new_tokens=5, seed=1)
    longer = extend(PROMPTS)
    assert all(new.startswith(old) and len(new) > len(old) for old, new in zip(PROMPTS, longer, strict=True))
    state = torch.random.get_rng_state()
    assert extend(PROMPTS[::-1]) == longer[::-1] and torch.equal(state, torch.random.get_rng_state())
    assert ByLanguageModel(str(language_model), max_new_tokens=5, seed=2)(PROMPTS) != longer
    with pytest.raises(ExtenderError, match="extender = 'no/such': .* fetch it with: hf download no/such"):
        ByLanguageModel("no/such")


def test_methods_are_paired_with_the_base_and_blind_to_batches(base: Base) -> None:
    images = base(PROMPTS, [3, 5], 1)
    torch.testing.assert_close(base(PROMPTS[1:], [5], 1), images[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(Extended(base, list)(PROMPTS, [3, 5], 1), images)
    assert not torch.allclose(Extended(base, by_rules)(PROMPTS, [3, 5], 1), images)
    best = BestOfDraws(base, Brightness(), 3)(PROMPTS, [3, 5], 1)
    draws = torch.stack([base(PROMPTS, [3, 5], 1, draw) for draw in range(3)])
    winners = draws.mean((2, 3, 4)).argmax(0)
    assert torch.equal(best, draws[winners, torch.arange(2)])


def test_evaluation_compares_methods_and_a_reward_without_gradient_with_the_base(tmp_path: Path) -> None:
    from craftor.baselines.methods import known_to
    from craftor.evaluate import Scorer, held_out_prompts
    from craftor.evaluation_summary import summarise
    from craftor.locate import locate, shipped_recipe

    recipe = load_recipe(
        shipped_recipe("micro_ddpo_compressibility.toml"),
        {
            "task.rollout": {"num_steps": 2, "guidance_scale": 4.0},
            "task.window": {"last": 1},
            "evaluation": {
                "prompts": "micro:held_out.jsonl",
                "num_prompts": 2,
                "num_seeds": 2,
                "methods": {
                    "longer": {"kind": "prompt_engineering"},
                    "small": {"kind": "best_of", "num": 2, "by": "compressibility"},
                },
            },
        },
    )
    shutil.copytree(Path(locate("micro:base")) / "text_encoder", tmp_path / "text_encoder")
    scorer = Scorer(
        recipe.model_dump(by_alias=True), {"tuned": [{"folder": str(tmp_path), "weight": 1.0, "steps": (1, 2)}]}, 0
    )
    assert recipe.evaluation is not None
    images = scorer.images(held_out_prompts(recipe.evaluation))
    images.sort(key=lambda image: (image["number"], image["seed"], image["variant"]))
    found = summarise(images, {"compressibility", "total"}, known_to(recipe.evaluation.methods))
    assert found["metrics"]["compressibility"]["delta"] == 0, "the same encoder twice"
    assert not found["metrics"]["compressibility"]["held_out"] and found["metrics"]["accuracy"]["held_out"]
    longer, small = found["methods"]["longer"], found["methods"]["small"]
    assert small["compressibility"]["delta"] > 0 and not small["compressibility"]["held_out"]
    assert longer["clip"]["delta"] != 0 and longer["compressibility"]["held_out"]
    assert small["compressibility"]["base"] == longer["compressibility"]["base"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"few": {"kind": "best_of", "by": "beauty"}}, "evaluation.methods.few.by = 'beauty'; allowed: clip, pick"),
        (
            {"few": {"kind": "best_of", "num": 1, "by": "clip"}},
            "methods.few.num: Input should be greater than or equal",
        ),
        ({"tuned": {"kind": "prompt_engineering"}}, "a method is named 'tuned'"),
        ({"more": {"kind": "prompt_engineering", "model": "x"}}, "methods.more.model: unknown key"),
    ],
)
def test_mistakes_are_explained(tiny_recipe: Path, methods: dict, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(tiny_recipe, {"evaluation": {"prompts": "micro:held_out.jsonl", "methods": methods}})
    assert message in str(error.value)


def test_evaluation_needs_a_clip_for_diversity(tiny_recipe: Path) -> None:
    data = load_recipe(tiny_recipe).data_of()
    data["task"] = {
        "kind": "policy_gradient",
        "rewards": {"bytes": {"kind": "compressibility", "weights": "jpeg", "weight": 1.0}},
    }
    Recipe.model_validate(data)
    data["evaluation"] = Evaluation(prompts="micro:held_out.jsonl").model_dump()
    with pytest.raises(ValueError, match="diversity of images is measured by a clip_score"):
        Recipe.model_validate(data)
