"""Settings: every field documented and a flag, the paper's numbers, bad values refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from sgg_fast.commands import train
from sgg_fast.config import SETTINGS, Config, ConfigError, add_flags, as_flags, flag
from sgg_fast.recipes import RECIPES, recipe

FLAGS = {name: setting for name, setting in SETTINGS.items() if not setting.rules.of_recipe}

LISTED = json.loads(Path(__file__).with_name("flags.json").read_text())
"""Every flag of train.py with type, default and choices: what users rely on. Change it with the flag, on purpose."""

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


def described(action: argparse.Action) -> dict[str, object]:
    """Type, default (of a setting: the toy recipe's) and choices of a flag."""
    switch = action.nargs == 0
    kind = "switch" if switch else getattr(action.type, "__name__", "str")
    default = SETTINGS[action.dest].default if action.dest in SETTINGS else action.default
    found: dict[str, object] = {"type": kind, "default": None if default is argparse.SUPPRESS else default}
    return {**found, "choices": list(action.choices)} if action.choices else found


def test_train_has_the_listed_flags_with_their_types_defaults_and_choices():
    actions = [action for action in train.command_line()._actions if action.dest != "help"]
    assert {" ".join(action.option_strings): described(action) for action in actions} == LISTED


def test_the_list_of_flags_can_differ():
    """Shows that the comparison sees a changed default, a changed choice and a lost flag."""
    parser = train.command_line()
    for action in parser._actions:
        if action.dest == "stage":
            action.choices = ("pretrain",)
    actions = [action for action in parser._actions if action.dest not in ("help", "width")]
    found = {" ".join(action.option_strings): described(action) for action in actions}
    assert {name for name in LISTED if found.get(name) != LISTED[name]} == {"--stage", "--width"}


def test_no_part_has_over_twenty_fields():
    parts = [part.default_factory for part in dataclasses.fields(Config)]
    assert len(parts) == 5 and max(len(dataclasses.fields(part)) for part in parts) <= 20


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_docstring_that_is_its_help(name):
    text = SETTINGS[name].help
    assert len(text) > 15 and text.endswith(".")


def test_every_setting_but_the_recipes_own_is_a_flag_with_its_type_and_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for name, setting in FLAGS.items():
        assert f"--{flag(name)} " in text or f"--{flag(name)}, --no-" in text
        value = True if isinstance(setting.default, bool) else setting.default or type(setting.default)(1)
        parsed = parser.parse_args(as_flags({name: value}))
        assert getattr(parsed, name) == value and type(value) is type(setting.default)
    for name in SETTINGS.keys() - FLAGS.keys():
        assert f"--{flag(name)} " not in text


def test_a_flag_that_is_absent_leaves_the_recipe_alone():
    args = vars(train.parse(["--stage", "pretrain", "--recipe", "vg256", "--batch-size", "4"]))
    given = {name: args[name] for name in FLAGS if name in args}
    assert given == {"batch_size": 4}
    assert recipe("vg256", **given) == RECIPES["vg256"]().replace(batch_size=4)


def test_flat_settings_and_parts_are_two_views_of_one_run():
    config = recipe("vg256", data="set", model="sd", width=64, seed=3)
    assert (config.data.source, config.model.source, config.model.width, config.run.seed) == ("set", "sd", 64, 3)
    flat = config.flat()
    assert (flat["data"], flat["model"], flat["width"]) == ("set", "sd", 64)
    assert Config().replace(**flat) == config
    assert json.loads(json.dumps(flat)) == flat


def test_a_setting_that_does_not_exist_is_refused_with_one_that_is_near():
    with pytest.raises(ConfigError, match="there is no setting batchsize; batch_size is near"):
        recipe("toy", batchsize=3)


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


def test_only_the_toy_recipe_brings_models_and_data():
    recipe("toy").check_given()
    for name in RECIPES.keys() - {"toy", "toy-words"}:
        with pytest.raises(ConfigError, match="this recipe needs --data: a folder"):
            recipe(name).check_given()
        with pytest.raises(ConfigError, match="this recipe needs --model: a Stable Diffusion"):
            recipe(name, data="toy").check_given()
        recipe(name, data="toy", model="a/hub-id").check_given()
    with pytest.raises(ConfigError, match=r"needs --model: the foundation that"):
        recipe("toy-words").check_given()
    assert recipe("vg128").data.num_expected == 62_565 and recipe("coco256").data.num_expected == 24_972
    assert recipe("vg128", data="toy", num_scenes=9).data.num_expected == 9


def test_a_folder_of_data_that_is_not_there_is_refused(tmp_path):
    recipe("toy", data=str(tmp_path)).check_given()
    with pytest.raises(
        ConfigError, match=r"absent: there is no such folder, and it is not toy or toy-rare or toy-words"
    ):
        recipe("toy", data=str(tmp_path / "absent")).check_given()


def test_an_unknown_recipe_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"vg512.*toy, toy-words, vg128, vg256"):
        recipe("vg512")


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.rules.choices])
def test_a_word_outside_the_choices_is_refused(name):
    choices = SETTINGS[name].rules.choices
    assert SETTINGS[name].default in choices and len(choices) > 1
    with pytest.raises(ConfigError, match=f"--{flag(name)} must be one of .*{choices[-1]}"):
        recipe("toy", **{name: "sideways"})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("batch_size", 0, "at least 1, not 0"),
        ("pretrain_steps", 0, "at least 1"),
        ("finetune_steps", -1, "at least 1"),
        ("log_every", 0, "at least 1"),
        ("checkpoint_every", 0, "at least 1"),
        ("num_negatives", 0, "at least 1"),
        ("num_scenes", 0, "at least 1"),
        ("num_layers", 0, "at least 1"),
        ("relation_draws", 0, "at least 1"),
        ("sampling_steps", 0, "at least 1"),
        ("sheet_steps", 0, "at least 1"),
        ("max_skipped", 0, "at least 1"),
        ("rank_timeout", 0.5, "at least 1"),
        ("mask_ratio", 1.1, "lie between 0 and 1"),
        ("loss_weight", -0.1, "lie between 0 and 1"),
        ("condition_dropout", 2.0, "lie between 0 and 1"),
        ("relation_dropout", -0.1, "lie between 0 and 1"),
        ("mae_weight", -1.0, "not be negative"),
        ("con_weight", -1.0, "not be negative"),
        ("geometry", -1.0, "not be negative"),
        ("unet_lr", -1e-6, "not be negative"),
        ("unet_lr", float("nan"), "be a finite number"),
        ("gate_init", float("nan"), "be a finite number"),
        ("pretrain_lr", float("inf"), "be a finite number"),
        ("sample_every", -1, "not be negative"),
        ("num_samples", -1, "not be negative"),
        ("warmup_steps", -1, "not be negative"),
        ("validation_pairs", -1, "not be negative"),
        ("seed", -1, "lie between 0 and 4294967295"),
        ("seed", 2**32, "lie between 0 and 4294967295"),
        ("guidance", 0.5, r"at least 1 \(1 is none\)"),
        ("resolution", 100, "be a multiple of 8, at least 32"),
        ("resolution", 16, "be a multiple of 8, at least 32"),
        ("accumulation_steps", 0, "at least 1"),
        ("ema", 1.0, r"be below 1 \(such as 0.9999\)"),
        ("ema", -0.1, "not be negative"),
        ("min_snr_gamma", -1.0, "not be negative"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_flag(name, value, reason):
    with pytest.raises(ConfigError, match=f"--{flag(name)} must .*{reason}"):
        recipe("toy", **{name: value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights": "lean", "precision": "fp32"}, "--weights lean keeps weights in bf16: leave out --precision fp32"),
        ({"weights": "lean", "precision": "fp16"}, "leave out --precision fp16"),
        ({"weights": "lean", "optimizer": "adam"}, "--weights lean needs --optimizer adam8bit, .* or adafactor, not"),
        ({"weights": "split", "precision": "fp32"}, "--weights split keeps weights in bf16: leave out --precision"),
        (
            {"optimizer_in_backward": True, "max_grad_norm": 0.0, "optimizer": "adam"},
            "needs --optimizer adam8bit, adam4bit or",
        ),
        ({"optimizer_in_backward": True}, r"excludes --max-grad-norm \(set it to 0\)$"),
        (
            {"optimizer_in_backward": True, "accumulation_steps": 2, "precision": "fp16"},
            r"excludes --max-grad-norm \(.*\) and --accumulation-steps above 1 and --precision fp16$",
        ),
        (
            {"weight_gradients": "aside", "lora": 4, "gradient_checkpointing": True},
            "set --max-grad-norm 0 and leave out --lora and leave out --gradient-checkpointing$",
        ),
        ({"cross_attention": "ours", "precision": "fp32"}, "--cross-attention ours computes in bf16 or fp16"),
        ({"attention": "cudnn", "precision": "fp32"}, "--attention cudnn computes in bf16 or fp16"),
    ],
)
def test_ways_of_updating_that_exclude_each_other_are_refused_in_one_line(changes, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        recipe("toy", **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss_weight": 0.5}, "no X_global for image-scene alignment: leave out --loss-weight"),
        ({"geometry": 0.5}, "none of SGG-IG's own tokens for --geometry: leave it out"),
        ({"attention_loss": 0.5}, "none of SGG-IG's own tokens for --attention-loss: leave it out"),
        ({"instance_codes": True}, "none of SGG-IG's own tokens for --instance-codes: leave it out"),
        ({"relation_dropout": 0.1}, "--relation-dropout: --text-form sentence says the whole graph; use phrases"),
    ],
)
def test_a_baseline_refuses_what_it_has_no_inputs_for(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        recipe("toy", conditioner="text", **changes)
    cured = {"text_form": "phrases", **changes} if "relation_dropout" in changes else {}
    assert recipe("toy", conditioner="text", **cured).model.conditioner == "text"


def test_a_switch_is_said_or_unsaid_by_its_flag():
    args = vars(train.parse(["--stage", "finetune", *as_flags({"gradient_checkpointing": True, "ema": 0.9})]))
    assert (args["gradient_checkpointing"], args["ema"]) == (True, 0.9)
    assert as_flags({"gradient_checkpointing": False}) == ["--no-gradient-checkpointing"]


def test_noised_alignment_takes_no_second_weight():
    with pytest.raises(ConfigError, match="leave --isa-weight out"):
        recipe("toy", image_embedding="noised", isa_weight="alpha_bar")
    assert recipe("toy", image_embedding="noised").objective.alignment_weight == "none"
    assert recipe("toy").objective.alignment_weight == "alpha_bar"


def test_pretraining_needs_a_loss():
    assert recipe("toy", mae_weight=0.0).objective.con_weight == 1
    with pytest.raises(ConfigError, match="leave nothing to pre-train on"):
        recipe("toy", mae_weight=0.0, con_weight=0.0)


def test_text_initialisation_needs_the_triples_tokens():
    with pytest.raises(ConfigError, match="--token-init text"):
        recipe("toy", token_init="text", context="global")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("toy").optim.batch_size = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("toy").optim = None
