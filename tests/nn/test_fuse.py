"""The pass over diffusers' models: same results and gradients, same parameters, fewer launches; and back again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from sgg_kernels import launch
from support.tiny_runs import rows, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgg_fast import ops
from sgg_fast.nn.attention import checkpoint_activations
from sgg_fast.nn.fuse import FusedGroupNorm, FusedGroupNormSiLU, fuse, fuse_for, unfuse
from sgg_fast.nn.merge import adjacent
from sgg_fast.pipeline import SceneGraphToImagePipeline
from sgg_fast.toy.world import draw_scene

Results = dict[str, torch.Tensor]


def sd_unet(layers_per_block: int = 1, **changes: object) -> UNet2DConditionModel:
    """Stable Diffusion v1's UNet with a sixteenth of its channels and groups: every C / G of it."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "block_out_channels": (20, 40, 80, 80),
        "layers_per_block": layers_per_block,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "norm_num_groups": 2,
    }
    unet = UNet2DConditionModel(**{**settings, **changes})
    for module in unet.modules():  # as after training: at their start weights are 1 and biases 0
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
    return unet.to(memory_format=torch.channels_last)


def sd_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder, two of its four levels, an eighth of its channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        latent_channels=4,
    ).to(memory_format=torch.channels_last)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_results(unet: nn.Module, dtype: torch.dtype = torch.float32, images: int = 1, size: int = 4) -> Results:
    """Output and every gradient of a call with a masked context, by name."""
    unet.zero_grad()
    shapes = (images, 4, size, size), (images, 8, unet.config.cross_attention_dim)
    z, context = (randn(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(shapes))
    mask = (torch.arange(8) < 5).expand(images, 8)
    out = unet(z, torch.arange(10, 10 + images), context, encoder_attention_mask=mask).sample
    out.backward(randn(3, *out.shape).to(out))
    grads = {name: p.grad for name, p in unet.named_parameters()}
    return {"out": out.detach(), "grad z": z.grad, "grad context": context.grad, **grads}


def vae_results(vae: nn.Module, dtype: torch.dtype = torch.float32) -> Results:
    vae.zero_grad()
    x = randn(1, 1, 3, 8, 8).to(dtype).requires_grad_()
    z = vae.encode(x).latent_dist.mean
    out = vae.decode(z).sample
    out.backward(randn(3, *out.shape).to(out))
    grads = {name: p.grad for name, p in vae.named_parameters()}
    return {"out": out.detach(), "z": z.detach(), "grad x": x.grad, **{k: g for k, g in grads.items() if g is not None}}


def assert_same(found: Results, low: Results, exact: Results) -> None:
    """Error against float64 <= 2 x the stock model's own in the same precision, plus a small floor; in the L2 norm."""
    assert found.keys() == low.keys() == exact.keys()
    for name, want in exact.items():
        assert found[name].shape == want.shape and found[name].dtype == low[name].dtype, name
        error, allowed = ((x[name].double() - want).norm().item() for x in (found, low))
        floor = 1e-6 * (want.numel() ** 0.5 + want.norm().item())
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, the stock model's own is {allowed:.3g}"


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


def same_bits(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def merged_groups(model: nn.Module) -> list:
    state = model.__dict__["_sgg_fused"]
    return [parameters for merged in (*state.leading, *state.shared) for parameters in merged.parameters]


def test_storage_stays_one_through_what_a_training_does_to_it():
    unet, optimizer_of = sd_unet(), torch.optim.Adam
    fuse(unet)
    assert all(map(adjacent, merged_groups(unet)))
    stock = sd_unet()
    optimizers = [optimizer_of(model.parameters(), lr=1e-3) for model in (unet, stock)]
    for _ in range(2):
        for model, optimizer in zip((unet, stock), optimizers, strict=True):
            unet_results(model)
            optimizer.step()
    exact = unet_results(copy.deepcopy(stock).double(), torch.float64)
    assert all(map(adjacent, merged_groups(unet)))
    again = copy.deepcopy(unet)
    pointers = {p.data_ptr() for p in unet.parameters()} & {p.data_ptr() for p in again.parameters()}
    assert not pointers, "a copy shares nothing"
    # Adam divides by the root of tiny squares, so after a step trajectories agree to rounding of the step, not of fp32.
    torch.testing.assert_close(unet_results(again)["out"].double(), exact["out"], rtol=1e-3, atol=1e-3)
    assert all(map(adjacent, merged_groups(again)))
    unet.load_state_dict(stock.state_dict())
    assert_same(unet_results(unet), unet_results(stock), exact)
    unet.double()
    assert all(map(adjacent, merged_groups(unet))), "a cast keeps each group in one storage"
    torch.testing.assert_close(unet_results(unet, torch.float64), exact, rtol=1e-9, atol=1e-9)
    assert all(map(adjacent, merged_groups(unet)))


def test_views_into_somebody_elses_buffer_stay_there():
    """As DeepSpeed and flat optimisers lay parameters out, with or without gaps between them."""
    low, exact = unet_results(sd_unet()), unet_results(sd_unet().double(), torch.float64)
    unet = sd_unet()
    fuse(unet)
    flat = torch.zeros(sum(p.numel() + 3 for p in unet.parameters()))
    offset = 0
    for p in unet.parameters():
        view = flat[offset : offset + p.numel()].as_strided(p.shape, p.stride(), offset)
        p.data = view.copy_(p.data)
        offset += p.numel() + 3
    assert_same(unet_results(unet), low, exact)
    assert {p.untyped_storage().data_ptr() for p in unet.parameters()} == {flat.untyped_storage().data_ptr()}


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


def test_checkpointed_activations():
    unet = sd_unet()
    fuse(unet)
    plain = unet_results(unet)
    checkpoint_activations(unet)
    unet.train()
    found = unet_results(unet)
    exact = unet_results(sd_unet().double(), torch.float64)
    assert_same(found, plain, exact)


def test_no_result_outlives_its_call_or_serves_another_input():
    unet, stock = sd_unet(), sd_unet()
    fuse(unet)
    z, context = randn(0, 1, 4, 4, 4), randn(1, 1, 8, 12)
    with torch.no_grad():
        first = unet(z, 10, context).sample
        context.mul_(-2)  # the same tensor, another value
        second = unet(z, 10, context).sample
        wanted = stock(z, 10, context).sample
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)
    kept = weakref.ref(context)
    del context
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError):
        unet(z, 10, randn(1, 1, 8, 13))
    again = unet(z, 10, randn(2, 1, 8, 12)).sample
    torch.testing.assert_close(again, stock(z, 10, randn(2, 1, 8, 12)).sample, rtol=1e-4, atol=1e-5)


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
