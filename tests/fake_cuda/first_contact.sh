#!/usr/bin/env bash
# Makes an environment with torch's CUDA build (5.4 GB, once), and runs the matrix on the stand-in: make first-contact.
# FIRST_CONTACT_VENV names an environment that is there already. --if-installed, as first word: make none, and say so.
# The one place that does not follow constraints.txt in torch and triton: CUDA 13's builds are there for 2.14.1 alone
# where there is no network but a package index.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${FIRST_CONTACT:-$root/build/first-contact}
venv=${FIRST_CONTACT_VENV:-$folder/venv}
torch=2.14.1

installed() {  # torch, and every package that constraints.txt pins
    [ -x "$venv/bin/python" ] && "$venv/bin/python" - "$torch" "$root/constraints.txt" <<'PYTHON'
import importlib.metadata as metadata, re, sys
from pathlib import Path
torch, path = sys.argv[1:]
pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", Path(path).read_text(), re.MULTILINE)) | {"torch": torch}
pins.pop("triton")  # that torch brings its own
there = {d.metadata["Name"].lower().replace("_", "-"): d.version.partition("+")[0] for d in metadata.distributions()}
sys.exit(any(there.get(name.lower().replace("_", "-")) != version for name, version in pins.items()))
PYTHON
}

case " $* " in *" -h "* | *" --help "*)
    exec env PYTHONPATH="$root:$root/kernels:$root/tests" "$(command -v python || echo python3)" -m fake_cuda.matrix --help ;;
esac
if ! installed; then
    if [ "${1:-}" = --if-installed ]; then
        echo "torch $torch for CUDA and the packages of constraints.txt are not all in $venv: no row ran (make first-contact installs them)"
        exit 0
    fi
    mkdir -p "$folder"
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q torch==$torch
    grep -vE '^(#|torch==|triton==|$)' "$root/constraints.txt" >"$folder/packages.txt"
    "$venv/bin/pip" install -q --no-deps -r "$folder/packages.txt"
fi
[ "${1:-}" != --if-installed ] || shift
cd "$root"
export PYTHONPATH=$root:$root/kernels:$root/tests OMP_NUM_THREADS=1
exec "$venv/bin/python" -m fake_cuda.matrix --folder "$folder" "$@"
