"""Adam with 4-bit moments against formulas in float64 and torchao's own step, through the interpreter or compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from sgg_kernels.reference.adam import APPLIED, BLOCK, CONTROL_SIZE, CORRECTION_1, CORRECTION_2, FACTOR
from sgg_kernels.reference.weights import read_weights

from sgg_fast import ops
from sgg_fast.ops import adam as op

BACKENDS = ["reference", "triton"]
NUMELS, OFFSETS, NUM = [1, 255, 300, BLOCK + 5], [0, 256, 512, 1024], 1024 + 5 * 256
"""Of the gradients, in buffers of NUM elements; one gradient is of an odd number and ends within a block of 128."""
SIZE = 128
TIE = 2e-6
"""Of a normalised value: its own rounding, which decides where it lies that near the middle of two codes."""


def unpacked(code: torch.Tensor) -> torch.Tensor:
    """A code an element, the upper half of a byte first."""
    return torch.tensor([half for byte in code.tolist() for half in (byte // 16, byte % 16)], device=code.device)


def moments(device: str, drawn: bool = True) -> op.Moments:
    """Of zero, or as steps may have left them."""
    generator = torch.Generator().manual_seed(2)
    codes = [torch.full((NUM // 2,), byte, dtype=torch.uint8) for byte in (0x77, 0)]
    scales = [torch.zeros(NUM // SIZE) for _ in range(2)]
    if drawn:
        for num, offset in zip(NUMELS, OFFSETS, strict=True):
            for code in codes:
                half = slice(offset // 2, (offset + num) // 2)
                code[half] = torch.randint(256, (num // 2,), generator=generator, dtype=torch.uint8)
        scales = [torch.rand(NUM // SIZE, generator=generator) for _ in range(2)]
    made = [*codes, *scales, op.dynamic_map(True, 4), op.dynamic_map(False, 4)]
    return op.Moments(*(t.to(device) for t in made))


def gradients(device: str, dtype: torch.dtype, seed: int = 3) -> op.GroupGrads:
    """Sizes over some decades, among them 0."""
    generator, grads = torch.Generator().manual_seed(seed), []
    for num in NUMELS:
        grad = torch.randn(num, generator=generator) * torch.exp(torch.randn(num, generator=generator))
        grad[num // 2] = 0
        grads.append(grad.to(device, dtype))
    return table_of(grads, OFFSETS)


def table_of(grads: list[torch.Tensor], offsets: list[int]) -> op.GroupGrads:
    backend = ops.backend_for(grads[0].device, torch.float32)
    return op.GroupGrads(grads, offsets, op.chunk_table(grads, offsets, backend).to(grads[0].device))


def step_by(given, state, grads, device, number, factor=1.0, hyper=None):
    """One applied step of rate 1e-2."""
    control = torch.zeros(CONTROL_SIZE)
    control[APPLIED], control[FACTOR] = 1, factor
    control[CORRECTION_1], control[CORRECTION_2] = 1 - 0.9**number, 1 - 0.999**number
    step = torch.tensor([number], dtype=torch.int32, device=device)
    rate = torch.tensor([1e-2, 0, 0, 0], device=device)
    op.adam_update_(given, state, grads, control.to(device), rate, step, hyper or op.Hyper())


def weights(form: str, device: str) -> op.Weights:
    wide = torch.randn(NUM, generator=torch.Generator().manual_seed(1)).to(device)
    low = torch.zeros(NUM, dtype=torch.int16, device=device) if form == "split" else None
    return op.Weights(wide if form == "fp32" else wide.bfloat16(), low, 5)


def assert_nearest(code: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, wanted: torch.Tensor) -> None:
    """Each code stands for the value of the map that is nearest to wanted / absmax, up to ties."""
    rows = wanted.view(-1, SIZE)
    torch.testing.assert_close(absmax.double(), rows.abs().amax(1), rtol=2e-6, atol=0)
    x = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
    distance = (x[..., None] - values.double()).abs()
    excess = distance.gather(-1, unpacked(code).view(-1, SIZE, 1))[..., 0] - distance.amin(-1)
    assert (excess <= TIE).all(), excess.max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["fp32", "split", "rounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["grad32", "grad16"])
def test_is_adam(backend, form, dtype, device):
    """One step from drawn state against the formula in float64: codes nearest, weights right to their last digits."""
    ops.use_kernels(backend)
    given, state, grads = weights(form, device), moments(device), gradients(device, dtype)
    wide = read_weights(given, slice(0, NUM)).double()
    m, v = (
        values.double()[unpacked(code)] * absmax.double().repeat_interleave(SIZE)
        for code, absmax, values in zip(state[:2], state[2:4], state[4:], strict=True)
    )
    g, reached = torch.zeros_like(wide), torch.zeros(NUM // SIZE, dtype=torch.bool, device=device)
    for grad, offset in zip(grads.grads, grads.offsets, strict=True):
        g[offset : offset + len(grad)] = 0.25 * grad.double()
        reached[offset // SIZE : -(-(offset + len(grad)) // SIZE)] = True
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
    wide -= 1e-2 * (m / (1 - 0.9**7)) / ((v / (1 - 0.999**7)).sqrt() + 1e-8)
    before = copy.deepcopy(state)
    step_by(given, state, grads, device, 7, 0.25)
    for k, exact in enumerate((m, v)):
        code, absmax = state[k].view(-1, SIZE // 2), state[2 + k]
        assert_nearest(code[reached].flatten(), absmax[reached], state[4 + k], exact.view(-1, SIZE)[reached].flatten())
        assert torch.equal(code[~reached], before[k].view(-1, SIZE // 2)[~reached]), "what no gradient reaches stays"
        assert torch.equal(absmax[~reached], before[2 + k][~reached])
    if form == "rounded":
        near = given.param.view(torch.int16).long()
        around = torch.stack([((near + k) & 0xFFFF).to(torch.uint16).view(torch.bfloat16) for k in (-1, 1)]).double()
        low, high = around.amin(0), around.amax(0)
        inside = (low < wide + 1e-6) & (wide - 1e-6 < high)
        assert inside.view(-1, SIZE)[reached].all(), "the number above or the one below"
    else:
        found = read_weights(given, slice(0, NUM)).double().view(-1, SIZE)[reached]
        torch.testing.assert_close(found, wide.view(-1, SIZE)[reached], rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_is_found_between_the_right_neighbours(backend, device):
    """Without memory (beta 0) the moments are g and g^2: values 1e-5 beside the middle of every two codes."""
    ops.use_kernels(backend)
    for k, values in enumerate((op.dynamic_map(True, 4).double(), op.dynamic_map(False, 4).double())):
        middles, below = (values[1:] + values[:-1]) / 2, torch.arange(15)
        down = torch.where(middles > 0, 1 - 1e-5, 1 + 1e-5)
        x, wanted = torch.cat([middles * down, middles * (2 - down)]), torch.cat([below, below + 1])
        grad = torch.ones(SIZE)  # 1 at the start makes the scale 1
        grad[1:31] = x.sqrt() if k else x
        state, given = moments(device, drawn=False), op.Weights(torch.zeros(NUM, device=device))
        step_by(given, state, table_of([grad.to(device)], [0]), device, 1, hyper=op.Hyper(beta_1=0.0, beta_2=0.0))
        found = unpacked(state[k][: SIZE // 2])
        assert torch.equal(found[1:31].cpu(), wanted) and found[0] == 15


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_torchaos_own_step(backend, device):
    """Its step in PyTorch, four times from the state that it left; gradients large enough for its least scale."""
    subclass = pytest.importorskip("torchao.optim.subclass_4bit")
    from torchao.optim.adam import single_param_adam

    ops.use_kernels(backend)
    num = 1024
    theirs = torch.randn(num, generator=torch.Generator().manual_seed(0)).to(device)
    state = moments(device, drawn=False)
    made = [subclass.OptimState4bit.zeros((num,), signed, SIZE, torch.device(device)) for signed in (True, False)]
    rate = torch.tensor(1e-2, device=device)
    for step in range(1, 5):
        grad = torch.randn(num, generator=torch.Generator().manual_seed(step)).to(device) * (0.01 if step == 2 else 1)
        for k, theirs_k in enumerate(made):  # at first its codes of a zero scale are not ours, and mean the same
            if step > 1:
                state[k][: num // 2], state[2 + k][: num // SIZE] = theirs_k.codes, theirs_k.scale
        ours = op.Weights(torch.cat([theirs, theirs.new_zeros(NUM - num)]))
        step_by(ours, state, table_of([grad], [0]), device, step)
        number = torch.tensor(float(step), device=device)
        single_param_adam(theirs, grad, number, *made, None, rate, 0.9, 0.999, 0.0, 1e-8, False, False)
        torch.testing.assert_close(ours.param[:num], theirs, rtol=1e-6, atol=1e-6)
        for k, theirs_k in enumerate(made):
            torch.testing.assert_close(state[2 + k][: num // SIZE], theirs_k.scale, rtol=1e-6, atol=0)
            apart = (unpacked(state[k][: num // 2]) - unpacked(theirs_k.codes)).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3, "up to ties"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_moment_of_zero_gives_no_movement_and_small_gradients_keep_their_size(backend, device):
    """torchao's least scale of 1e-12 would take gradients of 1e-6, whose squares are below it, for larger ones."""
    ops.use_kernels(backend)
    grad = torch.full((512,), 1e-8, device=device)
    grad[256:] = 0
    given, state = op.Weights(torch.zeros(NUM, device=device)), moments(device, drawn=False)
    step_by(given, state, table_of([grad], [0]), device, 1, hyper=op.Hyper(eps=1e-15))
    torch.testing.assert_close(given.param[:256], torch.full((256,), -1e-2, device=device), rtol=1e-4, atol=0)
    torch.testing.assert_close(given.param[256:], torch.zeros_like(given.param[256:]), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_the_same_bits_twice(backend, device):
    ops.use_kernels(backend)
    results = []
    for _ in range(2):
        given, state, grads = weights("rounded", device), moments(device), gradients(device, torch.bfloat16)
        step_by(given, state, grads, device, 3)
        results.append([given.param, *state])
    assert all(map(torch.equal, *results))
    control, step = torch.zeros(CONTROL_SIZE, device=device), torch.ones(1, dtype=torch.int32, device=device)
    rest = (*grads[:3], control, torch.zeros(4, device=device), step, [], given.seed, 0.9, 0.999, 1e-8, backend)
    args = (*given[:2], list(state), *rest)
    torch.library.opcheck(op._update, args, test_utils=("test_schema", "test_faketensor"))
