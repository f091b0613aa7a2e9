"""The card beside a saved pipeline: how the weights were trained, their licence, and what was not measured."""

from __future__ import annotations

import json
import types

import pytest

from sgg_fast.config import Config
from sgg_fast.model_card import SHEET, model_card, provenance, write_card
from sgg_fast.recipes import recipe

SD = "CompVis/stable-diffusion-v1-4"
ENCODER = types.SimpleNamespace(trained_names=("__image__", "__in_image__", "sheep"))


def test_a_run_leaves_a_card_that_says_how_it_was_trained_and_what_was_not_measured(trained_run):
    folder = trained_run / "finetune" / "pipeline"
    card = (folder / "README.md").read_text()
    settings = json.loads((trained_run / "finetune" / "log.jsonl").read_text().splitlines()[0])["settings"]
    header = card.split("---")[1]
    assert "license: apache-2.0\n" in header and "library_name: diffusers\n" in header
    for name in ("recipe", "finetune_steps", "unet_lr", "batch_size", "token_init"):
        assert f"| {name.replace('_', ' ')} | {settings[name]} |" in card
    assert "Not measured for these weights: FID" in card and str(trained_run) not in card
    told = json.loads((folder / "model_index.json").read_text())["provenance"]
    assert told["recipe"] == "toy" and told["settings"]["finetune_steps"] == settings["finetune_steps"]


@pytest.mark.parametrize(
    ("base", "card", "licence"),
    [
        ("CompVis/stable-diffusion-v1-4", None, "creativeml-openrail-m"),
        ("someone/else", None, ""),
        ("folder", "---\nlanguage: en\nlicense: mit\n---\n# x", "mit"),
        ("folder", "# no header, license: mit", ""),
        ("folder", None, ""),
    ],
)
def test_the_licence_of_the_base_weights(tmp_path, base, card, licence):
    if base == "folder":
        base = str(tmp_path / "sd")
        (tmp_path / "sd").mkdir()
        if card:
            (tmp_path / "sd" / "README.md").write_text(card)
    told = provenance(Config(), base, {"fid": 12.5})
    assert told["base_licence"] == licence and str(tmp_path) not in json.dumps(told)
    assert told["metrics"] == {"fid": 12.5}


def test_provenance_holds_the_settings_that_have_an_effect_and_no_place_of_this_machine(tmp_path):
    (tmp_path / "base").mkdir()
    config = recipe("toy", data=str(tmp_path), image_embedding="noised")
    told = provenance(config, str(tmp_path / "base"), figures={"last loss": 0.25})
    assert (told["data"], told["base"], told["metrics"]) == (tmp_path.name, "base", {})
    assert told["settings"]["alignment_weight"] == "none" and "isa_weight" not in told["settings"]
    assert "lora" in told["settings"] and "lora_lr" not in told["settings"], "without --lora its rate has no effect"
    assert json.loads(json.dumps(told)) == told and told["figures"] == {"last loss": 0.25}
    assert "figures" not in provenance(Config(), SD)


def test_a_card_tells_what_was_trained_and_measured():
    card = model_card({"provenance": provenance(recipe("toy", lora=8), SD, {"FID": 12.3456})}, ENCODER)
    header, body = card.split("---\n")[1:]
    assert f"base_model: {SD}\nbase_model_relation: adapter\n" in header and "- lora\n" in header
    assert "license: creativeml-openrail-m\n" in header and f"The base weights ({SD}) are under" in body
    assert "| lora | 8 |" in body and "--base BASE" in body
    assert "| FID | 12.35 |" in body and "Nothing. Not measured" not in body and "3 names" in body


def test_a_card_of_unknown_weights_says_so():
    card = model_card({}, ENCODER)
    assert "license: unknown\n" in card and "look it up before you share" in card
    assert "does not say how its weights were trained" in card and "Nothing. Not measured" in card
    assert "base_model" not in card and "lora" not in card


def test_the_files_beside_a_pipeline_show_its_last_samples_if_there_are_any(tmp_path):
    told = provenance(Config(), "toy models of this package", figures={"loss": 1 / 3})
    pipeline = types.SimpleNamespace(
        config={"provenance": told}, graph_encoder=types.SimpleNamespace(config=ENCODER)
    )  # fmt: skip
    write_card(pipeline, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert SHEET not in card and "| loss | 0.3333 |" in card and "license: apache-2.0" in card
    (tmp_path / SHEET).touch()
    write_card(pipeline, tmp_path)
    assert f"![]({SHEET})" in (tmp_path / "README.md").read_text()
    compile((tmp_path / "pipeline.py").read_text(), "pipeline.py", "exec")
