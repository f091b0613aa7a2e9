"""Which attention runs, and that the context mask reaches every cross-attention layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from fake_cuda.attention import standing_in
from support.cases.interpreter import widen_products
from support.tiny_runs import trainer

from sgg_fast import ops
from sgg_fast.drawing import load_model
from sgg_fast.nn import attention
from sgg_fast.nn.attention import CudnnAttnProcessor, XformersAttnProcessor, checkpoint_activations, set_attention
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.nn.fuse import fuse
from sgg_fast.toy.world import draw_scene

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


@pytest.mark.parametrize("choice", ["sdpa", "auto"])
def test_cpu_runs_sdpa_in_every_layer(unet, choice, caplog):
    unet.set_attn_processor(AttnProcessor())
    with caplog.at_level("INFO", logger="sgg_fast"):
        assert set_attention(unet, choice, CPU) == "sdpa"
    assert len(unet.attn_processors) > 4
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert "UNet attention: sdpa (" in caplog.text, "said once, with the reason"


@pytest.mark.parametrize("choice", ["xformers", "cudnn"])
def test_what_needs_cuda_is_refused_on_cpu_in_one_line(unet, choice):
    with pytest.raises(ValueError, match=f"--attention {choice} needs a CUDA device") as caught:
        set_attention(unet, choice, CPU)
    assert "\n" not in str(caught.value)


def test_where_xformers_cannot_auto_falls_back_and_says_the_whole_reason_but_a_request_raises(
    unet, monkeypatch, caplog
):
    def fail(unet, device):
        raise ValueError("fa2F: device too old; cutlassF: dtype: torch.int8 (supported: none)")

    monkeypatch.setattr(attention, "check_xformers", fail)
    unet.set_attn_processor(AttnProcessor())
    with caplog.at_level("INFO", logger="sgg_fast"):
        assert set_attention(unet, "auto", torch.device("cuda")) == "sdpa"
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}
    whole = "xformers cannot attend: fa2F: device too old; cutlassF: dtype: torch.int8 (supported: none)"
    assert f"sdpa ({whole})" in caplog.text
    with pytest.raises(ValueError, match=r"^--attention xformers cannot attend: .* use --attention sdpa$"):
        set_attention(unet, "xformers", torch.device("cuda"))


def test_every_reason_of_every_operator_is_named():
    q = torch.zeros(1, 8, 2, 8)
    with pytest.raises(ValueError, match=r"device=cpu .*; cutlassF-pt: .*device=cpu") as caught:
        attention.find_operators(q, q, None)
    assert "\n" not in str(caught.value) and "wasn't build" not in str(caught.value)


@pytest.fixture(params=["CUDA 12: its binary loads", "CUDA 13: it does not"])
def operators(request, monkeypatch):
    """xFormers' CUTLASS operators on CPU tensors, with torch's own checks, as xformers finds itself on either build.

    torch's flash operator, which xFormers finds in CUDA builds alone, is left out: it knows no CPU tensors.
    """
    from xformers.ops.common import get_operator
    from xformers.ops.fmha import common, flash

    monkeypatch.setattr(flash.FwOp, "OPERATOR", get_operator("xformers_flash", "not_on_a_cpu"))
    monkeypatch.setattr(common, "_built_with_cuda", request.param.startswith("CUDA 12"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(attention, "_MOOT", (*attention._MOOT, "device=cpu", "bf16 is only supported on A100+"))
    with standing_in() as seen:
        yield seen


def wide_unet() -> UNet2DConditionModel:
    """Heads of width 8, which the operators take in every dtype."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


