"""The arithmetic of torch's caching allocator, by hand: segments, splitting, joining, the smallest that fits, pools."""

from __future__ import annotations

from sgg_fast.train.memory.allocator import GRAPHS, MIB, CachingAllocator


def reserved_after(*events, pool=""):
    allocator = CachingAllocator()
    allocator.run(list(events), pool)
    return allocator.reserved // MIB


def test_segments_have_three_sizes():
    assert reserved_after(("a", 1)) == 2  # up to 1 MiB: a segment of 2
    assert reserved_after(("a", MIB), ("b", MIB), ("c", 1)) == 4
    assert reserved_after(("a", MIB + 1)) == 20  # below 10 MiB: one of 20
    assert reserved_after(("a", 9 * MIB), ("b", 9 * MIB)) == 20
    assert reserved_after(("a", 10 * MIB)) == 10  # from there on its own, a multiple of 2
    assert reserved_after(("a", 10 * MIB + 1)) == 12


def test_a_large_block_is_split_only_if_more_than_a_small_one_is_left():
    assert reserved_after(("a", 20 * MIB), ("a", -1), ("b", 19 * MIB), ("c", MIB + 1)) == 40  # 1 MiB is left, unused
    assert reserved_after(("a", 20 * MIB), ("a", -1), ("b", 18 * MIB), ("c", 2 * MIB)) == 20


def test_free_neighbours_join_and_the_smallest_that_fits_is_taken():
    parts = [("a", 6 * MIB), ("b", 6 * MIB), ("c", 6 * MIB)]
    assert reserved_after(*parts, ("a", -1), ("c", -1), ("d", 9 * MIB)) == 40  # two holes of 6 and 8
    assert reserved_after(*parts, ("a", -1), ("b", -1), ("d", 9 * MIB)) == 20  # one of 12
    allocator = CachingAllocator()
    allocator.run([("a", 40 * MIB), ("b", 12 * MIB), ("a", -1), ("b", -1), ("c", 12 * MIB), ("d", 40 * MIB)])
    assert allocator.reserved == allocator.peak == 52 * MIB


def test_blocks_that_are_freed_in_any_order_leave_whole_segments():
    allocator = CachingAllocator()
    for order in ("abc", "bca", "cab", "acb"):
        allocator.run([(key, 5 * MIB) for key in "abc"])
        allocator.run([(key, -1) for key in order])
        allocator.empty_cache()
        assert allocator.reserved == 0
    assert allocator.peak == 20 * MIB


def test_a_segment_in_use_and_those_of_graphs_stay():
    allocator = CachingAllocator()
    allocator.run([("a", 5 * MIB), ("b", 5 * MIB), ("a", -1)])
    allocator.run([("c", 30 * MIB), ("c", -1)])
    allocator.run([("d", 40 * MIB), ("d", -1)], GRAPHS)
    allocator.empty_cache()
    assert allocator.reserved == (20 + 40) * MIB
    allocator.run([("e", 40 * MIB)])  # another pool's segment does not serve
    assert allocator.reserved == (20 + 40 + 40) * MIB


def test_another_streams_segment_serves_that_stream_only():
    allocator = CachingAllocator()
    events = [("gradients", 40 * MIB), ("gradients", -1), ("activations", 40 * MIB), ("activations", -1)]
    allocator.run(events)
    assert allocator.reserved == 40 * MIB
    allocator.run(events, aside={"gradients"})
    allocator.run(events, aside={"gradients"})
    assert allocator.reserved == (40 + 40) * MIB
