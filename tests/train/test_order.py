"""Sample order: one permutation an epoch, shared out to processes."""

from __future__ import annotations

from sgg_fast.train.order import SampleOrder


def test_processes_share_out_what_one_process_reads():
    one = SampleOrder(10, 4, seed=3, rank=0, world_size=1)
    two = [SampleOrder(10, 2, seed=3, rank=r, world_size=2) for r in (0, 1)]
    for step in range(7):
        assert one.at(step).tolist() == [*two[0].at(step), *two[1].at(step)]
    epoch = [i for step in range(5) for i in one.at(step)][:10]
    assert sorted(epoch) == list(range(10)), "an epoch reads every sample once"
    again = SampleOrder(10, 4, seed=3, rank=0, world_size=1)
    assert again.at(6).tolist() == one.at(6).tolist(), "and is a function of the step alone"
