"""One evaluation from start to end: draw, detect, score, write. The command line is in `__main__.py`.

Letters: S seeds, G graphs, P counterfactual pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sgg_fast.data.cache import fingerprint
from sgg_fast.diffusion import limits
from sgg_fast.drawing.models import load_model, made_scheduler, scheduler_name
from sgg_fast.eval import bootstrap, distances, metrics, pictures, report
from sgg_fast.eval.detector import Detector, Instance
from sgg_fast.eval.detectors import ToyWorldDetector, choose_detector, open_detector
from sgg_fast.eval.direction import GATE, measure_direction
from sgg_fast.eval.pictures import EvalJob, GraphSet, noise_seed
from sgg_fast.eval.whole import faultless_table, merged
from sgg_fast.graph import SceneGraph
from sgg_fast.nn.conditioner import SceneGraphConditioner
from sgg_fast.pipeline import SceneGraphToImagePipeline

AXES = ("left/right", "above/below")
NUM_GRAPHS = 100
"""Graphs drawn without --num."""
NUM_ACCURACY = 200
"""Scenes for the toy detector's own accuracy."""
_SHEET = 12


@dataclasses.dataclass(frozen=True)
class EvalPlan:
    """The pictures of one evaluation."""

    graphs: list[SceneGraph]
    """[G]."""
    pairs: list[metrics.CounterfactualPair]
    """[P]."""
    partners: dict[int, SceneGraph]
    """Graph of every pair, by its index in the set; some indices are beyond the first G."""
    folder: Path

    def path(self, seed: int, index: int, turned: int | None = None) -> Path:
        """File of a graph's picture, or of its counterfactual along axis `turned`."""
        ending = "" if turned is None else f"-{AXES[turned].replace('/', '-')}"
        return self.folder / f"seed-{seed}" / f"{index:05d}{ending}.png"

    def jobs(self, seed: int) -> list[EvalJob]:
        """Every picture of a seed."""
        own = {**dict(enumerate(self.graphs)), **self.partners}
        jobs = [EvalJob(self.path(seed, i), graph, noise_seed(seed, i)) for i, graph in sorted(own.items())]
        return jobs + [
            EvalJob(self.path(seed, p.graph_index, p.axis), p.turned, noise_seed(seed, p.graph_index))
            for p in self.pairs
        ]


def make_plan(graph_set: GraphSet, num: int, num_pairs: int, folder: Path) -> EvalPlan:
    """The first `num` graphs, and the first pairs of each axis. Raises ValueError if there are too few graphs."""
    if graph_set.size is not None and graph_set.size < num:
        raise ValueError(f"--num {num}: {graph_set.name} has {graph_set.size} graphs")
    last = max(num, graph_set.scan * num_pairs) if graph_set.size is None else graph_set.size
    pairs: list[metrics.CounterfactualPair] = []
    wanted = [num_pairs, num_pairs]
    for i in tqdm(range(last), desc="look for pairs", leave=False, disable=None):
        if wanted == [0, 0]:
            break
        for pair in metrics.counterfactual_pairs(i, graph_set.graph(i)):
            if wanted[pair.axis]:
                wanted[pair.axis] -= 1
                pairs.append(pair)
    partners = {p.graph_index: graph_set.graph(p.graph_index) for p in pairs}
    return EvalPlan([graph_set.graph(i) for i in range(num)], pairs, partners, folder)


