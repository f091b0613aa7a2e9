"""Validation of pre-training on held-out pairs: retrieval by X_global, and names of masked objects.

It measures accuracies with their values at chance. It is not a loss and not a gate; it goes into the log, and on
request it stops a run early. Letters: M held-out pairs, N objects, V names, I width of image embeddings, K width of the
targets.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from sgg_fast.config import ConfigError, RunConfig
from sgg_fast.data.sources import PairSource
from sgg_fast.train.run import processes
from sgg_fast.train.run.log import RunLog
from sgg_fast.train.stages import PretrainStage

CHUNK = 256
"""Graphs encoded at once."""

MASK_STEP = 2**31 - 1
"""Step of validation's mask draws: the same at every validation, and beyond the last step of any run."""

LARGEST_SHARE = 8
"""At most one image of this many is held out."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Accuracies by name, in 0..1, each beside the accuracy of the best guess without the input."""

    values: dict[str, float]
    chance: dict[str, float]

    @property
    def overall(self) -> float:
        """Mean of all accuracies, 0 without any; early stopping watches it."""
        return sum(self.values.values()) / max(1, len(self.values))


def split_pairs(run: RunConfig, source: PairSource, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Sample ids, int64: (those that train, those that validate).

    `validation_pairs` images, but at most an eighth of them, are drawn by the seed. All their graphs, and their mirror
    images, stay out of training. Only the first graph of each image validates, unmirrored. With fewer than two images
    there is no validation, and everything trains. mirrored: the second half of the images mirrors the first. Raises
    `ConfigError` if early stopping is on and nothing validates.
    """
    num_images = source.num_images
    num_drawn = num_images // 2 if mirrored else num_images
    num = min(run.validation_pairs, num_drawn // LARGEST_SHARE)
    if num < 2:
        if run.early_stop:
            raise ConfigError(
                f"--early-stop {run.early_stop} needs pairs to watch: --validation-pairs above 1 and a set of at "
                f"least {2 * LARGEST_SHARE} images; this one has {num_drawn}"
            )
        return np.arange(len(source)), np.arange(0)
    held_out = np.sort(np.random.default_rng([run.seed, MASK_STEP]).permutation(num_drawn)[:num])
    image = np.arange(len(source)) % num_images
    return np.flatnonzero(~np.isin(image % num_drawn, held_out)), held_out


def retrieved(similarity_MM: torch.Tensor, k: int) -> torch.Tensor:
    """Share of rows whose diagonal entry is among their k largest, a scalar.

    A tie counts against the row, so an encoder that gives every graph the same vector scores 0. So does NaN, which is
    not at least itself.
    """
    place_M = (similarity_MM >= similarity_MM.diagonal()[:, None]).sum(dim=1)
    return ((place_M >= 1) & (place_M <= k)).double().mean()


def nearest(predicted_NK: torch.Tensor, words_VK: torch.Tensor) -> torch.Tensor:
    """[N] index of the word at the least squared distance."""
    return (words_VK.square().sum(dim=1) - 2 * predicted_NK @ words_VK.T).argmin(dim=1)


class Validation:
    """Measures a stage on the held-out samples `ids` [M]. Equal weights give equal numbers at any step."""

    def __init__(self, stage: PretrainStage, ids: np.ndarray) -> None:
        self.stage, self.ids = stage, ids
        graphs = stage.cache.graphs
        self.words = graphs.object_name[graphs.object_pooled.bool()].unique().long()
        """[V] ids of every name that an object of the set has: what a masked object may be called."""

    @torch.no_grad()
    def measure(self) -> Scores:
        """Measure what the stage is trained for: by eq. 9, graph <-> image retrieval among held-out pairs; by the
        auto-encoder, nearest-word accuracy for masked objects."""
        stage = self.stage
        training = stage.training
        stage.eval()
        chunks = [self._chunk(self.ids[first : first + CHUNK]) for first in range(0, len(self.ids), CHUNK)]
        stage.train(training)
        x_global, images, guessed, true = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        objective, values, chance = stage.config.objective, {}, {}
        if objective.con_weight:
            similarity_MM = torch.nn.functional.normalize(x_global, dim=-1) @ images.T
            for name, matrix in (("graph_to_image", similarity_MM), ("image_to_graph", similarity_MM.T)):
                for k in (1, 5):
                    values[f"{name}_top{k}"] = float(retrieved(matrix, k))
                    chance[f"{name}_top{k}"] = min(1.0, k / len(self.ids))
        if objective.mae_weight and len(true):
            values["masked_object"] = float((guessed == true).double().mean())
            chance["masked_object"] = float(true.bincount().max()) / len(true)
        return Scores(values, chance)

    def _chunk(self, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
        """X_global [m, I] of the full graphs, their images [m, I], and each masked object's predicted and true word."""
        stage = self.stage
        _, targets, images = stage._frozen
        encoded = stage.encode(ids, MASK_STEP)
        predicted, name, masked = stage.decode(encoded)
        guessed = self.words[nearest(predicted[masked], targets[self.words])]
        index = torch.from_numpy(ids).to(images.device)
        return encoded.x_global[: len(ids)], images[index], guessed, name[masked].long()


class Watch:
    """Validates when it is due, and detects that the last `early_stop` validations brought no improvement."""

    def __init__(
        self, run: RunConfig, stage: PretrainStage, held_out: np.ndarray, state: dict[str, float] | None = None
    ) -> None:
        self.run = run
        self.state = {"best": 0.0, "since": 0, **(state or {})}
        """What a checkpoint holds: the best accuracy, and validations since then."""
        self.validation = Validation(stage, held_out) if run.validate_every and len(held_out) else None

    def look(self, step: int, last: bool, log: RunLog) -> bool:
        """Measure and log after `step` steps, if it is due. Returns True if training should end here."""
        if self.validation is None or not (last or step % self.run.validate_every == 0):
            return False
        scores = self.validation.measure()
        log.validated(step, scores.values, scores.chance)
        if scores.overall > self.state["best"]:
            self.state = {"best": scores.overall, "since": 0}
        else:
            self.state["since"] += 1
        if not any(processes.first_says([ended(self.run, self.state)])):  # on other hardware numbers may differ
            return False
        log.event(event="early stop", step=step, validations_without_improvement=self.state["since"])
        return True


def ended(run: RunConfig, state: dict[str, float]) -> bool:
    """Whether the `Watch` of this state has ended training."""
    return 0 < run.early_stop <= state["since"]
