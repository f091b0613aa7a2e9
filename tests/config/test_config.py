"""Settings: every field documented and a flag, the paper's numbers, bad values refused."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from sgg_fast.commands import train
from sgg_fast.config import CHOICES, Config, ConfigError, add_flags, as_flags, field_help, flag
from sgg_fast.recipes import RECIPES, recipe

FIELDS = [field.name for field in dataclasses.fields(Config)]

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


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_docstring(name):
    text = field_help()[name]
    assert len(text) > 15 and text.endswith(".")


def test_every_field_but_the_recipe_is_a_flag_with_its_type_and_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for field in dataclasses.fields(Config):
        if field.name != "recipe":
            assert f"--{flag(field.name)} " in text or f"--{flag(field.name)}, --no-" in text
            value = True if field.type == "bool" else field.default or type(field.default)(1)
            parsed = parser.parse_args(as_flags({field.name: value}))
            assert getattr(parsed, field.name) == value and type(value) is type(field.default)


def test_a_flag_that_is_absent_leaves_the_recipe_alone():
    args = vars(train.parse(["--stage", "pretrain", "--recipe", "vg256", "--batch-size", "4"]))
    given = {name: args[name] for name in FIELDS if name in args and name != "recipe"}
    assert given == {"batch_size": 4}
    assert recipe("vg256", **given) == dataclasses.replace(RECIPES["vg256"](), batch_size=4)


@pytest.mark.parametrize(("name", "resolution"), [("vg128", 128), ("vg256", 256), ("coco128", 128), ("coco256", 256)])
def test_recipes_hold_the_papers_settings(name, resolution):
    config = recipe(name)
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert (config.recipe, config.resolution) == (name, resolution)
    assert "adam" in config.optimizer, "P: Adam"
    # Our default forms: every printed form is vg256-literal's.
    forms = (config.encoder, config.triple, config.contrastive, config.image_embedding, config.alignment_weight)
    assert forms == ("residual", "roles", "bce", "clean", "alpha_bar")


def test_literal_differs_from_vg256_by_the_printed_forms_only():
    literal, ours = dataclasses.asdict(recipe("vg256-literal")), dataclasses.asdict(recipe("vg256"))
    assert {key: value for key, value in literal.items() if value != ours[key]} == {
        "recipe": "vg256-literal",
        "encoder": "plain",
        "triple": "shared",
        "contrastive": "literal",
        "isa_weight": "none",
    }


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"vg512.*toy, vg128, vg256"):
        recipe("vg512")


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_a_word_outside_the_choices_is_refused(name):
    with pytest.raises(ConfigError, match=f"--{flag(name)} must be one of .*{CHOICES[name][-1]}"):
        recipe("toy", **{name: "sideways"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("pretrain_steps", 0),
        ("finetune_steps", -1),
        ("log_every", 0),
        ("checkpoint_every", 0),
        ("num_negatives", 0),
        ("mask_ratio", 1.1),
        ("loss_weight", -0.1),
        ("condition_dropout", 2.0),
        ("relation_dropout", -0.1),
        ("mae_weight", -1.0),
        ("con_weight", -1.0),
        ("unet_lr", -1e-6),
        ("unet_lr", float("nan")),
        ("pretrain_lr", float("inf")),
        ("sample_every", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("guidance", 0.5),
        ("resolution", 100),
        ("resolution", 16),
        ("accumulation_steps", 0),
        ("ema", 1.0),
        ("ema", -0.1),
        ("min_snr_gamma", -1.0),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_flag(name, value):
    with pytest.raises(ConfigError, match=f"--{flag(name)} must"):
        recipe("toy", **{name: value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "lean", "precision": "fp32"}, "--weights lean keeps weights in bf16: leave out --precision fp32"),
        ({"weights": "lean", "precision": "fp16"}, "leave out --precision fp16"),
        ({"weights": "lean", "optimizer": "adam"}, "--weights lean needs --optimizer adam8bit"),
        ({"weights": "split", "precision": "fp32"}, "--weights split keeps weights in bf16: leave out --precision"),
        ({"weights": "split", "optimizer_in_backward": True, "max_grad_norm": 0}, "without --weights split: use lean"),
        ({"optimizer_in_backward": True, "max_grad_norm": 0.0, "optimizer": "adam"}, "needs --optimizer adam8bit"),
        ({"optimizer_in_backward": True}, r"excludes --max-grad-norm \(set it to 0\)$"),
        (
            {"optimizer_in_backward": True, "accumulation_steps": 2, "precision": "fp16"},
            r"excludes --max-grad-norm \(.*\) and --accumulation-steps above 1 and --precision fp16$",
        ),
        ({"attention": "cudnn", "precision": "fp32"}, "--attention cudnn computes in bf16 or fp16"),
    ],
)
def test_ways_of_updating_that_exclude_each_other_are_refused_in_one_line(changes, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        recipe("toy", **changes)
    assert "\n" not in str(caught.value)


def test_a_switch_is_said_or_unsaid_by_its_flag():
    args = vars(train.parse(["--stage", "finetune", *as_flags({"gradient_checkpointing": True, "ema": 0.9})]))
    assert (args["gradient_checkpointing"], args["ema"]) == (True, 0.9)
    assert as_flags({"gradient_checkpointing": False}) == ["--no-gradient-checkpointing"]


def test_noised_alignment_takes_no_second_weight():
    with pytest.raises(ConfigError, match="leave --isa-weight out"):
        recipe("toy", image_embedding="noised", isa_weight="alpha_bar")
    assert recipe("toy", image_embedding="noised").alignment_weight == "none"
    assert recipe("toy").alignment_weight == "alpha_bar"


def test_pretraining_needs_a_loss():
    assert recipe("toy", mae_weight=0.0).con_weight == 1
    with pytest.raises(ConfigError, match="leave nothing to pre-train on"):
        recipe("toy", mae_weight=0.0, con_weight=0.0)


def test_text_initialisation_needs_the_triples_tokens():
    with pytest.raises(ConfigError, match="--token-init text"):
        recipe("toy", token_init="text", context="global")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("toy").batch_size = 3
