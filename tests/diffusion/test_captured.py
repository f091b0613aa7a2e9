"""The UNet's replayed step: equal to the called one on a GPU; which graph is whose, everywhere."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from sgg_fast.diffusion.captured import MAX_GRAPHS, WARM_UP_CALLS, CapturedUNet, Recording
from sgg_fast.drawing.explain import AttentionMaps
from sgg_fast.nn.fuse import fuse

SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}


def small_unet(**more: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **more,
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip


def inputs(batch: int = 2, tokens: int = 80, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """z, context, mask."""
    draw = torch.Generator().manual_seed(seed)
    z, context = torch.randn(batch, 4, 8, 8, generator=draw), torch.randn(batch, tokens, 16, generator=draw)
    mask = torch.arange(tokens) < torch.tensor([tokens - 3 * b for b in range(batch)])[:, None]
    return z.to(device), context.to(device), mask.to(device)


class Played(Recording):
    """A recording that calls again at each replay, into the buffer that a graph would write to."""

    made = 0

    def __init__(self, call, inputs, stream, pool, search) -> None:
        type(self).made += 1
        self.call, self.inputs = call, [x.clone() for x in inputs]
        self.output = call(*self.inputs)
        self.graph = self

    def pool(self) -> None:
        return None

    def replay(self) -> torch.Tensor:
        return self.output.copy_(self.call(*self.inputs))


@pytest.fixture
def captured(monkeypatch) -> CapturedUNet:
    """With the logic of CUDA on the host: everything but the graphs themselves."""
    monkeypatch.setattr(CapturedUNet, "_reason", staticmethod(lambda unet, z: ""))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "stream")
    monkeypatch.setattr(Played, "made", 0)
    return CapturedUNet(record=Played)


def called(unet, z, t, context, mask) -> torch.Tensor:
    return unet(z, t, context, encoder_attention_mask=mask).sample


@torch.no_grad()
def test_each_shape_has_its_graph_and_each_sampling_its_context(captured):
    unet, t = small_unet(), torch.tensor(500)
    for batch, tokens, seed, made in ((2, 80, 0, 1), (2, 80, 1, 1), (4, 80, 2, 2), (4, 96, 3, 3), (2, 80, 4, 3)):
        z, context, mask = inputs(batch, tokens, seed)
        denoise = captured.denoiser(unet, z, context, mask)
        first, second = denoise(z, t), denoise(2 * z, t // 2)
        assert Played.made == made
        torch.testing.assert_close(first, called(unet, z, t, context, mask))
        torch.testing.assert_close(second, called(unet, 2 * z, t // 2, context, mask))


@torch.no_grad()
def test_graphs_die_with_what_they_were_made_of_and_the_oldest_makes_room(captured):
    unet, (z, context, mask) = small_unet(), inputs()
    captured.denoiser(unet, z, context, mask)
    weight = unet.conv_in.weight
    weight.mul_(2)  # in place: the graph reads it where it lies
    captured.denoiser(unet, z, context, mask)
    assert Played.made == 1
    weight.data = weight.data.clone()
    captured.denoiser(unet, z, context, mask)
    assert Played.made == 2
    unet.set_attn_processor(dict(unet.attn_processors))
    captured.denoiser(unet, z, context, mask)
    assert Played.made == 2, "the same processors"
    unet.set_default_attn_processor()
    captured.denoiser(unet, z, context, mask)
    assert Played.made == 3
    for tokens in range(80, 80 + 16 * MAX_GRAPHS, 16):
        captured.denoiser(unet, *inputs(tokens=tokens))
    assert len(captured._graphs) == MAX_GRAPHS and Played.made == 3 + MAX_GRAPHS - 1
    captured.denoiser(unet, *inputs(tokens=80 + 16 * MAX_GRAPHS))
    assert len(captured._graphs) == MAX_GRAPHS
    captured.denoiser(unet, z, context, mask)
    assert Played.made == 3 + MAX_GRAPHS + 1, "the first one had made room"


@torch.no_grad()
def test_what_sdxl_reads_beside_them_is_that_of_each_drawing(captured):
    """One graph for two drawings of one shape with other pooled vectors and sizes."""
    unet, (z, context, mask), t = small_unet(**SDXL), inputs(), torch.tensor(500)
    for k in (1, 2):
        more = {"text_embeds": k * torch.ones(2, 12), "time_ids": torch.tensor([[64.0 * k] * 6]).expand(2, -1)}
        expected = unet(z, t, context, encoder_attention_mask=mask, added_cond_kwargs=more).sample
        torch.testing.assert_close(captured.denoiser(unet, z, context, mask, more=more)(z, t), expected)
        assert torch.equal(CapturedUNet().denoiser(unet, z, context, mask, "off", more)(z, t), expected)
    assert Played.made == 1


@torch.no_grad()
@pytest.mark.parametrize("relation_guidance", [0.0, 2.0])
def test_guidance_is_in_the_captured_call_and_its_strength_is_an_input(captured, relation_guidance):
    """The formula on the UNet's own predictions; two strengths, one graph."""
    unet, t, num = small_unet(), torch.tensor(500), 3 if relation_guidance else 2
    z, _, _ = inputs(2)
    _, context, mask = inputs(2 * num)
    for guidance in (7.5, 3.0):
        null, *others, given = called(unet, torch.cat([z] * num), t, context, mask).chunk(num)
        expected = null + guidance * (given - null)
        expected += sum((relation_guidance * (given - bare) for bare in others), torch.zeros(()))
        for denoise in (captured, CapturedUNet()):
            choice = "on" if denoise is captured else "off"
            found = denoise.denoiser(unet, z, context, mask, choice, None, guidance, relation_guidance)(z, t)
            torch.testing.assert_close(found, expected)
    assert Played.made == 1


