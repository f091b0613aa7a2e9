"""The captured fine-tuning step: what it computes is the plain engine's, and nothing in it waits for the device."""

from __future__ import annotations

import dataclasses
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.cases.capture import FORBIDDEN, Watcher
from support.cases.stage import GRAPHS, cache, conditioner, foundation, settings  # noqa: F401  (fixtures)
from torch.overrides import TorchFunctionMode

from sgg_fast import ops
from sgg_fast.data.cache import TrainingCache
from sgg_fast.data.moments import MomentRows
from sgg_fast.nn.attention import set_attention
from sgg_fast.nn.fuse import fuse
from sgg_fast.ops.adam import num_chunks
from sgg_fast.toy.models import toy_foundation
from sgg_fast.train.assemble import assemble
from sgg_fast.train.engines import captured as capturing
from sgg_fast.train.engines.captured import SLOTS, CapturedEngine, run_part, why_eager
from sgg_fast.train.engines.choose import build_engine
from sgg_fast.train.engines.eager import EagerEngine
from sgg_fast.train.memory.blank import blank_cache, blank_conditioner, blank_foundation
from sgg_fast.train.stages import FinetuneStage

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))

SETTINGS = {"batch_size": 2, "unet_lr": 1e-3, "graph_lr": 3e-3, "optimizer": "adam", "min_snr_gamma": 5.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch, request):
    """One step of warm-up where nothing is compiled; kernels as they were."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(capturing, "WARM_UP_STEPS", 1)
    yield
    ops.use_kernels("auto")


def engine(cache: TrainingCache, captured: bool, **changes: object) -> EagerEngine | CapturedEngine:
    """An engine on the CPU with models of its own, always the same."""
    torch.manual_seed(0)
    config = settings(**{**SETTINGS, **changes})
    models = toy_foundation(weights=None)
    stage = FinetuneStage(config, conditioner(config, cache), models, cache)
    return (CapturedEngine if captured else EagerEngine)(stage, CPU)


def rows_of(cache: TrainingCache) -> TrainingCache:
    """The same set, its latents in host memory and sent with every step."""
    return dataclasses.replace(cache, moments=MomentRows(np.split(cache.moments.numpy(), [3, 4]), 1))


def draws(num: int, micro: int) -> list[np.ndarray]:
    """[K, 2] samples of the first steps, of very different sizes; the largest graph needs a longer context."""
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(len(GRAPHS))[: 2 * micro].reshape(micro, 2) for _ in range(num)]
    drawn[1][0, 0] = len(GRAPHS) - 1
    return drawn


def assert_same_weights(
    found: EagerEngine, expected: EagerEngine, start: dict[str, torch.Tensor], share: float = 0.9
) -> None:
    """Every weight moved the same way: errors beside the distance that the weights of a tensor went.

    share: of the tensors that moved at all.
    """
    theirs, moved = dict(expected.module.named_parameters()), 0
    for name, parameter in found.module.named_parameters():
        way = (theirs[name] - start[name]).norm()
        moved += int(way > 0)
        assert (parameter - theirs[name]).norm() <= 2e-2 * way + 1e-6, name
    assert moved > share * len(theirs)


@pytest.mark.parametrize(
    ("steps", "micro", "changes"),
    [(3, 1, {"ema": 0.9, "relation_dropout": 0.5}), (2, 3, {"max_grad_norm": 0.05})],
)
def test_a_captured_step_trains_like_the_plain_one(cache, steps, micro, changes):
    """Several steps over both context lengths: losses, chances and weights; the oracle is torch's Adam."""
    made = {"accumulation_steps": micro, **changes}
    plain, captured = engine(cache, False, **made), engine(cache, True, **made)
    assert isinstance(plain.optimizer, torch.optim.Adam)
    start = {name: p.detach().clone() for name, p in plain.module.named_parameters()}
    for step, ids_KB in enumerate(draws(steps, micro)):
        expected, found = (one.update(ids_KB, step, 1 / (1 + step)) for one in (plain, captured))
        assert found.applied and found.behind == 0 and list(found.losses) == list(expected.losses)
        for side in ("losses", "chance"):
            for name, value in getattr(expected, side).items():
                torch.testing.assert_close(getattr(found, side)[name], value, rtol=1e-3, atol=1e-5)
    assert len(captured._runs) == 2, "graphs of both context lengths were met"
    assert int(captured.optimizer.num_steps) == steps, "steps of the warm-up do not count"
    with plain.exported(), captured.exported():
        assert_same_weights(captured, plain, start)


