"""Draw scene graphs: `python infer.py graph.json` writes one PNG a graph and prints the paths.

The same as the installed command `sgg-infer`.
"""

import sys

from sgg_fast.commands.infer import main

if __name__ == "__main__":
    sys.exit(main())
