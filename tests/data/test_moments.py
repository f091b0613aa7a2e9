"""Moments in files or host memory: the right rows, read ahead, in pieces, and kept no longer than needed."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import torch
from support import ROOT

from sgg_fast.data.moments import MomentRows, read_to
from sgg_fast.data.shards import write_tensors

CPU = torch.device("cpu")


def made(draws: int = 1) -> tuple[MomentRows, np.ndarray]:
    """Seven images in two shards, and all their rows."""
    rows = np.random.default_rng(0).standard_normal((7, 4, 2, 2)).astype(np.float16)
    return MomentRows([rows[:3], rows[3:]], draws), rows


def test_rows_are_those_of_the_samples_whatever_their_shard_and_draw():
    moments, rows = made(draws=2)
    ids = np.array([6, 0, 9, 2, 2])
    assert len(moments) == 14 and moments.shape == (14, 4, 2, 2) and moments.dtype == torch.float16
    assert (moments[ids].numpy() == rows[ids % 7]).all()
    moments.bring(ids, CPU)
    assert moments.current.equal(moments[ids])
    assert moments.on(CPU).equal(torch.from_numpy(np.concatenate([rows, rows])))


def test_expected_rows_are_read_by_another_thread_once_and_then_forgotten():
    moments, rows = made()
    readers, ids = [], np.array([5, 1])
    read = moments._read

    def noted(ids_B: np.ndarray) -> torch.Tensor:
        readers.append(threading.current_thread())
        return read(ids_B)

    moments._read = noted
    moments.expect(ids)
    moments.expect(ids)
    assert (moments.take(ids).numpy() == rows[ids]).all()
    assert len(readers) == 1 and readers[0] is not threading.main_thread()
    assert (moments.take(ids).numpy() == rows[ids]).all(), "not expected any more: read now"
    assert readers[1:] == [threading.main_thread()] and not moments._coming


def test_rows_reach_a_device_in_pieces(monkeypatch):
    monkeypatch.setattr("sgg_fast.data.moments._ROWS", 3)
    parts = [np.arange(14, dtype=np.float32).reshape(7, 2), np.empty((0, 2), np.float32), np.ones((2, 2), np.float32)]
    found = read_to(parts, "cpu")
    assert torch.equal(found, torch.from_numpy(np.concatenate(parts)))


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """All of 74 MB of latents read at random: the process's own memory (not the page cache) stays as it was."""
    rows = np.zeros((40, 8, 120, 120), np.float32)
    for k in range(4):
        rows[:] = np.arange(40 * k, 40 * k + 40)[:, None, None, None]
        write_tensors(tmp_path / f"{k}.safetensors", {"moments": rows}, {})
    code = (
        "import sys, torch, numpy as np; from pathlib import Path\n"
        "from sgg_fast.data.shards import read_tensors; from sgg_fast.data.moments import MomentRows\n"
        "def own(): return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "shards = [read_tensors(Path(sys.argv[1]) / f'{k}.safetensors')[0]['moments'] for k in range(4)]\n"
        "moments = MomentRows(shards, 1); order = np.random.default_rng(0).permutation(160)\n"
        "moments[torch.from_numpy(order[:8])]; before = own()\n"
        "for i in range(0, 160, 8):\n"
        "    ids = torch.from_numpy(order[i:i+8]); assert (moments[ids][:, 3, 4, 5].long() == ids).all()\n"
        "print(own() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 9_000, "KiB, of 72 000 read"