def evaluate(args: argparse.Namespace) -> str:
    """Draw what is missing, score everything, write it to --out; returns the tables.

    Raises ValueError or OSError for unusable input, `NotFiniteError` for pictures with NaN or Inf.
    """
    model = load_model(args.model)
    pipeline = model.pipeline
    steps = pipeline.config.sampling_steps if args.steps is None else args.steps
    guidance = pipeline.config.guidance if args.guidance is None else args.guidance
    if args.scheduler is not None:
        pipeline.scheduler = made_scheduler(pipeline, args.scheduler)
    if refusal := limits.refusal(pipeline.scheduler, steps):
        raise ValueError(f"--steps {steps} with --scheduler {scheduler_name(pipeline)}: {refusal}")
    graph_set = pictures.open_graphs(args.data, pipeline.config.resolution)
    num = min(NUM_GRAPHS, graph_set.size or NUM_GRAPHS) if args.num is None else args.num
    plan = make_plan(graph_set, num, args.pairs, args.out / "pictures")
    kind = {"spoken": pictures.is_spoken(args.data), "held_out": pictures.is_unseen(args.data)}
    which = args.detector or ("toy-words" if any(kind.values()) else None)  # that of toy is blind to the combinations
    chosen, warning = choose_detector(which, [*plan.graphs, *plan.partners.values()])
    warnings = [warning] if warning else []
    if args.inception:
        if graph_set.image is None:
            raise ValueError(f"--inception: {graph_set.name} has no real pictures to compare with")
        warnings += distances.check_inception(args.inception, num * args.seeds, num)
    detector = open_detector(chosen)
    settings = {"model": model.weights, "data": graph_set.name, "steps": steps, "guidance": guidance}
    settings |= {"relation_guidance": args.relation_guidance, "scheduler": scheduler_name(pipeline)}
    settings["graphs"] = pictures.graphs_digest(graph_set)
    pictures.check_settings(args.out, settings)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for seed in seeds:
        pictures.draw_missing(pipeline, plan.jobs(seed), steps, guidance, relation_guidance=args.relation_guidance)

    result: dict[str, Any] = {**settings, "model": model.description, "weights": model.weights, "seeds": args.seeds}
    result |= {"first seed": args.first_seed, "num graphs": num}
    result["detector"] = _detector_accuracy(detector, pipeline, kind)
    drawn = [pictures.load([plan.path(seed, i) for i in range(num)]) for seed in seeds]
    real = None if graph_set.image is None else np.stack([graph_set.image(i) for i in range(num)])
    if graph_set.turned:
        warnings.append(f"{len(graph_set.turned)} real pictures were turned as their orientation tag says")
    result |= _score(detector, pipeline, plan.graphs, drawn, real)
    result["counterfactual pairs"] = _score_pairs(detector, plan, seeds)
    if isinstance(pipeline.graph_encoder, SceneGraphConditioner):  # baselines have no token for a relation
        result["direction"] = dataclasses.asdict(measure_direction(pipeline, plan.graphs))
    result["distances"] = _distances(args, graph_set, plan, np.stack(drawn), real, warnings)
    result["diversity"] = _diversity(graph_set, np.stack(drawn), real)
    if args.against:
        result["against"] = {"folder": str(args.against), "differences": compare(result, args.against)}
    result["warnings"] = warnings
    text = _tables(result)
    report.write_result(args.out, result)
    (args.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    report.contact_sheet(args.out / "sheet.png", _cells(plan, graph_set, args.first_seed))
    return f"{text}\n\n{args.out / 'eval.json'}\n{args.out / 'tables.md'}\n{args.out / 'sheet.png'}"


_MEASURED: dict[tuple[Any, ...], dict[str, Any]] = {}
"""A toy detector's accuracy by autoencoder and kind of scenes: a process that evaluates several models measures it
once."""


def _detector_accuracy(
    detector: Detector | None, pipeline: SceneGraphToImagePipeline, kind: dict[str, bool]
) -> dict[str, Any]:
    """Accuracy of a toy detector on scenes with known objects: as drawn, and through this model's autoencoder.

    kind: arguments of `draw_scene` for scenes like those of the set.
    """
    from sgg_fast.toy.detector import accuracy
    from sgg_fast.toy.world import HELD_OUT_SEED, draw_scene

    if detector is None:
        return {"name": "none"}
    if not isinstance(detector, ToyWorldDetector):
        return {"name": detector.name}
    known = fingerprint(pipeline.vae), NUM_ACCURACY, detector.name, *kind.values()
    if known in _MEASURED:
        return _MEASURED[known]
    scenes = [draw_scene(HELD_OUT_SEED, i, **kind) for i in range(NUM_ACCURACY)]
    through = pictures.through_vae(pipeline.vae, np.stack([scene.image for scene in scenes]))
    own = {"real": None, "through the VAE": through}
    found = {name: accuracy(detector.network, scenes, images) for name, images in own.items()}
    figures = {name: {"recall": a.recall, "precision": a.precision, "colour": a.colour} for name, a in found.items()}
    _MEASURED[known] = {"name": detector.name, "scenes": len(scenes), "accuracy": figures}
    return _MEASURED[known]


def _score(
    detector: Detector | None,
    pipeline: SceneGraphToImagePipeline,
    graphs: Sequence[SceneGraph],
    drawn: Sequence[np.ndarray],
    real: np.ndarray | None,
) -> dict[str, Any]:
    """Rows of figures: the model, its two floors and, if there are real pictures, the ceilings."""
    if detector is None:
        return {"whole": {}, "rows": {}, "predicates": {}, "intervals": {}, "per picture": {}}

    found = [detector.find(images, graphs) for images in drawn]

    def scored(
        found: Sequence[list[list[Instance]]], asked: Sequence[SceneGraph] = graphs
    ) -> list[metrics.PictureScore]:
        return [metrics.score_picture(g, x, detector.parse) for one in found for g, x in zip(asked, one, strict=True)]

    rows = {"drawn": scored(found)}
    if len(graphs) > 1:
        others = [detector.find(np.roll(images, 1, axis=0), graphs) for images in drawn]
        rows["floor: another graph's picture"] = scored(others)
    rows["floor: every relation flipped"] = scored(found, [metrics.flipped_graph(graph) for graph in graphs])
    if real is not None:
        rows["ceiling: real pictures"] = scored([detector.find(real, graphs)])
        rows["ceiling: real, through the VAE"] = scored(
            [detector.find(pictures.through_vae(pipeline.vae, real), graphs)]
        )
    combinations = [_held_out(graph) for graph in graphs]
    if any(graph.relations for graph in combinations):
        rows["drawn, held-out combinations"] = scored(found, combinations)
    values = [[metrics.per_picture(score) for score in scored([one])] for one in found]
    per_picture = {name: [[v[name] for v in seed] for seed in values] for name in values[0][0]}
    whole = {}
    for name in [name for name in rows if name in ("drawn", "ceiling: real, through the VAE")]:
        faultless = np.array([score.faultless for score in rows[name]]).reshape(-1, len(graphs))
        whole[name] = faultless_table(graphs, faultless, detector.parse)
    return {
        "whole": whole,
        "rows": {name: metrics.summarise(scores) for name, scores in rows.items()},
        "predicates": {name: metrics.relation_table(scores) for name, scores in rows.items()},
        "intervals": {name: str(bootstrap.estimate(np.array(v))) for name, v in per_picture.items()},
        "per picture": per_picture,
    }


def _held_out(graph: SceneGraph) -> SceneGraph:
    """The graph with only its relations of `world.HELD_OUT`."""
    from sgg_fast.toy.world import held_out_relations

    return SceneGraph(graph.objects, tuple(graph.relations[k] for k in held_out_relations(graph)))


def _score_pairs(detector: Detector | None, plan: EvalPlan, seeds: Sequence[int]) -> dict[str, Any]:
    """Axis -> estimate over its pairs, and every value [S, P]: share of both pictures that follow."""
    if detector is None:
        return {}
    rated = {}
    for axis, name in enumerate(AXES):
        pairs, rows = [pair for pair in plan.pairs if pair.axis == axis], []
        graphs = [plan.partners[pair.graph_index] for pair in pairs]
        for seed in seeds if pairs else ():
            found: list[list[list[Instance]]] = [
                detector.find(pictures.load([plan.path(seed, p.graph_index, side) for p in pairs]), graphs)
                for side in (None, axis)
            ]
            rows.append(
                [
                    metrics.follows(pair, graph, own, turned, detector.parse)
                    for pair, graph, own, turned in zip(pairs, graphs, *found, strict=True)
                ]
            )
        array = np.array(rows, dtype=float) if rows else np.empty((0, 0))
        estimate = bootstrap.estimate(array)
        rated[name] = {
            "follows": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
            "chance": 0.5,
            "pairs": len(pairs) if rows else 0,
            "both seen": float((~np.isnan(array)).mean()) if array.size else float("nan"),
            "values": array,
        }
    return rated


def _distances(
    args: argparse.Namespace,
    graph_set: GraphSet,
    plan: EvalPlan,
    drawn: np.ndarray,
    real: np.ndarray | None,
    warnings: list[str],
) -> dict[str, Any]:
    """Distribution metrics of exactly the pictures in `drawn`: toy features for the toy, Inception's on request.

    Metrics that cannot be measured are added to `warnings`.
    """
    found: dict[str, Any] = {}
    flat = drawn.reshape(-1, *drawn.shape[2:])
    if graph_set.size is None and graph_set.image is not None:
        num = len(flat)
        others = np.stack([graph_set.image(i) for i in range(len(plan.graphs), len(plan.graphs) + 2 * num)])
        if num < 2:
            warnings.append("FID and KID of one picture do not exist: raise --num or --seeds")
        else:
            found["toy"] = distances.toy_distances(drawn, others[:num], others[num:])
    if args.inception:
        assert real is not None
        found["Inception"] = distances.inception_distances(flat, real, args.inception)
    return found


def _diversity(graph_set: GraphSet, drawn: np.ndarray, real: np.ndarray | None) -> dict[str, Any]:
    """Mean distance of one graph's pictures from different seeds, with every graph's value; empty if unmeasured."""
    if graph_set.size is not None or real is None:
        return {}
    from sgg_fast.toy.features import load_features

    network = load_features()
    num_seeds, num_graphs = drawn.shape[:2]
    features_SGD = network.read(drawn.reshape(-1, *drawn.shape[2:])).reshape(num_seeds, num_graphs, -1)
    values_G = distances.spread(features_SGD)
    estimate = bootstrap.estimate(values_G[None])
    return {
        "features": network.name,
        "mean distance": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "between real pictures of different graphs": float(distances.spread(network.read(real)[:, None]).mean()),
        "values": values_G,
    }


def _diversity_line(found: dict[str, Any]) -> str:
    if not found:
        return "not measured; it needs features that are trained to tell pictures apart, and only the toy has its own"
    if math.isnan(found["mean distance"]):
        return "not measured; it needs pictures from two seeds (--seeds 2)"
    return (
        f"pictures of one graph lie {found['mean distance']:.3f} [{found['low']:.3f}, {found['high']:.3f}] apart, real "
        f"ones of different graphs {found['between real pictures of different graphs']:.3f} ({found['features']})"
    )


def compare(result: dict[str, Any], other: Path) -> dict[str, str]:
    """Differences to another evaluation of the same graphs and seeds, paired by picture, with their intervals.

    Figures that are missing in an older evaluation are left out.
    """
    theirs = report.read_result(other)
    if theirs["data"] != result["data"]:
        raise ValueError(f"--against {other}: is about {theirs['data']}, not {result['data']}")

    def values(document: dict[str, Any]) -> dict[str, np.ndarray]:
        pairs = {f"follows, {axis}": entry["values"] for axis, entry in document["counterfactual pairs"].items()}
        return {name: np.array(rows, dtype=float) for name, rows in {**document["per picture"], **pairs}.items()}

    try:
        a, b = values(result), values(theirs)
        return {name: str(bootstrap.difference(a[name], b[name])) for name in a if name in b and a[name].size}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"--against {other}: {error}; use the same --num, --pairs, --seeds and --detector") from error


