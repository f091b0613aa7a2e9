"""Nothing of the libraries' own talk reaches the terminal of a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT

IMPORTED = "from sgg_fast.quiet import quiet_libraries; quiet_libraries(); import deepspeed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_deepspeed_which_saving_a_model_imports_does_not_say_that_it_looked_for_a_gpu():
    pytest.importorskip("deepspeed")
    unset = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, env=unset, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