def losses_of(unet: UNet2DConditionModel, dtype: torch.dtype | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients, under autocast to `dtype`."""
    z, context, mask = inputs()
    unet.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = unet(z, torch.tensor([10, 900]), context, encoder_attention_mask=mask).sample
    out.float().square().mean().backward()
    return out.detach().float(), [p.grad.clone() for p in unet.parameters() if p.grad is not None]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast to bf16"])
def test_xformers_attends_as_sdpa_forward_and_backward_under_autocast(operators, dtype, fused):
    """The mask's bias is fp32 there and the queries bf16, at an operator that autocast does not know."""
    unet = wide_unet()
    if fused:
        fuse(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    exact, low = losses_of(unet, None), losses_of(unet, dtype)
    assert attention.check_xformers(unet, CPU) == "cutlassF-pt"
    operators.clear()
    unet.set_attn_processor(XformersAttnProcessor())
    got = losses_of(unet, dtype)
    layers = sum(name.endswith(("attn1", "attn2")) for name, _ in unet.named_modules())
    assert len(operators) == layers and {seen.query.dtype for seen in operators} == {dtype or torch.float32}
    assert len(got[1]) == len(exact[1]) > 100
    outs, grads = ((got[0], low[0], exact[0]), (torch.cat([g.flatten() for g in of[1]]) for of in (got, low, exact)))
    for a, b, c in (outs, grads):  # all gradients as one vector: a bias of 16 numbers is luck
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-5 * c.norm()


def test_no_head_is_copied_and_one_bias_serves_every_layer(operators):
    unet, made = wide_unet(), []
    unet.set_attn_processor(XformersAttnProcessor())
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")):
            module.register_forward_hook(lambda module, args, out: made.append(out.data_ptr()))
    losses_of(unet, torch.bfloat16)
    assert {x.data_ptr() for seen in operators for x in (seen.query, seen.key, seen.value)} <= set(made)
    biases = [seen.bias for seen in operators if seen.bias is not None]
    assert len(biases) == len(operators) / 2 and len({bias.data_ptr() for bias in biases}) == 1
    for bias in biases:
        assert bias.dtype == torch.bfloat16 and bias.stride()[1:] == (0, 0, 1)


def test_a_context_of_odd_length_gets_an_aligned_bias(operators):
    unet = wide_unet()
    z, context, mask = inputs()
    context, mask = context[:, :13], mask[:, :13]
    unet.set_attn_processor(AttnProcessor2_0())
    wanted = unet(z, 10, context, encoder_attention_mask=mask).sample
    unet.set_attn_processor(XformersAttnProcessor())
    got = unet(z, 10, context, encoder_attention_mask=mask).sample
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert all(seen.bias.stride(0) == 16 for seen in operators if seen.bias is not None)


@pytest.mark.parametrize("fused", [False, True])
def test_our_cross_attention_is_sdpa_forward_and_backward_under_autocast(fused, monkeypatch):
    """In the interpreter, with keys and values as slices of a merged GEMM where the UNet is fused."""
    widen_products(monkeypatch)
    unet = wide_unet()
    if fused:
        fuse(unet)
    set_attention(unet, "sdpa", CPU)
    exact, low = losses_of(unet, None), losses_of(unet, torch.bfloat16)
    calls = []
    attend = ops.cross_attention

    def noted(*args):
        calls.append(args)
        return attend(*args)

    monkeypatch.setattr(ops, "cross_attention", noted)
    ops.use_kernels("triton")
    try:
        set_attention(unet, "sdpa", CPU, "ours")
        got = losses_of(unet, torch.bfloat16)
    finally:
        ops.use_kernels("auto")
    layers = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    assert len(calls) == len(layers) and {q.dtype for q, *_ in calls} == {torch.bfloat16}
    assert len({bias.data_ptr() for *_, bias, _ in calls}) == 1, "one bias a call of the UNet"
    names = {type(unet.attn_processors[f"{name}.processor"]).__name__ for name in layers}
    assert names == {"OurCrossAttnProcessor"} and len({*unet.attn_processors.values()}) == 2
    outs, grads = ((got[0], low[0], exact[0]), (torch.cat([g.flatten() for g in of[1]]) for of in (got, low, exact)))
    for a, b, c in (outs, grads):
        assert (a - c).norm() <= 2 * (b - c).norm() + 1e-5 * c.norm()


def test_our_cross_attention_without_a_mask(monkeypatch):
    """On the reference: a bias of zeros is no bias."""
    unet = wide_unet()
    z, context, _ = inputs()
    set_attention(unet, "sdpa", CPU)
    wanted = unet(z, 10, context).sample
    monkeypatch.setattr(attention, "_why_not_ours", lambda unet, device: "")
    set_attention(unet, "sdpa", CPU, "ours")
    torch.testing.assert_close(unet(z, 10, context).sample, wanted, rtol=1e-4, atol=1e-5)


def test_where_our_cross_attention_cannot_run_is_one_line(unet):
    with pytest.raises(
        ValueError, match=r"^--cross-attention ours: the kernels do not run here \(device cpu"
    ) as caught:
        set_attention(unet, "sdpa", CPU, "ours")
    assert "\n" not in str(caught.value) and str(caught.value).endswith("use --cross-attention auto")
    ops.use_kernels("triton")
    try:
        wide = copy.deepcopy(unet)
        next(m for name, m in wide.named_modules() if name.endswith("attn2")).inner_dim = 4 * 161
        with pytest.raises(ValueError, match="width 161, and the kernel takes up to 160"):
            set_attention(wide, "sdpa", CPU, "ours")
        odd = copy.deepcopy(unet)
        next(m for name, m in odd.named_modules() if name.endswith("attn2")).norm_k = torch.nn.LayerNorm(4)
        with pytest.raises(ValueError, match="attn2 has norm_k"):
            set_attention(odd, "sdpa", CPU, "ours")
    finally:
        ops.use_kernels("auto")


def test_the_stand_in_refuses_what_torch_refuses(operators):
    """Else the tests above would prove nothing: diffusers' own processor would give this bias."""
    q = torch.zeros(2, 8, 2, 8, dtype=torch.bfloat16)
    ops = attention.find_operators(q, q, None)
    with pytest.raises(RuntimeError, match="invalid dtype for bias"):
        torch.ops.aten._efficient_attention_forward(q, q, q, torch.zeros(2, 2, 8, 8), None, None, 8, 8, 0.0, 0)
    with pytest.raises(ValueError, match=r"^bias in torch\.float32, queries in torch\.bfloat16$"):
        attention.attend(ops, q, q, q, torch.zeros(2, 2, 8, 8))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        torch.ops.aten._efficient_attention_forward(q, q.float(), q, None, None, None, 8, 8, 0.0, 0)


def test_an_operator_whose_numbers_are_wrong_is_refused(operators, monkeypatch):
    """As one that was not compiled for the device: it returns, and what it returns is rubbish."""
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args, **kwargs: attend(*args, **kwargs) * 1.5)
    with pytest.raises(ValueError, match=r"^cutlassF-pt in torch\..* its numbers are wrong here$"):
        attention.check_xformers(wide_unet(), CPU)


def test_a_layer_that_the_processor_does_not_know_is_named(unet):
    other = copy.deepcopy(unet)
    other.mid_block.attentions[0].transformer_blocks[0].attn1.norm_q = torch.nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"mid_block.*attn1 has norm_q"):
        attention.check_xformers(other, CPU)


