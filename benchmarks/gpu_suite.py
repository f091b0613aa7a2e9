"""Every GPU check in one command that ends within nine minutes and leaves at most eight files.

    python -m benchmarks.gpu_suite --out DIR          # make gpu-suite OUT=DIR
    python -m benchmarks.gpu_suite --out DIR --dry    # make gpu-suite-dry OUT=DIR: the same script on a CPU, tiny

Each part is a process with a time limit of its own. At the limit it is killed with its children, so one failure does
not lose the rest. The headline comes first: steps of pre-training and fine-tuning, and pictures. Later parts may use
the time that a part leaves over. A part whose packages are not installed is unavailable, which is not a failure. After
every part the results so far are written: environment.json, summary.json, logs.tar.gz, and the CSVs, which grow row by
row. To add a part, add it to `PARTS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time

from benchmarks.harness.output import read_rows
from benchmarks.ops import targets
from sgg_fast.commands import command
from sgg_fast.commands.flags import OneLineParser
from sgg_fast.config import ConfigError
from sgg_fast.files import write_aside

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 530
DRY_SECONDS = 600
MAX_FILES, MAX_BYTES = 8, 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the suite.

    In a command `{out}` is the folder of results, `{soon}` the seconds after which it should start no new work.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    """Seconds reserved for it; it may also use what earlier parts left over."""
    dry: tuple[str, ...] = ()
    """Its command on a CPU."""
    needs: tuple[str, ...] = ()
    """Packages that it requires; without them it reports itself unavailable."""
    interpreted: bool = False
    """In a dry run, whether Triton interprets its kernels (to check them; never to time them)."""


def _python(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-m", *words)


def _parallel() -> tuple[str, ...]:
    """Flags of pytest-xdist, if it is installed: most of the tests' time is the compilation of kernels, on the host."""
    return ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()


_BENCH = _python("benchmarks.run")
_OURS = ("--verify-only", "--backend", "ours", "--mode", "fwd_bwd", "fwd", "--out", "{out}")
_OPTIMISER = (*_python("benchmarks.optimiser"), "--out", "{out}")
_STEP = (*_python("benchmarks.train_step"), "--stage", "finetune", "--out", "{out}")
_PRETRAIN = (*_python("benchmarks.train_step"), "--stage", "pretrain", "--out", "{out}")
_INFER = (*_python("benchmarks.infer"), "--out", "{out}")
_REGRESS = (*_python("benchmarks.regress"), "{out}")
_TIMED = ("--out", "{out}", "--no-plots")

PARTS = (
    Part("pretrain_step", _PRETRAIN, seconds=45, dry=(*_PRETRAIN, "--quick", "--batch", "2")),
    Part(
        "train_step",
        (*_STEP, "--resolution", "256", "512", "--limit", "{soon}"),
        seconds=140,
        dry=(*_STEP, "--quick", "--form", "plain", "lean", "diffusers-adamw"),
    ),
    Part(
        "infer",
        (*_INFER, "--limit", "{soon}"),
        seconds=90,
        dry=(*_INFER, "--quick", "--batch", "1", "--form", "captured", "eager", "diffusers", "--no-cold"),
    ),
    Part(
        "tests",
        (*_python("pytest"), "-m", "gpu", "--continue-on-collection-errors", "--durations=10", *_parallel()),
        seconds=95,
        dry=(*_python("pytest"), "-m", "gpu", "--collect-only"),
        needs=("pytest", "hypothesis"),
    ),
    Part(
        "bench",
        (*_BENCH, *_TIMED, "--limit", "{soon}", "--compile-seconds", "30"),
        seconds=85,
        dry=(*_BENCH, *_TIMED, "--quick", "--size", "tiny", "--width", "32", "--compile-seconds", "0"),
    ),
    Part(
        "verify",
        (*_BENCH, *_OURS, "--size", "paper", "vg16", "1e4", "--dtype", "bf16", "fp32", "fp16"),
        seconds=35,
        dry=(*_BENCH, *_OURS, "--size", "tiny", "--width", "32", "--dtype", "bf16"),
        interpreted=True,
    ),
    Part(
        "optimiser",
        (*_OPTIMISER, "--size", "unet", "graph"),
        seconds=25,
        dry=(*_OPTIMISER, "--size", "tiny", "--seconds", "0"),
        needs=("bitsandbytes",),
    ),
    Part("regress", _REGRESS, seconds=5, dry=_REGRESS),
)
"""Parts in running order; their seconds add up to less than TOTAL_SECONDS."""

SOON = 0.75
"""Share of a part's time after which it starts no new work."""


@dataclasses.dataclass
class Result:
    """Outcome of a part."""

    name: str
    status: str
    seconds: float


