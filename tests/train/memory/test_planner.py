"""The memory planner: its count of a step against real tensors and resident memory, its arithmetic, its commands."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sgg_kernels.reference.adam import BLOCK
from support import DS_JSON, ROOT
from support.memory_child import rise, write_sizes
from support.sd_folder import write_clip, write_pairs, write_sd
from support.tiny_runs import flags, lines, train
from torch import nn

import train as command
from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train.backward.aside import HELD_BYTES
from sgg_fast.train.engines.choose import plan_engine
from sgg_fast.train.memory import advice as memory
from sgg_fast.train.memory import planner as planning
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.meter import Meter, autocast_like_cuda
from sgg_fast.train.memory.parts import (
    CUBLAS_WORKSPACE,
    EngineLayout,
    WeightGroup,
    address_bytes,
    bucket_blocks,
    gradient_bytes,
    resident_blocks,
    resident_parts,
    update_bytes,
)
from sgg_fast.train.memory.plan import GIB, OUTSIDE, MemoryPlan
from sgg_fast.train.memory.planner import Planner, whole_step
from sgg_fast.train.optim.groups import parameter_groups
from sgg_fast.train.stages import FinetuneStage

SD_WEIGHTS = 859_520_964
CPU = torch.device("cpu")


def toy(**changes):
    return recipe("toy", **{"width": 32, "num_layers": 1, "token_init": "none", "batch_size": 2, **changes})


def typed(config):
    return memory.TypedRun(config, "finetune", None, "cpu")


@pytest.fixture(scope="module")
def sd():
    return Planner(recipe("vg256"))


def test_sizes_are_the_published_ones(sd):
    counts = {name: sum(p.numel() for p in getattr(sd.foundation, name).parameters()) for name in
              ("unet", "vae", "text_encoder", "clip")}  # fmt: skip
    assert counts == {"unet": SD_WEIGHTS, "vae": 83_653_863, "text_encoder": 123_060_480, "clip": 151_277_313}
    assert len(list(sd.foundation.unet.parameters())) == 686


def unet_groups(sd, dtype, most=math.inf):
    module = nn.Module()
    module.unet = sd.foundation.unet
    return [
        WeightGroup(tuple(p.numel() for p in group["params"]), group["optim_bits"], dtype)
        for group in parameter_groups(module, sd.config.optim, most)
    ]


def test_our_kernels_update_in_place_and_their_references_a_weight_at_a_time():
    group = WeightGroup((1000, 10), 8, torch.bfloat16)
    for changes, each in (({}, 0), ({"kernels": "reference"}, 56), ({"optimizer_in_backward": True}, 0)):
        config = recipe("vg256", weights="lean", max_grad_norm=0.0, **changes)
        assert update_bytes(EngineLayout(config.optim, config.model.kernels, "cuda", None), [group]) == each * 1000


@pytest.mark.parametrize("changes", [{}, {"weights": "split"}, {"weights": "lean"}])
def test_blocks_are_the_resident_parts(sd, changes):
    """One block a group and part: weights, low halves, state."""
    config = recipe("vg256", **changes)
    layout = EngineLayout(config.optim, config.model.kernels, "cuda", None)
    groups = unet_groups(sd, torch.bfloat16 if changes else torch.float32)
    blocks, parts = resident_blocks(layout, groups), resident_parts(layout, groups)[0]
    assert len(blocks) == len(groups) * len(parts)
    assert sum(blocks) == pytest.approx(sum(parts.values()), abs=len(blocks))


def test_the_table_of_addresses_has_three_numbers_a_block_of_weights():
    groups = [WeightGroup((8 * 1024,), 8, torch.float32)]
    assert address_bytes(groups, "adam8bit") == 24 * -(-8 * 1024 // BLOCK)


def test_a_step_ends_its_gradients_after_the_update():
    events = [("a", 8), ("b", 4), ("a", -1), ("gradient", 2), ("b", -1)]
    assert whole_step(events, [("update", 7), ("update", -1)]) == [
        ("a", 8), ("b", 4), ("a", -1), ("gradient", 2), ("update", 7), ("update", -1), ("b", -1), ("gradient", -1)
    ]  # fmt: skip


def test_a_gpu_has_frozen_models_for_a_sheet_only_unless_a_step_calls_them():
    """Their bytes move from the sheet to what is always there; a CPU has them always and plans no sheet."""
    config = toy()
    plan = Planner(config).plan(1)
    visiting = plan.moments["sample sheet"]["frozen models for a sheet"]
    assert visiting > 0 and plan.resident["frozen models"] == 0
    called = Planner(config.replace(image_embedding="predicted")).plan(1)
    assert called.resident["frozen models"] == visiting
    assert called.moments["sample sheet"]["frozen models for a sheet"] == 0
    on_cpu = Planner(config, device="cpu").plan(1)
    assert "sample sheet" not in on_cpu.moments and on_cpu.resident["frozen models"] > visiting
    assert "sample sheet" not in Planner(config.replace(sample_every=0)).plan(1).moments


def test_weight_gradients_aside_hold_their_inputs():
    inline, aside = (
        Planner(toy(max_grad_norm=0.0, weight_gradients=where)).plan(1).resident for where in ("inline", "aside")
    )
    assert aside == {**inline, "held for weight gradients aside": HELD_BYTES + CUBLAS_WORKSPACE}


def test_a_set_that_is_not_prepared_is_encoded_on_the_gpu_first():
    """128 pictures at once need more than the toy's step on one."""
    planners = {stored: Planner(toy(), num_images=8, stored=stored) for stored in (False, True)}
    raw, prepared = (planner.plan(1) for planner in planners.values())
    foundation = planners[False].foundation
    held = sum(t.nbytes for model in (foundation.clip, foundation.vae) for t in model.state_dict().values())
    assert raw.when == "encoding the set" and raw.peak > held + 128 * 64**2 * 3 * 4 and raw.reserved > raw.peak
    del raw.moments["encoding the set"]
    assert raw.moments == prepared.moments and raw.resident == prepared.resident


