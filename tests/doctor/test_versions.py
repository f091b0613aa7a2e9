"""Packages that do not fit each other are found by their own metadata."""

from __future__ import annotations

import pytest

from sgg_fast.doctor import versions
from sgg_fast.doctor.findings import FAILED, OK


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


def test_installed_versions_are_the_packages_own_words(monkeypatch):
    import torch

    monkeypatch.setattr(versions, "PACKAGES", ("torch", "no-such-package-of-ours"))
    found = versions.installed()
    assert list(found) == ["torch", "no-such-package-of-ours"] and found["no-such-package-of-ours"] == ""
    assert torch.__version__.startswith(found["torch"].partition("+")[0])


@pytest.mark.parametrize(
    ("required", "pinned"),
    [
        (["filelock", "triton==3.4.0; platform_system == 'Linux'"], "3.4.0"),
        (["triton == 3.5.1.post1"], "3.5.1.post1"),
        (["triton>=3", "pytorch-triton==3.1"], None),
        (None, None),
    ],
)
def test_the_triton_of_torch_is_the_one_that_its_metadata_pins(monkeypatch, required, pinned):
    monkeypatch.setattr(versions, "requires", {"torch": required}.get)
    assert versions.wanted_triton() == pinned
