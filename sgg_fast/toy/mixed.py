"""Scenes of `toy-words-mixed`, for training: things together that `toy-words` keeps apart.

A model that saw each verb with few things does not draw it with others. In half of these scenes, the verb of a held-out
combination, or the thing, occurs with many other partners. The combinations of `HELD_OUT` stay held out.
"""

from __future__ import annotations

from sgg_fast.toy.layout import HEAD, SEAT, TOP, Group, Thing
from sgg_fast.toy.words import WordsPlan

SMALL = {"car": 0.4, "boat": 0.4, "sheep": 0.55, "dog": 0.55, "house": 0.4, "tree": 0.4}
"""Scale at which a thing fits into a hand."""
GRIPS = {
    **{"car": (0.1, 0.5), "boat": (0.3, 0.8), "house": (0.1, 0.7), "tree": (0.5, 0.85)},
    **dict.fromkeys(("sheep", "dog"), (0.2, 0.5)),
}
"""Where the hand takes it, in its unit box."""
RIDERS = {"boat": ("person", "sheep", "horse"), "horse": ("dog", "sheep"), "sheep": ("dog",), "dog": ("sheep",)}
"""Riders that `toy-words` has rarely or never, by mount; all sit as a dog does."""
STANDERS = {
    "car": ("dog", "sheep", "person", "ball"),
    "house": ("dog", "person", "ball", "bird"),
    "tree": ("ball", "bird"),
    "horse": ("ball", "bird"),
    "sheep": ("ball", "bird"),
}
"""Things that stand on another one."""
WEARERS = ("bird", "car", "house", "tree", "dog", "horse")
COVERED = {
    "house": ("snow", "flowers"),
    **dict.fromkeys(("car", "tree", "boat", "horse", "sheep", "dog"), ("snow", "leaves", "flowers")),
}
"""Covers of each thing."""


class MixedPlan(WordsPlan):
    """A scene of `toy-words` that starts with one or two things in company that is new to it."""

    def _start(self) -> None:
        if self.chance(0.5):
            super()._start()
            return
        self.target = max(self.target, len(self.backdrop) + 3)
        land = (self._new_rider, self._standing, self._in_hand, self._hatted, self._covered)
        for _ in range(2):
            if self.room < 2:
                return
            make = self._new_rider if self.kind == "sea" else land[self.rng.integers(len(land))]
            group = make()
            afloat = group.things[-1].category == "boat" and not group.feet
            if afloat and self.kind == "land":
                group.feet = [group.things[-1]]
            self._settle(group, "sea" if afloat and self.kind != "land" else "ground")

    def _new_rider(self) -> Group:
        mount = Thing("boat" if self.kind == "sea" else self.pick(*RIDERS))
        rider = Thing(self.pick(*RIDERS[mount.category]))
        if rider.category == "person":
            rider = Thing("person", "person riding")
        rider.resize(0.65 if rider.category == "horse" else 0.85)
        rider.attach((0.5, 0.74), mount, SEAT[mount.sprite])
        boat = mount.category == "boat"
        group = Group([rider, mount] if boat else [mount, rider], [(rider, "riding", mount)], [] if boat else [mount])
        self._hat(group, rider, 0.3 if rider.category != "sheep" else 0.0)
        return group

    def _standing(self) -> Group:
        below = Thing(self.pick(*STANDERS))
        above = Thing(self.pick(*STANDERS[below.category]))
        above.resize(0.8 if above.category in ("dog", "sheep", "person") else 1.0)
        above.attach((0.5, 0.98), below, TOP[below.sprite])
        return Group([below, above], [(above, "standing on", below)], [below])

    def _in_hand(self) -> Group:
        person, held = Thing("person", "person holding"), Thing(self.pick(*SMALL))
        held.resize(SMALL[held.category]).attach(GRIPS[held.category], person, (1.0, 0.42))
        return Group([person, held], [(person, "holding", held)], [person])

    def _hatted(self) -> Group:
        wearer, hat = Thing(self.pick(*WEARERS)), Thing("hat")
        hat.attach((0.5, 0.86), wearer, HEAD.get(wearer.sprite) or TOP.get(wearer.sprite, (0.7, 0.1)))
        return Group([wearer, hat], [(wearer, "wearing", hat)], [] if wearer.category == "bird" else [wearer])

    def _covered(self) -> Group:
        below = Thing(self.pick(*COVERED))
        cover = Thing(self.pick(*COVERED[below.category]), covers=below)
        return Group([below, cover], [(below, "covered in", cover)], [below])
