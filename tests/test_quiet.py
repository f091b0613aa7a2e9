"""The libraries' notices stay off the terminal; our own log lines and errors do not."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support import ROOT

from sgg_fast.quiet import quiet_imports, quiet_libraries, speak_plainly, uncollected


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_deepspeed_which_saving_a_model_imports_does_not_say_that_it_looked_for_a_gpu():
    pytest.importorskip("deepspeed")
    imported = "from sgg_fast.quiet import quiet_libraries; quiet_libraries(); import deepspeed"
    unset = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", imported], cwd=ROOT, env=unset, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_our_log_lines_are_plain_text_and_a_users_own_handler_stays(monkeypatch, capsys):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    for _ in range(2):
        speak_plainly()
    logging.getLogger("sgg_fast.graph").warning("a name \x1b[2J\nand %s", "\u202eanother")
    assert capsys.readouterr().err == "a name \\x1b[2J\nand \\u202eanother\n"
    own = logging.NullHandler()
    monkeypatch.setattr(root, "handlers", [own])
    speak_plainly()
    assert root.handlers == [own]


def test_warnings_of_libraries_are_dropped_and_their_errors_and_our_warnings_kept(monkeypatch, caplog):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_imports()
        for module in ("torch.nn", "deepspeed", "sgg_fast.env", "torchaudio"):
            warnings.warn_explicit(module, UserWarning, "file.py", 1, module=module)
    assert [str(warning.message) for warning in seen] == ["sgg_fast.env", "torchaudio"]
    for name in ("xformers", "torch.distributed.run"):
        logging.getLogger(name).warning("a notice")
        logging.getLogger(name).error("an error of %s", name)
    assert [record.message for record in caplog.records] == [
        "an error of xformers", "an error of torch.distributed.run"
    ]  # fmt: skip
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info", "the user's own value"


def test_what_was_chosen_is_logged_only_when_asked_for(monkeypatch):
    import diffusers
    import transformers

    ours = logging.getLogger("sgg_fast")
    before = ours.level
    try:
        quiet_libraries(verbose=True)
        assert logging.getLogger("sgg_fast.env").isEnabledFor(logging.INFO)
        quiet_libraries()
        assert not ours.isEnabledFor(logging.INFO) and ours.isEnabledFor(logging.WARNING)
    finally:
        ours.setLevel(before)
    for library in (diffusers, transformers):
        assert library.utils.logging.get_verbosity() == logging.ERROR


@pytest.mark.parametrize(("imported", "enabled"), [(False, True), (True, True), (False, False)])
def test_garbage_is_not_collected_during_the_first_import_and_never_what_it_made(monkeypatch, imported, enabled):
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "diffusers", sys)
    gc.unfreeze()
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(InterruptedError), uncollected():
            during = gc.isenabled()
            raise InterruptedError
        assert (during, gc.isenabled()) == (imported and enabled, enabled)
        assert (gc.get_freeze_count() > 0) is (not imported and enabled)
    finally:
        gc.enable()
        gc.unfreeze()