@pytest.mark.parametrize("weights", ["master", "split"])
def test_updates_in_backward_are_the_plain_engines(cache, weights):
    """In a captured step, too: losses, weights, norms; a bad loss changes nothing; no gradient is left."""
    made = {"optimizer": "adam8bit", "optimizer_in_backward": True, "max_grad_norm": 0.0, "weights": weights}
    plain, captured = engine(cache, False, **made), engine(cache, True, **made)
    start = {name: p.detach().clone() for name, p in plain.module.named_parameters()}
    for step, ids_KB in enumerate(draws(3, 1)):
        expected, found = (one.update(ids_KB, step, 1 / (1 + step)) for one in (plain, captured))
        assert found.applied and expected.applied
        torch.testing.assert_close(found.losses["loss"], expected.losses["loss"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.grad_norm, expected.grad_norm, rtol=1e-2, atol=1e-6)
        assert all(p.grad is None for p in captured.parameters)
    assert_same_weights(captured, plain, start, share=0.8)  # of split weights the upper halves are compared
    names, images, *rest = captured.module._frozen
    captured.module._frozen = (names, torch.full_like(images, torch.inf), *rest)
    before = {name: p.detach().clone() for name, p in captured.module.named_parameters()}
    assert not captured.update(np.array([[4, 5]]), 3).applied
    assert all(torch.equal(p, before[name]) for name, p in captured.module.named_parameters())


@pytest.mark.parametrize("captured", [True, False])
def test_latents_that_are_sent_give_the_bits_of_resident_ones(cache, captured):
    """Both engines, two micro-batches, both context lengths; some rows read ahead, others not."""
    made = {"accumulation_steps": 2}
    one, other = engine(cache, captured, **made), engine(rows_of(cache), captured, **made)
    for step, ids_KB in enumerate(draws(4, 2)):
        if step % 2:
            other.module.cache.moments.expect(ids_KB[0])
        expected, found = (engine_.update(ids_KB, step) for engine_ in (one, other))
        for name, value in expected.losses.items():
            assert value.isfinite() and found.losses[name].equal(value), name
    for (name, p), q in zip(one.module.named_parameters(), other.module.parameters(), strict=True):
        assert p.equal(q), name


def test_a_padded_batch_has_the_terms_of_the_bare_one(cache):
    """The same losses in the smallest bucket, in the largest, and without one, whatever stands in the padding."""
    one = engine(cache, True)
    ids, step = np.array([0, 4]), 7
    expected = one.forward(ids, step)
    for bucket in one.buckets.ladder.values():
        one.fill(one._table, ids, step, bucket)
        found = one.module.packed_terms(one._table, bucket)
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.chance[name], expected.chance[name])


def test_warming_up_changes_nothing(cache):
    one = engine(cache, True, accumulation_steps=2)
    before = {name: value.clone() for name, value in one.module.state_dict().items()}
    ids_KB = np.array([[0, 1], [2, 3]])
    bucket = one.buckets.of(ids_KB)
    one.fill(one._table, ids_KB[0], 0, bucket)
    one.warm_up(bucket)
    assert all(torch.equal(value, before[name]) for name, value in one.module.state_dict().items())
    assert one.optimizer.num_steps == 0 and all(p.grad is None for p in one.module.parameters())


