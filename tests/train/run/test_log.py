"""log.jsonl of a run that goes on: later steps go, a cut line goes, lines that no run writes are named."""

from __future__ import annotations

import json

import pytest

from sgg_fast.config import ConfigError
from sgg_fast.train.run.log import RunLog, _forget_after

WHOLE = ['{"event": "start", "step": 0}', '{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}']


def test_later_steps_and_a_line_that_a_kill_cut_off_go(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*WHOLE, '{"step": 3, "lo']))
    _forget_after(path, 1)
    assert path.read_text().splitlines() == WHOLE[:2]


@pytest.mark.parametrize("line", ['{"step": "1"}', '{"step": null}', '{"step": [1]}', '{"step": NaN}', "3", "[]",
                                  '{"step": true}', '{"step": 1.5}'])  # fmt: skip
def test_wrong_types_are_one_line_and_the_cure_it_names_cures(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*WHOLE, line, *WHOLE]) + "\n")
    with pytest.raises(ConfigError) as caught:
        RunLog(tmp_path, "pretrain", 1, 9, 1)
    assert str(caught.value).startswith(f"{path}: line 4 has no whole number as its step: delete the line")
    assert len(path.read_text().splitlines()) == 7, "it stays as it is"
    path.write_text("\n".join(text for text in path.read_text().splitlines() if text != line) + "\n")
    log = RunLog(tmp_path, "pretrain", 2, 9, 1)
    log.event(event="done", step=2)
    log.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [0, 1, 2, 0, 1, 2, 2]


def test_nesting_beyond_any_reader_is_a_damaged_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join([*WHOLE, "[" * 100_000]) + "\n")
    _forget_after(path, 2)
    assert path.read_text().splitlines() == WHOLE