def test_gaps_count_against_the_budget():
    plan = MemoryPlan("", {"all": 3 * GIB}, {"forward": {}}, {}, gaps=GIB)
    assert plan.peak == 3 * GIB and plan.reserved == 4 * GIB
    assert plan.fits(4 * GIB + OUTSIDE) and not plan.fits(4 * GIB + OUTSIDE - 1)
    assert any(line.startswith("gaps between blocks") for line in plan.lines())


@pytest.mark.parametrize(
    ("changes", "ds", "dtype", "gigabytes"),
    [
        ({}, None, torch.float32, 8.62),
        ({"ema": 0.999}, None, torch.float32, 8.62 + 3.44),
        ({"ema": 0.999, "ema_device": "cpu"}, None, torch.float32, 8.62),
        ({"weights": "lean"}, None, torch.bfloat16, 5.19),
        ({"weights": "split"}, None, torch.bfloat16, 5.19 + 1.72),
        ({"weights": "lean", "optimizer_in_backward": True, "max_grad_norm": 0.0}, None, torch.bfloat16, 3.47),
        ({}, "ds.json", torch.bfloat16, 8.62),
        ({"optimizer": "adam"}, None, torch.float32, 16e-9 * SD_WEIGHTS),
    ],
)
def test_what_stays_on_a_gpu_is_so_many_bytes_a_weight(sd, changes, ds, dtype, gigabytes):
    config = recipe("vg256", **changes)
    layout = EngineLayout(
        config.optim,
        config.model.kernels,
        "cuda",
        plan_engine(config.optim, "finetune", torch.device("cuda"), ds and DS_JSON),
    )
    groups = unet_groups(sd, dtype)
    resident, _ = resident_parts(layout, groups)
    assert (sum(resident.values()) + gradient_bytes(layout, groups)) / 1e9 == pytest.approx(gigabytes, abs=0.02)


def test_zero_flattens_a_groups_gradients_and_widens_them(sd):
    """2 + 4 bytes an element of the largest group beside what is there; its two buckets only during backward."""
    config = recipe("vg256")
    layout = EngineLayout(
        config.optim, config.model.kernels, "cuda", plan_engine(config.optim, "finetune", torch.device("cuda"), DS_JSON)
    )
    groups = unet_groups(sd, torch.bfloat16, layout.largest_group)
    assert update_bytes(layout, groups) == 6 * max(group.numel for group in groups) <= 6 * 50_000_000
    assert bucket_blocks(layout, groups) == [2 * 50_000_000] * 2
    four = replace(layout, world_size=4)
    resident, _ = resident_parts(four, groups)
    assert resident["weights"] == pytest.approx(2 * SD_WEIGHTS, rel=1e-3)
    assert resident["fp32 master weights"] == SD_WEIGHTS and gradient_bytes(four, groups) < 0.51 * SD_WEIGHTS


def test_several_processes_without_deepspeed_need_a_bucket_more(sd):
    """Gradients become the buckets, so one is there twice; in backward those on their way are there too."""
    config = recipe("vg256")
    one = EngineLayout(config.optim, config.model.kernels, "cuda", None)
    eight = replace(one, world_size=8)
    groups = unet_groups(sd, torch.bfloat16)
    assert bucket_blocks(one, groups) == [] and bucket_blocks(eight, groups) == [64 << 20]
    assert gradient_bytes(eight, groups) == gradient_bytes(one, groups) and "8 processes" in eight.describe()
    in_backward = replace(eight, optim=replace(config.optim, optimizer_in_backward=True, max_grad_norm=0))
    assert bucket_blocks(in_backward, groups) == [64 << 20] * 3


