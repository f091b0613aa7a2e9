"""sg2im's .h5 and vocab.json as a training set: files of our making and of theirs, what is refused, training steps."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import flags
from support.vg_files import LOW, draw_images, load_by_facts, plain_set

import train
from sgg_fast.config import ConfigError, DataConfig
from sgg_fast.data.images import stays_inside
from sgg_fast.data.prepare.vg import prepare
from sgg_fast.data.sources import open_source, vg_source
from sgg_fast.data.vg_h5 import read_split, read_vocabulary
from sgg_fast.graph import SceneGraph

NAMES = {
    "object_idx_to_name": ["__image__", "man", "tree", "sky"],
    "pred_idx_to_name": ["__in_image__", "on", "above"],
    "attribute_idx_to_name": ["white ", "green"],
}
GRAPHS = [
    SceneGraph(("man", "tree", "sky"), ((0, "on", 1), (2, "above", 1))),
    SceneGraph(("sky", "man", "man"), ((0, "above", 2),)),
]
PATHS = ["VG_100K/7.png", "VG_100K_2/9.png"]


def pad(rows: list[list], width: int = 30) -> np.ndarray:
    """Rows of any length to int32 [rows, width, ...], the rest -1."""
    array = np.full((len(rows), width, *np.shape(rows[0][0])), -1, np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array


def their_arrays() -> dict[str, np.ndarray]:
    """What sg2im's layout says the file holds, for `GRAPHS`, with a self-loop and a duplicate as in published data."""
    boxes = [[10, 20, 40, 50], [0, 0, 99, 99], [-3, 5, 64, 64]]
    return {
        "image_ids": np.array([7, 9], np.int32),
        "objects_per_image": np.array([3, 3], np.int32),
        "relationships_per_image": np.array([4, 1], np.int32),
        "attributes_per_object": pad([[1, 0, 2], [0, 0, 1]]),
        "object_ids": pad([[1, 2, 3], [4, 5, 6]]),
        "object_names": pad([[1, 2, 3], [3, 1, 1]]),
        "object_boxes": pad([boxes, boxes]),
        "relationship_ids": pad([[1, 2, 3, 4], [5]]),
        "relationship_subjects": pad([[0, 1, 0, 2], [0]]),
        "relationship_predicates": pad([[1, 1, 1, 2], [2]]),
        "relationship_objects": pad([[1, 1, 1, 1], [2]]),
        "object_attributes": pad([[0], [-1], [0, 1], [-1], [-1], [1]]),
    }


