"""Settings of the optimisation: batches, steps, learning rates, and the storage and update of weights."""

from __future__ import annotations

import dataclasses

from .fields import ConfigError, Part, setting
from .model import ModelConfig

BLOCKWISE = ("adam8bit", "adam4bit", "adafactor")
"""Optimisers with a blockwise quantised state."""


@dataclasses.dataclass(frozen=True)
class OptimConfig(Part):
    """Optimisation of both stages."""

    batch_size: int = setting(8, at_least=1, in_card=True)
    """Graphs or images per step and process; in fine-tuning per micro-batch. Several processes (torchrun) add up."""
    accumulation_steps: int = setting(1, at_least=1)
    """Micro-batches of --batch-size whose gradients make one fine-tuning step; they count as one step. Gradients add
    up in the precision of the UNet's weights: bf16 with split and lean --weights."""
    pretrain_steps: int = setting(300, at_least=1, may_change=True)
    """Iterations of --stage pretrain."""
    finetune_steps: int = setting(150, at_least=1, may_change=True, in_card=True)
    """Iterations of --stage finetune."""
    pretrain_lr: float = setting(5e-4, at_least=0)
    """Learning rate of pre-training."""
    unet_lr: float = setting(3e-4, at_least=0, in_card=True)
    """Learning rate of the UNet in fine-tuning."""
    graph_lr: float = setting(1e-4, at_least=0, in_card=True)
    """Learning rate of the graph modules in fine-tuning."""
    lr_schedule: str = setting("constant", choices=("constant", "cosine"), exact=())
    """Learning rates over a stage: constant, or a cosine from full to a hundredth at the stage's last step."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps over which the learning rates rise linearly to full."""
    max_grad_norm: float = setting(1.0, at_least=0)
    """Upper bound of the gradient's norm; a larger gradient is clipped. 0 turns clipping off. Clipping costs time on a
    GPU: the norm needs all gradients, so the update waits for the whole backward, where a captured step without it
    updates weights while backward runs. Predicted for the paper's fine-tuning (256 x 256, batch 2): 4 to 6 ms a step on
    an RTX 4090, 1 to 1.5 on an H200. Clipped or not, a gradient that is not finite is never applied: with clipping it
    skips the step, without it only the weights that are updated with it."""
    weights: str = setting(
        "auto",
        choices=("auto", "master", "split", "lean"),
        exact=("auto", "master", "split"),
        saves_memory={"weights": "lean", "precision": "auto", "optimizer": "adam8bit"},
    )
    """Storage of the UNet's weights in fine-tuning: fp32, cast for compute (master); bf16, while the optimiser keeps
    the low halves of fp32, so nothing is cast (split); or bf16 alone, with updates rounded stochastically so that small
    ones are kept on average (lean: saves 4 of 10 bytes a weight). auto: split on CUDA where our kernels update the
    whole UNet after bf16 compute, so without --lora, --ema, --deepspeed, --precision fp32 or fp16 and --kernels
    reference; else master. A resumed run keeps what it began with."""
    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"), in_card=True)
    """Precision of fine-tuning: auto is bf16 on CUDA and with bf16 --weights, else fp32; fp16 scales the loss."""
    optimizer_in_backward: bool = setting(
        False, exact=(), saves_memory={"optimizer_in_backward": True, "max_grad_norm": 0, "optimizer": "adam8bit"}
    )
    """Update each weight once backward has its gradient, and free that: no gradient clipping, no accumulation."""
    optimizer: str = setting(
        "adam",
        choices=("adam8bit", "adam", "adam4bit", "adafactor"),
        in_card=True,
        saves_memory={"optimizer": "adam8bit"},
    )
    """Fine-tuning optimiser: Adam with 8-bit moments (2 bytes a weight); with fp32 moments (8 bytes; faster on a CPU);
    with 4-bit moments (1.1 bytes); or Adafactor (0.01 bytes: means of rows and columns, no first moment). Norms, biases
    and embeddings keep fp32 moments. --weights lean and --optimizer-in-backward exclude adam. Pre-training always runs
    Adam in fp32."""
    pretrain_matmul: str = setting("high", choices=("high", "highest"), may_change=True, exact=())
    """torch's float32 matmul precision in pre-training on CUDA: high multiplies in TF32 (operands of 10 mantissa bits,
    sums in fp32), highest in fp32."""
    lora: int = setting(0, at_least=0, in_card=True)
    """Rank of low-rank adapters (LoRA) that fine-tuning trains in place of the UNet's weights; 0: the weights. The
    frozen weights are stored in --precision. The graph modules train whole."""
    lora_targets: str = setting("attention", choices=("attention", "convolutions"), in_card=True, only_with="lora")
    """Layers of the UNet that get --lora's adapters: its attention projections, or also the convolutions of its
    blocks."""
    lora_lr: float = setting(1e-4, at_least=0, in_card=True, only_with="lora")
    """Learning rate of --lora's adapters, in place of --unet-lr."""
    ema: float = setting(0.0, at_least=0, below=1, hint="such as 0.9999")
    """Decay per step of an average of the weights, which the result holds instead of the last ones; 0 for none."""
    ema_device: str = setting(
        "auto", choices=("auto", "cpu"), exact=(), saves_memory={"ema_device": "cpu"}, only_with="ema"
    )
    """Device of the average: beside the weights, or in CPU memory (updated every 16 steps)."""

    def check(self) -> None:
        """Raises `ConfigError` for ways of updating weights that exclude each other."""
        if self.lora and self.bf16_weights:
            raise ConfigError(
                f"--lora stores the frozen weights in --precision and its adapters in fp32: leave out --weights "
                f"{self.weights}"
            )
        if self.bf16_weights and self.precision in ("fp32", "fp16"):
            raise ConfigError(f"--weights {self.weights} keeps weights in bf16: leave out --precision {self.precision}")
        for name, used in (
            (f"--weights {self.weights}", self.weights == "lean"),
            ("--optimizer-in-backward", self.optimizer_in_backward),
        ):
            if used and self.optimizer not in BLOCKWISE:
                raise ConfigError(f"{name} needs --optimizer {', '.join(BLOCKWISE[:-1])} or {BLOCKWISE[-1]}, not "
                                  f"{self.optimizer}")  # fmt: skip
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

    def check_model(self, model: ModelConfig) -> None:
        """Raises `ConfigError` for a precision that the model's operators do not compute in."""
        if self.precision == "fp32" and model.attention == "cudnn":
            raise ConfigError("--attention cudnn computes in bf16 or fp16: leave out --precision fp32, or use sdpa")
        if self.precision == "fp32" and model.cross_attention == "ours":
            raise ConfigError(
                "--cross-attention ours computes in bf16 or fp16: leave it out, or leave out --precision fp32"
            )

    @property
    def bf16_weights(self) -> bool:
        """Whether fine-tuning's UNet is in bf16, without autocast; not under DeepSpeed, which refuses such weights.

        "auto" is not: `engines.base.resolved` replaces it, and it stays where only fp32 weights can run.
        """
        return self.weights in ("split", "lean")

    def learning_rates(self, stage: str) -> dict[str, float]:
        """Full learning rates of a stage's parts, "unet" (or its adapters) and "graph"."""
        if stage == "pretrain":
            return {"graph": self.pretrain_lr}
        return {"unet": self.lora_lr if self.lora else self.unet_lr, "graph": self.graph_lr}

    def num_steps(self, stage: str) -> int:
        """Iterations of a stage."""
        return self.pretrain_steps if stage == "pretrain" else self.finetune_steps
