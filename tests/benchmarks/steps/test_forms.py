"""The names of the measured forms, and the sizes of a step."""

from __future__ import annotations

from benchmarks.steps import forms
from benchmarks.steps.forms import Size


def test_sizes_come_by_the_number_of_their_pixels():
    made = forms.sizes([512, 128], [16, 2])
    assert [str(size) for size in made] == ["128x128 b2", "128x128 b16", "512x512 b2", "512x512 b16"]
    assert forms.sizes([64, 32], [4, 1])[1:3] == [Size(64, 1), Size(32, 4)], "as many pixels: in the order given"


def test_only_diffusers_forms_compile_for_minutes():
    found = [name for name in forms.FINETUNE if forms.compiles(name)]
    assert found == ["diffusers-reduce-overhead", "diffusers-max-autotune"]