def write_theirs(
    folder: Path, arrays: dict | None = None, paths: list | None = None, names: dict | None = None
) -> Path:
    """A folder as sg2im leaves it, with pictures twice as wide as high."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = PATHS if paths is None else paths
    with h5py.File(folder / "train.h5", "w") as file:
        for key, array in (their_arrays() if arrays is None else arrays).items():
            file.create_dataset(key, data=array)
        held = file.create_dataset("image_paths", (len(paths),), dtype=h5py.special_dtype(vlen=str))
        for i, path in enumerate(paths):
            held[i] = path
    names = NAMES if names is None else names
    to_idx = {k.replace("idx_to_name", "name_to_idx"): {n: i for i, n in enumerate(v)} for k, v in names.items()}
    (folder / "vocab.json").write_text(json.dumps(to_idx | names))
    draw_images(folder / "images", dict.fromkeys(PATHS, (128, 64)))
    return folder


def test_theirs_is_read(tmp_path, caplog):
    source = vg_source(write_theirs(tmp_path), 64)
    assert source.graphs == GRAPHS and len(source) == 2
    (record,) = caplog.records
    assert "1 relations of an object to itself, 1 duplicates" in record.getMessage()


def test_first_attribute_goes_in_front_of_the_name(tmp_path):
    graphs = vg_source(write_theirs(tmp_path), 64, first_attribute=True).graphs
    assert [g.objects for g in graphs] == [("white man", "tree", "white sky"), ("sky", "man", "green man")]
    assert [g.relations for g in graphs] == [g.relations for g in GRAPHS]


def test_the_whole_picture_is_resized_as_in_sg2im(tmp_path):
    source = vg_source(write_theirs(tmp_path), 32)
    image = source.load_image(1)
    with Image.open(tmp_path / "images" / PATHS[1]) as picture:
        expected = np.asarray(picture.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    assert image.dtype == np.uint8 and image.shape == (32, 32, 3) and (image == expected).all()
    assert image[0, 0, 0] < 8 and image[0, -1, 0] > 247, "both ends of the ramp are still there"


def test_images_may_lie_in_the_folder_itself(tmp_path):
    write_theirs(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"2 of 2 images missing, first .*7\.png; unpack"):
        vg_source(tmp_path, 64)
    for path in (tmp_path / "elsewhere").iterdir():
        path.rename(tmp_path / path.name)
    assert vg_source(tmp_path, 64).load_image(0).shape == (64, 64, 3)


def test_ours_is_read_as_it_was_prepared(tmp_path):
    vg = plain_set(3)
    prepare(vg.write(tmp_path / "root"), tmp_path / "out", LOW)
    draw_images(tmp_path / "out" / "images", {f"VG_100K_{i % 2 + 1}/{i}.jpg": (300, 240) for i in (1, 2, 3, 90, 91)})
    expected = SceneGraph(("man", "tree", "sky"), ((0, "on", 1), (2, "above", 1)))
    assert vg_source(tmp_path / "out", 64).graphs == [expected] * 3
    assert vg_source(tmp_path / "out", 64, "val").graphs == [SceneGraph(("sky", "man", "tree"), ((1, "on", 2),))]
    assert vg_source(tmp_path / "out", 64, "test").load_image(0).shape == (64, 64, 3)
    assert vg_source(tmp_path / "out", 64, first_attribute=True).graphs[0].objects == ("man", "green tree", "sky")
    source = open_source(DataConfig(source=str(tmp_path / "out")), seed=0)
    assert source.graphs == [expected] * 3 and "train" in source.name


def test_the_loader_from_facts_reads_both(tmp_path):
    """The same function reads what a test wrote and what we write; names and paths agree."""
    theirs = load_by_facts(write_theirs(tmp_path / "theirs") / "train.h5")
    assert [(i["id"], i["path"], i["names"]) for i in theirs] == [(7, PATHS[0], [1, 2, 3]), (9, PATHS[1], [3, 1, 1])]
    prepare(plain_set(2).write(tmp_path / "root"), tmp_path / "out", LOW)
    with h5py.File(tmp_path / "theirs" / "train.h5") as a, h5py.File(tmp_path / "out" / "train.h5") as b:
        assert set(a) == set(b)
        assert all(a[key].dtype == b[key].dtype and a[key].ndim == b[key].ndim for key in a)
    ours = load_by_facts(tmp_path / "out" / "train.h5")
    assert ours[0] == {
        "id": 1, "path": "VG_100K_2/1.jpg", "ids": [100, 101, 102], "names": [1, 2, 3],
        "boxes": [[0, 0, 40, 50], [10, 5, 40, 50], [20, 10, 40, 50]],
        "relations": [(10, 0, 1, 1), (11, 2, 2, 1)], "attributes": [[], [0, 1], []],
    }  # fmt: skip


def test_an_empty_split_has_the_layout(tmp_path):
    vg = plain_set(2)
    vg.splits["val"] = []
    prepare(vg.write(tmp_path / "root"), tmp_path / "out", LOW)
    assert load_by_facts(tmp_path / "out" / "val.h5") == []
    with pytest.raises(ConfigError, match=r"val\.h5: holds no image"):
        vg_source(tmp_path / "out", 64, "val")


def changed(key: str, place, value):
    def change(arrays: dict) -> None:
        arrays[key][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed("object_names", (1, 2), 4), "row 1 (image 9): object_names: index 4, but vocab.json has 4 names"),
        (changed("object_names", (0, 0), 0), "row 0 (image 7): object_names: vocab.json: '__image__' is added by the"),
        (changed("objects_per_image", 0, 31), "row 0 (image 7): objects_per_image: 31, but there is room for 30"),
        (changed("relationship_objects", (1, 0), 3), "row 1 (image 9): relationships[0]: object index 3, but"),
        (changed("relationship_predicates", (1, 0), -1), "row 1 (image 9): predicates: index -1"),
        (lambda arrays: arrays.pop("relationship_subjects"), "not of sg2im's layout: relationship_subjects missing"),
        (lambda arrays: arrays.update(object_names=np.zeros((3, 30), np.int32)), "object_names is int32 [3, 30]"),
        (lambda arrays: arrays.update(object_names=np.zeros((2, 30), np.float32)), "object_names is float32 [2, 30]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_row_and_reason(tmp_path, change, reason):
    arrays = their_arrays()
    change(arrays)
    with pytest.raises(ConfigError) as caught:
        vg_source(write_theirs(tmp_path, arrays), 64)
    assert str(caught.value).startswith(str(tmp_path / "train.h5")) and reason in str(caught.value)


@pytest.mark.parametrize("path", ["../7.png", "/etc/7.png", "a/../../7.png", "C:/7.png", "a\\..\\7.png", ""])
def test_an_image_path_that_leaves_the_folder_is_refused(tmp_path, path):
    assert not stays_inside(path)
    with pytest.raises(ConfigError, match=r"row 1: image path '.*' leaves the folder of the images"):
        vg_source(write_theirs(tmp_path, paths=[PATHS[0], path]), 64)


def test_broken_files_are_one_line(tmp_path):
    folder = write_theirs(tmp_path)
    whole = (folder / "train.h5").read_bytes()
    (folder / "train.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"train\.h5: cannot be read as HDF5: .*; prepare it again"):
        vg_source(folder, 64)
    for content, reason in (("{", "not usable JSON"), ('{"object_idx_to_name": [1]}', "object_idx_to_name must be")):
        (folder / "vocab.json").write_text(content)
        with pytest.raises(ConfigError, match=reason):
            vg_source(folder, 64)
    (folder / "vocab.json").unlink()
    with pytest.raises(ConfigError, match=r"vocab\.json: cannot be read: No such file"):
        vg_source(folder, 64)


def test_a_vocabulary_without_attributes_is_enough(tmp_path):
    names = {key: value for key, value in NAMES.items() if not key.startswith("attribute")}
    folder = write_theirs(tmp_path, names=names)
    graphs, paths = read_split(folder / "train.h5", read_vocabulary(folder / "vocab.json"))
    assert graphs == GRAPHS and paths == PATHS


def test_an_unreadable_picture_is_named(tmp_path):
    source = vg_source(write_theirs(tmp_path), 64)
    picture = tmp_path / "images" / PATHS[0]
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"7\.png: cannot be read as an image"):
        source.load_image(0)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_stages_train_on_theirs(tmp_path, stage, trained_run):
    argv = ["--stage", stage, "--data", str(write_theirs(tmp_path / "data")), "--out", str(tmp_path / "run")]
    if stage == "finetune":
        argv += ["--graph-encoder", str(trained_run / "pretrain" / "graph_encoder")]
    assert train.main([*argv, *flags()]) == 0
    assert (tmp_path / "run" / stage).is_dir()


def test_train_says_in_one_line_what_is_missing(tmp_path, capsys):
    folder = write_theirs(tmp_path / "data")
    (folder / "images" / PATHS[1]).unlink()
    argv = ["--stage", "pretrain", "--data", str(folder), "--out", str(tmp_path / "run"), *flags()]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert "train.py: --data" in err and "1 of 2 images missing" in err and "Traceback" not in err
