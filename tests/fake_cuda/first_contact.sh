#!/usr/bin/env bash
# Makes an environment with torch's CUDA build (5.4 GB, once), and runs the matrix on the stand-in: make first-contact.
# The one place that does not follow constraints.txt in torch and triton: CUDA 13's builds are there for 2.14.1 alone
# where there is no network but a package index.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${FIRST_CONTACT:-$root/build/first-contact}
venv=${FIRST_CONTACT_VENV:-$folder/venv}
if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q torch==2.14.1
    grep -vE '^(#|torch==|triton==|$)' "$root/constraints.txt" >"$folder/packages.txt"
    "$venv/bin/pip" install -q --no-deps -r "$folder/packages.txt"
fi
cd "$root"
export PYTHONPATH=$root:$root/kernels:$root/tests OMP_NUM_THREADS=1
exec "$venv/bin/python" -m fake_cuda.matrix --folder "$folder" "$@"
