"""TTGIR by hand, and machine code of PTX by hand: what Triton's compiler would hand to the checks of compiled code."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from types import SimpleNamespace
from typing import Any

from support.aot.programs import entry


def module(body: str, warps: int = 4) -> str:
    """A module of one function, whose layouts are #blocked (one dimension) and #tile (two)."""
    return f"""
#blocked = #ttg.blocked<{{sizePerThread = [4], threadsPerWarp = [32], warpsPerCTA = [{warps}], order = [0]}}>
#tile = #ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [1, 32], warpsPerCTA = [{warps}, 1], order = [1, 0]}}>
module attributes {{"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = {warps} : i32, ttg.target = "cuda:89", "ttg.threads-per-warp" = 32 : i32}} {{
  tt.func public @kernel(%x_ptr: !tt.ptr<f32>, %out_ptr: !tt.ptr<f32>, %stride: i32, %num: i32) attributes {{noinline = false}} {{
{body}
    tt.return
  }}
}}
"""  # noqa: E501


ROW = module("""
    %row = tt.get_program_id x : i32
    %o = tt.make_range {end = 512 : i32, start = 0 : i32} : tensor<512xi32, #blocked>
    %first = arith.muli %row, %stride : i32
    %firsts = tt.splat %first : i32 -> tensor<512xi32, #blocked>
    %at = arith.addi %firsts, %o : tensor<512xi32, #blocked>
    %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<512x!tt.ptr<f32>, #blocked>
    %p = tt.addptr %x, %at : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>
    %value = tt.load %p : tensor<512x!tt.ptr<f32>, #blocked>
    %out = tt.splat %out_ptr : !tt.ptr<f32> -> tensor<512x!tt.ptr<f32>, #blocked>
    %q = tt.addptr %out, %at : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>
    tt.store %q, %value : tensor<512x!tt.ptr<f32>, #blocked>""")
"""A row of 512 copied, its offset in 32 bits."""

LOOP = module("""
    %zeros = arith.constant dense<0.000000e+00> : tensor<512xf32, #blocked>
    %c1 = arith.constant 1 : i32
    %c0 = arith.constant 0 : i32
    %o = tt.make_range {end = 512 : i32, start = 0 : i32} : tensor<512xi32, #blocked>
    %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<512x!tt.ptr<f32>, #blocked>
    %p = tt.addptr %x, %o : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>
    %step = tt.splat %stride : i32 -> tensor<512xi32, #blocked>
    %sums:2 = scf.for %i = %c0 to %num step %c1 iter_args(%total = %zeros, %p_x = %p) -> (tensor<512xf32, #blocked>, tensor<512x!tt.ptr<f32>, #blocked>)  : i32 {
      %value = tt.load %p_x : tensor<512x!tt.ptr<f32>, #blocked>
      %more = arith.addf %total, %value : tensor<512xf32, #blocked>
      %next = tt.addptr %p_x, %step : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>
      scf.yield %more, %next : tensor<512xf32, #blocked>, tensor<512x!tt.ptr<f32>, #blocked>
    }
    %out = tt.splat %out_ptr : !tt.ptr<f32> -> tensor<512x!tt.ptr<f32>, #blocked>
    %q = tt.addptr %out, %o : tensor<512x!tt.ptr<f32>, #blocked>, tensor<512xi32, #blocked>
    tt.store %q, %sums#0 : tensor<512x!tt.ptr<f32>, #blocked>""")  # noqa: E501
"""The sum of `num` rows, by a pointer that advances."""


def assembled(ptx: str, arch: str = "sm_89") -> bytes:
    """Machine code of PTX by hand, by the ptxas that Triton ships."""
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, made = pathlib.Path(folder) / "kernel.ptx", pathlib.Path(folder) / "kernel.cubin"
        source.write_text(re.sub(r"^\s*\.loc\s.*\n", "", ptx, flags=re.MULTILINE))
        command = [str(tool), f"--gpu-name={arch}", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return made.read_bytes()


def made_by_hand(ttgir: str, body: str, num_warps: int, shared: int) -> tuple[Any, Any]:
    """(kernel, compiled kernel) of a module with the four arguments and of PTX, for sm_89."""
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "stride": "i32", "BLOCK": "constexpr", "num": "i32"}
    ptx = entry(body, 2, threads=32 * num_warps)
    asm = {"ttgir": ttgir, "ptx": ptx, "cubin": assembled(ptx)}
    metadata = SimpleNamespace(target=SimpleNamespace(arch=89), num_warps=num_warps, shared=shared)
    kernel = SimpleNamespace(__name__="copy_kernel", arg_names=list(signature))
    return kernel, SimpleNamespace(asm=asm, metadata=metadata, src=SimpleNamespace(signature=signature))
