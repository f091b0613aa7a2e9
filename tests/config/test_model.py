"""Settings of the networks: what they read, and the forms that exclude each other."""

from __future__ import annotations

import pytest

from sgg_fast.config import ConfigError, ModelConfig
from sgg_fast.recipes import recipe


@pytest.mark.parametrize(
    ("settings", "phrases", "text"),
    [
        ({}, True, True),
        ({"token_init": "none"}, False, False),
        ({"conditioner": "text"}, False, True),
        ({"conditioner": "text", "text_form": "phrases"}, True, True),
        ({"conditioner": "sgdiff"}, False, False),
    ],
)
def test_the_text_encoder_is_needed_where_the_context_is_made_of_its_states(settings, phrases, text):
    config = ModelConfig(**settings)
    assert (config.reads_phrases, config.reads_text) == (phrases, text)


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [("sd", "Diffusion v1.4 folder"), ("sd21", "v2.1 folder"), ("sdxl", "XL base folder")],
)
def test_the_models_to_load_must_be_named_but_for_the_toys(sizes, needed):
    for toy in ("toy", "toy-words"):
        ModelConfig(sizes=toy).check_given()
    ModelConfig(sizes=sizes, source="a/folder").check_given()
    with pytest.raises(ConfigError, match=f"^this recipe needs --model: .*{needed}"):
        ModelConfig(sizes=sizes).check_given()


def test_text_initialisation_needs_the_triples_tokens():
    with pytest.raises(ConfigError, match="--token-init text"):
        recipe("toy", token_init="text", context="global")


def test_a_baseline_has_no_tokens_to_put_codes_on():
    with pytest.raises(ConfigError) as caught:
        ModelConfig(conditioner="sgdiff", instance_codes=True)
    assert str(caught.value) == ModelConfig(conditioner="sgdiff").without_tokens("instance-codes")
    assert str(caught.value).startswith("--conditioner sgdiff has none of SGG-IG's own tokens for --instance-codes")
