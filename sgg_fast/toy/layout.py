"""Composes a toy scene: its groups of objects, their relations and their places.

Not here: pixels (`sgg_fast/toy/sprites.py`), masks and the graph (`sgg_fast/toy/world.py`).
Lengths are in picture units: 0..1, x to the right, y down.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sgg_fast.toy import sprites

PAINTED = ("hat", "boat", "kite", "car", "ball", "umbrella", "house")
PAINTS = ("red", "blue", "yellow", "green", "orange", "purple", "white")
COLOURED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PAINTED, PAINTS),
    "horse": ("brown", "white", "black"),
    "dog": ("brown", "white", "black"),
    "sheep": ("white", "black"),
    "bird": ("red", "blue", "yellow", "white"),
    "tree": ("green", "orange"),
}
"""The possible colour attributes of each category."""
USUAL = {
    "sheep": "white",
    "tree": "green",
    "horse": "brown",
    "dog": "brown",
    "sun": "yellow",
    "cloud": "white",
}
"""The colour of a category whose name has none; painted categories and shirts take any colour."""
COVERS = ("snow", "leaves", "flowers")
BACKDROPS = {"land": ("sky", "grass"), "sea": ("sky", "sea"), "beach": ("sky", "sea", "sand")}

ALOFT = ("sun", "cloud", "kite", "bird")
"""Categories at any height of the sky. Of the other categories the taller mostly stands higher, on ground or water."""

MAX_OBJECTS = 8

SIZES: dict[str, tuple[float, float]] = {
    "person": (0.21, 0.42),
    "person holding": (0.21, 0.42),
    "person riding": (0.23, 0.34),
    "hat": (0.2, 0.13),
    "horse": (0.46, 0.38),
    "sheep": (0.31, 0.25),
    "dog": (0.3, 0.25),
    "bird": (0.17, 0.14),
    "house": (0.42, 0.42),
    "tree": (0.34, 0.48),
    "car": (0.44, 0.22),
    "boat": (0.46, 0.44),
    "kite": (0.3, 0.36),
    "ball": (0.13, 0.13),
    "umbrella": (0.36, 0.44),
    "sun": (0.22, 0.22),
    "cloud": (0.34, 0.17),
}
"""Width and height in picture units, near the viewer."""

TOP = {
    "horse": (0.36, 0.4),
    "sheep": (0.36, 0.12),
    "house": (0.5, 0.04),
    "car": (0.5, 0.03),
    "tree": (0.5, 0.04),
}
HEAD = {
    **{"person": (0.51, 0.09), "person holding": (0.51, 0.09), "person riding": (0.46, 0.11)},
    **{"horse": (0.79, 0.1), "sheep": (0.82, 0.2), "dog": (0.72, 0.14)},
}
GRIP = {"kite": (0.0, 1.0), "umbrella": (0.5, 0.82), "ball": (0.2, 0.5), "hat": (0.3, 0.8), "bird": (0.5, 0.98)}
SEAT = {"horse": (0.36, 0.44), "boat": (0.3, 0.74), "sheep": (0.36, 0.2), "dog": (0.32, 0.46)}
"""Joints in a unit box: where a bird sits, a head, a hand's grip, a rider's place."""


@dataclasses.dataclass(eq=False)
class Thing:
    """An object in the making; `frame` is x, y, width, height."""

    category: str
    sprite: str = ""
    frame: sprites.Frame = (0.0, 0.0, 0.0, 0.0)
    flip: bool = False
    colour: str | None = None
    covers: Thing | None = None

    def __post_init__(self) -> None:
        self.sprite = self.sprite or self.category
        if self.sprite in SIZES:
            w, h = SIZES[self.sprite]
            self.frame = (-w / 2, -h, w, h)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.category}" if self.colour else self.category

    def resize(self, factor: float) -> Thing:
        self.frame = tuple(v * factor for v in self.frame)  # type: ignore[assignment]
        return self

    def attach(self, own: tuple[float, float], other: Thing, spot: tuple[float, float]) -> None:
        """Move this object so its point `own` lies on `spot` of `other`, both in unit boxes."""
        (x, y, w, h), (_, _, own_w, own_h) = other.frame, self.frame
        self.frame = (x + spot[0] * w - own[0] * own_w, y + spot[1] * h - own[1] * own_h, own_w, own_h)


Link = tuple[Thing, str, Thing]


@dataclasses.dataclass
class Group:
    """Objects that belong together, in drawing order, standing on (0, 0); `feet` stand on the ground."""

    things: list[Thing]
    links: list[Link] = dataclasses.field(default_factory=list)
    feet: list[Thing] = dataclasses.field(default_factory=list)

    def add(self, thing: Thing, *links: Link) -> None:
        self.things.append(thing)
        self.links.extend(links)

    def bounds(self) -> np.ndarray:
        """x0, y0, x1, y1 around all objects, in picture units."""
        frames = np.array([t.frame for t in self.things if t.covers is None])
        return np.concatenate([frames[:, :2].min(axis=0), (frames[:, :2] + frames[:, 2:]).max(axis=0)])

    def place(self, x: float, y: float, scale: float, mirror: bool) -> None:
        for thing in self.things:
            left, top, w, h = thing.frame
            left = -left - w if mirror else left
            thing.frame = (x + left * scale, y + top * scale, w * scale, h * scale)
            thing.flip ^= mirror


class Plan:
    """The scene before it is drawn: its objects and their places."""

    KINDS: tuple[str, ...] = ("land", *BACKDROPS)
    """The backdrops to choose from."""
    ANEW = 0.45
    """Share of repeated choices that are drawn again (`again`)."""
    HOLDERS, HOLDER_HATS = 0.6, 0.6
    """Share of people who hold something, and of those who then wear a hat."""
    HELD: tuple[str, ...] = ("kite", "umbrella", "ball")

    def __init__(self, rng: np.random.Generator, rare: bool = False) -> None:
        self.rng = rng
        self.kind = self.pick(*self.KINDS)
        self.backdrop = [Thing(category) for category in BACKDROPS[self.kind]]
        self.horizon = float(rng.uniform(0.34, 0.44) if self.kind == "beach" else rng.uniform(0.4, 0.54))
        self.shore = self.horizon + float(rng.uniform(0.16, 0.22))
        self.target = int(rng.integers(len(self.backdrop) + 1, MAX_OBJECTS + 1))
        self.favourites: dict[str, str] = {}
        self.groups: list[tuple[float, Group]] = []
        self.links: list[Link] = []
        self.covers: list[Thing] = []
        self.taken: list[np.ndarray] = []
        if rare:
            self._start_rare()
        self._fill()
        self._name_colours()

    @property
    def things(self) -> list[Thing]:
        """All objects in drawing order, far to near."""
        near = [thing for _, group in sorted(self.groups, key=lambda g: g[0]) for thing in group.things]
        return [*self.backdrop, *self.covers, *near]

    @property
    def room(self) -> int:
        return self.target - len(self.things)

    def pick(self, *options: str) -> str:
        return options[self.rng.integers(len(options))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def again(self, topic: str, *options: str) -> str:
        """Choose an option, often the one chosen for this topic before, so scenes hold two of a kind."""
        if topic not in self.favourites or self.chance(self.ANEW):
            self.favourites[topic] = self.pick(*options)
        return self.favourites[topic]

    def _fill(self) -> None:
        if self.kind != "sea" and self.room > 1 and self.chance(0.15):
            cover = Thing(self.pick(*(COVERS if self.kind == "land" else COVERS[1:2])), covers=self.backdrop[-1])
            self.covers.append(cover)
            self.links.append((self.backdrop[-1], "covered in", cover))
        menu = {
            "land": (
                self._people,
                self._animal,
                self._building,
                self._animal,
                self._building,
                self._sky,
                self._prop,
            ),
            "sea": (self._boats, self._boats, self._sky),
            "beach": (self._people, self._people, self._animal, self._prop, self._boats, self._sky),
        }[self.kind]
        for _ in range(12):
            if self.room <= 0:
                return
            make = menu[self.rng.integers(len(menu))]
            self._settle(make(), zone={self._sky: "sky", self._boats: "sea"}.get(make, "ground"))

    def _start_rare(self) -> None:
        """Start with a rare relation: one object above another in either order, or a person who holds something."""
        self.target = max(self.target, len(self.backdrop) + 2)
        topic = self.rng.random()
        if self.kind == "land" and topic < 0.25:
            lower, upper = (Thing(self.pick("sheep", "dog", "car", "ball")) for _ in range(2))
            group = self._column(lower, upper.resize(0.85), gap=self.rng.uniform(-0.02, 0.05))
            group.feet = [thing for thing in group.things if thing.category != "ball"]
            self._settle(group, zone="front")
        elif self.kind != "sea" and topic < 0.6:
            self._settle(self._holder(), zone="ground")
        else:
            lower = Thing(self.pick(*ALOFT))
            upper = Thing(self.pick(*(ALOFT[1:] if lower.category == "sun" else ALOFT)))
            self._settle(self._column(lower, upper, gap=self.rng.uniform(0.0, 0.12)), zone="sky")

    def _column(self, lower: Thing, upper: Thing, gap: float) -> Group:
        """Two objects, the feet of `upper` `gap` above the top of `lower`; the graph may name either direction."""
        _, _, w, h = upper.frame
        rise = lower.frame[3] + gap
        upper.frame = (self.rng.uniform(-0.25, 0.25) * rise - w / 2, -rise - h, w, h)
        link = (upper, "above", lower) if self.chance(0.5) else (lower, "below", upper)
        return Group([upper, lower], [link])

    def _settle(self, group: Group, zone: str) -> None:
        """Find a free place for the group; if there is none, the scene omits it."""
        ground = self.shore if self.kind == "beach" else self.horizon
        x0, y0, x1, y1 = group.bounds()
        for _ in range(8):
            if zone == "sky":
                scale = self.rng.uniform(0.85, 1.1)
                y = self.rng.uniform(0.02 - y0 * scale, max(self.horizon - 0.02, 0.04 - y0 * scale))
            elif zone == "sea" and self.kind == "beach":
                scale, y = 0.62, self.rng.uniform(self.horizon + 0.1, self.shore)
            else:
                depth = self.rng.uniform(0.8 if zone == "front" else 0.3, 1.0)
                scale, y = 0.72 + 0.33 * depth, ground + depth * (0.96 - ground)
            scale *= 0.92 if self.target > 6 else 1.0
            low, high = 0.01 - x0 * scale, 0.99 - x1 * scale
            if low > high or y + y0 * scale < 0.0:
                continue
            x = self.rng.uniform(low, high)
            box = np.array([x + x0 * scale, y + y0 * scale, x + x1 * scale, y + y1 * scale])
            if all(_overlap(box, other) < 0.12 for other in self.taken):
                # A mirrored group fills the mirrored bounds.
                mirror = self.chance(0.5)
                group.place(x + (x0 + x1) * scale if mirror else x, y, scale, mirror)
                self.taken.append(box)
                self.groups.append((y if zone != "sky" else -1.0, group))
                self.links += group.links
                self.links += [(t, "standing on", self.backdrop[-1]) for t in group.feet]
                return

    def _name_colours(self) -> None:
        """Give two of a kind mostly different colours; a single object gets a colour half of the time."""
        by_category: dict[str, list[Thing]] = {}
        for thing in self.things:
            by_category.setdefault(thing.category, []).append(thing)
        for category, colours in COLOURED.items():
            same = by_category.get(category, [])
            if same and self.chance(0.5 if len(same) == 1 else 0.85):
                order = self.rng.permutation(len(colours))
                for k, thing in enumerate(same):
                    thing.colour = colours[order[k % len(colours)]]

    def _hat(self, group: Group, wearer: Thing, p: float) -> None:
        if self.room > len(group.things) and self.chance(p):
            hat = Thing("hat")
            hat.attach((0.5, 0.86), wearer, HEAD[wearer.sprite])
            group.add(hat, (wearer, "wearing", hat))

    def _bird(self, group: Group, perch: Thing, p: float) -> None:
        if self.room > len(group.things) and self.chance(p):
            bird = Thing("bird")
            bird.attach((0.5, 0.98), perch, TOP[perch.sprite])
            group.add(bird, (bird, "standing on", perch))

    def _rider(self, group: Group, mount: Thing) -> None:
        """A person, or a dog, on a boat or an animal."""
        dog = self.chance(0.2) and mount.category != "dog"
        rider = Thing("dog").resize(0.85) if dog else Thing("person", "person riding")
        if mount.category in ("sheep", "dog"):
            rider.resize(0.85)
        rider.attach((0.5, 0.74), mount, SEAT[mount.sprite])
        group.links.append((rider, "riding", mount))
        # A boat's side hides the rider's legs; on a horse the near leg is visible.
        group.things.insert(0 if mount.category == "boat" else len(group.things), rider)
        self._hat(group, rider, 0.5)

    def _mounted(self, mount: Thing) -> Group:
        group = Group([mount], feet=[mount])
        self._rider(group, mount)
        return group

    def _people(self) -> Group:
        if self.kind == "land" and self.room > 1 and self.chance(0.4):
            return self._mounted(Thing("horse"))
        if self.room > 1 and self.chance(self.HOLDERS):
            return self._holder()
        return self._walker()

    def _walker(self) -> Group:
        person = Thing("person")
        group = Group([person], feet=[person])
        self._hat(group, person, 0.7)
        return group

    def _holder(self) -> Group:
        person, held = Thing("person", "person holding"), Thing(self.pick(*self.HELD))
        held.attach(GRIP[held.category], person, (1.0, 0.42))
        group = Group([person, held], [(person, "holding", held)], [person])
        self._hat(group, person, 0.0 if held.category == "umbrella" else self.HOLDER_HATS)
        return group

    def _animal(self) -> Group:
        animal = Thing("dog" if self.kind == "beach" else self.again("animal", "sheep", "dog", "horse"))
        group = Group([animal], feet=[animal])
        self._hat(group, animal, 0.3)
        if animal.category != "dog":
            self._bird(group, animal, 0.3)
        if self.kind == "land" and self.room > len(group.things) and self.chance(0.35):
            self._behind(group, animal, Thing(self.pick("tree", "house", "car", "sheep", "horse")), 0.05)
        return group

    def _building(self) -> Group:
        front = Thing(self.again("building", "house", "tree", "car"))
        group = Group([front], feet=[front])
        if self.room > 1 and self.chance(0.4):
            options = ("snow",) if front.category == "tree" else ("snow", "leaves")
            cover = Thing(self.pick(*options), covers=front)
            group.add(cover, (front, "covered in", cover))
        else:
            self._bird(group, front, 0.25)
        if self.room > len(group.things) and self.chance(0.55):
            tall = (
                ("tree", "house")
                if front.category == "car"
                else ("tree", "house", "sheep", "horse", "dog", "car", "person")
            )
            self._behind(group, front, Thing(self.pick(*tall)), 0.04)
        return group

    def _behind(self, group: Group, front: Thing, back: Thing, rise: float) -> None:
        """Put `back` beside the edge of `front`, a little further away, about half of it hidden."""
        (_, _, front_w, _), (_, y, w, h) = front.frame, back.frame
        reach = (front_w / 2 + self.rng.uniform(-0.05, 0.15) * w) * (1 if self.chance(0.5) else -1)
        back.frame = (reach - w / 2, y - rise, w, h)
        group.things.insert(0, back)
        group.links.append((back, "behind", front))

    def _prop(self) -> Group:
        prop = Thing(self.again("prop", "ball", "umbrella"))
        return Group([prop], feet=[prop] if prop.category == "umbrella" else [])

    def _sky(self) -> Group:
        sunless = all(t.category != "sun" for t in self.things)
        if sunless and self.chance(0.55):
            sun = Thing("sun")
            group = Group([sun])
            if self.room > 1 and self.chance(0.4):
                cloud = Thing("cloud")
                cloud.attach((0.5, 0.5), sun, (self.rng.uniform(0.0, 1.0), 0.85))
                group.add(cloud, (sun, "behind", cloud))
            return group
        return Group([Thing(self.pick("cloud", "cloud", "bird", "kite"))])

    def _boats(self) -> Group:
        boat = Thing("boat")
        group = Group([boat])
        if self.room > 1 and self.chance(0.6):
            self._rider(group, boat)
        if self.room > len(group.things) and self.chance(0.3):
            self._behind(group, boat, Thing("boat"), 0.06)
        return group


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Shared area of two boxes over the area of the smaller one."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
    return float(np.prod(np.maximum(sides, 0.0)) / smaller)
