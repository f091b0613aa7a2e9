"""The toy's foundation: its tokenizer, its shapes, its schedule, and which weights it takes from where."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgg_fast.toy import models, world
from sgg_fast.toy.fit import save_half
from sgg_fast.toy.models import make_tokenizer, toy_foundation, toy_tokenizer, weight_file


def test_each_word_is_a_token_and_the_same_words_give_the_same_merges():
    said = {word for name in world.vocabulary(spoken=True) for word in name.split()}
    first, again = (make_tokenizer(some) for some in (said, sorted(said, reverse=True)))
    assert first.get_vocab() == again.get_vocab()
    for word in said:
        assert first.tokenize(word) == [f"{word}</w>"]
    texts = [f"{a} {b}" for a, b in itertools.pairwise(sorted(said))] + ["a zebra, of course"]
    assert first(texts).input_ids == again(texts).input_ids
    assert first.decode(first("zebra").input_ids, skip_special_tokens=True).strip() == "zebra"


def test_the_shipped_tokenizer_is_read_not_trained():
    known = toy_tokenizer()
    assert known.get_vocab() == toy_tokenizer().get_vocab()
    assert all(known.tokenize(word) == [f"{word}</w>"] for name in world.vocabulary() for word in name.split())


def test_latents_of_scenes_have_unit_variance_and_the_shapes_of_an_f4_autoencoder(foundation):
    """Of scenes that the factor was not computed from."""
    images = np.stack([world.draw_scene(9, i).image for i in range(16)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = foundation.vae.encode(pixels).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(0)) * foundation.vae.config.scaling_factor
    assert latents.shape == (16, 4, 16, 16)
    assert 0.9 < float(latents.std()) < 1.1


@pytest.mark.parametrize("wide", [False, True])
def test_the_unet_takes_those_latents_and_clips_states(foundation, wide):
    unet = models.toy_unet(wide)
    context, mask = torch.zeros(2, 5, models.WIDTH), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        out = unet(torch.zeros(2, 4, 16, 16), torch.tensor([1, 999]), context, encoder_attention_mask=mask).sample
    assert out.shape == (2, 4, 16, 16)
    assert foundation.towers.read(["dog"])[0].shape[-1] == models.WIDTH
    layers = [name for name in unet.state_dict() if name.endswith("attn2.to_k.weight")]
    assert len(layers) == (4 if wide else 7), "one a transformer: two levels down, two levels up, the middle"


def test_the_schedule_is_stable_diffusions_own():
    """`scaled_linear` written out."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scheduler = models.toy_scheduler()
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), np.cumprod(1 - beta), rtol=1e-4)
    assert scheduler.config.prediction_type == "v_prediction"


def test_parts_without_a_file_are_random_by_the_seed_and_those_with_one_are_read(tmp_path, foundation):
    assert foundation.source == "toy models (trained: unet, vae, clip)"
    same, other = toy_foundation(seed=1, weights=None), toy_foundation(seed=2, weights=None)
    assert same.source == "toy models (random weights)"
    name = "conv_in.weight"
    assert not torch.equal(same.unet.state_dict()[name], other.unet.state_dict()[name])
    save_half(same.unet, weight_file("unet", tmp_path))
    read = toy_foundation(seed=2, weights=tmp_path)
    assert read.source == "toy models (trained: unet)"
    assert torch.equal(read.unet.state_dict()[name], same.unet.state_dict()[name].half().float())
    for own, random in ((read.vae, other.vae), (read.clip, other.clip)):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), random.parameters(), strict=True))
    tower = foundation.clip.text_model.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in foundation.text_encoder.state_dict().items())
    held = load_file(weight_file("vae"))
    assert weight_file("vae").parent.parent.name == "pipeline", "stored once, in the shipped model"
    assert torch.equal(held["decoder.conv_in.weight"].float(), foundation.vae.decoder.conv_in.weight)


def test_the_foundation_of_toy_words_shares_the_autoencoder_and_has_the_rest_of_its_own(foundation):
    words = toy_foundation(wide=True)
    assert words.source == "toy models (trained: unet, vae, clip)"
    assert weight_file("vae", wide=True) == weight_file("vae") and words.unet.config.block_out_channels == (64, 96, 128)
    for part in ("unet", "clip"):
        assert weight_file(part, wide=True) != weight_file(part) and weight_file(part, wide=True).is_file()
    assert words.tokenizer.tokenize("next to") == ["next</w>", "to</w>"] != foundation.tokenizer.tokenize("next to")
    for known in (words, foundation):
        assert known.clip.config.text_config.vocab_size == len(known.clip_tokenizer)
    assert words.clip.config.text_config.vocab_size != foundation.clip.config.text_config.vocab_size