def _tables(result: dict[str, Any]) -> str:
    """Everything except the single values, as text."""
    relation_guidance = f", relation guidance {result['relation_guidance']}" if result["relation_guidance"] else ""
    parts = [
        f"model: {result['model']} ({result['weights']}), {result['steps']} steps, guidance {result['guidance']}"
        + relation_guidance,
        f"graphs: {result['data']}, {result['num graphs']}, seeds: {result['seeds']}",
        "detector: " + result["detector"]["name"],
        report.table(result["detector"].get("accuracy", {}), "its own accuracy on"),
    ]
    if not result["rows"]:
        parts.append("objects and relations: not measured")
    else:
        pairs = {
            axis: {name: value for name, value in entry.items() if name != "values"}
            for axis, entry in result["counterfactual pairs"].items()
        }
        parts += [
            report.table(result["rows"]),
            "IoU: of multisets, 1 if nothing is asked and nothing is there; IoU (sets): LAION-SG's, then 0",
            "pictures without any fault: every object there, once, with its colour, every relation true, nothing else",
            report.table(merged(result["whole"]), "graphs of"),
            "counterfactual pairs: the same noise, one relation flipped; the share of pictures that follow",
            report.table(pairs, "axis"),
            report.table(result["predicates"]["drawn"], "relations drawn"),
        ]
    if result["intervals"]:
        intervals = ", ".join(f"{name} {text}" for name, text in result["intervals"].items())
        parts.append(f"means over pictures, with 95 % intervals: {intervals}")
    if "direction" in result:
        parts.append(
            f"direction (share of the tokens' spread that a turn moves them by; gate {GATE}): "
            + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result["direction"].items())
        )
    parts += [report.table({name: entry}, "crowd") for name, entry in result["distances"].items()]
    parts.append("diversity: " + _diversity_line(result["diversity"]))
    if "against" in result:
        differences = result["against"]["differences"]
        parts.append(
            f"differences to {result['against']['folder']}: "
            + ", ".join(f"{name} {text}" for name, text in differences.items())
        )
    parts += [f"WARNING: {warning}" for warning in result["warnings"]]
    return "\n\n".join(part for part in parts if part)


def _cells(plan: EvalPlan, graph_set: GraphSet, seed: int) -> list[tuple[SceneGraph, dict[str, np.ndarray]]]:
    """The first graphs, unselected, with the pictures of `seed`, and the first pair of each axis."""
    cells = []
    for i, graph in enumerate(plan.graphs[:_SHEET]):
        images = {} if graph_set.image is None else {"real": graph_set.image(i)}
        cells.append((graph, {**images, "drawn": pictures.load([plan.path(seed, i)])[0]}))
    for axis in (0, 1):
        for pair in [pair for pair in plan.pairs if pair.axis == axis][:3]:
            graph, (s, predicate, o) = plan.partners[pair.graph_index], pair.relation
            both = pictures.load([plan.path(seed, pair.graph_index, side) for side in (None, axis)])
            caption = f"{graph.objects[s]} {predicate} {graph.objects[o]}"
            cells.append((graph, {caption: both[0], "flipped": both[1]}))
    return cells
