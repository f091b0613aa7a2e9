"""The record of a run: what a resumed one keeps of log.jsonl, TensorBoard, the bar, time that does not count."""

from __future__ import annotations

import io
import json
import sys
import threading

import pytest
from PIL import Image
from support.tiny_runs import lines

from sgg_fast.config import ConfigError
from sgg_fast.train.run import log as logs
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


def test_time_for_sheets_and_checkpoints_is_not_counted_as_training(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 110.0, 120.0])  # made, paused from 10 to 110, recorded at 120
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(clock))
    log = logs.RunLog(tmp_path, "pretrain", 0, 10, batch=8)
    monkeypatch.setattr(log, "_bar", type("Bar", (), {"set_postfix_str": print, "close": lambda self: None})())
    with log.paused():
        pass
    log.record(5, {"loss": 1.0}, {"loss": 2.0})
    log.close()
    assert lines(tmp_path)[0]["images_per_s"] == pytest.approx(8 * 5 / 20)


def test_the_bar_is_short_and_shows_chance(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = logs.RunLog(tmp_path, "pretrain", 0, 10, batch=8)
    log.record(10, {"loss": 1.644, "mae": 0.6, "con": 1.05}, {"loss": 2.386, "mae": 1.0, "con": 1.386})
    log.close()
    assert "loss 1.64/2.39 (now/chance), mae 0.60/1.00, con 1.05/1.39" in capsys.readouterr().err


def test_a_resumed_log_forgets_the_steps_after_its_checkpoint_and_a_line_cut_off(tmp_path):
    kept = b'{"event": "start", "step": 0}\n{"step": 1}\n{"step": 2}\n'
    (tmp_path / "log.jsonl").write_bytes(kept + b'{"step": 3}\n{"event": "samples", "step": 3}\n{"st\x00\xff')
    logs.RunLog(tmp_path, "pretrain", 2, 10, batch=8).close()
    assert (tmp_path / "log.jsonl").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "tensorboard"]


def test_validations_and_pictures_go_to_tensorboard_beside_the_losses(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    red = Image.new("RGB", (4, 6), (255, 0, 0))
    with RunLog(tmp_path, "pretrain", 0, 10, batch=1, planned=3 << 30) as log:
        log.advance()
        log.validated(2, {"top1": 0.5}, {"top1": 0.125})
        log.picture(2, "samples", red)
        log.record(3, {"loss": 2.0}, {"loss": 4.0}, {"lr_unet": 1.23456789e-5})
    validation, record = lines(tmp_path)
    assert validation == {"event": "validation", "step": 2, "top1": 0.5, "top1_at_chance": 0.125}
    assert (record["lr_unet"], record["planned_memory_gib"]) == (1.23457e-5, 3.0)
    assert "held-out pairs at step 2 (now/chance): top1 0.500/0.125" in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("validation/top1_at_chance")] == [(2, 0.125)]
    assert [one.value for one in events.Scalars("loss_at_chance")] == [4.0]
    (picture,) = events.Images("samples")
    assert Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB").tobytes() == red.tobytes()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RunLog(tmp_path / "run", "pretrain", 0, 10, batch=1) as log, log.paused():
        log.advance()
        log.event(event="start", step=0)
        log.record(1, {"loss": 2.0}, {"loss": 4.0})
        log.validated(1, {"top1": 0.5}, {"top1": 0.1})
        log.picture(1, "samples", Image.new("RGB", (2, 2)))
    assert not list(tmp_path.iterdir())


def test_tensorboards_thread_tells_of_a_full_disk_once_and_other_threads_of_anything(tmp_path, monkeypatch):
    """Its error comes back at the next value, so its traceback is left out. The hook before is back at the end."""
    seen = []
    hook = lambda failed: seen.append(failed.exc_type)  # noqa: E731 - identity is what is compared
    monkeypatch.setattr(threading, "excepthook", hook)

    def fail(error: Exception, module: str) -> None:
        def run(self: threading.Thread) -> None:
            raise error

        thread = type("Worker", (threading.Thread,), {"__module__": module, "run": run})()
        thread.start()
        thread.join()

    with RunLog(tmp_path, "pretrain", 0, 10, batch=1):
        fail(OSError("full"), "tensorboard.summary.writer")
        fail(ValueError("a fault"), "tensorboard.summary.writer")
        fail(OSError("of another"), "sgg_fast")
    assert seen == [ValueError, OSError] and threading.excepthook is hook
