"""Both stages learn, measured on fixed scenes with fixed draws before and after, beside chance and beside a control.

Measure: the mean of each loss term over every scene of a set, over several draws of masks, negatives, timesteps and
noise that training never made; the same draws before and after. "Learned" means: below 0.8 of the value before, and
below the value at chance.

Control of pre-training: the same graphs, images, steps and draws, but at every step the graphs are shuffled anew among
the images. A fixed shuffle would be a set of pairs like any other, which a small set lets a network learn by heart; a
fresh one takes away the correspondence and nothing else. L_mae never reads an image, so the control learns it as
well and could pass on it alone; the question is put to L_con. Scenes held out of training show that what the true
pairs taught is the correspondence and not the pairs.

The towers have random weights, so that the numbers here do not depend on what the toy ships.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sgg_fast.config import Config
from sgg_fast.data.cache import TrainingCache, build_cache, to_pixels
from sgg_fast.data.sources import open_source
from sgg_fast.nn.foundation import Foundation
from sgg_fast.recipes import recipe
from sgg_fast.toy.models import toy_foundation
from sgg_fast.toy.world import draw_scene
from sgg_fast.train.assemble import new_conditioner
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.order import SampleOrder
from sgg_fast.train.stages import FinetuneStage, PretrainStage

CPU = torch.device("cpu")
FAR = 10**6
"""Steps from here on are for measuring; training never draws them."""


def measure(module: torch.nn.Module, ids: np.ndarray, batch: int, draws: int = 3) -> dict[str, float]:
    """Term -> mean over the scenes `ids` and over `draws` draws of each; "NAME_at_chance" beside it."""
    sums: dict[str, float] = {}
    module.eval()
    with torch.no_grad():
        for draw in range(draws):
            for some in np.split(ids, len(ids) // batch):
                terms = module(some, FAR + draw)
                values = {**terms.losses, **{f"{name}_at_chance": c for name, c in terms.chance.items()}}
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * batch / len(ids) / draws
    module.train()
    return sums


def fit(
    module: torch.nn.Module,
    config: Config,
    num_scenes: int,
    steps: int,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """The trainer's loop without its files: every step reads what `Trainer` would."""
    engine = EagerEngine(module, CPU)
    order = SampleOrder(num_scenes, config.optim.batch_size, config.run.seed, rank=0, world_size=1)
    for step in range(steps):
        before_step(step)
        engine.update(order.at(step)[None], step)


def learned(before: dict[str, float], after: dict[str, float], name: str) -> bool:
    return after[name] < 0.8 * before[name] and after[name] < after[f"{name}_at_chance"]


@pytest.fixture(scope="module")
def foundation() -> Foundation:
    """The toy's with random weights, but for a VAE that is sure of its latents, as every trained one is."""
    made = toy_foundation(weights=None)
    with torch.no_grad():
        made.vae.quant_conv.bias[made.vae.config.latent_channels :] -= 12.0
        pixels = to_pixels(np.stack([draw_scene(0, i).image for i in range(16)]), CPU)
        latents = made.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
    made.vae.register_to_config(scaling_factor=1 / float(latents.std()))
    return made


def cache_of(config: Config, foundation: Foundation, with_latents: bool) -> TrainingCache:
    return build_cache(open_source(config.data, config.run.seed), foundation, CPU, with_latents, progress=False)


NUM_TRAINED, NUM_HELD_OUT = 128, 64


def pretrain(foundation: Foundation, shuffled: bool) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Measures before and after training on the trained scenes, and after it on those held out."""
    own = {"contrastive": "bce", "graph_negatives": False, "geometry": 0.0}
    config = recipe("toy", num_scenes=NUM_TRAINED + NUM_HELD_OUT, width=64, num_layers=3, batch_size=16, **own)
    cache = cache_of(config, foundation, with_latents=False)
    torch.manual_seed(config.run.seed)
    stage = PretrainStage(config, new_conditioner(config.model, config.run.seed, foundation, cache), cache)
    names, targets, images = stage._frozen
    trained, held_out = np.arange(NUM_TRAINED), np.arange(NUM_TRAINED, len(cache))

    def shuffle(step: int) -> None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))
        stage._frozen = (names, targets, images[order])

    before = measure(stage, trained, 16)
    fit(stage, config, NUM_TRAINED, 160, shuffle if shuffled else lambda step: None)
    stage._frozen = (names, targets, images)
    return before, measure(stage, trained, 16), measure(stage, held_out, 16)


def test_pretraining_learns_and_the_shuffled_control_does_not(foundation):
    before, after, held_out = pretrain(foundation, shuffled=False)
    for name in ("loss", "mae", "con"):
        assert learned(before, after, name), (name, before, after)
        assert held_out[name] < held_out[f"{name}_at_chance"], (name, held_out)

    same, control, control_held_out = pretrain(foundation, shuffled=True)
    assert same == before, "both start from the same weights and are measured on the same draws"
    assert learned(same, control, "mae"), "the control trains as well as the other"
    assert not learned(same, control, "con") and control["con"] > 0.98 * control["con_at_chance"], control
    assert control_held_out["con"] > 0.98 * control_held_out["con_at_chance"], control_held_out
    print(f"\npre-training: {before=}\n{after=}\n{held_out=}\n{control=}\n{control_held_out=}")


def test_fine_tuning_learns(foundation):
    own = {"token_init": "none", "geometry": 0.0, "attention_loss": 0.0, "unet_lr": 1e-3}
    config = recipe("toy", num_scenes=32, width=64, num_layers=3, batch_size=8, **own)
    cache = cache_of(config, foundation, with_latents=True)
    stage = FinetuneStage(config, new_conditioner(config.model, config.run.seed, foundation, cache), foundation, cache)
    ids = np.arange(len(cache))
    before = measure(stage, ids, 8)
    fit(stage, config, len(cache), 50)
    after = measure(stage, ids, 8)
    assert before["diff"] > 0.95, "an untrained UNet does no better than chance"
    for name in ("loss", "diff", "isa"):
        assert learned(before, after, name), (name, before, after)
    print(f"\nfine-tuning: {before=}\n{after=}")
