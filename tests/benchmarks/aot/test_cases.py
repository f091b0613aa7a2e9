"""`benchmarks.aot.cases`: every kernel has a case that launches it, and nothing else counts as shipped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sgg_kernels.launch import intercept

from benchmarks.aot import __main__ as aot
from benchmarks.aot import cases as aot_cases
from benchmarks.aot.compile import Compiled

GOOD = Compiled("sm_89", "case", "some_kernel", 100, 512, 4, 20, 16, ())


def test_a_forgotten_kernel_is_a_violation(tmp_path):
    (tmp_path / "a.py").write_text(
        "@triton.jit\ndef helper(x):\n    return x\n\n@triton.jit\ndef one_kernel(x):\n    helper(x)\n"
    )
    (tmp_path / "b.py").write_text("@triton.jit(do_not_specialize=['x'])\ndef two_kernel(x):\n    pass\n")
    shipped = aot_cases.shipped_kernels(tmp_path)
    assert shipped == {"one_kernel", "two_kernel"}
    compiled = [dataclasses.replace(GOOD, kernel="one_kernel")]
    assert aot.violations(compiled, shipped) == [
        "sm_89 two_kernel: a kernel that no case launches (benchmarks/aot/cases.py)"
    ]


def test_every_shipped_kernel_declares_its_occupancy():
    assert aot_cases.shipped_kernels() == set(aot_cases.LEAST_WARPS)


@pytest.fixture(scope="module")
def launches() -> dict[str, list[tuple]]:
    """Case -> (kernel, grid, positional arguments) of its launches, none of which runs."""
    seen: dict[str, list[tuple]] = {}
    for case in aot_cases.cases():
        rows = seen.setdefault(case.name, [])

        def take(kernel, grid, args, options, rows=rows) -> bool:
            rows.append((kernel.__name__, grid, args))
            return True

        with intercept(take):
            case.run()
    return seen


def test_every_case_launches_and_every_kernel_is_launched(launches):
    """On tensors without memory. No two cases have one name."""
    assert len(launches) == len(aot_cases.cases()) and all(launches.values())
    assert {name for rows in launches.values() for name, *_ in rows} == aot_cases.shipped_kernels()
    tensors = [x for rows in launches.values() for *_, args in rows for x in args if isinstance(x, torch.Tensor)]
    assert {x.device.type for x in tensors} == {"meta"}


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("pack padded", ["pack_fwd_kernel"]),
        ("hash_draw words", ["hash_draw_kernel"] * 2),
        ("adam paper", ["adam_squares_kernel", "adam_decide_kernel", "adam_kernel"]),
        ("geglu toy bfloat16", ["geglu_fwd_kernel", "geglu_bwd_kernel"]),
    ],
)
def test_kernels_of_a_case(launches, case, kernels):
    assert [name for name, *_ in launches[case]] == kernels


def test_tensors_of_a_case_have_their_size_and_type(launches):
    """Ten million relations of 512 numbers; biases and pools are fp32 under autocast."""
    scale, small = (next(z for z in aot_cases.SIZES if z.name == name) for name in ("scale autocast", "odd bf16"))
    name, _, args = launches["gather_add_relu scale autocast"][0]
    shapes = [(tuple(x.shape), x.dtype) for x in args if isinstance(x, torch.Tensor)]
    assert name == "gather_add_relu_fwd_kernel" and ((10_000_003, 512), torch.bfloat16) in shapes
    assert scale.bias(7).dtype == torch.float32 and small.bias(7).dtype == torch.bfloat16
    assert scale.rows(3, 5).dtype == torch.bfloat16 and scale.rows(3, 5, torch.float32).shape == (3, 5)
    assert aot_cases.index(9).dtype == torch.int32
