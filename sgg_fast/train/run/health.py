"""Watches a run's numbers: steps that were skipped because something was not finite, and spikes of the loss."""

from __future__ import annotations

import collections
import logging
import math
import statistics

from sgg_fast.train.run.interrupts import BadNumbers
from sgg_fast.train.run.log import RunLog

logger = logging.getLogger(__name__)

WINDOW = 20
"""Records that a loss is compared with; fewer than half of them are too few to judge by."""
SPIKE = 8.0
"""How many typical deviations of its logarithm above the median a loss is a spike."""


class Health:
    """Every process has one and sees the same skips (`StepResult.applied`), so all stop at the same step."""

    def __init__(self, log: RunLog, max_skipped: int) -> None:
        self.log, self.max_skipped = log, max_skipped
        self.skipped = 0
        """Steps skipped since the start of this process."""
        self._in_a_row = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def applied(self) -> None:
        """A step was applied."""
        self._in_a_row = 0

    def skip(self, step: int, loss: float, samples: list[int]) -> None:
        """Step number `step` was not applied: count it, log the samples of all processes.

        loss: this process's, which may be finite where only the gradient was not, or only another process's.
        Raises `BadNumbers` at the `max_skipped`-th in a row.
        """
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        self.log.event(event="skipped", step=step, loss=repr(loss), samples=samples, skipped=self.skipped)
        if self._in_a_row >= self.max_skipped:
            raise BadNumbers(
                f"loss or gradient not finite in {self._in_a_row} steps in a row, the last at step {step} with samples "
                f"{', '.join(map(str, samples))}; the checkpoint before them is kept: lower the learning rates, mend "
                "these samples, or raise --max-skipped"
            )

    def record(self, step: int, loss: float) -> None:
        """A mean loss goes into the log: flag it where it lies far above the ones before.

        By logarithms, for small losses vary by factors; one that is not positive is not judged.
        """
        if loss <= 0:
            return
        if len(self._recent) >= WINDOW // 2:
            usual = statistics.median(self._recent)
            deviation = 1.4826 * statistics.median(abs(value - usual) for value in self._recent)  # sigma of a normal
            if math.log(loss) > usual + SPIKE * max(deviation, 0.01):
                self.log.event(event="spike", step=step, loss=round(loss, 6), usual=round(math.exp(usual), 6))
                logger.warning("step %d: the loss jumped to %.3g, usually %.3g", step, loss, math.exp(usual))
        self._recent.append(math.log(loss))