class Suite:
    """Runs the parts one after another, within one deadline."""

    def __init__(self, out: pathlib.Path, dry: bool, parts: tuple[Part, ...] = PARTS) -> None:
        self.out, self.dry, self.parts = out.resolve(), dry, parts  # the parts run in another folder
        self.logs = pathlib.Path(tempfile.mkdtemp(prefix="gpu_suite_"))
        self.deadline = time.monotonic() + (DRY_SECONDS if dry else TOTAL_SECONDS)
        self.results: list[Result] = []
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Run all parts; returns 0 if every one of them passed or is unavailable here."""
        from benchmarks.harness.measure import environment  # it loads torch

        self._write_json("environment", environment())
        for number, part in enumerate(self.parts):
            print(f"--- {part.name}", flush=True)
            self.results.append(self._run_part(part, sum(p.seconds for p in self.parts[number + 1 :])))
            print(f"--- {part.name}: {self.results[-1].status} ({self.results[-1].seconds:.0f} s)", flush=True)
            self._write_summary()
        self._print_table()
        self._check_files()
        shutil.rmtree(self.logs, ignore_errors=True)
        return int(any(not r.status.startswith(("passed", "unavailable")) for r in self.results))

    def _run_part(self, part: Part, kept: float) -> Result:
        """Run a part. kept: seconds reserved for the parts after it."""
        start = time.monotonic()
        missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
        left = self.deadline - start
        if missing:
            return Result(part.name, f"unavailable: not installed here: {', '.join(missing)}", 0.0)
        if left < 5:
            return Result(part.name, "skipped: no time was left", 0.0)
        work = self.logs / part.name
        work.mkdir()
        words = part.dry if self.dry else part.command
        limit = (
            left if self.dry else min(left, max(part.seconds, left - kept))
        )  # limits are for GPUs, not for busy CPUs
        words = tuple(word.format(out=self.out, soon=int(SOON * limit)) for word in words)
        status = run_limited(words, self._environment(part), work / "log.txt", limit)
        return Result(part.name, status, time.monotonic() - start)

    def _environment(self, part: Part) -> dict[str, str]:
        changed = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        changed["PYTHONUNBUFFERED"] = "1"
        if self.dry:
            changed["CUDA_VISIBLE_DEVICES"] = ""
            if part.interpreted:
                changed["TRITON_INTERPRET"] = "1"
        return changed

    def _write_json(self, name: str, value: object) -> None:
        (self.out / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    def _write_summary(self) -> None:
        """Write the summary and the archive of the logs, after every part."""
        findings = [dataclasses.asdict(f) for f in targets.findings(read_rows(self.out / "bench.csv"))]
        parts = [dataclasses.asdict(result) for result in self.results]
        self._write_json("summary", {"dry": self.dry, "parts": parts, "targets": findings})
        with write_aside(self.out / "logs.tar.gz") as aside, tarfile.open(aside, "w:gz") as archive:
            archive.add(self.logs, arcname="logs", filter=lambda info: info if info.size < MAX_BYTES else None)

    def _print_table(self) -> None:
        print("\npart        status                                     seconds")
        for result in self.results:
            print(f"{result.name:11} {result.status:42} {result.seconds:7.0f}")
        if self.dry:
            print("\ndry run on a CPU: nothing was measured on a GPU, so the targets are not judged")
            return
        print("\ntargets:")
        for finding in targets.findings(read_rows(self.out / "bench.csv")):
            print(f"{finding.target:70} {finding.found:34} {finding.verdict}")

    def _check_files(self) -> None:
        files = [path for path in self.out.iterdir() if path.is_file()]
        if len(files) > MAX_FILES:
            print(f"warning: {len(files)} files in {self.out}, more than {MAX_FILES}")
        for path in files:
            if path.stat().st_size >= MAX_BYTES:
                print(f"warning: {path} has {path.stat().st_size} bytes, more than {MAX_BYTES}")


def run_limited(words: tuple[str, ...], env: dict[str, str], log: pathlib.Path, seconds: float) -> str:
    """Run a command for at most `seconds`; its output is shown and stored, and its process group is killed at the end.

    Returns "passed", "failed: exit 1", or "failed: stopped after 60 s".
    """
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE)
    process = subprocess.Popen(
        words, stdout=tee.stdin, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=env,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(timeout=seconds)
        status = "passed" if code == 0 else f"failed: exit {code}"
    except subprocess.TimeoutExpired:
        status = f"failed: stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert tee.stdin is not None
        tee.stdin.close()
        try:
            tee.wait(timeout=3)
        except subprocess.TimeoutExpired:  # a child that left the group still holds the pipe
            tee.kill()
            tee.wait()
    return status


@command("gpu_suite", refused=(ConfigError, OSError))
def main(argv: list[str] | None) -> int:
    """Exit status 1 if a part did not pass."""
    parser = OneLineParser(prog="python -m benchmarks.gpu_suite", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for at most eight files")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny; kernels interpreted, never timed")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("sgg_kernels") is None:
        raise ConfigError("sgg_fast is not installed: pip install --no-index --no-deps --no-build-isolation -e .")
    import torch

    if not args.dry and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here: use --dry (make gpu-suite-dry)")
    chosen = tuple(part for part in PARTS if args.parts is None or part.name in args.parts)
    return Suite(args.out, args.dry, chosen).run()
