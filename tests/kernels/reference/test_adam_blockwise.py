"""The pure-torch form of Adam with moments as codes: the libraries' own maps, nearest codes, steps by the book."""

from __future__ import annotations

import itertools

import pytest
import torch
from sgg_kernels.reference.adam import CONTROL_SIZE, CORRECTION_1, CORRECTION_2, FACTOR, Hyper
from sgg_kernels.reference.adam_blockwise import (
    BLOCKS,
    ZERO_1,
    Moments,
    adam_blockwise,
    bits_of,
    blocks_of,
    dequantise,
    dynamic_map,
    middles,
    quantise,
    read_codes,
    write_codes,
)
from sgg_kernels.reference.weights import Weights

MAPS = list(itertools.product((True, False), (8, 4)))


def test_the_maps_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


def test_the_maps_are_torchaos():
    found = pytest.importorskip("torchao.optim.subclass_4bit")
    assert dynamic_map(True, 4).tolist() == torch.tensor(found.get_qmap_signed()).tolist()
    assert dynamic_map(False, 4).tolist() == torch.tensor(found.get_qmap_unsigned()).tolist()


@pytest.mark.parametrize(("signed", "bits"), MAPS)
def test_maps_rise_and_name_their_zero(signed, bits):
    values = dynamic_map(signed, bits)
    assert len(values) == 2**bits and bits_of(values) == bits and (values.diff() > 0).all() and values[-1] == 1
    if signed:
        assert values[ZERO_1[bits]] == 0 and values[0] > -1
    else:
        assert values[0] == (0 if bits == 8 else 1 / 16)


@pytest.mark.parametrize(("signed", "bits"), MAPS)
def test_a_number_is_above_a_middle_or_not(signed, bits):
    """fp32 numbers of either side are classed as exact arithmetic classes them; a tie belongs to the lower value."""
    values = dynamic_map(signed, bits)
    exact, found = (values[:-1].double() + values[1:].double()) / 2, middles(values)
    assert found.dtype == torch.float32
    for x in (found, found.nextafter(torch.tensor(2.0)), found.nextafter(torch.tensor(-2.0))):
        assert torch.equal(x > found, x.double() > exact)


@pytest.mark.parametrize(("signed", "bits"), MAPS)
def test_codes_are_the_nearest_and_come_back(signed, bits):
    """By trying every value of the map; a block of zeros and one below the normal numbers are zeros."""
    values, size = dynamic_map(signed, bits), BLOCKS[bits]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator) * torch.exp(3 * torch.randn(4, size, generator=generator))
    x = x if signed else x.square()
    x[2], x[3] = 0, 1e-39
    codes, absmax = quantise(x, values)
    assert codes.dtype == torch.uint8 and torch.equal(absmax, x.abs().amax(1))
    wanted = x[:2].double() / absmax[:2, None].double()
    distance = (wanted[..., None] - values.double()).abs()
    if values[0] == 0:
        distance[..., 0] = torch.where(wanted > 0, 2, distance[..., 0])  # above 0 is not 0
    chosen = distance.gather(-1, codes[:2, :, None].long())[..., 0]
    assert (chosen - distance.amin(-1) <= 1e-6 * wanted.abs()).all()
    back = dequantise(codes, absmax, values)
    torch.testing.assert_close(back[:2].double(), values.double()[codes[:2].long()] * absmax[:2, None].double())
    assert (back[2] == 0).all() and (back[3] <= 1e-39).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_written_where_they_are_read(bits):
    """With 4 bits an even element's code lies in a byte's upper half."""
    size = BLOCKS[bits]
    code = torch.zeros(4 * size * bits // 8, dtype=torch.uint8)
    codes = (torch.arange(2 * size).view(2, size) % 2**bits).to(torch.uint8)
    part = slice(size, 3 * size)
    write_codes(code, part, codes, bits)
    assert torch.equal(read_codes(code, part, bits), codes)
    assert (
        not read_codes(code, slice(0, size), bits).any() and not read_codes(code, slice(3 * size, 4 * size), bits).any()
    )
    if bits == 4:
        assert code[size // 2 : size // 2 + 3].tolist() == [0x01, 0x23, 0x45]


@pytest.mark.parametrize(("bits", "blocks"), [(8, (1, 3)), (4, (2, 5))])
def test_a_gradient_reaches_whole_blocks(bits, blocks):
    """300 elements from 256 on; 0 beyond their end."""
    control = torch.zeros(CONTROL_SIZE)
    control[FACTOR] = 0.5
    part, found, g = blocks_of(torch.ones(300, dtype=torch.bfloat16), 256, bits, control)
    assert (found.start, found.stop) == blocks and g.shape == (blocks[1] - blocks[0], BLOCKS[bits])
    assert (part.start, part.stop) == (256, 256 + g.numel())
    assert (g.flatten()[:300] == 0.5).all() and not g.flatten()[300:].any()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_by_the_book(bits):
    """From drawn codes: weights by Adam's formula in float64, new moments nearest to it, other blocks as they were."""
    size, num = BLOCKS[bits], 1024
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(256, (num * bits // 8,), generator=generator, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.rand(num // size, generator=generator) for _ in range(2)]
    moments = Moments(*codes, *scales, dynamic_map(True, bits), dynamic_map(False, bits))
    assert moments.bits == bits
    weights, grad = Weights(torch.randn(num, generator=generator)), torch.randn(512, generator=generator)
    part, control = slice(256, 768), torch.zeros(CONTROL_SIZE)
    control[FACTOR], control[CORRECTION_1], control[CORRECTION_2] = 0.5, 1 - 0.9**4, 1 - 0.999**4
    m, v = (
        dequantise(read_codes(code, part, bits), scale[256 // size : 768 // size], values).flatten().double()
        for code, scale, values in zip(codes, scales, moments[4:], strict=True)
    )
    m, v = 0.9 * m + 0.1 * 0.5 * grad.double(), 0.999 * v + 0.001 * (0.5 * grad.double()).square()
    want, before = weights.param.double(), [t.clone() for t in moments[:4]]
    want[part] -= 1e-2 * (m / (1 - 0.9**4)) / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
    step = torch.tensor([4], dtype=torch.int32)
    adam_blockwise(weights, moments, [grad], [256], control, torch.tensor([1e-2]), step, Hyper())
    torch.testing.assert_close(weights.param.double(), want, rtol=1e-6, atol=1e-6)
    for k, exact in enumerate((m, v)):
        wanted, absmax = quantise(exact.float().view(-1, size), moments[4 + k])
        found = read_codes(moments[k], part, bits)
        assert (found != wanted).float().mean() < 0.01, "up to ties"
        torch.testing.assert_close(moments[2 + k][256 // size : 768 // size], absmax, rtol=1e-5, atol=0)
        for other in (slice(0, 256), slice(768, num)):
            assert torch.equal(read_codes(moments[k], other, bits), read_codes(before[k], other, bits))
            held = slice(other.start // size, other.stop // size)
            assert torch.equal(moments[2 + k][held], before[2 + k][held])
