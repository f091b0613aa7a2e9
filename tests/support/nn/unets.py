"""Small UNets and VAEs shaped like Stable Diffusion's, their outputs with every gradient, and the bound of an error."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

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


def same_bits(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
