"""The choice of the backend: by request and device, what stands in its way, and its reason, logged once."""

from __future__ import annotations

import logging

import pytest
import torch

from sgg_fast import ops
from sgg_fast.ops import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch):
    monkeypatch.setattr(dispatch, "_announced", set())


def test_the_automatic_choice_on_cpu_is_the_reference():
    assert ops.backend_for(CPU) == "reference"


@pytest.mark.skipif("config.getoption('--ptx')", reason="the machine takes CPU tensors as well")
def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    ops.use_kernels("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.backend_for(CPU, torch.bfloat16) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="--kernels triton: the tensors are on cpu"):
        ops.backend_for(CPU)


def test_triton_without_the_package(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        ops.use_kernels("triton")
    assert ops.backend_for(CUDA) == "reference"


def test_float64_falls_back_or_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.backend_for(CUDA, torch.float64) == "reference"
    ops.use_kernels("triton")
    with pytest.raises(ValueError, match=r"torch\.float64 values"):
        ops.backend_for(CPU, torch.float32, torch.float64)


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="auto, reference or triton, not 'cuda'"):
        ops.use_kernels("cuda")


def test_the_reason_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            ops.backend_for(CPU)
    assert [r.getMessage() for r in caplog.records] == ["kernels: reference (cpu tensors)"]


def test_on_cuda_triton_runs_unless_the_doctor_left_it_out(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.env, "unfit", lambda part: "")
    assert ops.backend_for(CUDA, torch.bfloat16) == "triton"
    monkeypatch.setattr(dispatch.env, "unfit", {"kernels": "geglu is wrong"}.get)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert ops.backend_for(CUDA, torch.bfloat16) == "reference"
    assert caplog.messages == ["kernels: reference (Triton is left out since sgg-doctor: geglu is wrong)"]
    ops.use_kernels("triton")
    assert ops.backend_for(CUDA) == "triton", "a request wins over the doctor"


def test_an_assumed_backend_holds_inside_its_block_alone():
    """For any device and dtype, and nested; an error ends it too."""
    with pytest.raises(KeyError), ops.assumed("triton"):
        assert ops.backend_for(CPU, torch.float64) == "triton"
        with ops.assumed("reference"):
            assert ops.backend_for(CUDA) == "reference"
        assert ops.backend_for(torch.device("meta")) == "triton"
        raise KeyError
    assert ops.backend_for(CPU) == "reference"


@pytest.mark.skipif("config.getoption('--ptx')", reason="the machine takes CPU tensors as well")
def test_why_not_triton_names_the_first_obstacle(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.why_not_triton(CUDA, (torch.float32, torch.float16)) is None
    assert "torch.int8 values" in dispatch.why_not_triton(CUDA, (torch.float32, torch.int8))
    assert "the tensors are on cpu" in dispatch.why_not_triton(CPU, (torch.int8,))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert "not installed" in dispatch.why_not_triton(CPU)
