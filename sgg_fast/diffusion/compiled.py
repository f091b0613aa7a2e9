"""A UNet under torch.compile, for drawing. Where the compiler is missing or fails, the UNet itself is called."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

logger = logging.getLogger(__name__)

MODES = {"cuda": "max-autotune-no-cudagraphs"}
"""Mode of torch.compile by device type; "default" elsewhere. Our own capture takes the place of its CUDA graphs."""


class CompiledUNet:
    """Calls `unet`, compiled at its first call. The module itself does not change."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.compiles = unet, True
        self._run = torch.compile(unet, mode=MODES.get(unet.device.type, "default"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiles:
            try:
                return self._run(*args, **kwargs)
            except TorchDynamoException as error:
                logger.warning("the UNet runs without torch.compile: %s", _reason(error))
                self.compiles = False
        return self.unet(*args, **kwargs)


def _reason(error: Exception) -> str:
    """First line of the compiler's own error."""
    cause = getattr(error, "inner_exception", None) or error
    return str(cause).strip().splitlines()[0]
