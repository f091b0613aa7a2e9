"""Every ZeRO stage, in one process and two, gives the losses of the plain engine on the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from support import DS_JSON
from support.tiny_runs import flags, lines, rows, same_weights, train, trainer
from support.zero_runs import ZERO, train_each

SETTINGS = {"finetune_steps": 3, "checkpoint_every": 3, "sample_every": 3}


def assert_same_losses(run: Path, plain: Path, low: Path) -> None:
    """At each step the difference is at most twice what low precision makes of it, plus 1e-5."""
    got, want, rounded = (rows(folder / "finetune") for folder in (run, plain, low))
    assert list(got) == list(want) == [1, 2, 3]
    for step in want:
        assert got[step].keys() == want[step].keys()
        for name in want[step]:
            allowed = 2 * abs(rounded[step][name] - want[step][name]) + 1e-5
            assert abs(got[step][name] - want[step][name]) <= allowed, (run.name, step, name, got[step], want[step])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """Runs of the plain engine on all images of a step, in fp32 and in bf16."""
    out = tmp_path_factory.mktemp("plain")
    train(out / "fp32", "finetune", **SETTINGS, batch_size=4)
    train(out / "bf16", "finetune", **SETTINGS, batch_size=4, precision="bf16")
    return out / "fp32", out / "bf16"


def test_two_processes_are_one_with_twice_the_batch_under_zero_2_and_3(tmp_path, plain):
    """ZeRO-3 splits the weights themselves: its sheets and its result come from gathered ones."""
    done = train_each(tmp_path, ["zero2", "zero3"], 2, flags(**SETTINGS, batch_size=2))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("saved")]
    assert said == [f"saved {tmp_path}/{name}/finetune/pipeline" for name in ("zero2", "zero3")], "once, by the first"
    assert "Traceback" not in done.stderr
    for name in ("zero2", "zero3"):
        assert_same_losses(tmp_path / name, *plain)
        start = lines(tmp_path / name / "finetune")[0]
        assert (start["engine"], start["settings"]["batch_size"]) == (
            f"deepspeed {name.replace('o', 'o-')} x2, merged weights first",
            2,
        )
        manifest = tmp_path / name / "finetune" / "checkpoints" / "step-0000003" / "manifest.json"
        assert manifest.read_text().count("_optim_states.pt") == 2, "each process saved its part of the optimiser"
        assert (tmp_path / name / "finetune" / "samples" / "step-0000003.png").is_file()
        unet, whole = (
            UNet2DConditionModel.from_pretrained(run / "finetune" / "pipeline" / "unet").state_dict()
            for run in (tmp_path / name, plain[0])
        )
        assert all(unet[key].shape == whole[key].shape for key in whole), "whole weights, not parts"
        assert all((unet[key] - whole[key]).abs().max() < 3 * 2.1 * 3e-4 for key in whole), "three steps of 3e-4 apart"


def test_a_run_goes_on_under_another_zero_stage_from_its_result(tmp_path, plain):
    """--model takes a result, graph encoder included; nothing of DeepSpeed's own files is needed for it."""
    result = plain[0] / "finetune" / "pipeline"
    start = trainer(tmp_path / "more", "finetune", DS_JSON, model=str(result), finetune_steps=1)
    trained = UNet2DConditionModel.from_pretrained(result / "unet").state_dict()
    assert all(value.equal(trained[key]) for key, value in start.foundation.unet.state_dict().items())
    encoder = type(start.conditioner).from_pretrained(result / "graph_encoder").state_dict()
    assert all(torch.equal(value, encoder[key]) for key, value in start.conditioner.state_dict().items())
    assert start.train().is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_zero_stage_and_offload(tmp_path, plain, num_processes):
    done = train_each(tmp_path, list(ZERO), num_processes, flags(**SETTINGS, batch_size=4 // num_processes))
    assert done.returncode == 0, done.stderr
    for name in ZERO:
        assert_same_losses(tmp_path / name, *plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-offload", "zero3"])
def test_killed_and_resumed_in_two_processes_is_the_undisturbed_run(tmp_path, name):
    settings = {**SETTINGS, "sample_every": 0, "checkpoint_every": 1, "ema": 0.5}
    for out, steps in (("whole", (3,)), ("parts", (2, 3))):
        for num in steps:
            done = train_each(tmp_path / out, [name], 2, flags(**{**settings, "finetune_steps": num}))
            assert done.returncode == 0, done.stderr
    whole, parts = (tmp_path / out / name / "finetune" for out in ("whole", "parts"))
    assert rows(whole) == rows(parts)
    assert same_weights(whole / "pipeline", parts / "pipeline")
