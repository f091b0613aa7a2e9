"""Named settings: the paper's numbers, what each recipe needs to be given, and how they differ."""

from __future__ import annotations

import pytest

from sgg_fast.config import ConfigError
from sgg_fast.recipes import RECIPES, recipe

# Wang et al., AAAI-25, Implementation Details, read off the paper and not off recipes.py.
PAPER = {
    "width": 512,
    "mask_ratio": 0.3,
    "loss_weight": 0.5,
    "batch_size": 2,
    "pretrain_lr": 5e-4,
    "pretrain_steps": 700_000,
    "unet_lr": 1e-6,
    "finetune_steps": 30_000,
    "sampling_steps": 100,
}


@pytest.mark.parametrize(("name", "resolution"), [("vg128", 128), ("vg256", 256), ("coco128", 128), ("coco256", 256)])
def test_recipes_hold_the_papers_settings(name, resolution):
    config = recipe(name)
    flat = config.flat()
    assert {key: flat[key] for key in PAPER} == PAPER
    assert (config.run.recipe, config.data.resolution) == (name, resolution)
    assert "adam" in config.optim.optimizer and not config.optim.max_grad_norm, "P: Adam, and no clipping"
    # Our default forms: every printed form is vg256-literal's.
    model, objective = config.model, config.objective
    forms = (model.encoder, model.triple, objective.contrastive, objective.image_embedding, objective.alignment_weight)
    assert forms == ("residual", "roles", "bce", "clean", "alpha_bar")


def test_literal_differs_from_vg256_by_the_printed_forms_only():
    literal, ours = recipe("vg256-literal").flat(), recipe("vg256").flat()
    assert {key: value for key, value in literal.items() if value != ours[key]} == {
        "recipe": "vg256-literal",
        "encoder": "plain",
        "triple": "shared",
        "contrastive": "literal",
        "isa_weight": "none",
    }


def test_only_the_toy_recipes_bring_models_and_data():
    recipe("toy").check_given()
    recipe("toy-words").check_given()
    for name in RECIPES.keys() - {"toy", "toy-words"}:
        with pytest.raises(ConfigError, match="this recipe needs --data: a folder"):
            recipe(name).check_given()
        with pytest.raises(ConfigError, match="this recipe needs --model: a Stable Diffusion"):
            recipe(name, data="toy").check_given()
        recipe(name, data="toy", model="a/hub-id").check_given()
    assert recipe("vg128").data.num_expected == 62_565 and recipe("coco256").data.num_expected == 24_972
    assert recipe("vg128", data="toy", num_scenes=9).data.num_expected == 9


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"vg512.*toy, toy-words, vg128, vg256"):
        recipe("vg512")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_knows_its_name(name):
    assert recipe(name).run.recipe == name


def test_settings_bring_along_what_they_require_unless_that_is_given_too():
    def optimizer(**settings) -> str:
        return recipe("toy", **settings).optim.optimizer

    assert optimizer() == "adam" and optimizer(weights="lean") == "adam8bit"
    assert optimizer(optimizer_in_backward=True, max_grad_norm=0.0) == "adam8bit"
    assert optimizer(weights="lean", optimizer="adafactor") == "adafactor"
    assert recipe("laion1024-sdxl", lora=4, optimizer_in_backward=False).optim.weights == "auto"
    baseline = recipe("vg256-best", conditioner="sgdiff", relation_dropout=0.0).objective
    assert (baseline.loss_weight, baseline.geometry, baseline.attention_loss) == (1.0, 0.0, 0.0)
