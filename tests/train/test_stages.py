"""Both stages' terms on a toy foundation against a loop over samples: every draw, every equation, no batch.

The loop gives the UNet exactly the tokens that may be attended to and no mask, so it also shows that masked
padding is inert and that T does not matter.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from sgg_kernels.reference.pack import MASK_STREAM
from support import loops
from support.cases.box import boxed  # noqa: F401  (a fixture)
from support.cases.negative import told_wrongly
from support.cases.stage import (  # noqa: F401
    GRAPHS,
    IDS,
    IMAGE,
    LARGE,
    NAME,
    SIDE,
    STEP,
    WIDTH,
    Drawn,
    cache,
    conditioner,
    draw,
    encoded,
    finetune_stage,
    foundation,
    given_graph,
    pretrain_stage,
    settings,
)
from support.graphs import by_name, pack

from sgg_fast import ops
from sgg_fast.diffusion import noise
from sgg_fast.nn import lora
from sgg_fast.nn.clip import embed_images
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.foundation import Foundation
from sgg_fast.train.buckets import Bucket
from sgg_fast.train.stages import FinetuneStage, PretrainStage, Terms, checkpoint_state

# Pre-training.


def mae_squares(stage: PretrainStage, sample: int) -> list[float]:
    """Squared errors of the sample's masked objects, a value per object."""
    config, model, cache = stage.config, stage.conditioner, stage.cache
    graph = GRAPHS[sample]
    masked = loops.masked_objects(
        len(graph.objects), config.objective.mask_ratio, config.run.seed, STEP, sample, MASK_STREAM
    )
    copy = encoded(stage, sample, masked)
    heads = stage.decoder.layers[0].self_attn.num_heads
    predicted = loops.mae_decoder(loops.weights(stage.decoder), copy.x, copy.x_global, heads)
    targets = by_name(cache.table, model.targets(model.standardise(cache.names)))
    return [float(((predicted[i] - targets[graph.objects[i]]) ** 2).sum()) / NAME for i in sorted(masked)]


def contrast(stage: PretrainStage, sample: int) -> float:
    """Eq. 9 of the sample's full graph against its negatives."""
    config, x_global = stage.config, encoded(stage, sample).x_global
    images = stage.conditioner.centre_images(stage.cache.images)
    scale, bias = stage.constraint.scale.exp().item(), stage.constraint.bias.item()
    others = [i for i in range(len(GRAPHS)) if i != sample]
    num = config.objective.num_negatives if config.objective.contrastive == "infonce" else 1
    drawn = [
        others[loops.hash_u32(config.run.seed, STEP, sample, noise.STREAM_NEGATIVE, k) % len(others)]
        for k in range(num)
    ]
    f_pos = scale * loops.cosine(x_global, images[sample]) + bias
    f_negs = [scale * loops.cosine(x_global, images[i]) + bias for i in drawn]
    words = set(stage.cache.table.names)
    if config.objective.graph_negatives and (
        graph := told_wrongly(GRAPHS[sample], words, config.run.seed, STEP, sample)
    ):
        f_negs.append(scale * loops.cosine(encoded(stage, sample, graph=graph).x_global, images[sample]) + bias)
    if config.objective.contrastive == "infonce":
        return math.log(math.exp(f_pos) + sum(map(math.exp, f_negs))) - f_pos
    shift = 0 if config.objective.contrastive == "bce" else 1
    return loops.softplus(-f_pos) + sum(loops.softplus(f - shift) for f in f_negs)


