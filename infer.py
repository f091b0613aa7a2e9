"""Draw scene graphs: `python infer.py graph.json` writes one PNG a graph and prints the paths."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path, help="sg2im JSON: one scene graph or a list")
    parser.add_argument(
        "--model", help="a run of train.py or a pipeline folder (the newest toy run, else the toy models)"
    )
    parser.add_argument("--out", type=Path, help="PNG to write (outputs/GRAPH.png); several graphs get -0, -1, ...")
    parser.add_argument("--steps", type=int, default=100, help="DDIM steps (100)")
    parser.add_argument("--guidance", type=float, default=7.5, help="classifier-free guidance scale, 1 for none (7.5)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives every graph the same noise (0)")
    parser.add_argument("--size", type=int, help="pixels a side (as trained)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 for input that cannot be used (one line on stderr)."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    try:
        from sgg_fast.data.formats import load_scene_graphs
        from sgg_fast.drawing import draw_graphs, load_pipeline, output_paths

        if args.steps < 1 or not math.isfinite(args.guidance) or args.guidance < 1 or args.seed < 0:
            raise ValueError("--steps must be at least 1, --guidance a number from 1, --seed not negative")
        graphs = load_scene_graphs(args.graph)
        paths = output_paths(args.out or Path("outputs") / f"{args.graph.stem}.png", len(graphs))
        pipeline, description = load_pipeline(args.model)
        print(f"model: {description}", file=sys.stderr)
        if unseen := pipeline.unseen_names(graphs):
            print(f"words that the model never saw in training: {', '.join(unseen)}", file=sys.stderr)
        draw_graphs(pipeline, graphs, paths, args.steps, args.guidance, args.seed, args.size)
    except (ValueError, OSError) as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
