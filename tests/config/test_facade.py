"""`Config`: the parts and the flat settings are two views of one run, and neither can be changed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sgg_fast.config import SETTINGS, Config, ConfigError
from sgg_fast.recipes import recipe


def test_no_part_has_over_twenty_fields():
    parts = [part.default_factory for part in dataclasses.fields(Config)]
    assert len(parts) == 5 and max(len(dataclasses.fields(part)) for part in parts) <= 20


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


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("toy").optim.batch_size = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("toy").optim = None


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_docstring_that_is_its_help(name):
    text = SETTINGS[name].help
    assert len(text) > 15 and text.endswith(".")


def test_a_setting_is_read_from_a_run_has_an_effect_and_is_shown_on_the_card():
    plain, adapted = recipe("toy", image_embedding="noised"), recipe("toy", lora=4, lora_lr=0.5)
    rate, weight = SETTINGS["lora_lr"], SETTINGS["isa_weight"]
    assert (rate.of(adapted), rate.has_effect(adapted), rate.has_effect(plain)) == (0.5, True, False)
    assert rate.shown(adapted) == ("lora_lr", 0.5) and SETTINGS["lora"].has_effect(plain)
    assert weight.of(plain) == "auto" and weight.shown(plain) == ("alignment_weight", "none")
    assert weight.shown(adapted) == ("alignment_weight", "alpha_bar")


def test_a_run_needs_data_and_models():
    recipe("toy").check_given()
    with pytest.raises(ConfigError, match="needs --data"):
        recipe("vg256", model="a/hub-id").check_given()
    with pytest.raises(ConfigError, match="needs --model"):
        recipe("vg256", data="toy").check_given()
