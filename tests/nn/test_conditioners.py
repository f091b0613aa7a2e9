"""Every conditioner by one interface: all choices, all kinds, from the same graphs to the same UNet."""

from __future__ import annotations

import json

import pytest
import torch
from support.cases.conditioner import TWO_GRAPHS, of_foundation
from support.graphs import embeddings, pack
from support.sd_folder import CLIP_WIDTH, POOLED

from sgg_fast.nn.conditioners import CHOICES, KINDS

NAMES = {"sgg": "SceneGraphConditioner", "text": "TextConditioner", "sgdiff": "SGDiffConditioner"}
SETTINGS = {"form": "text_form"}
"""Name of a choice in the settings of a run, where it is another one."""


@pytest.mark.parametrize("kind", NAMES)
def test_each_kind_conditions_the_same_unet_and_is_dropped_to_the_empty_text(foundations, kind):
    models = foundations["sd21"]
    model = of_foundation(models, kind)
    assert KINDS[NAMES[kind]] is type(model) and KINDS.keys() == set(NAMES.values())
    model.calibrate_null(models.towers.read([""])[0][0])
    batch, table = pack(*TWO_GRAPHS)
    names = model.names_of(table, embeddings(table, CLIP_WIDTH))
    given = model(names, batch, model.read(TWO_GRAPHS, table, models.towers))
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)

    @torch.no_grad()
    def predicted(condition):
        return models.unet(z, t, condition.context, encoder_attention_mask=condition.mask).sample

    dropped = predicted(model.drop(given, torch.tensor([True, False])))
    empty = models.unet(z[:1], t, models.towers.read([""])[0]).sample
    torch.testing.assert_close(dropped[:1], empty, rtol=1e-4, atol=1e-5)
    kept = predicted(given)
    torch.testing.assert_close(dropped[1], kept[1], rtol=1e-4, atol=1e-5)
    assert (kept[0] - dropped[0]).abs().max() > 1e-4, "the graph is read"


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name, all_ in CHOICES.items() for choice in all_])
def test_each_choice_is_of_a_conditioner_that_keeps_it(foundations, tmp_path, name, choice):
    """Saved and loaded by the class that config.json names."""
    kind = "text" if name == "form" else "sgg"
    model = of_foundation(foundations["sd21"], kind, **{"token_init": "none", SETTINGS.get(name, name): choice})
    assert model.config[name] == choice
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    loaded = KINDS[written["_class_name"]].from_pretrained(tmp_path)
    assert loaded.config[name] == choice
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "form"), [("text", "sentence"), ("text", "phrases"), ("sgdiff", "sentence")])
def test_baselines_have_a_pooled_vector_too(foundations, kind, form):
    foundation = foundations["sdxl"]
    model = of_foundation(foundation, kind, text_form=form)
    batch, table = pack(*TWO_GRAPHS)
    names = model.names_of(table, embeddings(table, CLIP_WIDTH))
    given = model(names, batch, model.read(TWO_GRAPHS, table, foundation.towers))
    assert given.context.shape[2] == foundation.backbone.context_dim and given.pooled.shape == (2, POOLED)
    if form == "sentence" and kind == "text":
        said = foundation.towers.read(["sheep standing on grass", "red hat"])[1]
        torch.testing.assert_close(given.pooled, said[:, foundation.backbone.context_dim :])
