"""Fixtures of the operators' tests, which run kernels."""

from support.cases.interpreter import (  # noqa: F401 - pytest finds them here
    automatic_kernels,
    bf16_products,
    bf16_rounds_to_nearest,
    device,
    floats_are_fp32,
    launched,
    poisoned,
)
