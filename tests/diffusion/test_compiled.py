"""The UNet under torch.compile: the same picture, and the UNet itself where the compiler fails."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from torch import nn

from sgg_fast.diffusion.compiled import CompiledUNet
from sgg_fast.drawing import load_model
from sgg_fast.graph import SceneGraph

SHEEP = SceneGraph(("sheep", "grass"), ((0, "standing on", 1),))


class Layer(nn.Linear):
    device = torch.device("cpu")


@pytest.mark.slow
def test_a_picture_drawn_with_the_compiler_equals_the_one_without():
    pipeline, found = load_model("toy").pipeline, []
    pipeline.set_progress_bar_config(disable=True)
    for pipeline.compile_unet in (False, True):
        drawn = pipeline(SHEEP, 3, generator=torch.Generator().manual_seed(0), output_type="latent")
        found.append(drawn.images)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert pipeline._compiled is not None and pipeline._compiled.compiles


@torch.no_grad()
def test_where_the_compiler_is_missing_the_unet_is_called_and_one_line_says_so(caplog):
    layer, x = Layer(2, 2), torch.ones(1, 2)
    run = CompiledUNet(layer)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        for _ in range(2):
            assert torch.equal(run(x), layer(x))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "sgg_fast.diffusion.compiled"]
    assert said.startswith("the UNet runs without torch.compile: ") and "no-such-compiler" in said
    assert "\n" not in said and not run.compiles
