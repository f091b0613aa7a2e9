"""The pass over diffusers' models: same results and gradients, same parameters, fewer launches; and back again."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from sgg_kernels import launch
from support.nn.unets import Results, assert_same, randn, same_bits, sd_unet, sd_vae, unet_results, vae_results
from support.sd_folder import KINDS
from support.tiny_runs import rows, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgg_fast import ops
from sgg_fast.nn.backbone import Backbone, added
from sgg_fast.nn.fuse import FusedGroupNorm, FusedGroupNormSiLU, fuse, fuse_for, unfuse
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.toy.world import draw_scene


@pytest.fixture(scope="module")
def stock() -> tuple[Results, Results]:
    """Of the stock UNet, in fp32 and float64."""
    return unet_results(sd_unet()), unet_results(sd_unet().double(), torch.float64)


def test_every_group_size_of_stable_diffusion_on_the_triton_kernels(stock):
    """A whole UNet, forward and backward, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("Triton is compiled here, not interpreted")
    unet = sd_unet()
    found = fuse(unet)
    norms = 2 * 14 + 10 + 1  # residual blocks, transformers, the last one
    assert norms == sum(isinstance(m, nn.GroupNorm) for m in unet.modules())
    names: Counter[str] = Counter()
    sizes: set[int] = set()

    def note(kernel, grid, args, options) -> bool:
        names[kernel.__name__] += 1
        sizes.add(options.get("SIZE", 0))
        return False

    ops.use_kernels("triton")
    try:
        with launch.intercept(note):
            results = unet_results(unet)
    finally:
        ops.use_kernels("auto")
    assert_same(results, *stock)
    gates = found["FusedGEGLU"]
    assert names == {
        "group_norm_silu_fwd_kernel": norms, "group_norm_silu_bwd_kernel": norms,
        "add_layer_norm_fwd_kernel": 3 * gates, "add_layer_norm_bwd_kernel": 3 * gates,
        "column_sum_kernel": 1,  # every norm leaves one row here
        "geglu_fwd_kernel": gates, "geglu_bwd_kernel": gates,
    }  # fmt: skip
    assert sizes - {0} == {10, 20, 30, 40, 60, 80}


@pytest.mark.parametrize("images", [1, 3])
def test_the_reference_form_of_a_fused_unet(images):
    exact = unet_results(sd_unet().double(), torch.float64, images)
    unet = sd_unet()
    fuse(unet)
    assert_same(unet_results(unet, images=images), unet_results(sd_unet(), images=images), exact)


def test_under_autocast():
    """bf16 compute, fp32 weights, as in training."""
    # At 16 x 16 every level has more than a pixel: of a stride-2 convolution on one pixel, torch 2.13's bf16 weight
    # gradient on the CPU is whatever the memory held, with no code of ours in the call.
    exact, results = unet_results(sd_unet().double(), torch.float64, size=16), []
    for prepare in (lambda model: None, fuse):
        unet = sd_unet()
        prepare(unet)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(unet_results(unet, size=16))
    low, found = results
    assert found["out"].dtype == torch.bfloat16
    assert_same({"out": found["out"]}, {"out": low["out"]}, {"out": exact["out"]})
    # Gradients as one vector: in the few elements of a bias chance decides which form is closer in bf16.
    errors = [{k: (r[k].double() - exact[k]).norm() for k in exact if k != "out"} for r in results]
    stock, fused = (torch.stack(list(e.values())).norm() for e in errors)
    size = torch.stack([exact[k].norm() for k in errors[0]]).norm()
    assert fused <= 2 * stock <= 0.1 * size
    for name, error in errors[1].items():
        assert error <= 0.1 * exact[name].norm(), name


def test_a_fused_vae_with_both_forms_of_the_kernels():
    exact, low = vae_results(sd_vae().double(), torch.float64), vae_results(sd_vae())
    vae = sd_vae()
    found = fuse(vae)
    assert found["FusedResnetBlock2D"] == (2 + 2) + (4 + 2) and found["PassThrough"] == 2 and found["GEMMs"] == 2
    assert_same(vae_results(vae), low, exact)
    if not torch.cuda.is_available():
        ops.use_kernels("triton")
        try:
            assert_same(vae_results(vae), low, exact)
        finally:
            ops.use_kernels("auto")