def test_offload_moves_master_state_and_gradients_to_the_cpu(sd):
    config = recipe("vg256")
    ds = plan_engine(config.optim, "finetune", torch.device("cuda"), str(ROOT / "configs/ds_offload.json"))
    resident, host = resident_parts(
        EngineLayout(config.optim, config.model.kernels, "cuda", ds), unet_groups(sd, torch.bfloat16)
    )
    assert set(resident) == {"weights"} and resident["weights"] / 1e9 == pytest.approx(1.72, abs=0.01)
    assert sum(host.values()) / 1e9 == pytest.approx((4 + 2.03 + 4 + 2) * 0.8595, abs=0.02)


def test_meter_counts_what_lives():
    outside = torch.ones(1024)
    with Meter() as meter:
        meter.phase = "first"
        a = outside * 2  # 4096 bytes
        b = a.view(32, 32).t()  # a view: nothing
        outside.add_(1)  # was there before: nothing
        c = torch.cat([a, a])
        assert meter.now["activations"] == 3 * 4096
        del a, b
        meter.phase = "second"
        d = c[:1].clone()  # rounded up to the allocator's 512
        assert meter.now["activations"] == 2 * 4096 + 512
        del c, d
    assert meter.now == {"activations": 0, "gradients": 0, "temporaries": 0}
    assert {phase: parts["activations"] for phase, parts in meter.peaks.items()} == {"first": 12288, "second": 8704}


def linear_step(hook):
    """Backward of three layers of 64 x 64 at one row: gradients of 16 384 bytes each."""
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    parameters = list(module.parameters())
    with Meter() as meter:
        hook(meter, parameters)
        meter.phase = "backward"
        module(torch.ones(1, 64)).sum().backward()
        left = dict(meter.now)
    return meter, left, parameters


def test_meter_knows_gradients_from_activations():
    meter, left, parameters = linear_step(lambda meter, parameters: meter.keep_gradients(parameters))
    assert left["gradients"] == 3 * 16384 and left["activations"] == 0
    assert meter.peaks["backward"]["gradients"] >= 2 * 16384
    before = parameters[0].grad
    with Meter():  # the hooks are gone
        parameters[0].sum().backward()
    assert parameters[0].grad is before


def test_meter_frees_gradients_that_are_used_at_once():
    meter, left, parameters = linear_step(lambda m, p: m.use_gradients(p, lambda parameter: 10 * parameter.numel()))
    assert left == {"activations": 0, "gradients": 0, "temporaries": 0}
    assert all(p.grad is None for p in parameters)
    peak = meter.peaks["backward"]
    assert peak["temporaries"] == 10 * 4096 and sum(peak.values()) < 10 * 4096 + 2 * 16384


def test_meter_adds_the_buffer_of_all_gradients_when_a_bucket_is_full():
    meter, left, _ = linear_step(lambda m, p: m.bucket_gradients(p, bucket=8000, buffer=12345, aside=True))
    assert [size for key, size in meter.events if key in meter.aside] == [12345]
    assert left == {"activations": 0, "gradients": 12345, "temporaries": 0}
    _, left, _ = linear_step(lambda m, p: m.bucket_gradients(p, bucket=10**6, buffer=12345))
    assert left["gradients"] == 0


def test_autocast_runs_norms_in_fp32_as_on_a_gpu():
    def types():
        y = nn.functional.conv2d(torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1))
        norm, layer = nn.functional.group_norm(y, 2, torch.ones(4)), nn.functional.layer_norm(y, (4,))
        return y.dtype, norm.dtype, layer.dtype, nn.functional.silu(norm).dtype

    with autocast_like_cuda(torch.bfloat16):
        assert types() == (torch.bfloat16, torch.float32, torch.float32, torch.float32)
    with autocast_like_cuda(None):
        assert set(types()) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):  # everything is as it was
        assert types()[1] == torch.bfloat16


OPTIONS = {"image_embedding": "latent", "geometry": 0.5, "instance_codes": True, "relation_dropout": 0.1}


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, OPTIONS])
def test_fake_tensors_take_what_real_ones_take(changes):
    config = toy(**changes)
    planner = Planner(config, device="cpu")
    planned = planner._trace(2).peaks
    foundation = blank_foundation(config.model)
    graph_encoder, cache = blank_conditioner(config.model, foundation), blank_cache(config, foundation, 1)
    stage = FinetuneStage(config, graph_encoder, foundation, cache)
    if config.model.gradient_checkpointing:
        foundation.unet.enable_gradient_checkpointing()
    with Meter() as meter:
        meter.keep_gradients([p for p in stage.parameters() if p.requires_grad])
        meter.phase = "forward"
        total = stage(np.zeros(2, np.int64), 0).total
        meter.phase = "backward"
        total.backward()
    for phase in ("forward", "backward"):
        assert sum(planned[phase].values()) == pytest.approx(sum(meter.peaks[phase].values()), rel=0.01)


