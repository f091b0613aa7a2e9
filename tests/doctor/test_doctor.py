"""sgg-doctor: each verdict follows from what it looks at, and what failed is left out until it passes."""

from __future__ import annotations

import json

import pytest
import torch

from sgg_fast import env, ops
from sgg_fast.doctor import __main__ as doctor
from sgg_fast.doctor import kernels, versions
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding, record

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    env._record.cache_clear()
    yield
    env._record.cache_clear()


def test_on_a_cpu_it_says_what_it_cannot_check(tmp_path, capsys):
    out = tmp_path / "doctor.json"
    assert doctor.main(["--json", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("device", "attention", "captured pretrain", "captured finetune", "memory"):
        assert any(line.startswith(UNKNOWN) and name in line for line in said.splitlines()), name
    found = json.loads(out.read_text())
    assert found["left out"] == {} and found["machine"].startswith("CPU, torch")
    assert {f["verdict"] for f in found["findings"]} == {OK, UNKNOWN}


def test_versions_that_do_not_fit_are_named_with_their_cure():
    good = dict.fromkeys(versions.PACKAGES, "1.0") | {"torch": "2.13.0", "triton": "3.7.1", "deepspeed": "0.19.7"}
    (fine,) = versions.check(good, "3.7.1", "13.0")
    assert fine.verdict == OK
    bad = good | {"triton": "3.9.0", "deepspeed": "0.19.8", "xformers": ""}
    listed, deepspeed, triton = versions.check(bad, "3.7.1", "13.0")
    assert "absent: xformers" in listed.detail
    assert (deepspeed.verdict, triton.verdict) == (FAILED, FAILED) and triton.leaves_out == "kernels"
    assert "pip install deepspeed==0.19.7" in deepspeed.detail and "pip install triton==3.7.1" in triton.detail
    assert "CUDA build" in list(versions.check(good, None, None))[-1].detail


@pytest.mark.parametrize("name", sorted(kernels.calls()))
def test_a_kernel_that_is_right_passes_and_a_wrong_one_does_not(name, monkeypatch):
    """On the interpreter; then with the kernel's form off by a tenth in one tensor."""
    call, shapes = kernels.calls()[name]
    batch, generator = kernels.graphs(), torch.Generator().manual_seed(0)
    drawn = {key: torch.randn(shape, generator=generator) for key, shape in shapes(batch).items()}
    assert kernels._judge(call, batch, drawn, (torch.float32,)) == ""
    results = kernels._results

    def off(call, batch, values, dtype, form):
        found = results(call, batch, values, dtype, form)
        return [*found[:-1], found[-1] * 1.1] if form == "triton" else found

    monkeypatch.setattr(kernels, "_results", off)
    assert "differs from the reference" in kernels._judge(call, batch, drawn, (torch.float32,))


def test_the_optimiser_and_the_packed_batches_are_compared():
    assert kernels._adam(CPU) == "" and kernels._pack(CPU) == ""


def test_a_kernel_that_does_not_compile_is_a_finding_in_its_own_words(monkeypatch):
    def fail(device):
        raise RuntimeError("PTXAS error:\nno kernel image")

    monkeypatch.setattr(kernels, "_pack", fail)
    monkeypatch.setattr(kernels, "_adam", lambda device: "")
    monkeypatch.setattr(kernels, "calls", dict)
    pack, adam = kernels.check(CPU)
    assert (pack.verdict, pack.detail) == (FAILED, "RuntimeError: PTXAS error: no kernel image")
    assert adam.verdict == OK


def test_what_failed_is_left_out_until_it_passes(monkeypatch, caplog):
    path, here = env.doctor_record(), env.machine()
    bad = [Finding("kernel geglu", FAILED, "it differs", "kernels"), Finding("captured", OK, "", "capture")]
    assert record(bad, here, path) == {"kernels": "kernel geglu: it differs"}
    env._record.cache_clear()
    assert env.unfit("kernels") == "kernel geglu: it differs" and not env.unfit("capture")
    monkeypatch.setattr(ops.dispatch, "_announced", set())
    with caplog.at_level("INFO", logger="sgg_fast"):
        assert ops.backend_for(torch.device("cuda"), torch.float32) == "reference"
    assert "Triton is left out since sgg-doctor: kernel geglu: it differs" in caplog.text
    with env.everything_fit():
        assert ops.backend_for(torch.device("cuda"), torch.float32) == "triton"
    assert record([Finding("kernels", UNKNOWN, "", "kernels")], here, path), "what was not checked stays"
    assert record([Finding("kernel geglu", OK, "", "kernels")], here, path) == {}
    env._record.cache_clear()
    assert ops.backend_for(torch.device("cuda"), torch.float32) == "triton"


def test_another_machine_or_another_torch_is_not_concerned():
    record(
        [Finding("attention", FAILED, "off", "attention")], "NVIDIA A100, torch 2.11, triton 3.6", env.doctor_record()
    )
    env._record.cache_clear()
    assert not env.unfit("attention")


def test_a_check_that_raises_does_not_end_the_others_and_the_time_is_kept():
    def fail():
        raise RuntimeError("device-side assert")

    some = [("captured pretrain", fail), ("memory", lambda: [Finding("memory", OK, "")])]
    first, second = doctor.run(some, 60, lambda line: None)
    assert (first.verdict, first.leaves_out, second.verdict) == (FAILED, "capture", OK)
    assert [f.verdict for f in doctor.run(some, -1, lambda line: None)] == [UNKNOWN, UNKNOWN]
