"""How the toy models of this package were made.

Commands for the parts of the foundation: `python -m sgg_fast.toy.build vae`, then `clip`, then `unet`. Each continues
where it stopped, and writes fp16 weights to `--out`; `--install` copies them into the package, where
`sgg_fast/toy/models.py` finds them. Two more commands make the judging networks: `detector --scenes 7000` and `features
--scenes 4000`. `train.py` trains SGG-IG on the foundation, and then `python -m sgg_fast.toy.build ship --out RUN`:

    train.py --stage pretrain --out RUN --num-scenes 16000 --batch-size 32 --steps 2500 --lr-schedule cosine --seed 6
    train.py --stage finetune --out RUN --num-scenes 16000 --batch-size 32 --steps 4600 --lr-schedule cosine --seed 6
        --warmup-steps 50 --unet-lr 1e-3 --graph-lr 5e-4 --optimizer adam --ema 0.999 --relation-dropout 0.1
    train.py --stage finetune --out NEXT --model sgg_fast/toy/pipeline --data CACHE --steps 6400 --seed 7 ... as before

The second part continues from the model shipped after the first, in fp16, without validation (`--validation-pairs 0`).
CACHE: `python -m sgg_fast.data.prepare cache --data toy-rare --num-scenes 16000 --seed 6 --out CACHE`. `card --eval
DIR` puts the results of `sgg_fast.eval` on the card, `sheet` draws the README's picture.

The shipped weights are not bit for bit the output of these commands: the parts took 3000 (vae), 1500 (clip) and 6500
(unet) steps and were stopped and continued with other step counts on the way. Afterwards two details of the drawing
were corrected and some combinations were held out of the scenes. Fine-tuning began (`--model`) from the UNet of an
earlier model of 2000 steps with `--gate-init 0` and without the losses about boxes; its last step was set to 3000,
5000, 4000 and 4600 on the way, that of its second part to 4500, 8000, 7000 and 6400. The detector took 660 steps on 12
000 scenes with a first loss, 840 on 7 000 and 3 400 on 10 000 with the present one, the features 600 steps on 1 500
scenes.

The parts of `toy-words` are made by the same commands with `--data-set toy-words`, as docs/toy.md lists them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser

STEPS = {"vae": 6000, "clip": 3000, "unet": 20_000, "detector": 2400, "features": 1000, "detector_words": 500}
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
        parts.ship(args.out, parts.SHIPPED)
    elif args.part == "card":
        parts.put_on_card(parts.SHIPPED, args.eval, args.data)
    elif args.part == "sheet":
        parts.draw_sheet(parts.SHEET)
    else:
        parts.build_part(args)
