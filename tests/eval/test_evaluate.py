"""`python -m sgg_fast.eval` from start to end with the model that ships: figures, files, what is refused; the plan."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT
from support.tiny_runs import eval_flags as flags

from sgg_fast.drawing.models import SHIPPED, load_model
from sgg_fast.eval import distances, evaluate, pictures, report
from sgg_fast.eval.__main__ import main
from sgg_fast.eval.detectors import open_detector
from sgg_fast.eval.evaluate import compare
from sgg_fast.graph import SceneGraph
from sgg_fast.toy import parts, world
from sgg_fast.toy.detector import accuracy
from sgg_fast.toy.world import HELD_OUT_SEED, draw_scene

GRAPHS = [
    SceneGraph(("dog", "house"), ((0, "left of", 1),)),
    SceneGraph(("sun", "boat", "sea"), ((0, "above", 1),)),
]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(evaluate, "NUM_ACCURACY", 4)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """An evaluation of two graphs, one pair an axis and one step; read only."""
    out = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NUM_ACCURACY", 4)
        assert main(flags(out)) == 0
    return out


def test_every_figure_has_its_floor_and_ceiling(done):
    result = json.loads((done / "eval.json").read_text())
    floors = ["floor: another graph's picture", "floor: every relation flipped"]
    ceilings = ["ceiling: real pictures", "ceiling: real, through the VAE"]
    assert list(result["rows"]) == ["drawn", *floors, *ceilings]
    rows = result["rows"]
    # One step draws next to nothing; real pictures have nearly everything.
    assert rows["drawn"]["entity recall"] < rows["ceiling: real pictures"]["entity recall"]
    assert set(result["detector"]["accuracy"]) == {"real", "through the VAE"}
    assert result["distances"]["toy"]["features"].startswith("toy features")
    assert {entry["chance"] for entry in result["counterfactual pairs"].values()} == {0.5}
    text = (done / "tables.md").read_text()
    for words in (*result["rows"], "toy detector", "toy features", "left/right", "above/below", "gate"):
        assert words in text
    with Image.open(done / "sheet.png") as sheet:
        assert sheet.width > 800


def test_figures_can_be_recomputed_from_the_pictures(done):
    """The pictures are what counts: entity recall from them, by hand."""
    result = json.loads((done / "eval.json").read_text())
    graphs = [world.draw_scene(world.HELD_OUT_SEED, i).graph for i in range(2)]
    images = np.stack([np.asarray(Image.open(done / "pictures" / "seed-0" / f"{i:05d}.png")) for i in range(2)])
    found = num = 0
    for graph, instances in zip(graphs, open_detector("toy").find(images, graphs), strict=True):
        there = [instance.category for instance in instances]
        for category in {name.split()[-1] for name in graph.objects}:
            asked = sum(name.split()[-1] == category for name in graph.objects)
            found, num = found + min(asked, there.count(category)), num + asked
    assert result["rows"]["drawn"]["entity recall"] == pytest.approx(found / num, abs=1e-6)


def test_it_goes_on_where_it_was_stopped_and_refuses_other_settings(done, capsys):
    drawn = sorted((done / "pictures").rglob("*.png"))
    before = {path: path.read_bytes() for path in drawn}
    drawn[0].unlink()
    kept = {path: path.stat().st_mtime_ns for path in drawn[1:]}
    assert main(flags(done)) == 0
    assert {path: path.stat().st_mtime_ns for path in drawn[1:]} == kept
    assert drawn[0].read_bytes() == before[drawn[0]], "the same noise, the same picture"
    capsys.readouterr()
    assert main(flags(done, steps=2)) == 2
    assert "holds pictures with steps 1, not 2" in capsys.readouterr().err


def test_later_seeds_another_scheduler_and_diversity(tmp_path, capsys):
    """Two seeds from the fourth on, by another scheduler; how far their pictures lie apart, by hand."""
    from sgg_fast.toy.features import load_features

    changes = {"seeds": 2, "first-seed": 3, "scheduler": "dpm++", "pairs": 0}
    assert main(flags(tmp_path, **changes)) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["scheduler"] == "dpm++"
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["seed-3", "seed-4"]
    read = load_features().read
    apart = []
    for i in range(2):
        paths = [tmp_path / "pictures" / f"seed-{s}" / f"{i:05d}.png" for s in (3, 4)]
        a, b = read(np.stack([np.asarray(Image.open(path)) for path in paths]))
        apart.append(float(np.sqrt(((a - b) ** 2).sum())))
    assert result["diversity"]["values"] == pytest.approx(apart, rel=1e-4)
    assert result["diversity"]["mean distance"] == pytest.approx(sum(apart) / 2, rel=1e-4)
    assert "pictures of one graph lie" in (tmp_path / "tables.md").read_text()
    capsys.readouterr()
    assert main(flags(tmp_path, **changes | {"scheduler": "ddim"})) == 2
    assert "holds pictures with scheduler dpm++, not ddim" in capsys.readouterr().err


def test_against_itself_nothing_differs(done, capsys):
    assert main([*flags(done), "--against", str(done)]) == 0
    result = json.loads((done / "eval.json").read_text())
    differences = result["against"]["differences"]
    assert differences["SG IoU"] == "0.000 [0.000, 0.000]"
    assert "follows, left/right" in differences


def test_pictures_that_are_not_finite_are_one_line_and_never_saved(tmp_path, capsys, monkeypatch):
    """Poisoned, the UNet draws such latents, then the VAE such pixels; the same command cures it with a sound model."""
    model = load_model("toy")
    monkeypatch.setattr(evaluate, "load_model", lambda name: model)
    for part, weight in (
        ("unet", model.pipeline.unet.conv_out.bias),
        ("vae", model.pipeline.vae.decoder.conv_out.bias),
    ):
        whole = weight.detach().clone()
        with torch.no_grad():
            weight[0] = torch.inf if part == "vae" else torch.nan
        assert main(flags(tmp_path / "out")) == 3
        said = capsys.readouterr()
        assert (
            said.out == "" and said.err.count("\n") == 1 and f"conv_out.bias of {part} holds such numbers" in said.err
        )
        assert not list((tmp_path / "out").rglob("*.png"))
        with torch.no_grad():
            weight.copy_(whole)
    assert main(flags(tmp_path / "out")) == 0 and (tmp_path / "out" / "eval.json").is_file()


def test_pairs_start_from_the_noise_of_their_own_graph(tmp_path):
    plan = evaluate.make_plan(pictures.open_graphs("toy", 64), 3, 2, tmp_path)
    axes = [pair.axis for pair in plan.pairs]
    assert axes.count(0) == 2 and 1 <= axes.count(1) <= 2
    jobs = {job.path: job for job in plan.jobs(seed=4)}
    seeds = {job.noise_seed for path, job in jobs.items() if path.stem.isdigit()}
    assert len(seeds) == sum(path.stem.isdigit() for path in jobs)
    for pair in plan.pairs:
        own, turned = (jobs[plan.path(4, pair.graph_index, side)] for side in (None, pair.axis))
        assert own.noise_seed == turned.noise_seed
        assert sum(a != b for a, b in zip(own.graph.relations, turned.graph.relations, strict=True)) == 1


def test_the_card_says_what_was_measured_of_these_weights(done, tmp_path):
    folder = shutil.copytree(SHIPPED, tmp_path / "pipeline")
    result = {**report.read_result(done), "data": "toy-words"}
    report.write_result(tmp_path, result)
    parts.put_on_card(folder, tmp_path)
    card = (folder / "README.md").read_text()
    recall = result["rows"]["drawn"]["entity recall"]
    assert f"| entity recall, 2 held-out graphs of toy-words | {recall:.4g} |" in card
    told = json.loads((SHIPPED / "model_index.json").read_text())["provenance"]["data"]
    assert f"| data | {told} |" in card, "as it stood there"
    for name, value in (("weights", "0" * 16), ("data", "toy-repeats")):
        report.write_result(tmp_path, {**result, name: value})
        with pytest.raises(ValueError, match="of other weights or on other graphs"):
            parts.put_on_card(folder, tmp_path)


def test_one_graph_of_a_file_without_num_and_no_floor_of_other_graphs(tmp_path, capsys):
    graph = ROOT / "graph.json"
    words = flags(tmp_path / "out", data=graph, pairs=0)
    assert main([*words[:2], *words[4:]]) == 0, "without --num"
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert list(result["rows"]) == ["drawn", "floor: every relation flipped"]
    assert main(flags(tmp_path / "more", data=graph)) == 2
    assert "graph.json has 1 graphs" in capsys.readouterr().err


def test_sets_of_unseen_combinations_have_a_judge_that_knows_them(tmp_path):
    """Of either world; its accuracy is measured on such scenes."""
    assert main(flags(tmp_path, data="toy-combinations", pairs=0)) == 0
    judge = json.loads((tmp_path / "eval.json").read_text())["detector"]
    assert judge["name"] == "toy-words detector"
    scenes = [draw_scene(HELD_OUT_SEED, i, held_out=True) for i in range(judge["scenes"])]
    own = accuracy(open_detector("toy-words").network, scenes)
    assert judge["accuracy"]["real"] == {"recall": own.recall, "precision": own.precision, "colour": own.colour}


def test_an_evaluation_with_an_open_vocabulary_detector(owl, tmp_path):
    file = tmp_path / "graphs.json"
    file.write_text(json.dumps([{"objects": g.objects, "relationships": g.relations} for g in GRAPHS]))
    assert main(flags(tmp_path / "out", data=file, detector=owl)) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert result["detector"] == {"name": f"owlvit {owl}"}
    assert not any(row.startswith("ceiling") for row in result["rows"]), "a file of graphs has no real pictures"
    assert result["distances"] == result["diversity"] == {}
    assert "diversity: not measured" in (tmp_path / "out" / "tables.md").read_text()
    assert "IoU (sets): LAION-SG's" in (tmp_path / "out" / "tables.md").read_text()


def write_graphs(path: Path, *names: str) -> Path:
    path.write_text(json.dumps([{"objects": [name, "house"], "relationships": [[0, "left of", 1]]} for name in names]))
    return path


def test_a_detector_that_does_not_know_the_names_is_not_chosen_and_each_cure_works(owl, tmp_path, capsys):
    file, out = write_graphs(tmp_path / "g.json", "zebra", "striped dog"), tmp_path / "out"
    changes = {"data": file, "pairs": 0}
    assert main(flags(out, **changes)) == 2
    said = capsys.readouterr().err
    assert "--detector: 2 of 4 objects have names that the toy detector does not know ('zebra', 'striped dog')" in said
    assert not (out / "pictures").exists(), "refused before anything is drawn"
    assert main(flags(out, **changes, detector="none")) == 0
    result, text = json.loads((out / "eval.json").read_text()), (out / "tables.md").read_text()
    assert result["rows"] == result["per picture"] == result["counterfactual pairs"] == {}
    assert "objects and relations: not measured" in text and "detector: none" in text
    assert main(flags(out, **changes, detector=owl)) == 0, "the second cure, over the same pictures"
    assert next(iter(json.loads((out / "eval.json").read_text())["rows"])) == "drawn"
    assert main(flags(out, **changes, detector="toy")) == 0
    assert "WARNING: --detector toy: 2 of 4 objects" in (out / "tables.md").read_text()
    assert main([*flags(out, **changes, detector="none"), "--against", str(out)]) == 0, "nothing to compare"
    alien = tmp_path / "alien.json"
    alien.write_text(json.dumps({"objects": ["zebra", "lamp post"]}))
    assert main(flags(tmp_path / "o", data=alien, num=1, detector="toy")) == 2
    assert "2 of 2 objects" in capsys.readouterr().err


def test_pictures_of_other_graphs_are_not_taken_for_those_of_an_edited_file(tmp_path, capsys):
    file, out = write_graphs(tmp_path / "g.json", "dog", "sheep"), tmp_path / "out"
    assert main(flags(out, data=file, pairs=0)) == 0
    write_graphs(file, "dog", "person")
    assert main(flags(out, data=file, pairs=0)) == 2
    assert "holds pictures with graphs " in capsys.readouterr().err
    assert main(flags(tmp_path / "another", data=file, pairs=0)) == 0


def test_distances_are_of_the_drawn_pictures_and_of_no_other_file(tmp_path, monkeypatch):
    """Counterfactual pictures, partners beyond --num and files of earlier runs lie in the same folder."""
    seen: list[tuple[int, int]] = []

    def note(drawn: np.ndarray, real: np.ndarray, weights: Path) -> dict[str, float]:
        seen.append((len(drawn), len(real)))
        return {"FID": 1.0}

    monkeypatch.setattr(
        distances, "inception_distances", note
    )  # torch-fidelity is not everywhere: its list is looked at
    monkeypatch.setattr(distances, "check_inception", lambda weights, drawn, real: [f"{drawn} drawn, {real} real"])
    weights = tmp_path / "w.pth"
    weights.touch()
    assert main([*flags(tmp_path / "out", num=3, pairs=2), "--inception", str(weights)]) == 0
    assert len(list((tmp_path / "out" / "pictures").rglob("*.png"))) > 3
    assert main([*flags(tmp_path / "out", num=2, pairs=2, seeds=2), "--inception", str(weights)]) == 0
    assert seen == [(3, 3), (4, 2)]
    assert "WARNING: 4 drawn, 2 real" in (tmp_path / "out" / "tables.md").read_text()


def test_one_picture_has_no_distance_and_that_is_one_line(tmp_path):
    assert main(flags(tmp_path, num=1, pairs=0)) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["distances"] == {}
    assert (
        "WARNING: FID and KID of one picture do not exist: raise --num or --seeds"
        in (tmp_path / "tables.md").read_text()
    )
    assert main(flags(tmp_path, num=1, pairs=0, seeds=2)) == 0, "the cure"
    assert json.loads((tmp_path / "eval.json").read_text())["distances"]["toy"]["pictures a side"] == 2


def test_a_damaged_picture_is_named_and_drawn_again_once_it_is_deleted(tmp_path, capsys):
    assert main(flags(tmp_path, pairs=0)) == 0
    path = tmp_path / "pictures" / "seed-0" / "00001.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"x"):
        path.write_bytes(content)
        capsys.readouterr()
        assert main(flags(tmp_path, pairs=0)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{path}: cannot be read" in said and "delete it, and the same command" in said
    Image.new("RGB", (9, 9)).save(path)
    assert main(flags(tmp_path, pairs=0)) == 2 and "is 9 x 9 pixels where the others are" in capsys.readouterr().err
    path.unlink()
    before = np.asarray(Image.open(io.BytesIO(whole))).astype(int)
    assert main(flags(tmp_path, pairs=0)) == 0
    assert np.abs(np.asarray(Image.open(path)) - before).max() <= 2, "alone in its batch: sums in another order"
    for name, cure in (("settings.json", "give another --out, or delete"), ("eval.json", "evaluate that model again")):
        kept = (tmp_path / name).read_bytes()
        for content in (b"{", b"[1]", b"\xff", b"3"):
            (tmp_path / name).write_bytes(content)
            assert main([*flags(tmp_path, pairs=0), "--against", str(tmp_path)]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and name in said and cure in said
        (tmp_path / name).write_bytes(kept.replace(b"0.", b"1.", 1))
        if name == "eval.json":
            assert main([*flags(tmp_path, pairs=0), "--against", str(tmp_path)]) == 2
            assert "(SHA-256 differs); evaluate that model again" in capsys.readouterr().err
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + kept)
        assert main([*flags(tmp_path, pairs=0), "--against", str(tmp_path)]) == 0, "as an editor would save it"


def test_an_evaluation_from_before_a_figure_was_is_compared_by_the_others(tmp_path):
    rows = {"entity recall": [[1.0, 0.5]], "without a fault": [[1.0, 0.0]]}
    now = {"data": "toy", "counterfactual pairs": {}, "per picture": rows}
    older = {**now, "per picture": {"entity recall": [[0.5, 0.5]]}}
    (tmp_path / "eval.json").write_text(json.dumps(older))
    assert list(compare(now, tmp_path)) == ["entity recall"]
    (tmp_path / "eval.json").write_text(json.dumps(now))
    assert list(compare(now, tmp_path)) == ["entity recall", "without a fault"]
