"""Instance codes: who gets one, that every mention of an object carries its own, and what inference needs."""

from __future__ import annotations

import pytest
import torch
from support import loops
from support.graphs import GRAPHS, by_name, embeddings, pack
from support.loops import jitter

from sgg_fast import ops
from sgg_fast.config import ConfigError, ModelConfig
from sgg_fast.diffusion import noise
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.instances import CODE_WIDTH, STREAM_INSTANCE, instance_codes
from sgg_fast.train.assemble import read_conditioner

FLOCK = SceneGraph(
    ("sheep", "grass", "sheep", "tree", "sheep", "tree"),
    ((0, "left of", 2), (2, "left of", 4), (3, "on", 1), (4, "on", 1)),
)


def model() -> SceneGraphConditioner:
    torch.manual_seed(0)
    return jitter(SceneGraphConditioner(5, 6, 12, width=8, num_layers=2, instance_codes=True)).eval()


def test_streams_are_apart():
    assert STREAM_INSTANCE not in {getattr(noise, name) for name in dir(noise) if name.startswith("STREAM_")}


@pytest.mark.parametrize("key", [None, (3, 4, torch.tensor([7, 9]))])
def test_objects_that_share_their_name_get_the_hashs_codes(key):
    """Two graphs, each twice, as a batch of full and masked copies has them; the image node and padding have none."""
    store, _ = pack(FLOCK, GRAPHS["chain"])
    batch = ops.pack(store, [0, 1, 0, 1], bucket=(32, 40))
    found = instance_codes(batch, key=key)
    assert found.shape == (batch.num_objects, CODE_WIDTH)
    for copy in (0, 2):
        first, last = batch.object_ptr[copy : copy + 2].tolist()
        for i in range(last - first):
            seed, step, sample = (3, 4, 7) if key else (0, 0, 0)
            shared = i in (0, 2, 4) or i in (3, 5)
            expected = loops.normals(CODE_WIDTH, seed, step, sample, STREAM_INSTANCE, i) * shared
            torch.testing.assert_close(found[first + i], expected.float(), rtol=1e-4, atol=1e-5)
        assert not found[batch.object_ptr[copy + 1] : batch.object_ptr[copy + 2]].any()


def test_masked_objects_share_no_name():
    batch, _ = pack(FLOCK)
    masked = torch.zeros(batch.num_objects, dtype=torch.bool)
    masked[[0, 3]] = True
    coded = instance_codes(batch, masked).any(dim=1).tolist()
    assert coded == [False, False, True, False, True, False, False], "one tree is left, and two sheep"


def test_every_mention_of_an_object_carries_its_code():
    conditioner = model()
    batch, table = pack(FLOCK)
    names = embeddings(table, 5)
    codes = {i: loops.normals(CODE_WIDTH, 0, 0, 0, STREAM_INSTANCE, i).double() for i in (0, 2, 3, 4, 5)}
    expected = loops.encode(loops.weights(conditioner), FLOCK, by_name(table, names), codes=codes)
    x, tokens, x_global = conditioner.encode(names, batch)
    loops.assert_rows(tokens, expected.tokens)
    loops.assert_rows(x, expected.x)
    loops.assert_rows(x_global, [expected.x_global])
    without = loops.encode(loops.weights(conditioner), FLOCK, by_name(table, names))
    moved = [float((a - b).norm()) > 1e-3 for a, b in zip(expected.tokens, without.tokens, strict=True)]
    assert moved == [True, True, True, True, True, False, True, True, True, True], "only grass stands for itself"
    assert (tokens[4] - tokens[6]).norm() > 1e-2, "two sheep"


def test_codes_are_drawn_anew_in_training_and_fixed_at_inference(tmp_path):
    conditioner = model()
    batch, table = pack(FLOCK, GRAPHS["chain"])
    names = embeddings(table, 5)
    conditioner.save_pretrained(tmp_path)
    again = SceneGraphConditioner.from_pretrained(tmp_path).eval()
    assert again.config.instance_codes
    assert torch.equal(again(names, batch).context, conditioner(names, batch).context)
    drawn = [conditioner(names, batch, None, (1, step, torch.tensor([4, 5]))).context for step in (0, 1)]
    assert not torch.allclose(drawn[0][0], drawn[1][0], atol=1e-3)
    torch.testing.assert_close(drawn[0][1], drawn[1][1])
    settings = {"width": 8, "num_layers": 2, "token_init": "none", "gate_init": 0.0}
    assert read_conditioner(tmp_path, ModelConfig(instance_codes=True, **settings)).config.instance_codes
    with pytest.raises(ConfigError, match="pre-trained with instance_codes True, not False"):
        read_conditioner(tmp_path, ModelConfig(**settings))


def test_without_the_option_there_is_no_weight_for_it():
    assert not any("instance" in name for name in SceneGraphConditioner(5, 6, 12, width=8, num_layers=2).state_dict())
