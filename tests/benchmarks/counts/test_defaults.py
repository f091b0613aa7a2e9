"""The default is the fastest exact form, by launches, bytes and host calls, of all flags that change no result."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support import ROOT

from benchmarks.counts import defaults, step
from benchmarks.counts.roofline import CHIPS
from sgg_fast.config import SETTINGS
from sgg_fast.recipes import recipe
from sgg_fast.train.engines import base

TOY = {"batch_size": 2}


@pytest.mark.parametrize("path", defaults.PATHS)
def test_no_flag_is_faster_than_none(path):
    assert defaults.check(recipe("toy", **TOY), path) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", defaults.PATHS)
def test_nor_at_the_true_size(path):
    assert defaults.check(recipe("vg256"), path) == []


def test_the_reference_forms_of_the_kernels_take_more_launches_on_the_stand_in():
    counted = json.loads((ROOT / "tests" / "fake_cuda" / "expected.json").read_text())
    for rows in counted.values():
        for stage in ("pretrain", "finetune"):
            of = {form: rows[f"{stage}-{form}"]["steady"][-1]["launches"] for form in ("eager", "reference-kernels")}
            assert of["reference-kernels"] > of["eager"], stage


def test_every_flag_with_words_says_what_it_is():
    assert defaults.unclassified() == []
    assert {"attention", "fuse_unet", "weights", "kernels", "cuda_graphs"} <= defaults.exact_settings().keys()
    for name, values in defaults.exact_settings().items():
        assert SETTINGS[name].default in values


def test_a_new_flag_cannot_be_forgotten(monkeypatch):
    forgotten = dataclasses.replace(SETTINGS["attention"], name="tiling")
    forgotten = dataclasses.replace(forgotten, rules=dataclasses.replace(forgotten.rules, exact=None))
    monkeypatch.setitem(SETTINGS, "tiling", forgotten)
    assert defaults.unclassified() == ["tiling"]


def test_alternatives_are_those_that_change_something():
    words = [words for words, _ in defaults.alternatives(recipe("toy"), "finetune")]
    assert "--weights master" in words and "--attention sdpa" in words and "--fuse-unet off" in words
    assert not {"--weights split", "--attention xformers", "--kernels triton", "--fuse-unet on"} & set(words)
    assert "--weights master" not in [words for words, _ in defaults.alternatives(recipe("toy"), "deepspeed")]


def test_a_slower_default_is_found(monkeypatch):
    """With fp32 weights as the default, as it was, split halves are faster on every chip."""
    monkeypatch.setattr(
        base, "resolve_weights", lambda optim, *_: "master" if optim.weights == "auto" else optim.weights
    )
    config = recipe("toy", **TOY)
    default, split = step.count(config), step.count(config.replace(weights="split"))
    found = defaults.faster(default, iter([("--weights split", split)]))
    assert [one.chip for one in found] == [chip.name for chip in CHIPS]
    assert split.total.launches < default.total.launches - 300
    assert defaults.faster(split, iter([("--weights master", default)])) == []
