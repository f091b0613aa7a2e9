"""Settings of a run: seed, logs, samples and checkpoints, stopping, and defaults of sampling."""

from __future__ import annotations

import dataclasses

from .fields import ConfigError, Part, setting
from .model import ModelConfig
from .optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class RunConfig(Part):
    """All settings that are neither model nor data nor optimisation."""

    recipe: str = setting("toy", of_recipe=True)
    """Name of the recipe that the settings come from."""
    seed: int = setting(0, at_least=0, at_most=2**32 - 1, in_card=True, makes_cache=True)
    """Seed of everything random; each draw is a hash of (seed, step, sample)."""
    cuda_graphs: bool = setting(True, may_change=True, exact=(True, False))
    """Capture steps on CUDA as CUDA graphs instead of launching kernel by kernel; steps that cannot be captured
    (DeepSpeed, --precision fp16, --optimizer-in-backward) run eagerly."""
    weight_gradients: str = setting("inline", choices=("inline", "aside"), may_change=True, exact=())
    """Where backward computes the gradients of the UNet's linear layers and convolutions: inline, or aside, on a second
    stream, while backward goes on (a captured step on one GPU; to the same bits, for up to 128 MiB). aside needs
    --max-grad-norm 0. Predicted for the paper's fine-tuning (256 x 256, batch 2): 1.8 ms a step less on an RTX 4090,
    0.7 on an H200. Not measured, so not the default."""
    max_skipped: int = setting(10, at_least=1, may_change=True)
    """The run stops after this many skipped steps in a row. A step is skipped if its loss or gradient is not finite."""
    rank_timeout: float = setting(600.0, at_least=1, may_change=True)
    """Seconds that each of several processes waits for the others before it stops."""
    validation_pairs: int = setting(32, at_least=0)
    """Images kept out of pre-training with their graphs, for validation; at most an eighth of the set."""
    validate_every: int = setting(100, at_least=0, may_change=True)
    """Pre-training steps between validations (and one at the end); 0 for none."""
    early_stop: int = setting(0, at_least=0, may_change=True)
    """End pre-training after this many validations in a row without improvement; 0 for never."""
    log_every: int = setting(10, at_least=1, may_change=True)
    """Steps between log lines."""
    sample_every: int = setting(50, at_least=0, may_change=True)
    """Fine-tuning steps between sample sheets; 0 for none."""
    checkpoint_every: int = setting(100, at_least=1, may_change=True)
    """Steps between checkpoints; one is always written at the end."""
    num_samples: int = setting(4, at_least=0, may_change=True)
    """Graphs on a sample sheet."""
    sheet_steps: int = setting(20, at_least=1, may_change=True)
    """DDIM steps of the pictures on a sample sheet."""
    sheet_device: str = setting(
        "auto",
        choices=("auto", "cpu"),
        may_change=True,
        exact=(),
        saves_memory={"sheet_device": "cpu"},
        only_with="num_samples",
    )
    """Device on which a sample sheet's names are embedded and its pictures decoded: that of the training, which the
    frozen models visit, or the CPU, where they stay. The UNet draws on its own."""
    sampling_steps: int = setting(100, at_least=1, may_change=True)
    """DDIM steps that infer.py takes with the saved result unless --steps is given."""
    guidance: float = setting(4.0, at_least=1, hint="1 is none", may_change=True)
    """Classifier-free guidance scale of sample sheets, and the default of infer.py with the saved result."""

    def check(self) -> None:
        """Raises `ConfigError` for early stopping without validations."""
        if self.early_stop and not self.validate_every:
            raise ConfigError(f"--early-stop {self.early_stop} needs validations: --validate-every above 0")

    def check_form(self, optim: OptimConfig, model: ModelConfig) -> None:
        """Raises `ConfigError` where weight gradients cannot go aside."""
        cures = {
            "set --max-grad-norm 0": optim.max_grad_norm > 0,
            "leave out --optimizer-in-backward": optim.optimizer_in_backward,
            "leave out --lora": optim.lora > 0,
            "leave out --gradient-checkpointing": model.gradient_checkpointing,
        }
        given = [cure for cure, wrong in cures.items() if wrong]
        if self.weight_gradients == "aside" and given:
            raise ConfigError(
                f"--weight-gradients aside needs updates behind backward and all activations: {' and '.join(given)}"
            )