@torch.no_grad()
def test_cudnn_tries_its_algorithms_in_the_warm_up_alone(captured, monkeypatch):
    seen, unet, (z, context, mask) = [], small_unet(), inputs()
    hook = unet.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    nothing = contextlib.nullcontext()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nothing)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: nothing)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    captured._record = Recording
    for captured.search, tried in ((True, [True] * WARM_UP_CALLS), (False, [False] * WARM_UP_CALLS)):
        captured.denoiser(unet, z, context, mask, "on")
        assert seen == [*tried, False], "the last call is the captured one"
        seen.clear()
    hook.remove()


@torch.no_grad()
def test_what_cannot_be_captured_is_called_and_says_why_once(captured, caplog):
    def refuse(*_):
        Played.made += 1
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    unet, (z, context, mask) = small_unet(), inputs()
    captured._record = refuse
    for _ in range(2):
        found = captured.denoiser(unet, z, context, mask)(z, torch.tensor(3))
        torch.testing.assert_close(found, called(unet, z, torch.tensor(3), context, mask))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "the UNet's step runs without a CUDA graph: operation not permitted when stream is capturing"
    assert Played.made == 1
    with pytest.raises(ValueError, match="cannot be captured: operation not permitted"):
        captured.denoiser(unet, z, context, mask, "on")


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_the_model_is_called_and_on_is_refused():
    unet, (z, context, mask) = small_unet(), inputs()
    for choice in ("auto", "off"):
        found = CapturedUNet().denoiser(unet, z, context, mask, choice)(z, torch.tensor(3))
        assert torch.equal(found, called(unet, z, torch.tensor(3), context, mask))
    with pytest.raises(ValueError, match="cannot be captured: no CUDA device"):
        CapturedUNet().denoiser(unet, z, context, mask, "on")


def test_a_model_that_is_looked_into_is_called():
    unet, z = small_unet(), SimpleNamespace(device=torch.device("cuda", 0))
    assert CapturedUNet._reason(unet, z) == ""
    with AttentionMaps(unet, 1, (8, 8)):
        assert CapturedUNet._reason(unet, z) == "an attention processor looks at every call"
    unet.mid_block._hf_hook = object()
    assert CapturedUNet._reason(unet, z) == "its weights are offloaded"


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_replay_equals_a_call(dtype, fused):
    """The same kernels on the same numbers. Two shapes in turn, from one pool."""
    unet = small_unet().to("cuda", dtype)
    if fused:
        unet.to(memory_format=torch.channels_last)
        fuse(unet)
    steps, cases = CapturedUNet(), [inputs(2, device="cuda"), inputs(4, seed=1, device="cuda")]
    for _ in range(2):
        for z, context, mask in cases:
            z, context = z.to(dtype), context.to(dtype)
            denoise = steps.denoiser(unet, z, context, mask, "on")
            for t in (900, 5):
                time = torch.tensor(t, device="cuda")
                torch.testing.assert_close(denoise(z * t, time), called(unet, z * t, time, context, mask))


@pytest.mark.gpu
@torch.no_grad()
def test_moved_weights_are_seen_by_the_replay():
    unet, (z, context, mask), t = small_unet().cuda(), inputs(device="cuda"), torch.tensor(7, device="cuda")
    steps = CapturedUNet()
    before = steps.denoiser(unet, z, context, mask, "on")(z, t)
    unet.conv_out.weight.data = 2 * unet.conv_out.weight.data
    unet.conv_out.bias.mul_(2)
    after = steps.denoiser(unet, z, context, mask, "on")(z, t)
    torch.testing.assert_close(after, 2 * before)
