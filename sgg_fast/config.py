"""One frozen dataclass that says everything about a run; each field is a flag of train.py with this docstring as help.

Named settings are in `sgg_fast/recipes.py`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import math
import typing


class ConfigError(ValueError):
    """Settings that cannot work together or do not exist; the message is one line and names the cure."""


TOY_DATA = ("toy", "toy-rare", "toy-words")
"""Values of --data that are no folder."""
CHOICES = {
    "attributes": ("none", "first"),
    "flip": ("none", "swap"),
    "conditioner": ("sgg", "text", "sgdiff"),
    "text_form": ("sentence", "phrases", "numbered"),
    "encoder": ("residual", "plain"),
    "triple": ("roles", "shared"),
    "context": ("triples", "global"),
    "token_init": ("none", "text"),
    "contrastive": ("bce", "literal", "infonce"),
    "image_embedding": ("clean", "noised", "noisy-image", "predicted", "latent"),
    "isa_weight": ("auto", "alpha_bar", "none"),
    "lr_schedule": ("constant", "cosine"),
    "optimizer": ("adam8bit", "adam"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "weights": ("master", "split", "lean"),
    "ema_device": ("auto", "cpu"),
    "attention": ("auto", "xformers", "sdpa", "cudnn"),
    "kernels": ("auto", "reference", "triton"),
    "fuse_unet": ("auto", "on", "off"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A run, both stages. Values that the paper fixes are marked P in `recipes.py`."""

    recipe: str = "toy"
    """Name of the settings that everything else was taken from."""
    model: str = ""
    """Stable Diffusion v1 in diffusers format: folder or hub id. Empty: the toy models."""
    clip: str = ""
    """CLIP ViT-B/32 for names and images: folder or hub id. Empty: the one that --model carries."""
    data: str = "toy"
    """Training set: "toy", "toy-rare" or "toy-words" (drawn on the spot; in a third of toy-rare one thing is above
    another that is elsewhere below it, or somebody holds something; toy-words speaks as people type), a folder that
    `sgg_fast.data.prepare` made (a set, or a cache of one), or a folder of images, each with its graph in a .json
    beside it."""
    attributes: str = "none"
    """Of a Visual Genome set (train.h5): objects by name alone, or with the first of their attributes in front."""
    flip: str = "none"
    """Mirrored images: none, or each once more with "left" and "right" swapped in its graph (swap)."""
    relation_draws: int = 1
    """Graphs of each image of a COCO set, whose relations are drawn from its boxes; each is a sample of its own."""
    resolution: int = 64
    """Side of the training images, in pixels; a multiple of 8."""
    num_scenes: int = 256
    """How many toy scenes are drawn, with --data toy, toy-rare or toy-words."""

    conditioner: str = "sgg"
    """What the UNet is conditioned by: SGG-IG's graph encoder, or a baseline without pre-training: text, the graph said
    to SD's text encoder, or sgdiff, the graph encoder of SGDiff."""
    text_form: str = "sentence"
    """How --conditioner text says a graph: in one sentence, in phrases that are a token each, or in one sentence with
    numbered names where there are several of a kind."""
    width: int = 128
    """D, width of the graph encoder."""
    num_layers: int = 4
    """Triple convolutions in the graph encoder."""
    encoder: str = "residual"
    """Triple convolutions with layer norm and residual sum, or plain as in eqs 3-6."""
    triple: str = "roles"
    """Eq. 7 with one map per role, or one map shared by subject and object as printed."""
    context: str = "triples"
    """What the UNet attends to: a token per triple, or X_global alone (eq. 11 as printed)."""
    token_init: str = "text"
    """Start each triple's token from SD's own text state of its phrase, the graph's share added through a gate."""
    gate_init: float = 1.0
    """Where the gates of --token-init text start: at 0 the tokens are SD's own text states at first, and the gates have
    to open at --graph-lr; at 1 the graph's share counts as much from the first step."""
    null_tokens: int = 77
    """States of the empty text that the null condition holds: 77 as Stable Diffusion was trained with, or fewer (2: its
    start and end) for a model that never saw the rest; then the context is only as long as its graphs."""
    instance_codes: bool = False
    """Tell objects of one name in a graph apart: a random code on every token that mentions the object."""

    mask_ratio: float = 0.3
    """Share of objects that the auto-encoder masks."""
    contrastive: str = "infonce"
    """Eq. 9: binary cross-entropy with one negative, the printed form, or InfoNCE."""
    num_negatives: int = 64
    """Negatives of --contrastive infonce, from the cached image embeddings."""
    graph_negatives: bool = True
    """Further negatives of eq. 9: the graph itself with one relation turned round or said the opposite way."""
    mae_weight: float = 1.0
    """Weight of the masked auto-encoder's loss in pre-training; 0 switches it off."""
    con_weight: float = 1.0
    """Weight of eq. 9 in pre-training; 0 switches it off."""

    loss_weight: float = 0.5
    """lambda of eq. 12: share of the diffusion loss; the rest is image-scene alignment."""
    isa_weight: str = "auto"
    """Weight of eq. 10 over timesteps: alpha_bar_t, or none as printed. Auto is alpha_bar, but none for
    --image-embedding noised, which carries its own."""
    image_embedding: str = "clean"
    """I(t) of eq. 10: the embedding of the clean image, its expectation under noise (noised), that of the noised image
    (noisy-image), of the image that the UNet predicts, or a small network's reading of the predicted latent."""
    condition_dropout: float = 0.1
    """Share of training images whose condition is dropped, for classifier-free guidance."""
    relation_dropout: float = 0.0
    """Share of training images whose graph is given without its relations, for relation guidance."""
    min_snr_gamma: float = 0.0
    """Weight the diffusion loss over timesteps by min(SNR, this) / SNR (usually 5); 0 for the paper's even weight."""

    geometry: float = 0.5
    """Weight of a loss of both stages: each relation's token predicts how the boxes of its pair lie; 0 for none."""

    attention_loss: float = 0.1
    """Weight of a loss of fine-tuning: the UNet's attention to an object's token belongs into its box; 0 for none."""

    batch_size: int = 8
    """Graphs or images per step and process; in fine-tuning per micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches of --batch-size whose gradients make one fine-tuning step; a step counts once."""
    pretrain_steps: int = 300
    """Iterations of --stage pretrain."""
    finetune_steps: int = 150
    """Iterations of --stage finetune."""
    pretrain_lr: float = 5e-4
    """Learning rate of pre-training."""
    unet_lr: float = 3e-4
    """Learning rate of the UNet in fine-tuning."""
    graph_lr: float = 1e-4
    """Learning rate of the graph modules in fine-tuning."""
    lr_schedule: str = "constant"
    """Learning rates over a stage: constant, or a cosine from full to a hundredth at the stage's last step."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise linearly to full."""
    optimizer: str = "adam8bit"
    """Fine-tuning optimiser: bitsandbytes' 8-bit Adam, or torch's. Pre-training always runs Adam in fp32."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this; 0 leaves it alone."""
    precision: str = "auto"
    """Precision of fine-tuning: auto is bf16 on CUDA and with bf16 --weights, else fp32; fp16 scales the loss."""
    weights: str = "master"
    """The UNet's weights in fine-tuning: in fp32, cast for compute (master); rounded to bf16 once, from then on with
    the rest of fp32 kept by the optimiser, so that nothing is cast (split); or in bf16 alone, updates rounded
    stochastically so that small ones are kept on average (lean: 4 of 10 bytes a weight saved)."""
    optimizer_in_backward: bool = False
    """Update each weight as soon as backward has its gradient, and free it: no gradient clipping, no accumulation."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in backward: less memory, about a quarter more work."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which the result then holds instead of the last ones; 0 for none."""
    ema_device: str = "auto"
    """Where the average lies: beside the weights, or in CPU memory (then updated every 16 steps)."""
    attention: str = "auto"
    """UNet attention: auto is xformers on CUDA and torch's SDPA elsewhere; cudnn is SDPA by cuDNN, in bf16 or fp16."""
    kernels: str = "auto"
    """Graph kernels: auto is Triton on CUDA and the reference form elsewhere."""
    fuse_unet: str = "auto"
    """The UNet with fused normalisation and gates and merged projections, under stock parameter names: auto is on for
    CUDA."""
    cuda_graphs: bool = True
    """Replay steps on CUDA as CUDA graphs instead of launching kernel by kernel; what cannot be captured (DeepSpeed,
    --precision fp16, --optimizer-in-backward) runs eagerly."""
    seed: int = 0
    """Seed of everything random; each draw is a hash of (seed, step, sample)."""

    max_skipped: int = 10
    """Steps in a row whose loss or gradient is not finite, all skipped, at which the run stops."""
    rank_timeout: float = 600.0
    """Seconds that a process waits for the others of the run before it stops."""

    validation_pairs: int = 32
    """Images kept out of pre-training with their graphs, to validate on; at most an eighth of the set."""
    validate_every: int = 100
    """Pre-training steps between validations (and one at the end); 0 for none."""
    early_stop: int = 0
    """End pre-training after this many validations in a row without improvement; 0 for never."""
    log_every: int = 10
    """Steps between log lines."""
    sample_every: int = 50
    """Fine-tuning steps between sample sheets; 0 for none."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is always written at the end."""
    num_samples: int = 4
    """Graphs on a sample sheet."""
    sheet_steps: int = 20
    """DDIM steps of the pictures on a sample sheet."""
    sampling_steps: int = 100
    """DDIM steps that infer.py takes with the saved result unless told otherwise."""
    guidance: float = 4.0
    """Classifier-free guidance scale of sample sheets, and of infer.py with the saved result unless told otherwise."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"--{flag(name)} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"--{flag(field.name)} must be a finite number, not {value}")
        for name in ("batch_size", "pretrain_steps", "finetune_steps", "width", "num_layers", "num_scenes",
                     "log_every", "checkpoint_every", "sampling_steps", "sheet_steps", "num_negatives",
                     "accumulation_steps", "relation_draws", "max_skipped",
                     "rank_timeout"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"--{flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("mask_ratio", "loss_weight", "condition_dropout", "relation_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{flag(name)} must lie between 0 and 1, not {getattr(self, name)}")
        for name in (
            "pretrain_lr",
            "unet_lr",
            "graph_lr",
            "mae_weight",
            "con_weight",
            "geometry",
            "attention_loss",
            "max_grad_norm",
            "sample_every",
            "num_samples",
            "warmup_steps",
            "min_snr_gamma",
            "ema",
            "validation_pairs",
            "validate_every",
            "early_stop",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{flag(name)} must not be negative, not {getattr(self, name)}")
        if not 1 <= self.null_tokens <= 77:
            raise ConfigError(f"--null-tokens must lie between 1 and 77, not {self.null_tokens}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must lie between 0 and 4294967295, not {self.seed}")
        if self.guidance < 1:
            raise ConfigError(f"--guidance must be at least 1 (1 is none), not {self.guidance}")
        if self.resolution < 32 or self.resolution % 8:
            raise ConfigError(f"--resolution must be a multiple of 8, at least 32, not {self.resolution}")
        if self.token_init == "text" and self.context == "global":
            raise ConfigError(
                "--token-init text starts the triples' tokens, but --context global has none: use --token-init none"
            )
        if self.conditioner != "sgg" and self.loss_weight != 1:
            raise ConfigError(
                f"--conditioner {self.conditioner} has no X_global for image-scene alignment: leave out --loss-weight"
            )
        for name in ("geometry", "attention_loss", "instance_codes"):
            if self.conditioner != "sgg" and getattr(self, name):
                raise ConfigError(
                    f"--conditioner {self.conditioner} has none of SGG-IG's own tokens for --{flag(name)}: leave it out"
                )
        if self.image_embedding == "noised" and self.isa_weight == "alpha_bar":
            raise ConfigError("--image-embedding noised carries its own weight: leave --isa-weight out")
        if self.relation_dropout and self.reads_text and not self.reads_phrases:
            raise ConfigError(f"--relation-dropout: --text-form {self.text_form} says the whole graph; use phrases")
        if self.mae_weight == self.con_weight == 0:
            raise ConfigError(
                "--mae-weight 0 and --con-weight 0 leave nothing to pre-train on: give one of them weight"
            )
        if self.early_stop and not self.validate_every:
            raise ConfigError(f"--early-stop {self.early_stop} needs validations: --validate-every above 0")
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse ways of updating weights that exclude each other."""
        if self.ema >= 1:
            raise ConfigError(f"--ema must be below 1 (such as 0.9999), not {self.ema}")
        if self.precision == "fp32" and self.attention == "cudnn":
            raise ConfigError("--attention cudnn computes in bf16 or fp16: leave out --precision fp32, or use sdpa")
        if self.bf16_weights and self.precision in ("fp32", "fp16"):
            raise ConfigError(f"--weights {self.weights} keeps weights in bf16: leave out --precision {self.precision}")
        if self.weights == "split" and self.optimizer_in_backward:
            raise ConfigError("--optimizer-in-backward steps by bitsandbytes, without --weights split: use lean")
        for name, used in (
            (f"--weights {self.weights}", self.bf16_weights),
            ("--optimizer-in-backward", self.optimizer_in_backward),
        ):
            if used and self.optimizer != "adam8bit":
                raise ConfigError(f"{name} needs --optimizer adam8bit, not {self.optimizer}")
        if self.optimizer_in_backward:
            excluded = {
                "--max-grad-norm (set it to 0)": self.max_grad_norm > 0,
                "--accumulation-steps above 1": self.accumulation_steps > 1,
                "--precision fp16": self.precision == "fp16",
            }
            if given := [name for name, wrong in excluded.items() if wrong]:
                raise ConfigError(
                    "--optimizer-in-backward never has all gradients at once, so it excludes " + " and ".join(given)
                )

    def needs_boxes(self, stage: str) -> bool:
        """Whether the stage learns from where objects lie in the pictures."""
        return self.geometry > 0 or (stage == "finetune" and self.attention_loss > 0)

    @property
    def bf16_weights(self) -> bool:
        """Whether fine-tuning's UNet is in bf16, without autocast; not under DeepSpeed, which refuses such weights."""
        return self.weights != "master"

    @property
    def reads_phrases(self) -> bool:
        """Whether the context is made of SD's states of the triples' phrases."""
        if self.conditioner == "text":
            return self.text_form == "phrases"
        return self.conditioner == "sgg" and self.token_init == "text"

    @property
    def reads_text(self) -> bool:
        """Whether drawing needs SD's text encoder."""
        return self.conditioner == "text" or self.reads_phrases

    @property
    def alignment_weight(self) -> str:
        """ "alpha_bar" or "none": `isa_weight` with "auto" resolved."""
        if self.isa_weight != "auto":
            return self.isa_weight
        return "none" if self.image_embedding == "noised" else "alpha_bar"


def flag(name: str) -> str:
    """Field name -> flag name without its dashes."""
    return name.replace("_", "-")


def field_help() -> dict[str, str]:
    """Field name -> the docstring under it."""
    body = ast.parse(inspect.getsource(Config)).body[0]
    assert isinstance(body, ast.ClassDef)
    pairs = itertools.pairwise(body.body)
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
        and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)
    }  # fmt: skip


def add_flags(parser: argparse._ActionsContainer, only: tuple[str, ...] = ()) -> None:
    """One flag a field (of `only`, where given), without defaults: what is absent comes from the recipe."""
    help_of, types = field_help(), typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if field.name == "recipe" or (only and field.name not in only):
            continue
        kind: dict[str, typing.Any] = {"type": types[field.name], "choices": CHOICES.get(field.name)}
        if types[field.name] is bool:  # --name and --no-name
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            f"--{flag(field.name)}",
            default=argparse.SUPPRESS,
            help=f"{help_of[field.name]} (toy: {field.default})".replace("%", "%%"),
            **kind,
        )


def as_flags(settings: dict[str, object]) -> list[str]:
    """Field names and values -> the words that set them on a command line."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag(name)}")
        else:
            words += [f"--{flag(name)}", str(value)]
    return words
