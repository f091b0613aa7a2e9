"""Draws by a key as the losses make them: Python's own integers on either backend, one launch, and the fallback."""

from __future__ import annotations

import pytest
import torch
from sgg_kernels import reference
from support import loops

from sgg_fast import ops
from sgg_fast.diffusion import noise
from sgg_fast.ops import random

SAMPLES = torch.tensor([5, 0, 62_561, 2**31 + 3, -7])


@pytest.fixture(autouse=True)
def kernels():
    ops.use_kernels("triton")


@pytest.mark.parametrize("backend", ops.BACKENDS)
@pytest.mark.parametrize(
    "key", [(77, "sample", 12), (2**40 - 1, -3, "sample", 2**32 - 5), ("sample",), ("sample", -1)], ids=str
)
def test_numbers_of_a_key_in_python_integers(key, backend):
    """Integers before the first tensor, behind it, negative ones and ones of more than 32 bits."""
    ops.use_kernels(backend)
    given = [SAMPLES if word == "sample" else word for word in key]
    each = [[sample if word == "sample" else word for word in key] for sample in SAMPLES.tolist()]
    assert ops.hash_u32(*given).tolist() == [loops.hash_u32(*words) for words in each]
    uniform = torch.tensor([loops.uniform(*words) for words in each])
    torch.testing.assert_close(ops.hash_uniform(*given), uniform, rtol=0, atol=2.0**-25)
    normal = torch.stack([loops.normals(6, *words) for words in each]).view(-1, 2, 3)
    torch.testing.assert_close(ops.hash_normal((2, 3), *given), normal, rtol=1e-5, atol=1e-5)


def test_a_draw_is_one_launch(device, launched):
    key = 77, torch.tensor([123], dtype=torch.int32, device=device), SAMPLES.to(device)
    noise.draw_timesteps(*key, 1000)
    ops.hash_uniform(*key, noise.STREAM_DROP)
    ops.hash_normal((4, 8, 8), *key, noise.STREAM_NOISE)
    ops.hash_normal((4, 8, 8), *key, noise.STREAM_POSTERIOR)
    assert launched == ["hash_draw_kernel"] * 4


def test_other_keys_are_drawn_by_the_reference(device, launched):
    """Words of two dimensions, and more of them than the kernel takes."""
    sample = SAMPLES.to(device)
    for key in [(1, sample[:, None], torch.arange(3, device=device)), (sample, 1, 2, 3, 4)]:
        assert torch.equal(ops.hash_u32(*key), reference.hash_u32(*key))
    assert launched == []


def test_opcheck(device):
    for kind in (0, 1, 2):
        torch.library.opcheck(random._draw.library, ([SAMPLES.to(device)], [0, 12], 1, 77, 3, kind))
