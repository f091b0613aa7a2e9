"""Keeps the libraries' start-up chatter off the terminal of our two commands; never called by the library itself."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Errors still show; progress bars and notices of loading, and xformers' note about its extension, do not."""
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    for name in ("xformers", "DeepSpeed", "bitsandbytes", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|torch|bitsandbytes|xformers|diffusers|transformers)\b")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
