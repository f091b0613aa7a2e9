"""Draw scene graphs: `python infer.py graph.json` writes one PNG a graph and prints the paths."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before torch loads OpenMP: on a busy machine spinning threads made the toy's steps 20 times slower than sleeping ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("graph", type=Path, help="sg2im JSON: one scene graph or a list")
    parser.add_argument(
        "--model", help="a run of train.py or a pipeline folder (runs/toy if it is there, else the toy model we ship)"
    )
    parser.add_argument("--out", type=Path, help="PNG to write (outputs/GRAPH.png); several graphs get -0, -1, ...")
    parser.add_argument("--steps", type=int, help="DDIM steps (as the model's recipe)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance, 1 for none (as the model's recipe)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives every graph the same noise (0)")
    parser.add_argument("--size", type=int, help="pixels a side (as trained)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 for input that cannot be used (one line on stderr)."""
    args = parse(argv)
    try:
        paths = draw(args)
    except (ValueError, OSError) as error:
        print(f"infer.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infer.py: interrupted", file=sys.stderr)
        return 130
    for path in paths:
        print(path)
    return 0


def draw(args: argparse.Namespace) -> list[Path]:
    """The PNG files that were written. Raises ValueError or OSError for input that cannot be used."""
    from sgg_fast.data.formats import load_scene_graphs
    from sgg_fast.quiet import quiet_libraries

    graphs = load_scene_graphs(args.graph)  # refused before the libraries are loaded, which takes seconds
    quiet_libraries()
    from sgg_fast.drawing import check_settings, draw_graphs, load_pipeline, output_paths

    check_settings(args.steps, args.guidance, args.seed, args.size)
    paths = output_paths(args.out or Path("outputs") / f"{args.graph.stem}.png", len(graphs))
    pipeline, description = load_pipeline(args.model)
    print(f"model: {description}", file=sys.stderr)
    if unseen := pipeline.unseen_names(graphs):
        print(f"words that the model never saw in training: {', '.join(unseen)}", file=sys.stderr)
    draw_graphs(pipeline, graphs, paths, args.steps, args.guidance, args.seed, args.size)
    return paths


if __name__ == "__main__":
    sys.exit(main())