def test_a_cudnn_that_cannot_attend_is_refused_and_what_it_cannot_take_runs_elsewhere(unet, monkeypatch):
    """On this device the kernel is missing, which the probe finds; the processor itself falls back for single calls."""
    with pytest.raises(RuntimeError):
        attention._probe_cudnn(CPU)

    def fail(device):
        raise RuntimeError("No available kernel.\nAborting")

    monkeypatch.setattr(attention, "_probe_cudnn", fail)
    with pytest.raises(ValueError, match=r"^--attention cudnn: No available kernel.; use sdpa$"):
        set_attention(unet, "cudnn", torch.device("cuda"))
    z, context, mask = inputs()
    set_attention(unet, "sdpa", CPU)
    wanted = unet(z, 10, context, encoder_attention_mask=mask).sample
    unet.set_attn_processor(CudnnAttnProcessor())
    torch.testing.assert_close(unet(z, 10, context, encoder_attention_mask=mask).sample, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["xformers", "cudnn"])
def test_cuda_attends_with_the_mask_as_sdpa_does(unet, choice):
    device = torch.device("cuda")
    z, context, mask = (x.to(device, x.dtype if x.dtype == torch.bool else torch.bfloat16) for x in inputs())
    wide = UNet2DConditionModel.from_config(
        {**unet.config, "attention_head_dim": 2}
    )  # heads of 8 and 16, as kernels want
    on, results = wide.eval().to(device, torch.bfloat16), {}
    for name in (choice, "sdpa"):
        assert set_attention(on, name, device) == name
        results[name] = on(z, 10, context, encoder_attention_mask=mask).sample
    torch.testing.assert_close(results[choice], results["sdpa"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("lean", [False, True])
def test_the_choice_reaches_every_attention_layer_of_a_run(tmp_path, monkeypatch, lean):
    """In a real fine-tuning step every layer calls the processor that --attention put there."""
    one = trainer(tmp_path, "finetune", attention="sdpa", weights="lean" if lean else "master")
    layers = {name for name, m in one.foundation.unet.named_modules() if name.endswith(("attn1", "attn2"))}
    ran, call = [], AttnProcessor2_0.__call__

    def noted(self, attn, *args, **kwargs):
        ran.append(attn)
        return call(self, attn, *args, **kwargs)

    monkeypatch.setattr(AttnProcessor2_0, "__call__", noted)
    assert one.engine.update(np.array([[0, 1]]), 0).applied
    of = {id(m): name for name, m in one.foundation.unet.named_modules()}
    assert len(ran) == len(layers) >= 4 and {of[id(attn)] for attn in ran} == layers


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 5:], mask[1, 9:] = False, False
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 12, generator=generator), mask


