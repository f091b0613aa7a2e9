"""8-bit Adam against formulas in float64 and bitsandbytes' own steps, through the interpreter or compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from sgg_kernels import launch as launching
from sgg_kernels.reference.adam import APPLIED, BLOCK, CONTROL_SIZE, CORRECTION_1, CORRECTION_2, FACTOR, NORM
from torch import nn

from sgg_fast import ops
from sgg_fast.ops import adam as op
from sgg_fast.train.optim.adam_flat import FlatAdam

BACKENDS = ["reference", "triton"]
FORMS = ["fp32", "split", "rounded"]
"""Of the weights."""
NUMELS = [1, 255, 300, BLOCK + 5]
OFFSETS = [0, 256, 512, 1024]
NUM = 1024 + 5 * 256
"""Elements of the buffers: 1 024 and the last gradient's five blocks."""

TIE = 2e-6
"""Of a normalised value: its own rounding, which decides where it lies that near the middle of two codes."""


def weights(form: str, device: str, seed: int = 5) -> op.Weights:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(NUM, generator=generator).to(device)
    low = torch.zeros(NUM, dtype=torch.int16, device=device) if form == "split" else None
    return op.Weights(wide if form == "fp32" else wide.bfloat16(), low, seed)


def moments(device: str, drawn: bool = True) -> op.Moments:
    """Of zero, or as steps may have left them: padding holds zeros."""
    generator = torch.Generator().manual_seed(2)
    codes = [torch.full((NUM,), zero, dtype=torch.uint8) for zero in (op.ZERO_1[8], 0)]
    scales = [torch.zeros(NUM // 256) for _ in range(2)]
    if drawn:
        for num, offset in zip(NUMELS, OFFSETS, strict=True):
            for code in codes:
                code[offset : offset + num] = torch.randint(256, (num,), generator=generator, dtype=torch.uint8)
        scales = [torch.rand(NUM // 256, generator=generator) for _ in range(2)]
    made = [*codes, *scales, op.dynamic_map(True), op.dynamic_map(False)]
    return op.Moments(*(t.to(device) for t in made))


def gradients(device: str, dtype: torch.dtype, seed: int = 3) -> op.GroupGrads:
    """Sizes over many decades, among them 0."""
    generator = torch.Generator().manual_seed(seed)
    grads = []
    for num in NUMELS:
        grad = torch.randn(num, generator=generator) * torch.exp(3 * torch.randn(num, generator=generator))
        grad[num // 2] = 0
        grads.append(grad.to(device, dtype))
    return table_of(grads)


def table_of(grads: list[torch.Tensor], offsets: list[int] = OFFSETS) -> op.GroupGrads:
    backend = ops.backend_for(grads[0].device, torch.float32)
    return op.GroupGrads(grads, offsets, op.chunk_table(grads, offsets, backend).to(grads[0].device))


def decided(device: str, step: int, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`control` and `step` as after the decision to take step `step`."""
    control = torch.zeros(CONTROL_SIZE)
    control[APPLIED], control[FACTOR] = 1, factor
    control[CORRECTION_1], control[CORRECTION_2] = 1 - 0.9**step, 1 - 0.999**step
    return control.to(device), torch.tensor([step], dtype=torch.int32, device=device)


def rate(device: str, lr: float = 1e-2) -> torch.Tensor:
    return torch.tensor([lr, 0, 0, 0], device=device)


def true_step(given: op.Weights, state: op.Moments, grads: op.GroupGrads, step: int, factor: float, lr: float):
    """(weights, m, v) of all buffers in float64, by the book; m and v before they are quantised."""
    wide = ops_read(given).double()
    m, v = (
        values.double()[code.long()] * absmax.double().repeat_interleave(256)
        for code, absmax, values in zip(state[:2], state[2:4], state[4:], strict=True)
    )
    g = torch.zeros_like(wide)
    for grad, offset in zip(grads.grads, grads.offsets, strict=True):
        g[offset : offset + len(grad)] = factor * grad.double()
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
    update = lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return wide - update, m, v


def ops_read(given: op.Weights) -> torch.Tensor:
    """fp32 weights, by arithmetic on their bits."""
    if given.low is None:
        return given.param.float()
    high = given.param.view(torch.int16).long() << 16
    return ((high + given.low) & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


def assert_nearest(code: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, wanted: torch.Tensor) -> None:
    """Each code stands for the value of the map that is nearest to wanted / absmax, up to ties.

    But a second moment above 0 is not 0.
    """
    rows = wanted.view(-1, 256)
    torch.testing.assert_close(absmax.double(), rows.abs().amax(1), rtol=2e-6, atol=0)
    x = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-30)
    distance = (x[..., None] - values.double()).abs()
    if values[0] == 0:
        distance[..., 0] = torch.where(x > 0, 1, distance[..., 0])
    excess = distance.gather(-1, code.view(-1, 256, 1).long())[..., 0] - distance.amin(-1)
    assert (excess <= TIE * x.abs()).all(), excess.max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["grad32", "grad16"])
def test_is_adam(backend, form, dtype, device):
    """One step from drawn state, every size and decade: codes nearest, weights right to their last digits."""
    ops.use_kernels(backend)
    given, state, grads = weights(form, device), moments(device), gradients(device, dtype)
    wide, m, v = true_step(given, state, grads, 7, 0.25, 1e-2)
    control, step = decided(device, 7, 0.25)
    op.adam_update_(given, state, grads, control, rate(device), step, op.Hyper())
    assert_nearest(state.code_1, state.absmax_1, state.map_1, m)
    assert_nearest(state.code_2, state.absmax_2, state.map_2, v)
    if form == "rounded":
        near = given.param.view(torch.int16).long()
        around = torch.stack([((near + k) & 0xFFFF).to(torch.uint16).view(torch.bfloat16) for k in (-1, 1)]).double()
        low, high = around.amin(0), around.amax(0)
        assert ((low < wide + 1e-6) & (wide - 1e-6 < high)).all(), "the number above or the one below"
    else:
        torch.testing.assert_close(ops_read(given).double(), wide, rtol=2e-7, atol=1e-7)
    if form == "split":
        assert torch.equal(given.param, ops_read(given).bfloat16()), "the nearest bf16 number"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000], ids=["gpu", "negative", "cpu"])
def test_a_weight_that_is_no_number_is_not_rounded_to_one(backend, bits, device):
    """0x7FFFFFFF, in bf16 with the half that it lacks: adding half of the last place would carry into the sign."""
    ops.use_kernels(backend)
    given = weights("split", device)
    low = (bits & 0xFFFF ^ 0x8000) - 0x8000  # the signed lower half; the upper one makes up for its sign
    given.param.view(torch.int16)[OFFSETS[1]] = ((bits - low >> 16) & 0xFFFF ^ 0x8000) - 0x8000
    given.low[OFFSETS[1]] = low
    assert ops_read(given).isnan().nonzero().tolist() == [[OFFSETS[1]]]
    control, step = decided(device, 1)
    op.adam_update_(given, moments(device), gradients(device, torch.float32), control, rate(device), step, op.Hyper())
    assert given.param.isnan().nonzero().tolist() == ops_read(given).isnan().nonzero().tolist() == [[OFFSETS[1]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_stays_zero(backend, device):
    ops.use_kernels(backend)
    given, state = op.Weights(torch.zeros(NUM, device=device)), moments(device)
    control, step = decided(device, 1)
    op.adam_update_(given, state, gradients(device, torch.float32), control, rate(device), step, op.Hyper())
    covered = torch.zeros(NUM, dtype=torch.bool)
    for num, offset in zip(NUMELS, OFFSETS, strict=True):
        covered[offset : offset + num] = True
    padding = ~covered.to(device)
    assert not given.param[padding].any()
    assert (state.code_1[padding] == op.ZERO_1[8]).all() and (state.code_2[padding] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_is_found_between_the_right_neighbours(backend, device):
    """Without memory (beta 0) the moments are g and g^2: values 1e-5 beside the middle of every two codes."""
    ops.use_kernels(backend)
    signed, unsigned = op.dynamic_map(True).double(), op.dynamic_map(False).double()

    def beside(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        middles, below = (values[1:] + values[:-1]) / 2, torch.arange(255)
        down = torch.where(middles > 0, 1 - 1e-5, 1 + 1e-5)
        return torch.cat([middles * down, middles * (2 - down)]), torch.cat([below, below + 1])

    for k, values in enumerate((signed, unsigned)):
        x, wanted = beside(values)
        if k:
            x, wanted = x.sqrt(), wanted.clamp(min=1)  # above 0 is not 0
        grad = torch.ones(NUM)  # 1 at the start of each block makes its scale 1
        grad[1:256], grad[257:512] = x[:255], x[255:]
        state = moments(device, drawn=False)
        given = op.Weights(torch.zeros(NUM, device=device))
        grads = table_of([grad[:512].to(device)], [0])
        control, step = decided(device, 1)
        op.adam_update_(given, state, grads, control, rate(device), step, op.Hyper(beta_1=0.0, beta_2=0.0))
        found = state[k][:512].view(2, 256)[:, 1:].flatten().cpu()
        assert torch.equal(found.long(), wanted)
        assert (state[k][:512:256] == 255).all() and len(set(found.tolist())) == 256 - k


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_bitsandbytes_own_step(backend, device):
    """Its step in PyTorch, which like its CUDA kernels takes the nearest code, three times from the state it left."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch as their_step

    ops.use_kernels(backend)
    theirs, state = torch.randn(NUM, device=device), moments(device, drawn=False)
    for step in (1, 2, 3):
        grad = gradients(device, torch.float32, seed=step).grads[-1].repeat(3)[:NUM] * (1e-4 if step == 2 else 1)
        ours, mine = op.Weights(theirs.clone()), copy.deepcopy(state)
        control, number = decided(device, step)
        op.adam_update_(ours, mine, table_of([grad], [0]), control, rate(device), number, op.Hyper())
        with torch.compiler.set_stance("force_eager"):
            their_step(
                theirs, grad, state.code_1, state.code_2, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2, state.map_1,
                state.map_2, state.absmax_1, state.absmax_2, 0.0, 1.0, False, optimizer_name="adam",
            )  # fmt: skip
        torch.testing.assert_close(ours.param, theirs, rtol=1e-6, atol=1e-6)
        for k in (0, 1):
            torch.testing.assert_close(mine[2 + k], state[2 + k], rtol=1e-6, atol=0)
            their = state[k].int()
            if k:
                their = torch.maximum(their, (state.absmax_2.repeat_interleave(256) * (grad != 0) > 0).int())
            apart = (mine[k].int() - their).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3, "up to ties"


def test_is_bitsandbytes_cpu_operator_up_to_its_grid():
    """Its operator for CPUs looks a normalised value up in a table: it rounds it to one of 65 536 steps first.

    Weights and scales are equal; its codes are the nearest ones of the rounded values, so those of small values differ
    from ours (0 in the signed map becomes 4e-5).
    """
    pytest.importorskip("bitsandbytes")
    ops.use_kernels("reference")
    grad = gradients("cpu", torch.float32).grads[-1]
    num = len(grad)
    theirs, state = torch.ones(num), moments("cpu", drawn=False)
    their = [t[:num].clone() for t in state[:2]] + [t[: -(-num // 256)].clone() for t in state[2:4]]
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", grad, theirs, their[0], their[1], 0.9, 0.999, 0.0, 0.0, 1e-8, 1, 1e-2, *state[4:], *their[2:], 0.0, 1.0
    )
    ours = op.Weights(torch.ones(NUM))
    control, number = decided("cpu", 1)
    op.adam_update_(ours, state, table_of([grad], [0]), control, rate("cpu"), number, op.Hyper())
    torch.testing.assert_close(ours.param[:num], theirs, rtol=1e-6, atol=0)
    for k, values in enumerate(state[4:]):
        torch.testing.assert_close(state[2 + k][: len(their[2 + k])], their[2 + k], rtol=1e-6, atol=0)
        x = 0.1 * grad.double() if k == 0 else 0.001 * grad.double().square()
        x = x / their[2 + k].repeat_interleave(256)[:num]
        step = ((x + 1) * 32767.5 + 0.5).floor()
        found = torch.bucketize(step / 32767.5 - 1, (values[1:].double() + values[:-1].double()) / 2)
        inside = ((x + 1) * 32767.5 - step).abs() < 0.48  # nearer to the edge its rounding in fp32 may go either way
        sure = inside | ((x >= 0) & (x < 2e-5))
        assert sure.float().mean() > 0.9 and torch.equal(found[sure], their[k][sure].long())


def optimizer(device: str, form: str = "fp32", max_norm: float = 0.0, seed: int = 3) -> FlatAdam:
    """Two groups, of 8 and of 32 bits; the last parameter of each gets no gradient."""
    torch.manual_seed(0)
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    groups = [
        {"params": [nn.Parameter(torch.randn(n).to(device, dtype)) for n in numels], "lr": lr, "optim_bits": bits}
        for numels, lr, bits in (([300, 1, 7], 1e-2, 8), ([5, 33, 7], 1e-3, 32))
    ]
    return FlatAdam(groups, seed, max_norm, split=form == "split")


def give(one: FlatAdam, step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for group in one.param_groups:
        for parameter in group["params"][:-1]:
            grad = size * torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(parameter.device, parameter.dtype)


def buffers(one: FlatAdam) -> list[torch.Tensor]:
    found = [one.control, one.num_steps]
    for group in one._groups:
        found += [t for t in (*group.weights[:2], *group.moments) if t is not None]
    return found


def run(backend: str, device: str, form: str, num: int = 2, **options: object) -> FlatAdam:
    ops.use_kernels(backend)
    one = optimizer(device, form, **options)
    for step in range(num):
        give(one, step)
        one.step()
    return one


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_the_reference_and_give_the_same_bits_twice(form, device):
    """Groups, clipping, both widths of state; also the random bits of rounding are the same on both backends."""
    ours, reference = (run(backend, device, form, max_norm=3.0) for backend in ("triton", "reference"))
    if form == "rounded":
        assert all(map(torch.equal, buffers(ours), buffers(run("triton", device, form, max_norm=3.0))))
    for one, other in zip(buffers(ours), buffers(reference), strict=True):
        if one.dtype in (torch.uint8, torch.int16, torch.bfloat16):
            assert (one != other).float().mean() < 0.02 or one.dtype == torch.int16, "up to ties"
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_by_the_norm_over_all_groups_and_each_has_its_rate(backend, device):
    ops.use_kernels(backend)
    one = optimizer(device, max_norm=0.5)
    give(one, 0)
    norm = torch.cat([p.grad.double() for g in one.param_groups for p in g["params"][:-1]]).norm()
    before = [[p.detach().clone() for p in g["params"]] for g in one.param_groups]
    grads = [[p.grad for p in g["params"]] for g in one.param_groups]
    one.step()
    assert one.control[NORM].item() == pytest.approx(norm.item(), rel=1e-6)
    assert one.control[FACTOR].item() == pytest.approx(0.5 / norm.item(), rel=1e-5)
    for group, was, given in zip(one.param_groups, before, grads, strict=True):
        for parameter, start, grad in zip(group["params"][:-1], was, given, strict=False):
            moved, clear = parameter.detach() - start, grad.abs() > 1e-3  # the first step's size is the rate
            torch.testing.assert_close(moved[clear], -group["lr"] * grad.sign()[clear], rtol=1e-3, atol=0)
        assert torch.equal(group["params"][-1], was[-1]), "without a gradient nothing moves"


@pytest.mark.parametrize(("backend", "form"), [("triton", "split"), *(("reference", form) for form in FORMS)])
def test_skips_what_is_not_finite(backend, form, device):
    one = run(backend, device, form, num=1)
    before = [t.clone() for t in buffers(one)[1:]]
    give(one, 1)
    one.param_groups[1]["params"][0].grad[2] = float("nan")
    one.step()
    assert one.applied == 0 and all(map(torch.equal, buffers(one)[1:], before))
    give(one, 2)
    one.step()
    assert one.applied == 1 and one.num_steps == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_right_on_average(backend, device):
    """A step of 1e-5 on weights whose last digit is some 1e-4: thousands of them move by it on average, few at all."""
    ops.use_kernels(backend)
    num, steps = (8192, 2) if backend == "reference" or device == "cuda" else (4096, 1)
    start = (0.016 + 0.015 * torch.rand(num, generator=torch.Generator().manual_seed(0))).to(device).bfloat16()
    groups = [{"params": [nn.Parameter(start.clone())], "lr": 1e-5, "optim_bits": bits} for bits in (8, 32)]
    one = FlatAdam(groups, seed=11)
    for step in range(steps):
        for group in groups:
            group["params"][0].grad = torch.ones(num, device=device, dtype=torch.bfloat16)
        one.step()
        moved = [group["params"][0].detach().double() - start.double() for group in groups]
        for moves in moved:
            error = moves.std() / num**0.5
            assert error < 0.2 * 1e-5 * (step + 1), "the test can tell"
            assert (moves.mean() + 1e-5 * (step + 1)).abs() < 4 * error
            assert 0.02 < (moves != 0).double().mean() < 0.3
        assert not torch.equal(*moved), "groups draw apart"


def test_one_launch_a_group_beside_the_decision(device):
    ops.use_kernels("triton")
    one = optimizer(device)
    give(one, 0)
    seen: list[str] = []
    with launching.intercept(lambda kernel, *rest: seen.append(kernel.__name__) or False):
        one.step()
    assert seen == ["adam_squares_kernel"] * 2 + ["adam_decide_kernel", "adam_blockwise_kernel", "adam_kernel"]
    assert all(table.data_ptr() % 16 == 0 for table in one.table(one.gradients()).split(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    ops.use_kernels(backend)
    given, state, grads = weights("split", device), moments(device), gradients(device, torch.bfloat16)
    control, step = decided(device, 1)
    tests = ("test_schema", "test_faketensor")
    rest = (*grads[:3], control, rate(device), step, [], given.seed, 0.9, 0.999, 1e-8, backend)
    torch.library.opcheck(op._update, (*given[:2], list(state), *rest), test_utils=tests)
    fp32 = [torch.zeros(NUM, device=device), torch.zeros(NUM, device=device)]
    torch.library.opcheck(op._update, (*given[:2], fp32, *rest), test_utils=tests)
    decide = control, step, grads.grads, [grads.table], [True], *op.Hyper(), backend
    torch.library.opcheck(op._decide, decide, test_utils=tests)
