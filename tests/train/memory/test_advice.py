"""Memory advice by the commands: what fits, what would, the batch that fits, and the line of a run out of memory."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import DS_JSON, ROOT
from support.tiny_runs import flags, toy

import train as command
from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.memory import advice as memory
from sgg_fast.train.memory import planner as planning
from sgg_fast.train.memory.plan import GIB, OUTSIDE
from sgg_fast.train.memory.planner import Planner


def typed(config):
    return memory.TypedRun(config, "finetune", None, "cpu")


def test_auto_batch_keeps_the_images_of_a_step(monkeypatch):
    config = toy(batch_size=12)
    monkeypatch.setattr(Planner, "largest_batch", lambda self, budget: 5)
    found = memory.auto_batch(typed(config), "24GiB")
    assert found == config.replace(batch_size=4, accumulation_steps=3)  # 5 would fit, but does not divide 12
    once = config.replace(optimizer="adam8bit", optimizer_in_backward=True, max_grad_norm=0.0)
    with pytest.raises(ConfigError, match="--accumulation-steps above 1"):
        memory.auto_batch(typed(once), "24GiB")
    monkeypatch.setattr(Planner, "largest_batch", lambda self, budget: 40)
    assert memory.auto_batch(typed(config), "24GiB") == config


def test_plan_prints_and_runs_nothing(tmp_path, capsys):
    argv = ["--stage", "finetune", *flags(), "--out", str(tmp_path / "run"), "--budget", "2GiB"]
    assert command.main([*argv, "--plan", "--deepspeed", DS_JSON]) == 0
    said = capsys.readouterr().out
    assert "DeepSpeed ZeRO-2" in said and "on a GPU" in said and "fp32 master weights" in said
    *_, peak, gaps, fits, largest = said.splitlines()
    assert gaps.startswith("gaps between blocks")
    assert peak.startswith("peak, in ") and fits.startswith("fits 2.00 GiB")
    assert int(largest.removeprefix("largest batch that fits: ")) > 100
    assert list(tmp_path.iterdir()) == []


def plan_of_one(budget, *more):
    """The last two lines of --plan for a tiny run within `budget` bytes."""
    argv = ["--stage", "finetune", *flags(batch_size=1, num_layers=1, token_init="none"), "--plan", *more]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert command.main([*argv, "--budget", f"{budget / 2**20:.7f}MiB"]) == 0
    return out.getvalue().splitlines()[-2:]


def test_a_plan_whose_encoding_does_not_fit_says_to_prepare_the_set():
    plan = Planner(toy(batch_size=1, num_scenes=8, sample_every=0)).plan(1)
    assert plan.when == planning.ENCODING
    *_, refusal = plan_of_one(OUTSIDE + plan.reserved - 1)
    assert refusal == f"not even a batch of 1 fits: the set's encoding needs the most; {memory.PREPARE}"
    on_gpu = replace(typed(toy(batch_size=1, num_scenes=8, sample_every=0)), device="cuda")
    out_of_memory = memory.out_of_memory(on_gpu)
    assert f" in {planning.ENCODING}, its largest part" in out_of_memory and out_of_memory.endswith(memory.PREPARE)


def test_a_plan_that_does_not_fit_names_settings_that_do(monkeypatch):
    monkeypatch.setattr(planning, "ENCODED_PIXELS", 1)
    budget = OUTSIDE + Planner(toy(batch_size=1, num_scenes=8, sample_every=0)).plan(1).reserved - 1
    fits, refusal = plan_of_one(budget)
    assert fits.startswith("does not fit") and refusal.startswith("not even a batch of 1 fits; it does with --")
    found = re.findall(r"with (--.+?) \(batch (\d+)\)", refusal)
    assert "--weights lean --optimizer adam8bit" in dict(found)
    for words, batch in found:
        fits, largest = plan_of_one(budget, *words.split())
        assert fits.startswith("fits") and largest == f"largest batch that fits: {batch}", words


def saves(config):
    optim = config.optim
    return sum((config.model.gradient_checkpointing, optim.weights == "lean", optim.optimizer_in_backward))


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (
            1,
            [
                "--gradient-checkpointing",
                "--weights lean --optimizer adam8bit",
                "--optimizer-in-backward --max-grad-norm 0 --optimizer adam8bit --batch-size 3",
            ],
        ),
        (2, ["--gradient-checkpointing --latents-device cpu --weights lean --optimizer adam8bit"]),
    ],
)
def test_settings_that_fit_only_together_are_named_together(monkeypatch, needed, words):
    """A batch of 3 wherever enough of them save memory; 12 images at once cannot be accumulated in backward."""
    monkeypatch.setattr(Planner, "largest_batch", lambda self, budget: 3 if saves(self.config) >= needed else 0)
    with pytest.raises(ConfigError, match="--auto-batch: not even one image fits 24") as refused:
        memory.auto_batch(typed(toy(batch_size=12)), "24GiB")
    assert str(refused.value).endswith(f"; it does with {' or with '.join(f'{each} (batch 3)' for each in words)}")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--stage", "pretrain", "--plan"], "--plan and --auto-batch are for --stage finetune"),
        (["--stage", "finetune", "--plan", "--budget", "lots"], "--budget lots: say it as 24GiB"),
        (["--stage", "finetune", "--plan", "--budget", "0GiB"], "--budget 0GiB: say it as 24GiB"),
        (["--stage", "finetune", "--budget", "24GiB"], "--budget is for --plan and --auto-batch"),
        (["--stage", "finetune", "--plan", "--model", "{folder}"], "its configuration cannot be read"),
        (
            ["--stage", "finetune", "--auto-batch", "--budget", "1000MiB"],
            "; nor with all that saves memory together: take a",
        ),
    ],
)
def test_plan_refuses(tmp_path, capsys, more, reason):
    words = [word.format(folder=tmp_path) for word in more]
    assert command.main([*words, *flags(), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("train.py:")]
    assert out == "" and len(said) == 1 and reason in said[0]


LIMITED = """
import resource, sys
import train
from sgg_fast.train import trainer, memory  # their libraries are there before the limit
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:"))
resource.setrlimit(resource.RLIMIT_AS, (1024 * size + 2**30,) * 2)
sys.exit(train.main(sys.argv[1:]))
"""
"""train.py with a gigabyte for everything that a run allocates."""


def test_a_run_out_of_memory_says_what_would_help(tmp_path):
    argv = ["--stage", "finetune", *flags(batch_size=512, steps=1, resolution=64), "--out", str(tmp_path / "run")]
    words = [sys.executable, "-c", LIMITED, *argv]
    done = subprocess.run(words, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("train.py:"))
    config = recipe("toy", width=32, num_layers=2, num_scenes=8, batch_size=512)
    plan = Planner(config, device="cpu").plan(512)
    assert plan.peak > GIB
    assert f"the planned peak is {plan.peak / GIB:.2f} GiB in {plan.when}, its largest part activations" in said
    helps = said.split("Each of these would help: ")[1].split(", ")
    assert len(helps) == 3 and helps[0].startswith("--gradient-checkpointing (")
    assert any(words.startswith("--batch-size 256 --accumulation-steps 2 (") for words in helps)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), (" 24 GB ", 24 * 10**9), ("900MiB", 900 * 2**20), ("1.5GB", 15 * 10**8)]
)
def test_a_budget_is_read_with_its_unit(text, size):
    assert memory.budget_bytes(text) == size


def test_without_a_budget_the_batch_is_for_the_whole_machine(monkeypatch):
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    budgets = []
    monkeypatch.setattr(Planner, "largest_batch", lambda self, budget: budgets.append(budget) or 1)
    memory.auto_batch(typed(toy()), None)
    assert budgets == [1024 * int(line.split()[1])]


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as refused:  # this class is all that torch has for a CPU
        torch.empty(2**60)
    assert memory.is_out_of_memory(refused.value)
    assert memory.is_out_of_memory(MemoryError()) and memory.is_out_of_memory(torch.OutOfMemoryError())
    assert not memory.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))
    pretrain = replace(typed(toy()), stage="pretrain")
    assert memory.out_of_memory(pretrain) == "out of memory: lower --batch-size"


def test_half_a_batch_keeps_the_images_of_a_step_where_they_can_be_accumulated():
    plain = toy(batch_size=4, accumulation_steps=3)
    in_backward = toy(batch_size=4, optimizer="adam8bit", optimizer_in_backward=True, max_grad_norm=0.0)
    words = [memory._smaller_batch(one.optim)[0].typed(one) for one in (plain, in_backward)]
    assert words == ["--batch-size 2 --accumulation-steps 6", "--batch-size 2"]
    assert memory._smaller_batch(toy(batch_size=1).optim) == []
