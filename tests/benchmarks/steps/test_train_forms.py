"""The forms of a fine-tuning step: ours and diffusers', and those that cannot run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.harness.output import UnavailableError
from benchmarks.steps import finetune, train_forms
from benchmarks.steps.forms import Size

CPU = torch.device("cpu")
SIZES = [Size(32, 1), Size(32, 2)]
SMALL = train_forms.settings(quick=True).replace(width=32, num_layers=1, batch_size=1)


def test_what_is_not_installed_is_skipped_and_so_is_an_xformers_that_cannot_run(monkeypatch):
    find_spec = importlib.util.find_spec
    config = train_forms.settings(quick=True)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
        (row,) = finetune.measure_form("ds.json", config, SIZES[:1], CPU, 0.1)
        assert row.status == "skipped: not installed here: deepspeed"
    form = object.__new__(train_forms.Diffusers)
    form.unet = train_forms.blank_foundation(config.model).unet
    with pytest.raises(UnavailableError, match=r"^skipped: diffusers' xformers: .+"):
        form._attend_by("xformers")


@pytest.mark.parametrize("name", ["plain", "diffusers-adamw"])
def test_a_form_steps_without_moving_its_weights(name):
    """Losses are those of its reference, before and after steps at a learning rate of 0, also at another size."""
    form = train_forms.build(name, SMALL, SIZES, CPU, 1)
    before = {key: value.clone() for key, value in weights_of(form).items()}
    for size in SIZES:
        form.prepare(size)
        first, (exact, _) = form.losses(1), form.references[size]
        assert first == [pytest.approx(exact[0], rel=2e-2)]
        form.step()
        assert form.losses(1) == first
    assert all(torch.equal(value, before[key]) for key, value in weights_of(form).items())
    assert form.references[SIZES[0]] != form.references[SIZES[1]]
    if name == "plain":
        assert form.planned(SIZES[0]) > form.optimiser_bytes / 4, "weights, gradients and more"
    else:
        assert form.planned(SIZES[0]) is None


def weights_of(form: train_forms.Form) -> dict[str, torch.Tensor]:
    module = form.unet if isinstance(form, train_forms.Diffusers) else form.stage
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def test_a_captured_form_has_an_engine_for_each_size_and_the_losses_of_its_steps():
    """Without CUDA graphs its engine is the plain one, whose steps have the losses of their forward."""
    form = train_forms.Captured(SMALL, None, SIZES[:1], CPU, 1)
    first = form.engine
    form.prepare(Size(32, 3))
    assert form.engine is not first and form.stage.config.optim.batch_size == 3 == len(form.ids)
    assert form.losses(2) == [pytest.approx(loss, rel=1e-3) for loss in train_forms.Ours.losses(form, 2)]


def test_settings_and_calls_of_the_forms():
    full, quick = train_forms.settings(quick=False), train_forms.settings(quick=True)
    assert (full.model.sizes, quick.model.sizes) == ("sd", "toy") and full.optim.precision == "bf16"
    assert [train_forms.call_of(name) for name in ("captured-lean", "plain", "diffusers-max-autotune")] == [
        "replay",
        "eager",
        "compiled",
    ]
