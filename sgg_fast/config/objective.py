"""Settings of the losses of both stages."""

from __future__ import annotations

import dataclasses

from .fields import ConfigError, Part, setting
from .model import ModelConfig


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Part):
    """Losses, their weights, and the inputs that training masks or drops. Weights and shares have no unit."""

    mask_ratio: float = setting(0.3, at_least=0, at_most=1)
    """Share of objects that the auto-encoder masks."""
    contrastive: str = setting("infonce", choices=("bce", "literal", "infonce"), in_card=True)
    """Eq. 9: binary cross-entropy with one negative, the printed form, or InfoNCE."""
    num_negatives: int = setting(64, at_least=1)
    """Negatives of --contrastive infonce, from the cached image embeddings."""
    graph_negatives: bool = setting(True, in_card=True)
    """Further negatives of eq. 9: the graph itself with one relation reversed or replaced by its opposite."""
    mae_weight: float = setting(1.0, at_least=0)
    """Weight of the masked auto-encoder's loss in pre-training; 0 switches it off."""
    con_weight: float = setting(1.0, at_least=0)
    """Weight of eq. 9 in pre-training; 0 switches it off."""
    loss_weight: float = setting(0.5, at_least=0, at_most=1)
    """lambda of eq. 12: share of the diffusion loss; the rest is image-scene alignment."""
    isa_weight: str = setting("auto", choices=("auto", "alpha_bar", "none"), in_card=True, resolved="alignment_weight")
    """Weight of eq. 10 over timesteps: alpha_bar_t, or none as printed. Auto is alpha_bar, but none for
    --image-embedding noised, which includes its own weight."""
    image_embedding: str = setting(
        "clean", choices=("clean", "noised", "noisy-image", "predicted", "latent"), in_card=True
    )
    """I(t) of eq. 10: the embedding of the clean image, its expectation under noise (noised), the embedding of the
    noised image (noisy-image) or of the image that the UNet predicts (predicted), or the output of a small network on
    the predicted latent (latent)."""
    condition_dropout: float = setting(0.1, at_least=0, at_most=1)
    """Share of training images whose condition is dropped, for classifier-free guidance."""
    relation_dropout: float = setting(0.0, at_least=0, at_most=1, in_card=True)
    """Share of training images whose graph is given without its relations, for relation guidance."""
    min_snr_gamma: float = setting(0.0, at_least=0)
    """Weight the diffusion loss over timesteps by min(SNR, this) / SNR (usually 5); 0 for the paper's even weight."""
    geometry: float = setting(0.5, at_least=0, in_card=True)
    """Weight of a loss of both stages: each relation's token predicts the layout of its pair's boxes; 0 for none."""
    attention_loss: float = setting(0.1, at_least=0, in_card=True)
    """Weight of a loss of fine-tuning: the UNet's attention to an object's token concentrates in its box; 0: none."""

    def check(self) -> None:
        """Raises `ConfigError` for losses that exclude each other."""
        if self.image_embedding == "noised" and self.isa_weight == "alpha_bar":
            raise ConfigError("--image-embedding noised carries its own weight: leave --isa-weight out")
        if self.mae_weight == self.con_weight == 0:
            raise ConfigError(
                "--mae-weight 0 and --con-weight 0 leave nothing to pre-train on: give one of them weight"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Raises `ConfigError` for losses that the model has no inputs for."""
        if model.conditioner != "sgg":
            if self.loss_weight != 1:
                raise ConfigError(
                    f"--conditioner {model.conditioner} has no X_global for image-scene alignment: leave out "
                    "--loss-weight"
                )
            if self.geometry and model.conditioner == "text":
                raise ConfigError(model.without_tokens("geometry"))
            if self.attention_loss and model.reads_text and not model.reads_phrases:
                raise ConfigError(
                    f"--attention-loss: --text-form {model.text_form} has no token for each object; use phrases"
                )
        if self.relation_dropout and model.reads_text and not model.reads_phrases:
            raise ConfigError(f"--relation-dropout: --text-form {model.text_form} says the whole graph; use phrases")

    def needs_boxes(self, stage: str) -> bool:
        """Whether the stage learns from the boxes of objects."""
        return self.geometry > 0 or (stage == "finetune" and self.attention_loss > 0)

    @property
    def alignment_weight(self) -> str:
        """ "alpha_bar" or "none": `isa_weight` with "auto" resolved."""
        if self.isa_weight != "auto":
            return self.isa_weight
        return "none" if self.image_embedding == "noised" else "alpha_bar"
