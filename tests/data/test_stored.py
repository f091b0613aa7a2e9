"""A finished cache: every damaged byte is noticed, its settings must be the run's, its rows are found."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_sets import (
    SIDE,
    cache_of,
    small_job,
    small_source,
)

from sgg_fast.config import ConfigError, DataConfig
from sgg_fast.data.shards import DamagedError, entry_of, read_index, read_tensors, write_index, write_tensors
from sgg_fast.data.stored import StoredCache
from sgg_fast.graph import NameTable, SceneGraphBatch
from sgg_fast.train.order import SampleOrder


def test_sizes_that_do_not_fit_the_images_are_refused(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "cache"))
    tensors, note = read_tensors(folder / "graphs.safetensors")
    whole = {name: np.array(value) for name, value in tensors.items()}
    write_tensors(folder / "graphs.safetensors", whole | {"picture_sizes": whole["picture_sizes"][:-1]}, note)
    write_index(folder, {**read_index(folder), "graphs": entry_of(folder / "graphs.safetensors")})
    with pytest.raises(DamagedError, match="picture_sizes must have four numbers an image"):
        StoredCache(folder)


def test_a_changed_or_missing_byte_anywhere_is_noticed_and_the_file_named(made, tmp_path):
    """Hundreds of random places in every file that is read; then cuts, growth, absence and exchanged files."""
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    assert len(StoredCache(folder).graphs) == 12
    rng = random.Random(0)
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "index.json")
    assert len(files) == 3 + 2
    for path in files:
        whole = path.read_bytes()
        for _ in range(120):
            spoilt = bytearray(whole)
            spoilt[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(spoilt)
            with pytest.raises(DamagedError) as caught:
                StoredCache(folder)
            assert str(caught.value).startswith(f"{path}: ") and "run the same `prepare cache` command" in str(
                caught.value
            )
        for length in {0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))}:
            path.write_bytes(whole[:length])
            with pytest.raises(DamagedError) as caught:
                StoredCache(folder)
            assert str(caught.value).startswith(f"{path}: ")
        path.write_bytes(whole + b"\0")
        with pytest.raises(DamagedError, match=path.name):
            StoredCache(folder)
        path.write_bytes(whole)
    first, second = files[2], files[3]
    assert first.stat().st_size == second.stat().st_size
    held = first.read_bytes()
    shutil.copy(second, first)
    with pytest.raises(DamagedError, match=first.name):
        StoredCache(folder)
    first.unlink()
    with pytest.raises(DamagedError, match=f"{first.name}: cannot be read: No such file"):
        StoredCache(folder)
    first.write_bytes(held)
    assert len(StoredCache(folder).graphs) == 12


def test_an_index_that_is_sealed_anew_around_wrong_content_is_one_line(made, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(made, folder)
    index = read_index(folder)
    wrong = [{**index, key: value} for key in index for value in (None, 7, [], {}, "x")
             if not (key in ("data", "split") and value == "x")]  # fmt: skip
    wrong += [{k: v for k, v in index.items() if k != key} for key in ("shards", "graphs", "draws", "settings")]
    entry = index["shards"][0]
    wrong += [{**index, "shards": [{**entry, key: None}]} for key in entry]
    wrong += [{**index, "shards": [{**entry, "file": "../../etc/passwd"}]}]
    refused = 0
    for content in wrong:
        write_index(folder, content)
        try:
            StoredCache(folder).check_settings(DataConfig(source=str(folder), resolution=SIDE))
        except ConfigError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
    assert refused >= len(wrong) - 25, "sizes and such are read by who needs them"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resolution": 64}, "prepared with --resolution 32, not 64"),
        ({"flip": "swap"}, "prepared with --flip none, not swap"),
        ({"attributes": "first"}, "prepared with --attributes none, not first"),
    ],
)
def test_settings_of_a_run_must_be_those_of_the_cache(made, change, reason):
    with pytest.raises(ConfigError, match=reason):
        small_source(made, **change)
    with pytest.raises(ConfigError, match="is a cache already"):
        small_job(made, made)


def test_reading_is_sharded_over_ranks_shuffled_by_seed_and_resumes_where_it_was(made, foundation):
    """What the trainer does: each rank's ids of a step, and the cache's rows of them."""
    moments = StoredCache(made).moments()
    world, batch, epochs = 2, 3, 4
    orders = [SampleOrder(12, batch, 5, rank, world) for rank in range(world)]
    steps = epochs * 12 // (world * batch)
    read = [[order.at(step) for order in orders] for step in range(steps)]
    flat = np.concatenate([ids for step in read for ids in step])
    epochs_of = flat.reshape(epochs, 12)
    assert (np.sort(epochs_of, axis=1) == np.arange(12)).all(), "each epoch has every sample once"
    assert len({tuple(epoch) for epoch in epochs_of.tolist()}) == epochs, "in another order"
    assert (np.concatenate([SampleOrder(12, 6, 5, 0, 1).at(s) for s in range(steps)]) == flat).all()
    assert (SampleOrder(12, batch, 6, 0, world).at(0) != orders[0].at(0)).any(), "another seed, another order"
    for step in (3, 7, 0, 5):  # a resumed run begins anywhere
        for rank in range(world):
            ids = SampleOrder(12, batch, 5, rank, world).at(step)
            assert (ids == read[step][rank]).all()
            assert moments[torch.from_numpy(ids)].equal(torch.stack([moments[torch.tensor([i])][0] for i in ids]))


def test_what_is_stored_is_the_set(data, made):
    """Pictures, packed graphs and their names; the embeddings of all shards, once for each draw."""
    stored, source = StoredCache(made), small_source(data)
    assert all((stored.picture(i) == source.load_image(i % 12)).all() for i in (0, 11, 13))
    table = NameTable()
    expected = SceneGraphBatch.from_graphs(source.graphs, table)
    assert list(stored.table().names) == list(table.names) and list(stored.table().phrases) == list(table.phrases)
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(stored.batch(), name), value), name
    shards = [read_tensors(made / f"shard-0000{k}.safetensors")[0]["images"] for k in range(3)]
    assert np.array_equal(stored.images(), np.concatenate(shards)) and len(stored.images()) == 12
    stored.draws = 2
    assert stored.images()[12:].equal(stored.images()[:12])


def test_pictures_beyond_those_that_are_kept_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sgg_fast.data.prepare.cache.NUM_PREVIEWS", 2)
    stored = StoredCache(cache_of(data, tmp_path / "cache", token_init="none"))
    stored.check_pictures(2)
    with pytest.raises(ConfigError, match="--num-samples 3: a cache keeps 2 pictures; ask for fewer"):
        stored.check_pictures(3)
    assert stored.picture(13).shape == (SIDE, SIDE, 3)
    with pytest.raises(ConfigError, match="of image 2 only the latent is in the cache"):
        stored.picture(2)
