"""Watches the losses of a run: skipped steps with values that are not finite, and spikes."""

from __future__ import annotations

import collections
import logging
import math
import statistics

from sgg_fast.train.run.interrupts import BadNumbers
from sgg_fast.train.run.log import RunLog

logger = logging.getLogger(__name__)

WINDOW = 20
"""Records that a loss is compared with; with fewer than half of them no loss is judged."""
SPIKE = 8.0
"""A loss is a spike if its logarithm is this many typical deviations above the median."""


class Health:
    """Counts skips and spikes. All processes see the same skips (`StepResult.applied`) and stop at the same step."""

    def __init__(self, log: RunLog, max_skipped: int) -> None:
        self.log, self.max_skipped = log, max_skipped
        self.skipped = 0
        """Steps skipped since the start of this process."""
        self._in_a_row = 0
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def applied(self) -> None:
        """Record an applied step."""
        self._in_a_row = 0

    def skip(self, step: int, loss: float, samples: list[int]) -> None:
        """Record that step number `step` was skipped: count it, log the samples of all processes.

        loss: this process's, which may be finite if only the gradient, or only another process, was not. Raises
        `BadNumbers` at the `max_skipped`-th skip in a row.
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
        """Record a mean loss and flag it if it lies far above the ones before.

        Logarithms are compared, because small losses vary by factors; a loss that is not positive is not judged.
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
