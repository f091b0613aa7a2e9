"""The list of measured cases: the headline first, each op in its own sizes."""

from __future__ import annotations

from benchmarks.ops.cases import FORWARD_ONLY, GRAPH_OPS, HEADLINE, MODES, OPS, SIZES, Case, cases


def test_the_headline_comes_first():
    made = cases(OPS, ["paper", "vg16", "512px"], ["bf16", "fp32"], MODES)
    assert len(made) == len(set(made))
    head = [case.op in HEADLINE for case in made]
    assert head == sorted(head, reverse=True) and {case.op for case in made} == set(OPS)
    assert [(case.dtype, case.size) for case in made[:12:6]] == [("bf16", "paper"), ("bf16", "vg16")]


def test_graphs_and_images_have_sizes_of_their_own():
    made = cases(["masked_pool", "geglu"], ["paper", "vg16", "512px"], ["fp32"], ["fwd"], width=8)
    assert [(case.op, case.size, case.width) for case in made] == [
        ("masked_pool", "paper", 8),
        ("masked_pool", "vg16", 8),
        ("geglu", "paper", 8),
        ("geglu", "512px", 8),
    ]


def test_ops_without_a_gradient_are_measured_once_and_the_layer_where_it_can_be_checked():
    assert cases(["pack"], ["paper"], ["bf16", "fp32"], MODES) == [Case("pack", "fwd", "paper", FORWARD_ONLY["pack"])]
    assert cases(["pack", "hash_draw"], ["paper"], ["bf16"], ["bwd"]) == []
    sizes = [size for size in SIZES if SIZES[size][1]]
    found = {op: [case.size for case in cases([op], sizes, ["bf16"], ["fwd"])] for op in GRAPH_OPS}
    assert found.pop("layer") == ["1e4", "1e5"]
    assert all(each == sizes for each in found.values())
