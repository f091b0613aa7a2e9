"""Entities and relations: how much of a graph its picture shows, compared with floor and ceiling.

Plain relation accuracy flatters, because much of a graph holds in any picture of its world. So each figure is computed
for the drawn pictures, for two floors (another graph's picture; the graph with every relation flipped) and for the
ceiling (real pictures, seen by the same detector). The headline is the counterfactual pair.

Letters: N objects of a graph, M instances in its picture, S seeds, G graphs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from sgg_fast.eval.detector import Instance
from sgg_fast.eval.relations import (
    AXIS,
    DIRECTIONAL,
    Relation,
    centre,
    exchangeable,
    flipped,
    holds,
    is_ground,
    shown,
)
from sgg_fast.eval.whole import Parse, bound, num_extra
from sgg_fast.graph import SceneGraph

OF_SETS = " (sets)"
"""Suffix of a figure that is computed over sets, as in LAION-SG; figures without it are over multisets."""
_MOST_ASSIGNMENTS = 5000


def match(
    graph: SceneGraph, instances: Sequence[Instance], parse: Parse, use_relations: bool = True
) -> list[Instance | None]:
    """The instance for each object of the graph, or None: one-to-one and of the object's category.

    Among objects of one category, the assignment maximises the number of correct named colours and, with
    `use_relations`, of correct relations; ties go to the more confident one. Without `use_relations`, relations cannot
    choose the instances that they are judged by.
    """
    asked = [parse(name) for name in graph.objects]
    chosen: list[Instance | None] = [None] * len(asked)
    options = {}
    for category in dict.fromkeys(category for category, _ in asked):
        nodes = [i for i, (c, _) in enumerate(asked) if c == category]
        there = sorted((x for x in instances if x.category == category), key=lambda x: -x.confidence)
        options[category] = nodes, list(_assignments(there, len(nodes)))
        for node, instance in zip(nodes, options[category][1][0], strict=True):
            chosen[node] = instance

    def quality() -> float:
        colours = sum(x is not None and x.colour == colour for x, (_, colour) in zip(chosen, asked, strict=True))
        confidence = sum(x.confidence for x in chosen if x is not None)
        holding = sum(bool(holds(p, a, b)) for p, a, b in _pairs(graph, chosen)) if use_relations else 0
        return colours + holding + 0.01 * confidence

    # Solve one category at a time with the others fixed: exact if one category is doubled, and nearly exact otherwise.
    for _ in range(2):
        for nodes, assignments in options.values():
            best, best_quality = None, -math.inf
            for assignment in assignments if len(assignments) > 1 else ():
                for node, instance in zip(nodes, assignment, strict=True):
                    chosen[node] = instance
                if quality() > best_quality:
                    best, best_quality = assignment, quality()
            for node, instance in zip(nodes, best or (), strict=False):
                chosen[node] = instance
    return chosen


def _assignments(there: list[Instance], num_nodes: int) -> Iterable[tuple[Instance | None, ...]]:
    """Every way to give `num_nodes` objects distinct instances, as many as there are; the likeliest few of too many."""
    while math.perm(max(len(there), num_nodes), num_nodes) > _MOST_ASSIGNMENTS and len(there) > num_nodes:
        there = there[:-1]
    padded = [*range(len(there)), *[-1] * (num_nodes - len(there))]
    ways = itertools.islice(itertools.permutations(padded, num_nodes), _MOST_ASSIGNMENTS)
    for way in dict.fromkeys(ways):
        yield tuple(there[k] if k >= 0 else None for k in way)


def _pairs(graph: SceneGraph, chosen: Sequence[Instance | None]) -> Iterable[tuple[str, Instance, Instance]]:
    for s, predicate, o in graph.relations:
        a, b = chosen[s], chosen[o]
        if a is not None and b is not None:
            yield predicate, a, b


@dataclasses.dataclass(frozen=True)
class PictureScore:
    """Scores of one picture against one graph."""

    found: list[bool]
    """Per object: an instance of its category was found."""
    colour_right: list[bool]
    """Per found object that names a colour which the detector reads: the colour is right."""
    num_instances: int
    counts_right: list[bool]
    """Per category of the graph: there are as many instances as objects."""
    relations: list[tuple[str, bool, bool]]
    """Per relation that can be judged: predicate, both objects found, and the relation holds between them."""
    entity_iou: float
    relation_iou: float
    graph_iou: float
    iou_of_sets: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The three IoUs over sets, as in LAION-SG; 0 where both are empty."""
    num_extra: int = 0
    """Instances that match no object, except grounds that the graph does not name."""
    bound: list[bool] = dataclasses.field(default_factory=list)
    """Per pair of objects of different categories with different colours, as read: each shows its own."""

    @property
    def faultless(self) -> bool:
        """Whether every requested object is there, once, as requested, and nothing else."""
        holding = all(holds for _, _, holds in self.relations)
        return all(self.found) and not self.num_extra and all(self.colour_right) and holding