def test_one_bad_micro_batch_skips_the_step_which_repeats_the_values(cache):
    one = engine(cache, True, accumulation_steps=2)
    first = one.update(np.array([[0, 1], [2, 3]]), 0).losses["loss"].item()
    names, images, *rest = one.module._frozen
    poisoned = images.clone()
    poisoned[5] = torch.inf
    one.module._frozen = (names, poisoned, *rest)
    before = {name: p.detach().clone() for name, p in one.module.named_parameters()}
    update = one.update(np.array([[4, 5], [2, 3]]), 1)
    assert not update.applied and update.losses["loss"].item() == first and not np.isfinite(update.lost)
    assert all(torch.equal(p, before[name]) for name, p in one.module.named_parameters())
    assert one.update(np.array([[4, 0], [2, 3]]), 2).applied


class NoConstants(TorchFunctionMode):
    """Refuses to make a tensor of numbers of the host, which on a GPU is a copy that waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            assert isinstance(args[0], torch.Tensor), f"{func.__name__}({args[0]})"
        return func(*args, **(kwargs or {}))


class NoData(Watcher):
    """Where tensors have no data: every operator that runs, and those that met a tensor with data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type != "meta" for t in tensors):
            self.seen["on the host"] += 1
        return out


def without_data(**changes: object) -> CapturedEngine:
    """The engine of the toy's sizes on tensors that have no data, as a GPU's have none for the host.

    Reading one, sizing a tensor by one and copying one to the host are errors there.
    """
    config = settings(**{**SETTINGS, "token_init": "text", "attention": "sdpa", "fuse_unet": "on", **changes})
    models = blank_foundation(config.model)
    models.unet.to(META)
    parts = models, blank_conditioner(config.model, models), blank_cache(config, models, 4)
    return CapturedEngine(assemble(config, "finetune", *parts, META), META)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "accumulation_steps": 2,
            "image_embedding": "latent",
            "geometry": 0.5,
            "attention_loss": 0.1,
            "instance_codes": True,
        },
        {"image_embedding": "predicted", "weights": "lean", "optimizer": "adam8bit", "gradient_checkpointing": True},
        {"weights": "split", "optimizer": "adam8bit", "max_grad_norm": 0.0},
    ],
)
def test_a_captured_step_reads_nothing_back(changes):
    """The whole step, the kernels as operators, forward, backward and the optimiser."""
    ops.use_kernels("triton")
    one = without_data(**changes)
    bucket = one.buckets.of(np.array([[0, 1]] * one.num_micro))
    groups = [[p.numel() for p in group["params"]] for group in one.optimizer.param_groups]
    num_rows = sum(num_chunks(numels, "triton") for numels in groups)
    if one.behind:  # the first backward, which shows the order, is not captured
        with NoData():
            num_rows = len(one.warm_up(bucket))
    addresses = torch.zeros(num_rows, 3, dtype=torch.int64, device=META)
    for part in one.parts(bucket, addresses):
        with NoConstants(), NoData() as watcher:
            run_part(part)
        assert not {*FORBIDDEN, "on the host"} & set(watcher.seen), part
    assert all(p.grad is None for p in one.module.parameters())


def test_tensors_without_data_show_what_waits():
    x = torch.ones(3, device=META)
    for wait in (lambda: x[0].item(), lambda: x.cpu(), lambda: x.nonzero(), lambda: bool(x.sum() > 0), x.tolist):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with NoConstants(), pytest.raises(AssertionError, match=r"tensor\(\[1.0, 2.0\]\)"):
        torch.tensor([1.0, 2.0], device=META)
    with NoData() as watcher:
        x.copy_(torch.ones(3))
    assert watcher.seen["on the host"]