@pytest.mark.parametrize(("make", "results"), [(sd_unet, unet_results), (sd_vae, vae_results)])
def test_the_pass_can_be_taken_back(make, results):
    model, stock = make(), make()
    before = results(stock)
    first = fuse(model)
    assert fuse(model) == first, "a second time changes nothing"
    unfuse(model)
    unfuse(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert all(vars(m).keys() == vars(s).keys() for m, s in zip(model.modules(), stock.modules(), strict=True))
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == len(list(model.parameters()))
    assert same_bits(results(model), before)
    assert fuse(model) == first


def test_weights_go_to_stock_diffusers_and_back(tmp_path):
    stock, fused = sd_unet(), sd_unet()
    fuse(fused)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in stock.named_parameters()]
    with torch.no_grad():
        for i, p in enumerate(fused.parameters()):
            p.copy_(0.1 * randn(i, *p.shape))
    wanted = unet_results(fused)
    # Fused -> stock: in memory, as a diffusers folder, as one file.
    stock.load_state_dict(fused.state_dict())
    fused.save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in fused.state_dict().items()}, tmp_path / "one.safetensors")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).to(memory_format=torch.channels_last)
    exact = unet_results(copy.deepcopy(stock).double(), torch.float64)
    for other in (stock, loaded):
        assert all(torch.equal(p, other.get_parameter(name)) for name, p in fused.named_parameters())
        assert type(other) is UNet2DConditionModel and not any("Fused" in type(m).__name__ for m in other.modules())
    assert_same(wanted, unet_results(loaded), exact)
    assert all(torch.equal(fused.get_parameter(k), v) for k, v in load_file(tmp_path / "one.safetensors").items())
    # Stock -> fused, in place and by assignment.
    for assign in (False, True):
        other = sd_unet()
        fuse(other)
        other.load_state_dict(stock.state_dict(), assign=assign)
        assert same_bits(unet_results(other), wanted)


class Operators(TorchDispatchMode):
    """Counts aten operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def test_merged_layers_are_single_gemms():
    """Self-attention 3 -> 1 a layer, the context's 2 a layer -> 1, time 1 a block -> 1; no weight is copied."""
    counts = {}
    for name, prepare in (("stock", lambda model: None), ("fused", fuse)):
        unet = sd_unet()
        prepare(unet)
        with Operators() as counter, torch.no_grad():
            unet(randn(0, 1, 4, 4, 4), 10, randn(1, 1, 8, 12))
        counts[name] = counter.names
    attentions, blocks = 10, 14
    saved_mm = 2 * attentions + (2 * attentions - 1)
    late = 2 * 10  # each attention's last layer leaves its bias to the norm behind it
    assert counts["stock"]["mm"] - counts["fused"]["mm"] == saved_mm - late
    assert counts["stock"]["addmm"] - counts["fused"]["addmm"] == blocks - 1 + late
    assert counts["stock"]["cat"] == counts["fused"]["cat"], "those of the skip connections"
    assert counts["stock"]["div"] >= blocks and counts["stock"]["silu"] >= 3 * blocks


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("before", [True, False])
def test_any_processor_before_or_after(processor, before):
    exact, stock, unet = unet_results(sd_unet().double(), torch.float64), sd_unet(), sd_unet()
    stock.set_attn_processor(processor())
    if before:
        unet.set_attn_processor(processor())
    fuse(unet)
    if not before:
        unet.set_attn_processor(processor())
    assert_same(unet_results(unet), unet_results(stock), exact)


