"""Moments in files or host memory: the right rows, read ahead, and kept no longer than needed."""

from __future__ import annotations

import threading

import numpy as np
import torch

from sgg_fast.data.moments import MomentRows

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
