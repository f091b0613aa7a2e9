"""The settings of `prepare cache`: what cannot work is refused before any library is loaded; the set is opened."""

from __future__ import annotations

import dataclasses

import pytest
from support.small_sets import small_job

from sgg_fast.config import ConfigError
from sgg_fast.data.stored import JOB


def test_a_job_opens_its_split_even_where_pictures_are_gone(data, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("set.json", "train.jsonl"):
        (folder / name).write_bytes((data / name).read_bytes())
    source = small_job(folder, tmp_path / "out").open_source()
    assert len(source) == 12 and source.place(3).name == "p3.png", "absent images are left out later"
    with pytest.raises(ConfigError, match=r"val\.jsonl: cannot be read"):
        dataclasses.replace(small_job(folder, tmp_path / "out"), split="val").open_source()


def test_what_cannot_work_is_refused_by_its_flag(data, tmp_path):
    for field in ("shard_size", "batch_size", "workers"):
        with pytest.raises(ConfigError, match=f"--{field.replace('_', '-')} must be at least 1, not 0"):
            dataclasses.replace(small_job(data, tmp_path), **{field: 0})
    for folder, said in ((tmp_path / "none", "--data .*none"), (tmp_path, "--data .*: is a cache already")):
        (tmp_path / JOB).write_text("{}")
        with pytest.raises(ConfigError, match=said):
            small_job(folder, tmp_path / "out")