def score_picture(graph: SceneGraph, instances: Sequence[Instance], parse: Parse) -> PictureScore:
    """Score one picture against one graph.

    The intersections over union are over multisets, and also over sets, as in LAION-SG (Li et al., 2024). They compare
    names (with colours as read) between the graph and all instances. They compare predicates and (subject name,
    predicate, object name) between the graph and the relations of its pairs in the picture (the requested relation,
    else its opposite, else none). LAION-SG's own figures come from a language model's reading of the picture and do not
    compare.
    """
    chosen = match(graph, instances, parse)
    asked = [parse(name) for name in graph.objects]
    colours = [
        x.colour == colour
        for x, (_, colour) in zip(chosen, asked, strict=True)
        if x is not None and x.colour is not None and colour is not None
    ]
    wanted, there = Counter(category for category, _ in asked), Counter(x.category for x in instances)
    judged, asked_relations, seen = [], [], []
    for relation in graph.relations:
        s, predicate, o = relation
        a, b = chosen[s], chosen[o]
        asked_relations.append(_by_name(graph, relation))
        if a is None or b is None:
            judged.append((predicate, False, False))
            continue
        holding = holds(predicate, a, b)
        if holding is None:
            asked_relations.pop()
            continue
        judged.append((predicate, True, holding))
        if (what := shown(relation, a, b)) is not None:
            seen.append(_by_name(graph, what))
    names_seen = [
        name if x.colour == parse(name)[1] or parse(name)[1] is None else f"other {x.category}"
        for name, x in zip(graph.objects, chosen, strict=True)
        if x is not None
    ]
    extra = len(instances) - len(names_seen)
    return PictureScore(
        found=[x is not None for x in chosen],
        colour_right=colours,
        num_instances=len(instances),
        counts_right=[there[category] == number for category, number in wanted.items()],
        relations=judged,
        entity_iou=_iou(graph.objects, [*names_seen, *[None] * extra]),
        relation_iou=_iou([p for _, p, _ in asked_relations], [p for _, p, _ in seen]),
        graph_iou=_iou(asked_relations, seen),
        iou_of_sets=(
            set_iou(graph.objects, [*names_seen, *(there.keys() - wanted.keys())]),
            set_iou([p for _, p, _ in asked_relations], [p for _, p, _ in seen]),
            set_iou(asked_relations, seen),
        ),
        num_extra=num_extra([category for category, _ in asked], chosen, instances),
        bound=bound(asked, chosen),
    )


def _by_name(graph: SceneGraph, relation: Relation) -> tuple[str, str, str]:
    return graph.objects[relation[0]], relation[1], graph.objects[relation[2]]