def check_resident(folder, channels, settings, ds_path=None):
    """Planned peak against the rise of a fresh process's resident memory, within 15 %."""
    write_sizes(folder, channels)
    config = recipe("vg128", **settings, model=str(folder))
    planner = Planner(config, plan_engine(config.optim, "finetune", CPU, ds_path), "cpu", num_images=8, stored=False)
    measured = rise(folder, settings, ds_path)
    planned = planner.plan(config.optim.batch_size)
    print(f"\nplanned {planned.peak / GIB:.3f} GiB in {planned.when}, measured {measured / GIB:.3f}")
    assert planned.peak == pytest.approx(measured, rel=0.15)
    return planned


def test_plan_is_the_rise_of_resident_memory(tmp_path):
    assert check_resident(tmp_path / "m", (64, 128, 256, 256), {"batch_size": 4}).when == "update"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "settings", "ds"),
    [
        ((128, 256, 512, 512), {"batch_size": 2}, None),
        ((64, 128, 256, 256), {"batch_size": 16}, None),
        ((64, 128, 256, 256), {"batch_size": 4, "weights": "lean"}, None),
        ((64, 128, 256, 256), {"batch_size": 4}, DS_JSON),
        ((64, 128, 256, 256), {"batch_size": 4, "optimizer": "adam", "ema": 0.999, "accumulation_steps": 2}, None),
    ],
)
def test_plan_is_the_rise_of_resident_memory_in_every_mode(tmp_path, channels, settings, ds):
    check_resident(tmp_path / "m", channels, settings, ds)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 17, 100, 4096])
@pytest.mark.parametrize("lines", [[(900, 1)], [(500, 0), (0, 7)], [(50, 1), (20, 4), (-400, 9)]])
def test_largest_batch_is_found_for_every_convex_peak(monkeypatch, most, lines):
    """A peak is the highest of some straight lines (phases); with few looks, for each costs a trace."""

    def peak(batch):
        return max(a + b * batch for a, b in lines)

    looked = set()

    def plan(self, batch, budget):
        looked.add(batch)
        return MemoryPlan("", {"all": peak(batch)}, {"forward": {}}, {})

    monkeypatch.setattr(Planner, "plan", plan)
    budget = OUTSIDE + (peak(most) if most else peak(1) - 1)
    flat = peak(most + 1) == peak(most)  # then more than `most` fit
    found = Planner.__new__(Planner).largest_batch(budget)
    assert found >= most if flat else found == most
    assert peak(found or 1) + OUTSIDE <= budget or not found
    assert len(looked) <= (32 if flat else 8)


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


def test_checkpointing_is_planned_under_autocast_as_well():
    """Its recomputation is in backward, outside of the forward's autocast."""
    plain, recomputed = (Planner(toy(gradient_checkpointing=on)).plan(16) for on in (False, True))
    at_peak = [
        max(plan.moments[phase].get("activations", 0) for phase in ("forward", "backward"))
        for plan in (recomputed, plain)
    ]
    assert 0 < at_peak[0] < at_peak[1]


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


def test_the_log_has_planned_beside_measured(tmp_path):
    settings = {
        "model": str(write_sd(tmp_path / "sd")),
        "clip": str(write_clip(tmp_path / "clip")),
        "data": str(write_pairs(tmp_path / "pairs")),
        "token_init": "none",
        "geometry": 0.0,
        "attention_loss": 0.0,
        "finetune_steps": 1,
    }
    train(tmp_path / "run", "finetune", **settings)
    row = next(line for line in lines(tmp_path / "run" / "finetune") if "event" not in line)
    assert 0 < row["planned_memory_gib"] < row["peak_memory_gib"]  # the process itself is in what was measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "batch", "most"), [("adam8bit", 2, 11.7), ("adam4bit", 2, 9.3), ("adafactor", 1, 6.0)]
)
def test_the_whole_of_sdxl_at_1024_fits_a_small_card(optimizer, batch, most):
    """GiB allocated by laion1024-sdxl, without the tables of its set."""
    planner = Planner(recipe("laion1024-sdxl", optimizer=optimizer), num_images=8, stored=False)
    plan = planner.plan(batch)
    print("\n".join(plan.lines()))
    assert plan.peak <= most * GIB, plan.lines()
