"""Several processes without DeepSpeed: their gradients, and whole runs that equal one with all images of a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cases import processes
from support.forks import Child, ForkServer
from support.tiny_runs import flags, rows, same_weights, train
from support.zero_runs import launch

from sgg_fast.train.engines import all_reduce
from sgg_fast.train.engines.all_reduce import GradientSum


def test_gradients_of_two_processes_are_summed_to_the_bit():
    """The checks are in `support/cases/processes.py`, which runs in both processes."""
    done = launch(2, [processes.__file__])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [check.__name__ for check in processes.CHECKS]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("children")) as one:
        yield one


def command(stage: str, out: Path, **changes: object) -> list[str]:
    return ["--stage", stage, "--out", str(out), *flags(**{"resolution": 32, **changes})]


def ended(children: list[Child]) -> None:
    codes = [child.wait() for child in children]
    assert not any(codes), "\n".join(child.said() for child in children)


FORMS = {
    "pretrain": ("pretrain", {}),
    "finetune": ("finetune", {}),
    "accumulated": ("finetune", {"optimizer": "adam8bit", "accumulation_steps": 2}),
    "in backward": ("finetune", {"optimizer_in_backward": True, "max_grad_norm": 0, "optimizer": "adam8bit"}),
}


def assert_same_losses(a: Path, b: Path) -> None:
    """In fp32 the difference is at most 1e-5 at each step."""
    got, want = rows(a), rows(b)
    assert list(got) == list(want) == [1, 2, 3, 4]
    for step in want:
        assert got[step].keys() == want[step].keys()
        for name in want[step]:
            assert abs(got[step][name] - want[step][name]) <= 1e-5, (step, name, got[step], want[step])


@pytest.mark.parametrize("form", list(FORMS))
def test_two_processes_are_one_with_twice_the_batch(server, tmp_path, form):
    """Losses, learning rates and norms at every step; pre-training's masks and negatives included."""
    stage, changes = FORMS[form]
    ended(server.start_all(2, command(stage, tmp_path / "two", **changes, batch_size=2)))
    train(tmp_path / "one", stage, resolution=32, **changes, batch_size=4)
    assert_same_losses(tmp_path / "two" / stage, tmp_path / "one" / stage)


PACKED = """
from sgg_fast.train.engines import captured, choose
captured.WARM_UP_STEPS = 1
choose.EagerEngine = lambda module, device, reason: choose.CapturedEngine(module, device)
"""
"""Steps as they are captured on CUDA: padded, from a table on the device, with a warm-up of each shape."""


@pytest.mark.parametrize("form", ["pretrain", "accumulated"])
def test_the_step_that_cuda_captures_sums_alike(server, tmp_path, form):
    stage, changes = FORMS[form]
    ended(server.start_all(2, command(stage, tmp_path / "two", **changes, batch_size=2), patch=PACKED))
    train(tmp_path / "one", stage, resolution=32, **changes, batch_size=4)
    assert_same_losses(tmp_path / "two" / stage, tmp_path / "one" / stage)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_goes_on_in_another_number_of_processes(server, tmp_path, stage):
    """Two processes, then one, as two again: the checkpoint is the same for all. Then bits, where nothing changed."""
    steps = f"{stage}_steps"
    ended(server.start_all(2, command(stage, tmp_path / "whole", batch_size=2)))
    ended(server.start_all(2, command(stage, tmp_path / "parts", batch_size=2, **{steps: 2})))
    one = command(stage, tmp_path / "parts", batch_size=4, **{steps: 3})
    refused = server.start([*one, "--batch-size", "2"])
    assert refused.wait() == 2 and "holds a run with 4 images a step, not 2" in refused.said()
    ended([server.start(one)])
    ended(server.start_all(2, command(stage, tmp_path / "parts", batch_size=2)))
    whole, parts = tmp_path / "whole" / stage, tmp_path / "parts" / stage
    assert_same_losses(parts, whole)
    ended(server.start_all(2, command(stage, tmp_path / "again", batch_size=2, **{steps: 2})))
    ended(server.start_all(2, command(stage, tmp_path / "again", batch_size=2)))
    result = "graph_encoder" if stage == "pretrain" else "pipeline"
    assert rows(tmp_path / "again" / stage) == rows(whole)
    assert same_weights(tmp_path / "again" / stage / result, whole / result)


def test_what_all_refuse_is_one_line(server, tmp_path):
    """Of the first process: wrong settings, found before they meet, and a folder in use, found after that."""
    pair = server.start_all(2, command("finetune", tmp_path, weights="lean", precision="fp32"))
    assert [child.wait() for child in pair] == [2, 2]
    assert "leave out --precision fp32" in pair[0].said() and pair[1].said() == ""
    pair = server.start_all(2, command("finetune", tmp_path, sampling_steps=2000))
    assert [child.wait() for child in pair] == [2, 2]
    assert "--sampling-steps 2000" in pair[0].said() and "train.py" not in pair[1].said()


def test_a_silent_sum_leaves_the_gradients_of_this_process(monkeypatch):
    """In the parameters' layouts, end to end in their bucket, zeros for a weight that is not used."""
    monkeypatch.setattr(all_reduce, "BUCKET_BYTES", 100)
    net = processes.Net()
    parameters = list(net.parameters())
    gradients = GradientSum(parameters)
    for x, _ in processes.batches(3):
        gradients.expect()
        with gradients.silent():
            net(x, 0).backward()
            gradients.finish()
        alone = processes.Net()
        alone(x, 0).backward()
        for p, q in zip(parameters, alone.parameters(), strict=True):
            assert p.grad.equal(torch.zeros_like(q) if q.grad is None else q.grad)
            assert p.grad.stride() == p.stride() and p.grad.storage_offset() * p.element_size() % 16 == 0
        for bucket in gradients.buckets:
            assert len({parameters[i].grad.untyped_storage().data_ptr() for i in bucket}) == 1
        net.zero_grad()
    assert any(len(bucket) > 1 for bucket in gradients.buckets) and not gradients.is_silent


def test_a_silent_sum_hands_each_weight_over_in_backward(monkeypatch):
    """Once a step, with its gradient; not all of them live at once, though the first backward shows the order only."""
    monkeypatch.setattr(all_reduce, "BUCKET_BYTES", 100)
    net = processes.Net()
    parameters, handed, alive = list(net.parameters()), [], []

    def update(index):
        alive.append(sum(p.grad is not None for p in parameters))
        handed.append((index, parameters[index].grad.clone()))
        parameters[index].grad = None

    gradients = GradientSum(parameters, update)
    for x, _ in processes.batches(3):
        handed.clear()
        gradients.expect()
        with gradients.silent():
            net(x, 1).backward()
            gradients.finish()
        alone = processes.Net()
        alone(x, 1).backward()
        assert sorted(index for index, _ in handed) == list(range(len(parameters)))
        for (index, grad), q in ((one, list(alone.parameters())[one[0]]) for one in handed):
            assert grad.equal(torch.zeros_like(q) if q.grad is None else q.grad), index
    assert max(alive) < len(parameters)
