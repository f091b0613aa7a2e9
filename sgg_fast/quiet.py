"""Start-up of our commands: keeps the libraries' notices off the terminal; never called by the library itself."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from sgg_fast.graph import plain

        return "\n".join(plain(line) for line in super().format(record).split("\n"))


def speak_plainly() -> None:
    """Log lines go to stderr as they are, but for what a terminal would obey; nothing where a handler is there."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def quiet_imports() -> None:
    """What libraries log and warn of while they are imported is not shown; their errors are. Loads none of them."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("xformers", "bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|bitsandbytes|xformers|diffusers|transformers)\b")


def quiet_libraries(verbose: bool = False) -> None:
    """`quiet_imports`, and no notices or progress bars of loading.

    Our own log goes to stderr: warnings, with `verbose` also what was chosen and why.
    """
    speak_plainly()
    logging.getLogger("sgg_fast").setLevel(logging.INFO if verbose else logging.WARNING)
    quiet_imports()
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():  # saving a model imports DeepSpeed, which would warn that it looked for a GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection while the libraries are imported, nor later of what they made: there is no garbage, and the
    search for it takes a fifth of the CPU time or more. Does nothing if they are imported already."""
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
