"""What an evaluation writes: tables, JSON with a digest, and the sheet of graphs beside their pictures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from sgg_fast.eval import report
from sgg_fast.graph import SceneGraph


def test_tables_and_json_say_what_is_not_there(tmp_path):
    text = report.table({"a": {"x": 0.12345, "n": 3}, "b": {"x": math.nan}}, "row").splitlines()
    assert [cell.strip() for cell in text[0].split("|")] == ["", "row", "x", "n", ""]
    assert [cell.strip() for cell in text[2].split("|")] == ["", "a", "0.123", "3", ""]
    assert [cell.strip() for cell in text[3].split("|")] == ["", "b", "-", "-", ""]
    report.write_json(tmp_path / "x.json", {"a": math.nan, "b": np.array([[1.5, math.nan]]), "c": np.int64(3)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [[1.5, None]], "c": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_contact_sheet_holds_every_picture_beside_its_graph(tmp_path):
    graph = SceneGraph(("dog", "house"), ((0, "left of", 1),))
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    cells = [(graph, {"drawn": np.full((64, 64, 3), colour, np.uint8)}) for colour in colours]
    report.contact_sheet(tmp_path / "sheet.png", cells)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).reshape(-1, 3)
    for colour in colours:
        assert (pixels == colour).all(axis=1).sum() == 192 * 192


def test_a_result_is_read_back_and_a_changed_figure_is_refused(tmp_path):
    result = {"data": "toy", "counterfactual pairs": {}, "per picture": {"entity recall": [[0.25, math.nan]]}}
    report.write_result(tmp_path, result)
    path = tmp_path / report.RESULT
    assert report.read_result(tmp_path) == {**result, "per picture": {"entity recall": [[0.25, None]]}}
    whole = path.read_text()
    path.write_text(whole.replace("0.25", "0.75"))
    with pytest.raises(ValueError, match=r"eval\.json: its bytes .* \(SHA-256 differs\); evaluate that model again$"):
        report.read_result(tmp_path)
    older = json.loads(whole)
    del older["sha256"]
    path.write_text(json.dumps(older))
    assert report.read_result(tmp_path)["data"] == "toy", "of a version without digests"
    for content in ("{", "[1]", '{"data": "toy"}', '{"data": 1, "counterfactual pairs": [], "per picture": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"eval\.json: is not the result of an evaluation"):
            report.read_result(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"eval\.json: cannot be read"):
        report.read_result(tmp_path)
