"""Settings of the networks: their kind, sizes and forms, and their operators."""

from __future__ import annotations

import dataclasses

from .fields import ConfigError, Part, setting


@dataclasses.dataclass(frozen=True)
class ModelConfig(Part):
    """Stable Diffusion, the conditioner of its UNet, and their operators."""

    source: str = setting("", flag="model", makes_cache=True)
    """Stable Diffusion v1, v2 or SDXL base in diffusers format: folder or hub id. Empty: the toy models."""
    sizes: str = setting("toy", choices=("toy", "toy-words", "sd", "sd21", "sdxl"), of_recipe=True)
    """The models that the recipe is for. The toy models ship in the package and are used if --model is empty."""
    clip: str = setting("", makes_cache=True)
    """CLIP ViT-B/32 for names and images: folder or hub id. Empty: the CLIP that --model contains."""
    conditioner: str = setting("sgg", choices=("sgg", "text", "sgdiff"), in_card=True)
    """Conditioner of the UNet: sgg, the graph encoder of SGG-IG, or a baseline without pre-training: text, the graph as
    text through SD's text encoder, or sgdiff, the graph encoder of SGDiff."""
    text_form: str = setting("sentence", choices=("sentence", "phrases", "numbered"), exact=())
    """Text of a graph for --conditioner text: one sentence, phrases of one token each, or one sentence that numbers the
    names of which there are several."""
    width: int = setting(128, at_least=1, in_encoder=True, in_card=True)
    """D, channels of the graph encoder."""
    num_layers: int = setting(4, at_least=1, in_encoder=True, in_card=True)
    """Triple convolutions in the graph encoder."""
    encoder: str = setting("residual", choices=("residual", "plain"), in_encoder=True, in_card=True)
    """Triple convolutions with layer norm and residual sum, or plain as in eqs 3-6."""
    triple: str = setting("roles", choices=("roles", "shared"), in_encoder=True, in_card=True)
    """Eq. 7 with one map per role, or one map shared by subject and object as printed."""
    context: str = setting("triples", choices=("triples", "global"), in_encoder=True, in_card=True)
    """The UNet's context: a token per triple, or X_global alone (eq. 11 as printed)."""
    token_init: str = setting("text", choices=("none", "text"), in_encoder=True, in_card=True, makes_cache=True)
    """Start each triple's token from SD's own text state of its phrase; a gate adds the graph's share."""
    gate_init: float = setting(1.0, in_encoder=True, in_card=True)
    """Initial value of the gates of --token-init text. At 0 the tokens are SD's own text states at first, and the gates
    open at --graph-lr; at 1 the graph's share counts as much from the first step."""
    null_tokens: int = setting(77, at_least=1, at_most=77, in_encoder=True)
    """States of the empty text in the null condition: 77 as in Stable Diffusion's training, or fewer for a model that
    was trained with fewer (2: start and end). With fewer, the context is only as long as its graphs."""
    instance_codes: bool = setting(False, in_encoder=True)
    """Distinguish objects of one name in a graph: a random code on every token that mentions the object."""
    attention: str = setting(
        "auto",
        choices=("auto", "xformers", "sdpa", "cudnn"),
        may_change=True,
        exact=("auto", "xformers", "sdpa", "cudnn"),
    )
    """UNet attention: auto is xformers on CUDA and torch's SDPA elsewhere; cudnn is SDPA by cuDNN, in bf16 or fp16."""
    cross_attention: str = setting("auto", choices=("auto", "ours"), may_change=True, exact=("auto", "ours"))
    """Attention to the context: auto is --attention's; ours is this package's kernel, in bf16 or fp16."""
    kernels: str = setting(
        "auto", choices=("auto", "reference", "triton"), may_change=True, exact=("auto", "reference", "triton")
    )
    """Graph kernels: auto is Triton on CUDA and the reference form elsewhere."""
    fuse_unet: str = setting("auto", choices=("auto", "on", "off"), may_change=True, exact=("auto", "on", "off"))
    """Fuse the UNet's normalisation and gates and merge projections, under stock parameter names; auto: on for CUDA."""
    gradient_checkpointing: bool = setting(
        False, may_change=True, exact=(False, True), saves_memory={"gradient_checkpointing": True}
    )
    """Recompute the UNet's activations in backward: less memory, about a quarter more work."""

    def check(self) -> None:
        """Raises `ConfigError` for forms that exclude each other."""
        if self.token_init == "text" and self.context == "global":
            raise ConfigError(
                "--token-init text starts the triples' tokens, but --context global has none: use --token-init none"
            )
        if self.conditioner != "sgg" and self.instance_codes:
            raise ConfigError(self.without_tokens("instance-codes"))

    def without_tokens(self, name: str) -> str:
        """Error message for a flag that needs SGG-IG's own tokens, which a baseline lacks."""
        return f"--conditioner {self.conditioner} has none of SGG-IG's own tokens for --{name}: leave it out"

    def check_given(self) -> None:
        """Raises `ConfigError` if no setting names the models to load."""
        if self.source or self.sizes in ("toy", "toy-words"):
            return
        version = {"sd21": "v2.1", "sdxl": "XL base"}.get(self.sizes, "v1.4")
        raise ConfigError(f"this recipe needs --model: a Stable Diffusion {version} folder or hub id")

    @property
    def reads_phrases(self) -> bool:
        """Whether the context consists of SD's states of the triples' phrases."""
        if self.conditioner == "text":
            return self.text_form == "phrases"
        return self.conditioner == "sgg" and self.token_init == "text"

    @property
    def reads_text(self) -> bool:
        """Whether sampling needs SD's text encoder."""
        return self.conditioner == "text" or self.reads_phrases
