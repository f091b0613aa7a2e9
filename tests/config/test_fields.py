"""A field and its rules: bad values are refused by the flag, and the docstring under a field is its help."""

from __future__ import annotations

import dataclasses
import math

import pytest

from sgg_fast.config import SETTINGS, ConfigError, flag
from sgg_fast.config.fields import Part, Rules, name_of, rules_of, setting
from sgg_fast.recipes import recipe


@dataclasses.dataclass(frozen=True)
class Oven(Part):
    """A part as those of the configuration."""

    heat: int = setting(180, at_least=50, at_most=250, multiple_of=10, flag="oven_heat")
    """Degrees."""
    fan: bool = setting(False)
    """Moves the air."""
    cake: str = setting("plain", choices=("plain", "marble"), in_card=True)
    undocumented: float = setting(0.5)

    def check(self) -> None:
        if self.fan and self.heat > 200:
            raise ConfigError("--fan burns the cake above 200")


def test_a_part_checks_its_fields_and_then_what_they_are_together():
    assert dataclasses.replace(Oven(), heat=200, fan=True).heat == 200
    with pytest.raises(ConfigError, match=r"^--oven-heat must be a multiple of 10, at least 50, not 185$"):
        Oven(heat=185)
    with pytest.raises(ConfigError, match=r"^--cake must be one of plain, marble, not 'lemon'$"):
        Oven(cake="lemon")
    with pytest.raises(ConfigError, match="burns"):
        Oven(heat=250, fan=True)


def test_a_field_has_a_name_rules_and_the_docstring_under_it():
    fields = {field.name: field for field in dataclasses.fields(Oven)}
    assert [name_of(field) for field in fields.values()] == ["oven_heat", "fan", "cake", "undocumented"]
    assert rules_of(fields["cake"]) == Rules(choices=("plain", "marble"), in_card=True)
    assert Oven.docs() == {"heat": "Degrees.", "fan": "Moves the air."}
    assert flag("oven_heat") == "oven-heat"


@pytest.mark.parametrize(
    ("rules", "good", "bad", "said"),
    [
        (Rules(), [-1e9, "any", True], [math.inf], "be a finite number, not inf"),
        (Rules(at_least=0), [0, 5], [-1], "not be negative, not -1"),
        (Rules(at_least=1, hint="1 is none"), [1], [0.5], "be at least 1 (1 is none), not 0.5"),
        (Rules(at_least=0, at_most=1), [0, 1], [1.5, -0.1], "lie between 0 and 1, not {}"),
        (Rules(at_least=0, below=1, hint="such as 0.9"), [0.99], [1], "be below 1 (such as 0.9), not 1"),
        (Rules(at_least=32, multiple_of=8), [32, 40], [36, 24], "be a multiple of 8, at least 32, not {}"),
    ],
)
def test_the_fault_of_a_value_names_its_bound(rules, good, bad, said):
    assert [rules.fault(value) for value in good] == [None] * len(good)
    assert [rules.fault(value) for value in bad] == [said.format(value) for value in bad]


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
