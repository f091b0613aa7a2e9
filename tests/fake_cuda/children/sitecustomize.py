"""Prepares the Python processes that a command starts for the stand-in (FAKE_CUDA_CHILDREN), as run.py is prepared.

The dry GPU suite hides devices from its parts; here the stand-in is what they run on.
"""

import os
import sys

if os.environ.get("FAKE_CUDA_CHILDREN") and os.environ.get("FAKE_CUDA") and "fake_cuda.run" not in sys.orig_argv:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    from fake_cuda import run

    run.prepare()
