"""Settings as flags: listed with type, default and choices; words and settings are two forms of one thing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sgg_fast.commands import train
from sgg_fast.config import SETTINGS, add_flags, as_flags, flag
from sgg_fast.recipes import RECIPES, recipe

FLAGS = {name: setting for name, setting in SETTINGS.items() if not setting.rules.of_recipe}
LISTED = json.loads(Path(__file__).with_name("flags.json").read_text())
"""Every flag of train.py with type, default and choices: what users rely on. Change it with the flag, on purpose."""


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


def test_a_switch_is_said_or_unsaid_by_its_flag():
    args = vars(train.parse(["--stage", "finetune", *as_flags({"gradient_checkpointing": True, "ema": 0.9})]))
    assert (args["gradient_checkpointing"], args["ema"]) == (True, 0.9)
    assert as_flags({"gradient_checkpointing": False}) == ["--no-gradient-checkpointing"]


def test_prepare_cache_has_the_flags_of_what_a_cache_holds():
    parser = argparse.ArgumentParser()
    add_flags(parser, for_cache=True)
    found = {action.dest for action in parser._actions}
    assert {"data", "model", "clip", "resolution", "flip", "token_init"} <= found
    assert not {"batch_size", "unet_lr", "width", "num_published"} & found
