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

installed() {  # diffusers comes with the packages that are installed last
    [ -x "$venv/bin/python" ] && "$venv/bin/python" - "$torch" <<'PYTHON'
import importlib.metadata as metadata, sys
try:
    sys.exit(metadata.version("torch").partition("+")[0] != sys.argv[1] or not metadata.version("diffusers"))
except metadata.PackageNotFoundError:
    sys.exit(1)
PYTHON
}

if ! installed; then
    if [ "${1:-}" = --if-installed ]; then
        echo "torch $torch for CUDA is not installed in $venv: no row ran (make first-contact installs it)"
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