@pytest.mark.parametrize(
    "changes",
    [
        {"contrastive": "bce"},
        {"contrastive": "literal", "encoder": "plain", "triple": "shared", "mask_ratio": 0.6},
        {"contrastive": "infonce", "num_negatives": 5},
        {"contrastive": "bce", "mae_weight": 0.25, "con_weight": 3.0},
        {"contrastive": "bce", "graph_negatives": True, "instance_codes": True},
        {"contrastive": "infonce", "num_negatives": 5, "graph_negatives": True},
    ],
)
def test_pretrain_terms(cache, changes):
    stage = pretrain_stage(cache, **changes)
    terms = stage(IDS, STEP)
    squares = [value for sample in IDS.tolist() for value in mae_squares(stage, sample)]
    con = [contrast(stage, sample) for sample in IDS.tolist()]
    mae, con = sum(squares) / len(squares), sum(con) / len(con)
    of_mae, of_con = changes.get("mae_weight", 1), changes.get("con_weight", 1)
    expected = {"loss": of_mae * mae + of_con * con, "mae": mae, "con": con}
    assert list(terms.losses) == list(expected)
    for name, value in expected.items():
        assert terms.losses[name].item() == pytest.approx(value, rel=2e-4), name
    chance = {"bce": 2 * math.log(2), "literal": 2 * math.log(1 + math.exp(-0.5)), "infonce": math.log(6)}
    con_chance = chance[changes["contrastive"]]
    if stage.config.objective.graph_negatives:  # four of the six graphs have a relation to tell wrongly
        entropy = -math.log(3 / 8) - 5 / 3 * math.log(5 / 8)
        con_chance = {"bce": entropy, "infonce": 1 / 3 * math.log(6) + 2 / 3 * math.log(7)}[changes["contrastive"]]
    assert {k: v.item() for k, v in terms.chance.items()} == pytest.approx(
        {"loss": of_mae + of_con * con_chance, "mae": 1.0, "con": con_chance}, rel=1e-6
    )
    assert terms.total.item() == pytest.approx(terms.losses["loss"].item()) and terms.total.requires_grad


