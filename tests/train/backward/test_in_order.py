"""Buckets of weights in the order of backward."""

from __future__ import annotations

import torch

from sgg_fast.train.backward.in_order import buckets_of

FP32, BF16 = torch.float32, torch.bfloat16


def test_buckets_fill_in_the_order_of_backward_one_type_each():
    sizes = [(4, FP32), (4, FP32), (2, BF16), (90, FP32), (2, BF16), (4, FP32)]
    assert buckets_of(sizes, [5, 4, 3, 2, 1, 0], 8) == [[3], [5, 1], [4, 2], [0]]
    assert buckets_of(sizes, [0, 1, 2, 3, 4, 5], 8) == [[0, 1], [3], [2, 4], [5]]
    assert buckets_of(sizes, range(6), 1000) == [[0, 1, 3, 5], [2, 4]]