def test_what_stays_eager_says_why(cache):
    def stage(cache=cache, **changes):
        made = FinetuneStage.__new__(FinetuneStage)
        torch.nn.Module.__init__(made)
        made.cache, made.config = cache, settings(**{**SETTINGS, **changes})
        return made

    said = dataclasses.replace(cache, texts=torch.zeros(len(cache), 77, dtype=torch.int64))
    assert why_eager(stage(), CUDA) is None
    assert why_eager(stage(precision="fp16"), CUDA).startswith("--precision fp16")
    assert why_eager(stage(rows_of(cache)), CUDA) is None, "whatever the size of the set"
    assert "text encoder" in why_eager(stage(said), CUDA)
    assert why_eager(stage(cuda_graphs=False), CUDA) == "--no-cuda-graphs"
    ops.use_kernels("reference")
    assert why_eager(stage(), CUDA).startswith("the reference forms")


def test_a_cpu_run_is_eager_and_says_so(cache, foundation):
    config = settings(**SETTINGS)
    stage = FinetuneStage(config, conditioner(config, cache), foundation, cache)
    made = build_engine(stage, CPU)
    assert type(made) is EagerEngine and made.execution == "eager (CUDA graphs need a GPU, not cpu)"


@pytest.mark.parametrize(("micro", "max_grad_norm"), [(1, 1.0), (2, 1.0), (2, 0.0)])
def test_a_capture_that_fails_goes_on_eagerly_with_one_warning(cache, micro, max_grad_norm, caplog):
    """Wherever it fails, and whatever gradients it leaves: losses and weights are those of an engine without one."""
    changes = {"accumulation_steps": micro, "max_grad_norm": max_grad_norm}
    one, other = engine(cache, True, **changes), engine(cache, True, **changes)
    tried = []

    def failing(bucket, addresses):
        tried.append(bucket)
        one.add(bucket, True)  # as far as backward; the optimiser cannot be captured
        if one.behind:  # which failed in the last backward
            one.behind.expect()
            one.behind._arrived.add(0)
        assert any(p.grad is not None for p in one.module.parameters())
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might")

    one.capture = failing
    for step, ids_KB in enumerate(draws(3, micro)):
        found, expected = one.update(ids_KB, step), other.update(ids_KB, step)
        assert found.applied and all(found.losses[name].equal(value) for name, value in expected.losses.items())
    assert len(one._runs) == 2 and len(tried) == 1, "the second bucket is not tried"
    reason = "CUDA error: operation not permitted when stream is capturing"
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"a training step cannot be captured as a CUDA graph and runs eagerly: {reason}"
    ]
    assert one.execution == f"eager (the capture failed: {reason})"
    assert (one.behind is not None) == (not max_grad_norm)
    assert all(p.equal(q) for p, q in zip(one.module.parameters(), other.module.parameters(), strict=True))


def test_a_warm_up_step_meets_no_gradient_of_the_one_before(cache, monkeypatch):
    monkeypatch.setattr(capturing, "WARM_UP_STEPS", 3)
    one, alive, run = engine(cache, True), [], capturing.run_part
    seen: list[weakref.ref] = []

    def watched(part):
        alive.append(sum(ref() is not None for ref in seen))
        found = run(part)
        seen[:] = [weakref.ref(grad.untyped_storage()) for update in found for grads, _ in update for grad in grads]
        return found

    monkeypatch.setattr(capturing, "run_part", watched)
    ids_KB = np.array([[0, 1]])
    bucket = one.buckets.of(ids_KB)
    one.fill(one._table, ids_KB[0], 0, bucket)
    one.warm_up(bucket)
    assert alive == [0, 0, 0] and len(seen) > 10


def test_every_bucket_is_warmed_up_before_the_first_capture(cache):
    """A capture holds its pool: a warm-up after it would need that much memory again."""
    one, order = engine(cache, True), []
    warm_up = one.warm_up

    def warmed(bucket):
        order.append(("warm-up", bucket))
        return warm_up(bucket)

    def captured(bucket, addresses):
        order.append(("capture", bucket))
        return [lambda: None]

    one.warm_up, one.capture = warmed, captured
    short, long = np.array([[0, 1]]), np.array([[0, len(GRAPHS) - 1]])
    first, second = one.buckets.of(short), one.buckets.of(long)
    assert first != second and len(one.buckets.ladder) == 2
    for step, ids in enumerate((short, long, short)):
        one.update(ids, step)
    assert order == [("warm-up", first), ("warm-up", second), ("capture", first), ("capture", second)]


