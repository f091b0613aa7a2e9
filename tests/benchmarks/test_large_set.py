"""`benchmarks.large_set`: records of LAION-SG's means through every phase, a thousand in place of half a million."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks import large_set
from sgg_fast.data.prepare import cache as writer
from sgg_fast.data.prepare import shard_work

NUM = large_set.CHUNK


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("large")
    (out / "num").write_text(str(NUM))
    large_set.generate(out / "train.json", NUM)
    return out, json.loads((out / "train.json").read_text())


def test_the_most_frequent_word_has_its_published_share_and_the_rest_follow_zipfs_law():
    for size, top in (large_set.LABELS, large_set.ATTRIBUTES, large_set.PREDICATES):
        share = np.diff(large_set.zipf(size, top), prepend=0)
        assert len(share) == size and share[0] == pytest.approx(top, rel=1e-3) and share.sum() == pytest.approx(1)
        exponent = np.log2(share[0] / share[1])
        assert share[9] == pytest.approx(share[0] / 10**exponent)


def test_records_have_the_published_means(records):
    _, made = records
    assert len({record["img_id"] for record in made}) == NUM
    assert np.mean([len(record["items"]) for record in made]) == pytest.approx(large_set.ITEMS, abs=0.25)
    assert np.mean([len(record["relations"]) for record in made]) == pytest.approx(large_set.RELATIONS, abs=0.25)
    for record in made:
        ends = [(link["item1"], link["item2"]) for link in record["relations"]]
        assert all(a != b and max(a, b) < len(record["items"]) for a, b in ends)
    labels = [item["label"] for record in made for item in record["items"]]
    assert labels.count("thing0") / len(labels) == pytest.approx(large_set.LABELS[1], abs=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_every_phase_reads_all_records(records, monkeypatch, capsys):
    """Preparation, the cache, its opening and an epoch; the last by the command, with its time and memory."""
    for module, name in ((shard_work, "encode_images"), (shard_work, "_decoded"), (writer, "embed_names")):
        monkeypatch.setattr(module, name, getattr(module, name))  # `cache` replaces them; put back at the end
    out, made = records
    num_items = sum(len(record["items"]) for record in made)
    num_links = sum(len(record["relations"]) for record in made)
    assert large_set.prepare(out)["MB of jsonl"] > 0.1
    assert large_set.cache(out)["samples"] == NUM
    opened = large_set.open_cache(out)
    assert opened["objects"] == num_items + NUM, "and the picture itself"
    assert opened["relations"] == num_links + num_items, "and each object in its picture"
    capsys.readouterr()
    assert large_set.main(["--out", str(out), "--phase", "iterate"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["phase"] == "iterate" and figures["objects read"] == opened["objects"]
    assert figures["objects a graph"] == pytest.approx(large_set.ITEMS, abs=1.0) and figures["peak GB"] >= 0


def test_a_cache_from_arrays_opens_like_a_prepared_one(tmp_path):
    (tmp_path / "num").write_text(str(NUM))
    found = large_set.direct(tmp_path)
    opened = large_set.open_cache(tmp_path)
    assert opened["names"] == found["names"] and opened["phrases"] == found["phrases"]
    assert opened["objects"] / NUM == pytest.approx(large_set.ITEMS + 1, abs=0.25)
    assert opened["relations"] / NUM == pytest.approx(large_set.RELATIONS + large_set.ITEMS, abs=0.5)


def test_fewer_records_than_a_batch_are_refused(tmp_path, capsys):
    assert large_set.main(["--out", str(tmp_path / "out"), "--num", "10"]) == 2
    assert capsys.readouterr().err.endswith("--num 10: at least 1024, a batch of its reading\n")
    assert not list(tmp_path.iterdir())
