"""The process and its device: ranks, memory, and what the doctor's record leaves out on this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from sgg_fast import env
from sgg_fast.doctor.findings import FAILED, Finding, record


@pytest.fixture
def note(tmp_path, monkeypatch) -> Iterator[Path]:
    """Place of the doctor's record, which is absent."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    env._record.cache_clear()
    yield env.doctor_record()
    env._record.cache_clear()


def test_ranks_are_those_of_the_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (env.local_rank(), env.rank(), env.world_size()) == (0, 0, 1)
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "5"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert (env.local_rank(), env.rank(), env.world_size()) == (1, 5, 8)


def test_the_device_is_the_processs_own_card_if_there_is_one(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert env.device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert env.device() == torch.device("cuda", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about memory of the CPU")
def test_peak_memory_is_the_kernels_count_in_bytes():
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.9 * 1024 * kib <= env.peak_memory() <= whole, "a parent's peak, before exec, counts too"


def test_a_machine_is_its_device_and_its_versions(monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    here = env.machine()
    assert f"torch {torch.__version__}, " in here
    monkeypatch.setattr(env, "version", absent)
    assert env.machine() != here and env.machine().endswith(", triton none")


def test_a_part_is_left_out_on_the_machine_where_it_failed(note):
    record([Finding("kernel geglu", FAILED, "it differs", "kernels")], env.machine(), note)
    assert env.unfit("kernels") == "kernel geglu: it differs" and env.unfit("fused") == ""
    with env.everything_fit():
        assert env.unfit("kernels") == ""
        record([], "another", note)
    assert env.unfit("kernels") == "", "the record is read again after the doctor has written"


def test_another_machine_or_another_torch_is_not_concerned(note):
    record([Finding("attention", FAILED, "off", "attention")], "NVIDIA A100, torch 2.11, triton 3.6", note)
    env._record.cache_clear()
    assert not env.unfit("attention")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"machine": 3, "unfit": {}}', '{"machine": "a", "unfit": {"kernels": 1}}',
     '{"machine": "a", "unfit": {"brakes": "worn"}}', '{"machine": "a", "unfit": []}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_record_leaves_nothing_out_and_says_so(tmp_path, caplog, content):
    path = tmp_path / "doctor.json"
    assert env.read_doctor(path) == {"machine": "", "unfit": {}} and not caplog.records, "absent"
    path.write_text(content)
    assert env.read_doctor(path) == {"machine": "", "unfit": {}}
    assert f"{path}: cannot be read" in caplog.text and "run sgg-doctor again" in caplog.text


def test_a_sound_record_is_read_as_it_is(tmp_path):
    said = {"machine": "NVIDIA A100, torch 2.11, triton 3.6", "unfit": {"attention": "off", "capture": "off too"}}
    (tmp_path / "doctor.json").write_text(json.dumps(said))
    assert env.read_doctor(tmp_path / "doctor.json") == said
