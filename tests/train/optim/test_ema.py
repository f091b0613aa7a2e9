"""The average of the weights: its formula, every 16 steps in CPU memory, held by the tensors for a while, saved."""

from __future__ import annotations

import pytest
import torch

from sgg_fast.train.optim.ema import WeightAverage


def test_an_average_in_cpu_memory_is_updated_every_16_steps():
    tensor = torch.zeros(3)
    average = WeightAverage([tensor], 0.9999, on_cpu=True)
    for _ in range(40):
        tensor += 1
        average.update()
    first = 0.1 * 0 + 0.9 * 16  # update 1 weighs min(decay ** 16, 1 / 10)
    second = 2 / 11 * first + 9 / 11 * 32
    torch.testing.assert_close(average.averages[0], torch.full((3,), second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_follows_its_formula_and_tensors_hold_it_for_a_while(dtype):
    """The decay is min(0.3, n / (n + 9)); averages are fp32 also of bf16 tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,))]
    average, expected = WeightAverage(tensors, 0.3, on_cpu=False), [t.double() for t in tensors]
    for n in range(1, 7):
        for tensor in tensors:
            tensor += torch.randn(tensor.shape, generator=generator).to(dtype)
        average.update()
        decay = min(0.3, n / (n + 9))
        expected = [decay * e + (1 - decay) * t.double() for e, t in zip(expected, tensors, strict=True)]
    last = [tensor.clone() for tensor in tensors]
    for found, want in zip(average.averages, expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="disk"), average.in_place():
        assert all(t.equal(a.to(dtype)) for t, a in zip(tensors, average.averages, strict=True))
        raise RuntimeError("disk")
    assert all(map(torch.equal, tensors, last)), "also after an error"


def test_a_loaded_average_goes_on_as_the_saved_one():
    tensors, copies = ([torch.full((4,), 1.0)] for _ in range(2))
    first, second = WeightAverage(tensors, 0.9, on_cpu=False), WeightAverage(copies, 0.9, on_cpu=False)
    for step in range(3):
        tensors[0].fill_(float(step))
        first.update()
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert state["num_steps"] == 3 and set(state) == {"num_steps", "0"}
    second.load_state_dict(state)
    for each, average in ((tensors, first), (copies, second)):
        each[0].fill_(7.0)
        average.update()
    assert second.averages[0].equal(first.averages[0]) and not first.averages[0].equal(state["0"])
