"""Inputs and fixtures that tests share with `test_stages.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sgg_fast.config import Config
from sgg_fast.data.cache import TrainingCache
from sgg_fast.diffusion import noise
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.nn.instances import CODE_WIDTH, STREAM_INSTANCE
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.stages import FinetuneStage, PretrainStage
from support import loops
from support.graphs import all_graphs, by_name, embeddings, pack, shared_table
from support.loops import jitter

NAME, WIDTH, IMAGE, SIDE, STEP = 16, 16, 128, 8, 3


LARGE = SceneGraph(("boat",) * 40, tuple((i, "on", (i + 1) % 40) for i in range(40)))


GRAPHS = [*all_graphs(), LARGE]


IDS = np.array([5, 0, 4, 2, 1, 6])


@pytest.fixture(scope="module")
def foundation() -> Foundation:
    return toy_foundation(weights=None)


@pytest.fixture(scope="module")
def cache() -> TrainingCache:
    table = shared_table()
    graphs, _ = pack(*GRAPHS, table=table)
    generator = torch.Generator().manual_seed(0)
    return TrainingCache(
        graphs=graphs,
        table=table,
        names=0.3 * embeddings(table, NAME) + 1,
        images=torch.randn(len(GRAPHS), IMAGE, generator=generator),
        moments=torch.randn(len(GRAPHS), 8, SIDE, SIDE, generator=generator),
    )


def conditioner(config: Config, cache: TrainingCache) -> SceneGraphConditioner:
    """Fresh weights, with statistics that are not trivial."""
    torch.manual_seed(0)
    own = config.model
    model = SceneGraphConditioner(
        NAME, IMAGE, 128, own.width, own.num_layers, own.encoder, own.triple, own.context,
        instance_codes=own.instance_codes,
    )  # fmt: skip
    jitter(model)
    model.calibrate_names(cache.names, cache.graphs.object_name[cache.graphs.object_pooled.bool()])
    model.image_mean.copy_(torch.nn.functional.normalize(cache.images, dim=-1).mean(0))
    model.calibrate_null(torch.randn(77, 128))
    model.calibrate_tokens(torch.randn(20, 128))
    return model


def settings(**changes: object) -> Config:
    plain = {"contrastive": "bce", "graph_negatives": False, "geometry": 0.0, "attention_loss": 0.0}
    sizes = {"width": WIDTH, "num_layers": 2, "seed": 11, "condition_dropout": 0.4, "resolution": 32}
    return Config().replace(**{**plain, **sizes, **changes})


def given_graph(stage: PretrainStage | FinetuneStage, sample: int) -> SceneGraph:
    """The sample's, which fine-tuning may give without its relations at `STEP`."""
    graph, share = GRAPHS[sample], stage.config.objective.relation_dropout
    if (
        isinstance(stage, FinetuneStage)
        and loops.uniform(stage.config.run.seed, STEP, sample, noise.STREAM_BARE) < share
    ):
        return SceneGraph(graph.objects)
    return graph


def pretrain_stage(cache: TrainingCache, **changes: object) -> PretrainStage:
    config = settings(**changes)
    model = conditioner(config, cache)
    stage = PretrainStage(config, model, cache)
    jitter(stage.decoder, seed=1)
    with torch.no_grad():
        stage.constraint.bias.fill_(0.2)
    return stage


@dataclasses.dataclass
class Drawn:
    """Everything random about a sample at `STEP`."""

    t: int
    kept: bool
    z_0: torch.Tensor
    eps: torch.Tensor


def draw(stage: FinetuneStage, foundation: Foundation, sample: int) -> Drawn:
    seed = stage.config.run.seed
    key, shape = (seed, STEP, sample), (4, SIDE, SIDE)
    posterior, eps = (
        loops.normals(4 * SIDE * SIDE, *key, stream).reshape(shape)
        for stream in (noise.STREAM_POSTERIOR, noise.STREAM_NOISE)
    )
    mean, logvar = stage.cache.moments[sample].double().chunk(2)
    z_0 = (mean + (logvar / 2).exp() * posterior) * foundation.vae.config.scaling_factor
    kept = loops.uniform(*key, noise.STREAM_DROP) >= stage.config.objective.condition_dropout
    return Drawn(int(loops.uniform(*key, noise.STREAM_TIME) * 1000), kept, z_0, eps.double())


def finetune_stage(
    cache: TrainingCache, foundation: Foundation, kind: str = "epsilon", **changes: object
) -> tuple[FinetuneStage, Foundation]:
    config = settings(**changes)
    scheduler = DDIMScheduler.from_config(foundation.scheduler.config, prediction_type=kind)
    foundation = dataclasses.replace(foundation, scheduler=scheduler)
    return FinetuneStage(config, conditioner(config, cache), foundation, cache), foundation


def encoded(
    stage: PretrainStage | FinetuneStage, sample: int, masked: set[int] | None = None, graph: SceneGraph | None = None
) -> loops.Encoded:
    """Sample's graph, or that one in its place, through eqs 3-8, by loops."""
    model, config, cache = stage.conditioner, stage.config, stage.cache
    names = by_name(cache.table, model.standardise(cache.names))
    shared = config.model.triple == "shared"
    graph = graph or given_graph(stage, sample)
    codes = {}
    if config.model.instance_codes:
        seen = [name for i, name in enumerate(graph.objects) if i not in (masked or ())]
        for i, name in enumerate(graph.objects):
            if i not in (masked or ()) and seen.count(name) > 1:
                codes[i] = loops.normals(CODE_WIDTH, config.run.seed, STEP, sample, STREAM_INSTANCE, i).double()
    return loops.encode(loops.weights(model), graph, names, config.model.encoder, shared, masked or (), codes)