def _iou(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """IoU of multisets; 1 for two empty ones."""
    left, right = Counter(a), Counter(b)
    union = (left | right).total()
    return (left & right).total() / union if union else 1.0


def set_iou(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """IoU of sets, which hold equal elements once; 0 for two empty ones. LAION-SG's definition."""
    left, right = set(a), set(b)
    return len(left & right) / len(left | right) if left | right else 0.0


def flipped_graph(graph: SceneGraph) -> SceneGraph:
    """The graph with every relation replaced by its opposite; a picture of the same objects reaches this floor."""
    return SceneGraph(graph.objects, tuple(flipped(relation) for relation in graph.relations))


def _share(values: Iterable[bool]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def relation_table(scores: Iterable[PictureScore]) -> dict[str, dict[str, float]]:
    """Predicate -> number of relations, share that hold, share that hold if both objects are there."""
    by_predicate: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for score in scores:
        for predicate, present, holding in score.relations:
            by_predicate[predicate].append((present, holding))
    return {
        predicate: {
            "asked": len(rows),
            "holds": _share(holding for _, holding in rows),
            "holds if present": _share(holding for present, holding in rows if present),
        }
        for predicate, rows in sorted(by_predicate.items())
    }


def summarise(scores: Sequence[PictureScore]) -> dict[str, float]:
    """Figures over all pictures. Entities: over objects; relations: over predicates, with equal weights."""
    table = relation_table(scores)

    def macro(column: str, predicates: Iterable[str]) -> float:
        values = [table[p][column] for p in predicates if p in table and not math.isnan(table[p][column])]
        return float(np.mean(values)) if values else math.nan

    num_found = sum(sum(score.found) for score in scores)
    return {
        "without a fault": _share(score.faultless for score in scores),
        "entity recall": _share(f for score in scores for f in score.found),
        "entity precision": num_found / max(sum(score.num_instances for score in scores), 1),
        "counts": _share(c for score in scores for c in score.counts_right),
        "colours": _share(c for score in scores for c in score.colour_right),
        "colours bound": _share(b for score in scores for b in score.bound),
        "relations": macro("holds", table),
        "relations if present": macro("holds if present", table),
        "directional": macro("holds", DIRECTIONAL),
        "directional if present": macro("holds if present", DIRECTIONAL),
        "entity IoU": float(np.mean([score.entity_iou for score in scores])),
        "relation IoU": float(np.mean([score.relation_iou for score in scores])),
        "SG IoU": float(np.mean([score.graph_iou for score in scores])),
        **{
            f"{name}{OF_SETS}": float(np.mean([score.iou_of_sets[k] for score in scores]))
            for k, name in enumerate(("entity IoU", "relation IoU", "SG IoU"))
        },
    }


def per_picture(score: PictureScore) -> dict[str, float]:
    """One picture's own means, NaN if the graph has no such element; the intervals use them."""
    directional = [row for row in score.relations if row[0] in DIRECTIONAL]
    return {
        "without a fault": float(score.faultless),
        "entity recall": _share(score.found),
        "entity precision": sum(score.found) / score.num_instances if score.num_instances else math.nan,
        "relations": _share(holding for _, _, holding in score.relations),
        "relations if present": _share(holding for _, present, holding in score.relations if present),
        "directional if present": _share(holding for _, present, holding in directional if present),
        "SG IoU": score.graph_iou,
    }


@dataclasses.dataclass(frozen=True)
class CounterfactualPair:
    """Two graphs that differ in one direction, drawn from the same noise."""

    graph_index: int
    relation: Relation
    """The relation in the graph itself."""
    turned: SceneGraph
    """The same graph with that relation flipped."""

    @property
    def axis(self) -> int:
        """0 for left and right, 1 for above and below."""
        return AXIS[self.relation[1]]


def counterfactual_pairs(graph_index: int, graph: SceneGraph) -> list[CounterfactualPair]:
    """At most one pair per axis: the first directional relation that could also hold the other way round.

    Its objects have names that occur once, and the toy world puts them in either order (`exchangeable`). The rest of
    the graph does not determine the order: no chain of other relations leads from one object to the other, where an
    interaction that joins two objects leads both ways.
    """
    pairs, names = [], Counter(graph.objects)
    for axis in (0, 1):
        for k, (s, predicate, o) in enumerate(graph.relations):
            if AXIS.get(predicate) != axis or names[graph.objects[s]] > 1 or names[graph.objects[o]] > 1:
                continue
            if not exchangeable(graph.objects[s], graph.objects[o], axis):
                continue
            others = [_steps(graph, r, axis) for n, r in enumerate(graph.relations) if n != k]
            steps = [step for some in others for step in some]
            if o in _reached(s, steps) or s in _reached(o, steps):
                continue
            relations = list(graph.relations)
            relations[k] = flipped(relations[k])
            pairs.append(
                CounterfactualPair(graph_index, (s, predicate, o), SceneGraph(graph.objects, tuple(relations)))
            )
            break
    return pairs


def _steps(graph: SceneGraph, relation: Relation, axis: int) -> list[tuple[int, int]]:
    """The order that a relation implies along `axis`, as (earlier, later); both ways for objects that are together."""
    s, predicate, o = relation
    if predicate in AXIS:
        if AXIS[predicate] != axis:
            return []
        return [(s, o)] if predicate in ("left of", "above") else [(o, s)]
    if is_ground(graph.objects[s]) or is_ground(graph.objects[o]):
        return []
    return [(s, o), (o, s)]


def _reached(start: int, steps: Sequence[tuple[int, int]]) -> set[int]:
    reached = {start}
    while more := {b for a, b in steps if a in reached} - reached:
        reached |= more
    return reached


def follows(
    pair: CounterfactualPair, graph: SceneGraph, own: Sequence[Instance], turned: Sequence[Instance], parse: Parse
) -> float:
    """Share of the two pictures in which the subject lies on the side that its graph names; NaN if unseen.

    Pictures that do not react give exactly 0.5: one of the two is right. The side is the sign of the difference of the
    box centres along the axis. NaN if one of the objects is missing in one of the pictures.
    """
    right = []
    for asked, instances in ((graph, own), (pair.turned, turned)):
        chosen = match(asked, instances, parse, use_relations=False)
        s, predicate, o = next(r for r in asked.relations if r in (pair.relation, flipped(pair.relation)))
        a, b = chosen[s], chosen[o]
        if a is None or b is None:
            return math.nan
        away = (centre(b.box) - centre(a.box))[pair.axis]
        right.append(bool(away > 0) == (predicate in ("left of", "above")))
    return sum(right) / 2
