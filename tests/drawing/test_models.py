"""The model to draw with: found by folder, run or name, told apart by its files; schedulers by their short names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import PNDMScheduler

from sgg_fast import digests
from sgg_fast.drawing.models import (
    SCHEDULERS,
    SHIPPED,
    _fingerprint,
    find_pipeline,
    load_model,
    made_scheduler,
    scheduler_name,
)


@pytest.fixture(scope="module")
def toy():
    return load_model("toy")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run in runs/toy of the working folder, which holds the shipped model."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED, "runs/toy/finetune/pipeline")
    return Path("runs/toy")


@pytest.mark.parametrize("place", ["", "pipeline", "finetune/pipeline"])
def test_a_pipeline_is_found_in_itself_in_a_stage_and_in_a_run(tmp_path, place):
    assert find_pipeline(tmp_path) is None
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "model_index.json").touch()
    assert find_pipeline(tmp_path) == tmp_path / place


def test_the_model_by_default_is_the_fine_tuned_run_and_else_the_one_that_ships(toy, run):
    found = load_model(None)
    assert (found.name, found.description) == ("runs/toy", "runs/toy/finetune/pipeline")
    assert found.notice.startswith("--model toy is the one that ships")
    assert found.weights == toy.weights, "a copy is the same model"
    shutil.rmtree(run)
    shipped = load_model(None)
    assert (shipped.name, shipped.notice) == ("toy", "") and shipped.description == toy.description


def test_any_file_that_drawing_reads_tells_a_model_from_another(toy, run, monkeypatch):
    monkeypatch.setenv(digests.VERIFY, "")
    folder = run / "finetune" / "pipeline"
    assert _fingerprint(folder, None) == toy.weights
    seen = {toy.weights}
    for name in ("scheduler/scheduler_config.json", "graph_tokenizer/tokenizer.json", "unet/config.json"):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
        seen.add(_fingerprint(folder, None))
    assert len(seen) == 4
    with pytest.raises(ValueError, match=r"runs/toy/finetune/pipeline: cannot be loaded: "):
        load_model(str(run), verify=True)


def test_a_lora_counts_with_its_base(run):
    folder = run / "finetune" / "pipeline"
    alone = _fingerprint(folder, None)
    with_base = {_fingerprint(folder, str(base)) for base in (SHIPPED, folder)}
    assert len(with_base) == 1, "the base counts by its content"
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "base": {"model": "owner/name", "clip": ""}}))
    named = _fingerprint(folder, None)
    assert len({alone, *with_base, named, _fingerprint(folder, "owner/other")}) == 4


@pytest.mark.parametrize("name", ["./nothing", "nothing", "/no/such/place", "a/b/c", "empty", "~/models"])
def test_what_is_neither_a_folder_of_ours_nor_a_hub_id_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"^--model {name}: no pipeline there"):
        load_model(name)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_made_by_its_short_name_with_the_models_settings(toy, name):
    pipeline = toy.pipeline
    made = made_scheduler(pipeline, name)
    assert type(made).__name__ == SCHEDULERS[name]
    assert made.config.num_train_timesteps == pipeline.scheduler.config.num_train_timesteps
    assert made.config.prediction_type == pipeline.scheduler.config.prediction_type
    assert (made is pipeline.scheduler) is (name == scheduler_name(pipeline))


def test_a_scheduler_without_a_short_name_goes_by_its_class(toy, monkeypatch):
    class OtherScheduler(PNDMScheduler):
        pass

    monkeypatch.setattr(toy.pipeline, "scheduler", OtherScheduler())
    assert scheduler_name(toy.pipeline) == "OtherScheduler"
    assert made_scheduler(toy.pipeline, "OtherScheduler") is toy.pipeline.scheduler
