"""Train SGG-IG: `python train.py --stage pretrain`, then `python train.py --stage finetune --deepspeed ds.json`.

The same as the installed command `sgg-train`.
"""

import sys

from sgg_fast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
