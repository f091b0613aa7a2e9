"""What failed is left out of later runs until it passes."""

from __future__ import annotations

import torch

from sgg_fast import env, ops
from sgg_fast.doctor.findings import FAILED, OK, UNKNOWN, Finding, record


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


def test_a_finding_is_a_line_with_its_verdict_first():
    lines = [Finding("kernel geglu", verdict, "it differs").line() for verdict in (OK, FAILED, UNKNOWN)]
    assert [line.split()[0] for line in lines] == ["ok", "FAILED", "not"]
    assert len({line.index("kernel geglu") for line in lines}) == 1 == len({line.index("it differs") for line in lines})