def on_card(cache: TrainingCache, **changes: object) -> tuple[EagerEngine, CapturedEngine]:
    """The eager engine and the capturing one on the GPU, with models of their own, alike."""
    data, made = cache.to(CUDA), []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        # Rates at which rounding does not decide where training goes.
        rates = {"unet_lr": 1e-5, "graph_lr": 1e-4, "cuda_graphs": cuda_graphs}
        config = settings(**{**SETTINGS, **rates, **changes})
        models = toy_foundation(weights=None)
        set_attention(models.unet, config.model.attention, CUDA)
        fuse(models.unet)
        stage = FinetuneStage(config, conditioner(config, cache).to(CUDA), models, data)
        made.append(build_engine(stage, CUDA))
    assert isinstance(made[1], CapturedEngine) and made[0].execution == "eager (--no-cuda-graphs)"
    return made[0], made[1]


def test_skipped_steps_in_flight_are_told_in_order_at_the_end(cache):
    """After the device has reached each; events stand for a device's."""
    one, waited = engine(cache, True), []
    for slot, (step, applied, loss) in zip(one._slots, ((9, 0, 7.5), (8, 0, np.inf), (7, 1, 2.0)), strict=False):
        slot.step, slot.done = step, SimpleNamespace(synchronize=lambda step=step: waited.append(step))
        slot.outcome.copy_(torch.tensor([applied, loss]))
    told = one.outstanding()
    assert told == [(8, np.inf), (9, 7.5)] and {8, 9} <= set(waited)
    assert one.outstanding() == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"precision": "fp32"}, 1e-2),  # convolutions in TF32
        ({"precision": "fp32", "accumulation_steps": 3, "ema": 0.9}, 1e-2),
        ({"precision": "bf16"}, 3e-2),
        ({"precision": "bf16", "weights": "lean", "optimizer": "adam8bit"}, 3e-2),
    ],
)
def test_captured_and_eager_steps_agree_on_cuda(cache, changes, tolerance):
    """Both context lengths, losses as the eager engine's at every step; once captured, no step waits for the device."""
    eager, captured = on_card(cache, **changes)
    for step, ids_KB in enumerate(draws(3 * SLOTS, captured.num_micro)):
        expected = eager.update(ids_KB, step)
        known = captured.buckets.of(ids_KB) in captured._runs
        torch.cuda.set_sync_debug_mode("error" if known else "default")
        found = captured.update(ids_KB, step)
        torch.cuda.set_sync_debug_mode("default")
        assert found.behind == SLOTS and found.applied
        for name, value in expected.losses.items():
            torch.testing.assert_close(found.losses[name], value, rtol=tolerance, atol=tolerance)
    assert len(captured._runs) == 2
    torch.testing.assert_close(int(captured.optimizer.num_steps), 3 * SLOTS)


@pytest.mark.gpu
def test_a_skipped_step_is_told_slots_steps_later(cache):
    _, captured = on_card(cache)
    ids_KB = np.array([[0, 1]])
    captured.update(ids_KB, 0)
    images = captured.module._frozen[1]
    kept = images[1].clone()
    images[1] = torch.nan
    captured.update(ids_KB, 1)
    images[1] = kept
    told = [captured.update(ids_KB, step) for step in range(2, 2 + SLOTS)]
    assert [update.applied for update in told] == [True] * (SLOTS - 1) + [False]
    assert np.isnan(told[-1].lost) and told[-1].losses["loss"].isfinite()
    images[1] = torch.nan
    captured.update(ids_KB, 10)
    ((step, loss),) = captured.outstanding()
    assert step == 10 and np.isnan(loss) and captured.outstanding() == []
