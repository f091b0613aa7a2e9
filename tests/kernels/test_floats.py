"""A kernel's floats are fp32, through the interpreter as compiled."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from sgg_kernels.launch import launch


@triton.jit
def rest_kernel(p_out, beta):
    """What is left of 1 once beta has been rounded."""
    tl.store(p_out, 1 - beta)


def test_arithmetic_on_an_argument_is_fp32(device):
    out = torch.empty(1, device=device)
    launch(rest_kernel, (1,), out, 0.999)
    assert out.item() == np.float32(1) - np.float32(0.999) != np.float32(1 - 0.999)
