"""How the toy models of this package were made.

Commands for the parts of the foundation: `python -m sgg_fast.toy.build vae`, then `clip`, then `unet`. Each continues
where it stopped, and writes fp16 weights to `--out`; `--install` copies them into the package, where
`sgg_fast/toy/models.py` finds them. Two more commands make the judging networks: `detector --scenes 7000` and `features
--scenes 4000`. The parts of `toy-words` are made by the same commands with `--data-set toy-words`, as docs/toy.md lists
them. `train.py` trains SGG-IG on that foundation, and then `python -m sgg_fast.toy.build ship --out LAST
--average-with SPREAD`:

    train.py --recipe toy-words --stage pretrain --out RUN
    train.py --recipe toy-words --stage finetune --out RUN --data CACHE --steps 9800 --lr-schedule constant
        --ema 0.9995
    train.py --recipe toy-words --stage finetune --out MIXED --model RUN/finetune/pipeline --data CACHE2 --steps 8000
        --ema 0.9995
    train.py --recipe toy-words --stage finetune --out CROWDED --model MIXED/finetune/pipeline --data CACHE3
        --steps 6000 --ema 0.9995 --warmup-steps 200 --loss-weight 1 --relation-dropout 0.2
    train.py --recipe toy-words --stage finetune --out SPREAD --model CROWDED/finetune/pipeline --data CACHE4
        --steps 4204 --ema 0.9995 --warmup-steps 200 --loss-weight 1 --relation-dropout 0.2
    train.py --recipe toy-words --stage finetune --out LAST --model SPREAD/finetune/pipeline --data CACHE4
        --steps 1500 --ema 0.998 --warmup-steps 100 --loss-weight 1 --relation-dropout 0.2 --seed 1

CACHE: `python -m sgg_fast.data.prepare cache --recipe toy-words --data toy-words --num-scenes 40000 --out CACHE`;
CACHE2 with `--data toy-words-mixed --seed 1`, CACHE3 with `--data toy-words-crowded --seed 2`, CACHE4 with `--data
toy-words-spread --seed 3`. Fine-tuning ran as two processes (`torchrun --nproc_per_node 2`, `--accumulation-steps 1
--precision bf16`). `card --eval DIR` puts the results of `sgg_fast.eval` on the card, `sheet` draws the README's
picture.

The shipped weights are not bit for bit the output of these commands. SGG-IG began from the UNet of the foundation after
5 600 of its 9 000 steps. Its first part was 3 181 steps of 32 and 5 500 of two times 32 on 16 000 scenes, then 4 296 on
40 000, each from the average of the one before in fp16, with Adam's moments anew. The first 400 steps of CROWDED were
under the rate of a run of 6 800. The parts of `toy` took 3000 (vae), 1500 (clip) and 6500 (unet) steps and were stopped
and continued with other step counts on the way; some combinations were held out of the scenes only later. The detector
of `toy` took 660 steps on 12 000 scenes with a first loss, 840 on 7 000 and 3 400 on 10 000 with the present one, the
features 600 steps on 1 500 scenes. That of `toy-words` took 400 steps on 4 000 scenes of `toy` and `toy-words`, then
1 600 on 8 000 of four kinds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

STEPS = {"vae": 6000, "clip": 3000, "unet": 20_000, "detector": 2400, "features": 1000, "detector_words": 1600}
PARTS = {
    "toy": ("vae", "clip", "unet", "detector", "features"),
    "toy-words": ("clip", "unet", "detector_words"),
}
"""World -> its own parts; `toy-words` shares the others with `toy`."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError for parts and files that do not fit each other."""
    parser = OneLineParser(prog="python -m sgg_fast.toy.build", description=__doc__)
    add = parser.add_argument
    add("part", choices=[*STEPS, "foundation", "ship", "card", "sheet"])
    add("--out", type=Path, default=Path("runs/toy-build"), help="folder of the parts; of the run to ship")
    add("--average-with", type=Path, help="with ship: the run that it continued; what ships is their mean")
    add("--data-set", default="toy", choices=tuple(PARTS), help="the world (%(default)s)")
    add("--steps", type=int, help=f"optimiser steps ({STEPS})")
    add("--start", type=Path, help="foundation whose UNet is trained on, with unet of toy-words")
    add("--first", type=int, default=0, help="steps that the UNet of --start has had (%(default)s)")
    add("--scenes", type=int, default=20_000, help="training scenes to draw")
    add("--eval", type=Path, default=Path("outputs/eval"), help="--out of the evaluation for the card")
    add("--data", default="", help="what the card says that it was trained on (as it stands there)")
    add("--install", action="store_true", help="copy the weights into the package when done")
    args = parser.parse_args(argv)
    own = PARTS[args.data_set]
    if args.part in STEPS and args.part not in own:
        raise ValueError(
            f"{args.part}: --data-set {args.data_set} has {', '.join(own)} of its own; the rest is that of toy"
        )
    if args.start and (args.part, args.data_set) != ("unet", "toy-words"):
        raise ValueError("--start is of unet with --data-set toy-words")
    if args.average_with and args.part != "ship":
        raise ValueError("--average-with is of ship")
    missing = [part for part in ("vae", "clip") if not (args.out / f"{part}.safetensors").is_file()]
    if missing and not args.start and args.part in ("unet", "foundation"):
        raise ValueError(f"{args.out} has no {' and no '.join(missing)}: build that first")
    args.steps = args.steps or STEPS.get(args.part)
    return args


@command("toy.build")
def main(argv: list[str] | None) -> None:
    """Exit code 0; 2 for parts that do not fit, and for an evaluation of another model than the shipped one."""
    args = parse(argv)
    from sgg_fast.quiet import quiet_libraries

    quiet_libraries()
    from sgg_fast.toy import parts

    if args.part == "foundation":
        parts.assemble(args.out, args.out / "foundation")
    elif args.part == "ship":
        parts.ship(args.out, parts.SHIPPED, args.average_with)
    elif args.part == "card":
        parts.put_on_card(parts.SHIPPED, args.eval, args.data)
    elif args.part == "sheet":
        parts.draw_sheet(parts.SHEET)
    else:
        parts.build_part(args)