def test_layers_that_are_not_stock_stay_as_they_are():
    class Adapter(nn.Linear):
        """Somebody's own layer."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    models = []
    for _ in range(2):
        unet = sd_unet(resnet_time_scale_shift="scale_shift")
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.__class__ = Adapter
        unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_v.__class__ = Adapter
        models.append(unet)
    unet, stock = models
    found = fuse(unet)
    assert "FusedResnetBlock2D" not in found and found["GEMMs"] == 10 - 1 + 1
    assert type(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q) is nn.Linear
    exact = unet_results(copy.deepcopy(stock).double(), torch.float64)
    assert_same(unet_results(unet), unet_results(stock), exact)


def test_without_merging_every_layer_is_called_by_itself():
    """As ZeRO-3 needs, which gathers weights in hooks of their layers."""
    unet, called = sd_unet(), set()
    fuse(unet, merge=False)
    names = [name for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.GroupNorm)]
    for name in names:
        unet.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    results = unet_results(unet)
    assert called == set(names)
    assert_same(results, unet_results(sd_unet()), unet_results(sd_unet().double(), torch.float64))


@pytest.mark.parametrize(("choice", "device", "wanted"), [
    ("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False),
])  # fmt: skip
def test_the_automatic_choice_is_cuda(choice, device, wanted):
    unet = sd_unet()
    fuse_for(torch.device(device), choice, unet)
    assert any(isinstance(m, FusedGroupNorm) for m in unet.modules()) == wanted


def test_a_fine_tuning_with_the_pass_equals_one_without(tmp_path):
    """Every logged loss, and what is exported: a stock UNet, drawn from by the pipeline with the pass and without."""
    runs = {choice: train(tmp_path / choice, "finetune", fuse_unet=choice) for choice in ("off", "on")}
    off, on = (rows(tmp_path / choice / "finetune") for choice in ("off", "on"))
    assert off.keys() == on.keys() and off
    for step, row in off.items():
        assert on[step] == pytest.approx(row, rel=1e-3, abs=1e-5), step
    pipelines = [SceneGraphToImagePipeline.from_pretrained(runs["on"]) for _ in range(2)]
    assert type(pipelines[0].unet) is UNet2DConditionModel
    images = []
    for pipeline, choice in zip(pipelines, ("off", "on"), strict=True):
        pipeline.fuse_unet = choice
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(draw_scene(0, 0).graph, 2, generator=torch.Generator().manual_seed(0), output_type="np")
        images.append(torch.from_numpy(drawn.images))
    assert isinstance(pipelines[1].vae.decoder.conv_norm_out, FusedGroupNormSiLU)
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def kind_results(unet: nn.Module, dtype: torch.dtype = torch.float32) -> Results:
    """Output and every gradient of a call, by name."""
    unet.zero_grad()
    draw, backbone = torch.Generator().manual_seed(0), Backbone.of(unet.config)
    shapes = (2, 4, 8, 8), (2, 8, backbone.context_dim), (2, max(backbone.pooled_dim, 1))
    z, context, pooled = (torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes)
    more = added(pooled, backbone.sizes(64, 64, 2, "cpu")) if backbone.pooled_dim else None
    mask = (torch.arange(8) < 5).expand(2, 8)
    out = unet(z, torch.tensor([10, 700]), context, encoder_attention_mask=mask, added_cond_kwargs=more).sample
    out.backward(torch.randn(out.shape, generator=draw).to(out))
    grads = {name: p.grad for name, p in unet.named_parameters()}
    inputs = {"z": z.grad, "context": context.grad, **({"pooled": pooled.grad} if more else {})}
    return {"out": out.detach(), **inputs, **grads}


COUNTS = {
    "sd21": {"FusedResnetBlock2D": 22, "FusedTransformer2DModel": 16, "FusedBasicTransformerBlock": 16,
             "FusedGEGLU": 16, "FusedGroupNormSiLU": 45, "FusedGroupNorm": 16, "FusedLayerNorm": 48, "GEMMs": 16 + 2},
    # 17 residual blocks; no attention in the outer level; levels of 2 and 4 layers, 5 and 5 + 1 transformers
    "sdxl": {"FusedResnetBlock2D": 17, "FusedTransformer2DModel": 11, "FusedBasicTransformerBlock": 34,
             "FusedGEGLU": 34, "FusedGroupNormSiLU": 35, "FusedGroupNorm": 11, "FusedLayerNorm": 102, "GEMMs": 34 + 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", COUNTS)
def test_the_fused_unet_is_the_stock_one(kind):
    """Error against float64 at most twice the stock model's own in fp32, for the output and every gradient."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**KINDS[kind].unet, sample_size=8, norm_num_groups=16)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    exact, stock = kind_results(unet.double(), torch.float64), kind_results(unet.float())
    names = list(unet.state_dict())
    unet.to(memory_format=torch.channels_last)
    found = fuse(unet)
    assert {name: found[name] for name in COUNTS[kind]} == COUNTS[kind]
    fused = kind_results(unet)
    assert list(unet.state_dict()) == names and fused.keys() == exact.keys()
    for name, want in exact.items():
        error, allowed = ((x[name].double() - want).norm().item() for x in (fused, stock))
        assert error <= 2 * allowed + 1e-6 * (want.numel() ** 0.5 + want.norm().item()), name
    unfuse(unet)
    torch.testing.assert_close(kind_results(unet)["out"], stock["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_full_size_unet():
    """Stable Diffusion v1's own, 859.5 million parameters, in fp32: 3.5 GiB, one call with the pass and one without."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    names = list(unet.state_dict())
    given = randn(1, 1, 4, 16, 16), torch.tensor([500]), randn(2, 1, 80, 768)
    with torch.no_grad():
        stock = unet(*given).sample
        found = fuse(unet)
        fused = unet(*given).sample
    assert found == {
        "FusedResnetBlock2D": 22, "FusedGroupNormSiLU": 2 * 22 + 1, "FusedGroupNorm": 16, "FusedGEGLU": 16,
        "FusedTransformer2DModel": 16, "MergedLinear": 3 * 16 + 2 * 16 + 22, "PassThrough": 1, "GEMMs": 16 + 2,
    }  # fmt: skip
    assert list(unet.state_dict()) == names
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-4 * stock.abs().max().item())
