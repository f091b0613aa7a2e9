"""One way to set a run up: whoever runs, plans or times a stage has the same one; conditioners as the settings say."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from support.tiny_runs import TINY, trainer
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counts import step as counts
from benchmarks.harness.output import UnavailableError
from benchmarks.steps import pretrain, train_forms
from benchmarks.steps.forms import Size
from sgg_fast import ops
from sgg_fast.config import ConfigError
from sgg_fast.recipes import recipe
from sgg_fast.train import rehearsal
from sgg_fast.train.assemble import Summary, assemble, fit_conditioner, read_conditioner, summary
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.memory.planner import Planner
from sgg_fast.train.outputs import export

CPU = torch.device("cpu")


def by_trainer(tmp_path, monkeypatch, stage, changes):
    return trainer(tmp_path, stage, **changes).engine.module


def by_warm_up(tmp_path, monkeypatch, stage, changes):
    return rehearsal.engine_of(stage, recipe("toy", **{**TINY, **changes}), CPU, None).module


def by_planner(tmp_path, monkeypatch, stage, changes):
    return Planner(recipe("toy", **{**TINY, **changes}), device="cpu")._stage


def by_form(name):
    """As `benchmarks.train_step` builds it; a captured one, which needs a GPU, as far as its stage."""

    def build(tmp_path, monkeypatch, stage, changes):
        config = recipe("toy", **{**TINY, **changes, "precision": "bf16", "optimizer": "adam8bit"})
        monkeypatch.setattr(train_forms, "call_of", lambda name: "eager")
        with contextlib.suppress(UnavailableError):
            sizes = [Size(64, config.optim.batch_size)]
            return train_forms.build(name, config, sizes, CPU, 1).stage
        pytest.skip("not here")

    return build


def by_counts(tmp_path, monkeypatch, stage, changes):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return counts.engine_of(recipe("toy", **{**TINY, **changes})).module


def by_pretraining_form(tmp_path, monkeypatch, stage, changes):
    monkeypatch.setattr(pretrain, "NUM_PAIRS", 8)
    return pretrain.Setup(True, CPU).stage(2)


FINETUNE = {"trainer": by_trainer, "warm-up": by_warm_up, "planner": by_planner, "counts": by_counts,
            **{name: by_form(name) for name in ("captured", "plain", "plain-unfused", "lean")}}  # fmt: skip
PRETRAIN = {"trainer": by_trainer, "warm-up": by_warm_up, "benchmark": by_pretraining_form}


@pytest.fixture(autouse=True)
def _auto_kernels():
    yield
    ops.use_kernels("auto")


@pytest.mark.parametrize("who", FINETUNE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everybody_fine_tunes_one_thing(tmp_path, monkeypatch, who, checkpointing):
    """On a GPU's settings, as far as a CPU has them: fused, merged, its attention, recomputed if asked for."""
    changes = {"fuse_unet": "on", "attention": "sdpa", "gradient_checkpointing": checkpointing}
    found = summary(FINETUNE[who](tmp_path, monkeypatch, "finetune", changes))
    expected = Summary(fused=83, merged=9, attention="AttnProcessor2_0", checkpointed=checkpointing,
                       devices=frozenset({"cpu"}))  # fmt: skip
    if who == "plain-unfused":  # which is what this form is there for
        expected = dataclasses.replace(expected, fused=0, merged=0)
    assert found == expected


@pytest.mark.parametrize("who", PRETRAIN)
def test_everybody_pre_trains_one_thing(tmp_path, monkeypatch, who):
    found = summary(PRETRAIN[who](tmp_path, monkeypatch, "pretrain", {}))
    assert found == Summary(fused=0, merged=0, attention="", checkpointed=False, devices=frozenset({"cpu"}))


def test_a_stage_is_whole_on_its_device():
    """Tensors without data stand for a GPU's: models, conditioner, every part of the cache, what the stage adds."""
    meta = torch.device("meta")
    config = recipe("toy", **{**TINY, "attention": "sdpa", "image_embedding": "predicted"})
    for stage in ("pretrain", "finetune"):
        models = blank_foundation(config.model)
        cache = blank_cache(config, models, 4)
        assert cache.boxes is not None and cache.phrases is not None
        made = assemble(config, stage, models, blank_conditioner(config.model, models), cache, meta)
        assert summary(made).devices == {"meta"}


@pytest.mark.parametrize(("embedding", "there"), [("clean", "cpu"), ("predicted", "meta"), ("noisy-image", "meta")])
def test_frozen_models_lie_on_the_device_only_if_a_step_calls_them(embedding, there):
    config = recipe("toy", **{**TINY, "attention": "sdpa", "image_embedding": embedding, "weights": "lean"})
    models = blank_foundation(config.model)
    parts = models, blank_conditioner(config.model, models), blank_cache(config, models, 4)
    stage = assemble(config, "finetune", *parts, torch.device("meta"))
    assert (stage.unet.device.type, stage.unet.dtype) == ("meta", torch.bfloat16)
    assert (models.vae.device.type, models.clip.device.type, models.text_encoder.device.type) == (there, there, "cpu")


def test_the_planner_plans_what_a_gpu_will_run():
    """Fused there and not on a CPU, unless the settings say so; ZeRO-3 gathers layer by layer, so nothing is merged."""
    config = recipe("toy", **TINY)
    zero3 = {"zero_optimization": {"stage": 3}}
    planned = [
        summary(Planner(changed, ds, device)._stage)
        for changed, ds, device in (
            (config, None, "cuda"),
            (config, None, "cpu"),
            (config.replace(fuse_unet="off"), None, "cuda"),
            (config, zero3, "cuda"),
        )
    ]
    assert [(one.fused, one.merged) for one in planned] == [(83, 9), (0, 0), (0, 0), (83, 0)]


def test_a_pretrained_encoder_is_read_with_its_settings_and_fitted_to_the_models(tmp_path):
    """Its vocabulary grows by the set's words; other settings, widths and kinds are refused."""
    config = recipe("toy", **TINY)
    models = blank_foundation(config.model)
    pretrained = blank_conditioner(config.model, models)
    pretrained.register_to_config(trained_names=("a word", "on"))
    export(tmp_path / "graph_encoder", pretrained)
    found = read_conditioner(tmp_path / "graph_encoder", config.model)
    assert all(tensor.equal(found.state_dict()[name]) for name, tensor in pretrained.state_dict().items())
    with pytest.raises(ConfigError, match="was pre-trained with width 32, not 48; pre-train again or change the flag"):
        read_conditioner(tmp_path / "graph_encoder", dataclasses.replace(config.model, width=48))

    cache = blank_cache(config, models, 2)
    fitted = fit_conditioner(found, models, cache)
    assert fitted is found and fitted.config.trained_names == ("a word", "on", *cache.table.names)
    narrow = dataclasses.replace(cache, names=cache.names[:, 1:])
    width = cache.names.shape[1]
    with pytest.raises(ConfigError, match=f"pre-trained for CLIP names of width {width}, but .* have {width - 1}"):
        fit_conditioner(found, models, narrow)

    baseline = blank_conditioner(dataclasses.replace(config.model, conditioner="sgdiff"), models)
    export(tmp_path / "baseline", baseline)
    with pytest.raises(ConfigError, match=r"not a graph encoder: .*it is a baseline's"):
        read_conditioner(tmp_path / "baseline", config.model)