def test_pretraining_terms_do_not_depend_on_the_batch(cache):
    stage = pretrain_stage(cache)
    whole = stage(IDS, STEP).losses
    parts = [stage(np.array([i]), STEP).losses for i in IDS]
    counts = [len(mae_squares(stage, i)) for i in IDS.tolist()]
    assert counts == [1, 1, 0, 1, 1, 2]
    mae = sum(n * float(part["mae"]) for n, part in zip(counts, parts, strict=True)) / sum(counts)
    assert whole["mae"].item() == pytest.approx(mae, rel=1e-5)
    assert whole["con"].item() == pytest.approx(sum(float(p["con"]) for p in parts) / len(parts), rel=1e-5)
    backwards = stage(IDS[::-1].copy(), STEP).losses
    for name, value in whole.items():
        assert backwards[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_pretraining_reaches_every_weight_it_should(cache):
    stage = pretrain_stage(cache)
    stage(IDS, STEP).total.backward()
    idle = {name for name, p in stage.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name.split(".")[1] for name in idle} == {"from_global", "token_norm"}, "the context is not read yet"


@pytest.mark.parametrize(("off", "idle"), [("mae_weight", {"decoder"}), ("con_weight", {"constraint"})])
def test_a_loss_of_weight_zero_trains_nothing(cache, off, idle):
    stage = pretrain_stage(cache, **{off: 0.0})
    stage(IDS, STEP).total.backward()
    moved = {name.split(".")[0] for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"conditioner", "decoder", "constraint"} - idle


def test_each_step_draws_anew(cache):
    stage = pretrain_stage(cache)
    assert stage(IDS, STEP).total == stage(IDS, STEP).total
    assert stage(IDS, STEP).losses["con"] != stage(IDS, STEP + 1).losses["con"]


# Fine-tuning.


@torch.no_grad()
def seen(model: SceneGraphConditioner, foundation: Foundation, z: torch.Tensor) -> torch.Tensor:
    """CLIP of the picture that a latent decodes to."""
    pixels = foundation.vae.decode((z / foundation.vae.config.scaling_factor)[None].float()).sample
    return model.centre_images(embed_images(foundation.clip, pixels))[0]


def finetune_sample(stage: FinetuneStage, foundation: Foundation, sample: int) -> dict[str, float]:
    """diff, isa and alpha-bar weight of one sample, by eqs 10-12."""
    config, model, drawn = stage.config, stage.conditioner, draw(stage, foundation, sample)
    abar, kind = float(foundation.scheduler.alphas_cumprod[drawn.t]), foundation.scheduler.config.prediction_type
    signal, blur = math.sqrt(abar), math.sqrt(1 - abar)
    graph, z_t = encoded(stage, sample), signal * drawn.z_0 + blur * drawn.eps
    if drawn.kept:
        rows, mask = loops.context(loops.weights(model), graph, 112)
        rows = rows[mask] if config.model.context == "triples" else rows[1:2]
    else:
        rows = model.null_states
    with torch.no_grad():
        out = stage.unet(z_t[None].float(), torch.tensor([drawn.t]), rows[None].float()).sample[0].double()
    target = drawn.eps if kind == "epsilon" else signal * drawn.eps - blur * drawn.z_0
    image = clean = model.centre_images(stage.cache.images)[sample]
    if config.objective.image_embedding == "noisy-image":
        image = seen(model, foundation, z_t)
    cos = loops.cosine(image, graph.x_global)
    weight = 1.0 if config.objective.isa_weight == "none" or config.objective.image_embedding == "noised" else abar
    isa = weight * (1 - (signal if config.objective.image_embedding == "noised" else 1) * cos)
    z_0 = (z_t - blur * out) / signal if kind == "epsilon" else signal * z_t - blur * out
    reader = 0.0
    if config.objective.image_embedding in ("predicted", "latent"):
        told = seen(model, foundation, z_0)
        if config.objective.image_embedding == "latent":
            with torch.no_grad():
                told = stage.reader(z_0[None].float(), torch.tensor([drawn.t]))[0]
            reader = 1 - loops.cosine(told, clean)
        isa, weight = isa + weight * (1 - loops.cosine(told, graph.x_global)), 2 * weight
    return {
        "diff": float((out - target).square().mean()),
        "isa": isa * drawn.kept,
        "reader": reader,
        "isa_chance": weight * drawn.kept,
        "kept": drawn.kept,
    }


FORMS = [
    ({"image_embedding": "clean"}, "epsilon"),
    ({"image_embedding": "clean", "isa_weight": "none", "encoder": "plain", "triple": "shared"}, "v_prediction"),
    ({"image_embedding": "noised", "loss_weight": 0.8}, "epsilon"),
    ({"image_embedding": "predicted"}, "epsilon"),
    ({"image_embedding": "predicted", "loss_weight": 0.2}, "v_prediction"),
    ({"image_embedding": "noisy-image"}, "epsilon"),
    ({"image_embedding": "latent", "loss_weight": 0.2}, "v_prediction"),
    ({"context": "global", "token_init": "none"}, "v_prediction"),
    ({"relation_dropout": 0.5, "instance_codes": True}, "v_prediction"),
]


@pytest.mark.parametrize(("changes", "kind"), FORMS)
def test_finetune_terms(cache, foundation, changes, kind):
    stage, models = finetune_stage(cache, foundation, kind, **changes)
    ids = np.append(IDS, len(GRAPHS) - 1)
    with torch.no_grad():
        terms = stage(ids, STEP)
    samples = [finetune_sample(stage, models, sample) for sample in ids.tolist()]
    assert {sample["kept"] for sample in samples} == {True, False}
    bare = {sample for sample in ids.tolist() if given_graph(stage, sample) != GRAPHS[sample]}
    assert (0 < len(bare) < len(set(ids))) == (stage.config.objective.relation_dropout > 0)
    diff, isa, chance = (sum(s[name] for s in samples) / len(samples) for name in ("diff", "isa", "isa_chance"))
    share = stage.config.objective.loss_weight
    expected = {"loss": share * diff + (1 - share) * isa, "diff": diff, "isa": isa}
    at_chance = {"loss": share + (1 - share) * chance, "diff": 1.0, "isa": chance}
    if stage.reader:
        expected["reader"], at_chance["reader"] = sum(s["reader"] for s in samples) / len(samples), 1.0
        expected["loss"], at_chance["loss"] = expected["loss"] + expected["reader"], at_chance["loss"] + 1
    assert list(terms.losses) == list(expected)
    for name, value in expected.items():
        assert terms.losses[name].item() == pytest.approx(value, rel=1e-3), name
    assert {k: v.item() for k, v in terms.chance.items()} == pytest.approx(at_chance, rel=1e-4)


@pytest.mark.parametrize("embedding", ["clean", "predicted"])
def test_finetune_terms_do_not_depend_on_the_batch(cache, foundation, embedding):
    stage, _ = finetune_stage(cache, foundation, image_embedding=embedding)
    ids = np.append(IDS, len(GRAPHS) - 1)
    with torch.no_grad():
        whole, backwards = stage(ids, STEP), stage(ids[::-1].copy(), STEP)
        alone = [stage(np.array([i]), STEP) for i in ids]
    for name, value in whole.losses.items():
        assert sum(float(a.losses[name]) for a in alone) / len(ids) == pytest.approx(value.item(), rel=1e-4)
        assert backwards.losses[name].item() == pytest.approx(value.item(), rel=1e-5)
        assert sum(float(a.chance[name]) for a in alone) / len(ids) == pytest.approx(
            whole.chance[name].item(), rel=1e-5
        )


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.norm()) + 1e-6
        assert float((found[name] - gradient).norm()) < 1e-2 * scale, name