def test_masked_tokens_change_nothing_in_value_or_gradient(unet):
    set_attention(unet, "sdpa", CPU)
    z, context, mask = inputs()
    context.requires_grad_(True)
    out = unet(z, torch.tensor([10, 900]), context, encoder_attention_mask=mask).sample
    out.square().sum().backward()
    assert context.grad[~mask].abs().max() == 0
    assert (context.grad[mask].abs().amax(-1) > 0).all()
    changed = torch.where(mask[..., None], context.detach(), 1e3)
    again = unet(z, torch.tensor([10, 900]), changed, encoder_attention_mask=mask).sample
    assert torch.equal(again, out)
    other = unet(z, torch.tensor([10, 900]), changed).sample
    assert not torch.allclose(other, out), "without the mask they are attended to"


def test_the_mask_reaches_every_cross_attention_layer(unet):
    """Each attn2 is called with a bias that shuts exactly the masked tokens out."""
    set_attention(unet, "sdpa", CPU)
    z, context, mask = inputs()
    seen = {}

    def note(name):
        def hook(module, args, kwargs):
            seen[name] = kwargs["attention_mask"]

        return hook

    layers = {name: m for name, m in unet.named_modules() if name.endswith("attn2")}
    hooks = [m.register_forward_pre_hook(note(name), with_kwargs=True) for name, m in layers.items()]
    unet(z, 10, context, encoder_attention_mask=mask)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == layers.keys() and len(layers) >= 4
    for bias in seen.values():
        assert torch.equal(bias.squeeze(1) < -1e3, ~mask)


def fill_padding(module: SceneGraphConditioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `module` writes large numbers where its mask says that nobody looks."""
    forward, null = module.forward, module.null_condition

    def filled(context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert not mask.all(), "there is padding"
        return torch.where(mask[..., None], context, 50.0)

    def forward_filled(*args):
        condition = forward(*args)
        return condition._replace(context=filled(condition.context, condition.mask))

    def null_filled(*args):
        context, mask = null(*args)
        return filled(context, mask), mask

    monkeypatch.setattr(module, "forward", forward_filled)
    monkeypatch.setattr(module, "null_condition", null_filled)


def test_padding_reaches_neither_the_picture_nor_the_loss(trained_run, tmp_path, monkeypatch):
    """Through our own callers: the pipeline with guidance, and the fine-tuning step with dropped conditions."""
    pipeline = load_model(str(trained_run)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    graph = draw_scene(0, 0).graph
    before = pipeline(graph, 2, generator=torch.Generator().manual_seed(0), output_type="np").images
    fill_padding(pipeline.graph_encoder, monkeypatch)
    after = pipeline(graph, 2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (before == after).all()

    stage = trainer(tmp_path, "finetune", condition_dropout=0.5).engine.module
    loss = [stage(np.arange(8), step).total for step in range(2)]
    fill_padding(stage.conditioner, monkeypatch)
    assert [stage(np.arange(8), step).total for step in range(2)] == loss


def test_a_checkpointed_unet_computes_its_blocks_again_and_the_same_gradients(unet):
    z, context, mask = inputs()
    grads, calls = [], []
    for prepare in (lambda model: None, checkpoint_activations):
        model = copy.deepcopy(unet).train()
        prepare(model)
        model.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
        model(z, 10, context, encoder_attention_mask=mask).sample.square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(0)
    assert calls == [1, 0, 1, 1, 0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
