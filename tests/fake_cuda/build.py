"""Builds the stand-in for CUDA: `python tests/fake_cuda/build.py OUT`, by the Python that has a CUDA build of torch.

OUT/libcuda.so.1 is preloaded in place of libcuda, libcudart and cuBLAS (`environment` says how). What torch's libraries
ask of these three and `src/` lacks answers "not supported", and is a complaint. Triton compiles as far as PTX, which
nothing here would run: in place of ptxas is a script that writes no machine code. `python -m benchmarks.aot` has every
kernel assembled.
"""

from __future__ import annotations

import re
import site
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).with_name("src")
LIBRARY = "libcuda.so.1"
ASSEMBLERS = {"ptxas": "TRITON_PTXAS_PATH", "ptxas-blackwell": "TRITON_PTXAS_BLACKWELL_PATH"}
"""Program of Triton's -> the variable that names another one."""
ASSEMBLER = """#!/bin/sh
# Answers for {real}: its version, and a file without machine code.
[ "$1" = --version ] && exec "{real}" --version
while [ $# -gt 1 ]; do
    [ "$1" = -o ] && echo none >"$2"
    shift
done
"""
ASKED_BY_NAME = """cuCtxGetLimit cuCtxSetLimit cuLaunchCooperativeKernel cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2
cuModuleLoad cuOccupancyMaxActiveBlocksPerMultiprocessor cuTensorMapEncodeTiled cuTensorMapEncodeIm2col
cuPointerGetAttributes"""
"""Of the driver, that torch and Triton look up while they run."""


def environment(out: Path) -> dict[str, str]:
    """What a process on the stand-in has in its environment."""
    folder = str(out.resolve())
    return {
        "LD_PRELOAD": f"{folder}/{LIBRARY}",
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "OMP_NUM_THREADS": "1",
        "DS_SKIP_CUDA_CHECK": "1",
        "FAKE_CUDA": folder,
        **{variable: f"{folder}/{program}" for program, variable in ASSEMBLERS.items()},
    }


def _symbols(*arguments: str) -> list[list[str]]:
    said = subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout
    return [line.split() for line in said.splitlines() if line.strip()]


def build(out: Path) -> Path:
    """The library in `out`; built again where a source is newer. Raises FileNotFoundError without a CUDA torch."""
    packages = Path(site.getsitepackages()[0])
    headers = next((packages / "nvidia").rglob("cuda_runtime_api.h"), None)
    if headers is None:
        raise FileNotFoundError(f"{packages}: no CUDA build of torch; pip install torch==2.14.1")
    library, sources = out / LIBRARY, sorted(SOURCES.iterdir())
    if library.is_file() and library.stat().st_mtime > max(s.stat().st_mtime for s in (*sources, Path(__file__))):
        return library
    out.mkdir(parents=True, exist_ok=True)
    for program in ASSEMBLERS:
        (out / program).write_text(ASSEMBLER.format(real=packages / "triton/backends/nvidia/bin" / program))
        (out / program).chmod(0o755)
    driver = packages / "triton/backends/nvidia/include"
    flags = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-Wall",
        "-Wno-unused-variable",
        f"-I{headers.parent}",
        "-idirafter",
        str(driver),
    ]
    objects = []
    for source in (s for s in sources if s.suffix == ".cpp"):
        objects.append(out / f"{source.stem}.o")
        subprocess.run([*flags, "-c", str(source), "-o", str(objects[-1])], check=True)
    have = {words[2] for o in objects for words in _symbols(str(o)) if len(words) == 3 and words[1] == "T"}
    asked = set(ASKED_BY_NAME.split())
    for found in sorted((packages / "torch/lib").glob("lib*cuda*.so")):
        names = (words[-1].partition("@")[0] for words in _symbols("-D", "--undefined-only", str(found)))
        asked |= {name for name in names if re.match(r"(__)?cuda|cublas", name)}
    lacking = out / "lacking.cpp"
    lines = ['extern "C" int fake_lacks(const char *);'] + [
        f'extern "C" int {name}() {{ return fake_lacks("{name}"); }}' for name in sorted(asked - have)
    ]
    lacking.write_text("\n".join(lines) + "\n")
    subprocess.run(
        [*flags, "-w", "-fno-builtin", "-shared", f"-Wl,-soname,{LIBRARY}", "-o", str(library),
         *map(str, objects), str(lacking), "-ldl"], check=True)  # fmt: skip
    return library


if __name__ == "__main__":
    where = Path(sys.argv[1])
    build(where)
    print("\n".join(f"export {name}={value}" for name, value in environment(where).items()))