def test_unets_branch_sees_x_global_detached(cache, foundation):
    """`predicted`: the UNet's branch does not pull X_global; X_global follows the clean image instead."""
    stage, models = finetune_stage(cache, foundation, image_embedding="predicted", loss_weight=0.0)
    sample = next(s for s in range(8) if draw(stage, models, s).kept)
    drawn, model = draw(stage, models, sample), stage.conditioner
    abar = float(models.scheduler.alphas_cumprod[drawn.t])
    found = gradients(stage, stage(np.array([sample]), STEP).total)

    condition = model(model.standardise(cache.names), pack(GRAPHS[sample], table=cache.table)[0])
    z_t = (math.sqrt(abar) * drawn.z_0 + math.sqrt(1 - abar) * drawn.eps)[None].float()
    used = condition.context[:, condition.mask[0]]
    eps = stage.unet(z_t, torch.tensor([drawn.t]), used).sample
    z_0 = (z_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    seen = embed_images(models.clip, models.vae.decode(z_0 / models.vae.config.scaling_factor).sample)
    clean = model.centre_images(cache.images)[sample : sample + 1]

    def away(image: torch.Tensor, x_global: torch.Tensor) -> torch.Tensor:
        return abar * (1 - torch.nn.functional.cosine_similarity(image, x_global)).sum()

    loss = away(clean, condition.x_global) + away(model.centre_images(seen), condition.x_global.detach())
    assert_same_gradients(found, gradients(stage, loss))
    assert found["unet.conv_in.weight"].abs().sum() > 0


def test_the_reader_learns_by_its_own_loss_and_the_unet_through_it(cache, foundation):
    """`latent`: as `predicted`, the reader in CLIP's place, whose weights the UNet's branch leaves alone."""
    stage, models = finetune_stage(cache, foundation, image_embedding="latent", loss_weight=0.0)
    sample = next(s for s in range(8) if draw(stage, models, s).kept)
    drawn, model, other = draw(stage, models, sample), stage.conditioner, copy.deepcopy(stage.reader)
    abar, t = float(models.scheduler.alphas_cumprod[drawn.t]), torch.tensor([drawn.t])
    found = gradients(stage, stage(np.array([sample]), STEP).total)
    assert all(p.requires_grad for p in stage.reader.parameters())

    condition = model(model.standardise(cache.names), pack(GRAPHS[sample], table=cache.table)[0])
    z_t = (math.sqrt(abar) * drawn.z_0 + math.sqrt(1 - abar) * drawn.eps)[None].float()
    eps = stage.unet(z_t, t, condition.context[:, condition.mask[0]]).sample
    z_0 = (z_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    clean = model.centre_images(cache.images)[sample : sample + 1]
    cosine = torch.nn.functional.cosine_similarity
    aligned = abar * (2 - cosine(clean, condition.x_global) - cosine(other(z_0, t), condition.x_global.detach()))
    read = 1 - cosine(stage.reader(z_0.detach(), t), clean)
    assert_same_gradients(found, gradients(stage, (aligned + read).sum()))
    assert found["unet.conv_in.weight"].any() and found["reader.conv_in.weight"].any()


def test_a_noised_image_trains_the_graph_alone(cache, foundation):
    stage, _ = finetune_stage(cache, foundation, image_embedding="noisy-image", loss_weight=0.0)
    found = gradients(stage, stage(IDS, STEP).total)
    assert found["conditioner.to_global.weight"].any()
    assert not any(gradient.any() for name, gradient in found.items() if name.startswith("unet."))


def test_what_trains_and_what_does_not(cache, foundation):
    stage, models = finetune_stage(cache, foundation)
    trained = {name for name, p in stage.named_parameters() if p.requires_grad}
    everything = {name for name, _ in stage.named_parameters()}
    assert everything - trained == {"conditioner.relation_encoder.mask_token"}
    assert {name.split(".")[0] for name in everything} == {"unet", "conditioner"}
    gradients(stage, stage(IDS, STEP).total)
    without = {name for name in trained if stage.get_parameter(name).grad is None}
    assert not without, "DeepSpeed waits for a gradient of every trained weight"
    for frozen in (models.vae, models.clip, models.text_encoder):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("embedding", ["clean", "predicted", "latent"])
def test_finetuning_under_bf16_autocast(cache, foundation, embedding):
    """No mixed-dtype failure; losses stay fp32 and near the fp32 ones; every gradient is finite."""
    stage, _ = finetune_stage(cache, foundation, image_embedding=embedding, encoder="plain")
    exact = stage(IDS, STEP).losses
    with torch.autocast("cpu", torch.bfloat16):
        terms = stage(IDS, STEP)
    assert terms.total.dtype == torch.float32
    for name, value in exact.items():
        assert terms.losses[name].item() == pytest.approx(value.item(), rel=0.02)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(stage, terms.total).values())


# What a captured step takes, and a checkpoint.


def table_of(stage: PretrainStage | FinetuneStage, ids: np.ndarray, bucket: Bucket) -> torch.Tensor:
    """The table that an engine fills for a micro-batch at `STEP`."""
    table = torch.zeros(ops.table_shape(stage.num_graphs + 1, 2 + stage.num_shared), dtype=torch.int32)
    ops.draw_table(stage.store, stage.graphs_of(ids, STEP), STEP, bucket=bucket.shape, out=table)
    stage.share(table)
    return table


def assert_same_terms(found: Terms, expected: Terms) -> None:
    assert list(found.losses) == list(expected.losses)
    for name, value in expected.losses.items():
        torch.testing.assert_close(found.losses[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.chance[name], expected.chance[name])


@pytest.mark.parametrize("changes", [{}, {"graph_negatives": True}])
def test_packed_pretraining_terms_are_those_of_the_samples(cache, changes):
    """Padded, from the table alone; also where the masked objects of other processes count."""
    stage, ids = pretrain_stage(cache, batch_size=3, **changes), IDS[:3]
    bucket = stage.buckets().of(ids[None])
    alone = stage.packed_terms(table_of(stage, ids, bucket), bucket)
    assert_same_terms(alone, stage(ids, STEP))
    stage.meet(IDS, 2)
    together = stage.packed_terms(table_of(stage, ids, bucket), bucket)
    assert_same_terms(together, stage(ids, STEP))
    assert alone.losses["mae"] != together.losses["mae"]


def test_processes_average_over_the_masked_objects_of_all(cache):
    """The first half masks two objects and the second one four, so the mean of their own means would differ."""
    stage = pretrain_stage(cache)
    whole = stage(IDS, STEP).losses["mae"]
    own = [stage(ids, STEP).losses["mae"] for ids in (IDS[:3], IDS[3:])]
    stage.meet(IDS, 2)
    halves = [stage(ids, STEP).losses["mae"] for ids in (IDS[:3], IDS[3:])]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-5, atol=1e-6)
    assert abs(sum(own) / 2 - whole) > 1e-3 * whole


def test_packed_finetuning_terms_are_those_of_the_samples(cache, foundation):
    """In the smallest bucket and in the largest; some graphs without their relations."""
    changes = {"batch_size": 2, "accumulation_steps": 3, "relation_dropout": 0.5}
    stage, models = finetune_stage(cache, foundation, **changes)
    assert (stage.num_graphs, stage.num_micro) == (2, 3) and stage.foundation is models
    ids = np.array([0, 4])
    assert len(stage.buckets().ladder) > 1
    with torch.no_grad():
        expected = stage(ids, STEP)
        for bucket in stage.buckets().ladder.values():
            assert_same_terms(stage.packed_terms(table_of(stage, ids, bucket), bucket), expected)


def test_a_checkpoint_holds_everything_but_frozen_weights_of_the_unet(cache, foundation):
    stage, _ = finetune_stage(cache, foundation)
    assert checkpoint_state(stage).keys() == stage.state_dict().keys()
    models = dataclasses.replace(foundation, unet=copy.deepcopy(foundation.unet))
    lora.add_adapters(models.unet, 2, "attention")
    adapted, _ = finetune_stage(cache, models, lora=2)
    kept = checkpoint_state(adapted)
    left = adapted.state_dict().keys() - kept.keys()
    assert len(left) == len(list(foundation.unet.parameters())) and all(name.startswith("unet.") for name in left)
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} <= kept.keys()
    assert {name for name in adapted.state_dict() if name.startswith("conditioner.")} <= kept.keys()


def test_geometry_adds_its_share_by_a_head_of_the_seed(cache, boxed):
    plain = pretrain_stage(boxed)(IDS, STEP).losses
    stage = pretrain_stage(boxed, geometry=0.5)
    found = stage(IDS, STEP)
    assert set(found.losses) == {*plain, "geometry"} and found.losses["geometry"] > 0
    assert found.losses["loss"].item() == pytest.approx((plain["loss"] + 0.5 * found.losses["geometry"]).item())
    again, other = (pretrain_stage(boxed, geometry=0.5, seed=seed).geometry.state_dict() for seed in (11, 12))
    assert all(tensor.equal(again[name]) for name, tensor in stage.geometry.state_dict().items())
    assert any(not tensor.equal(other[name]) for name, tensor in again.items())
