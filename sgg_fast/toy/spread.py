"""Scenes of `toy-words-spread`, for training: four single things spread over the ground.

`toy-words` seldom shows a house, a tree, an animal and a person side by side, because its ground fills up with groups.
People ask for just that, and say of some pairs only where one thing is.
"""

from __future__ import annotations

from sgg_fast.toy.layout import Group, Thing
from sgg_fast.toy.words import WordsPlan

SPREAD = 4
"""Number of things to spread."""
LARGE, SMALL = ("house", "tree", "car", "horse"), ("person", "person", "sheep", "dog", "umbrella", "ball")
"""The larger ones find their places first. People are drawn twice as often as another small thing."""


class SpreadPlan(WordsPlan):
    """A scene on land that starts with up to `SPREAD` single things on the ground, some with a hat."""

    KINDS = ("land",)

    def _start(self) -> None:
        self.target = max(self.target, len(self.backdrop) + SPREAD + 1)
        num_large = 2 if self.chance(0.75) else 1
        large, small = self.rng.permutation(LARGE), self.rng.permutation(SMALL)
        for category in (*large[:num_large], *small, *large[num_large:]):
            if len(self.groups) == SPREAD:
                return
            self._settle(self._single(str(category)), "ground")

    def _single(self, category: str) -> Group:
        thing = Thing(category)
        group = Group([thing], feet=[] if category == "ball" else [thing])
        if category in ("person", "dog", "horse"):
            self._hat(group, thing, 0.6 if category == "person" else 0.1)
        return group
