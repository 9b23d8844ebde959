"""Check this checkout on a GPU and measure it, within nine minutes; `make gpu-check` is this.

    python3 tools/gpu_check.py --out DIR                              # on a machine with a CUDA device
    python3 tools/gpu_check.py --out DIR --device cpu --rehearse      # the same parts on a CPU, with tiny shapes

The most informative parts run first: rates of the device, build of the CUDA kernels, their tests, a 1B-class model
with the noise scale on and off (with a profile), the norms' share of a copy's bandwidth, two processes on one GPU
(which must be refused), the other GPU tests, an 8B-class step, compiled blocks, the node check. Each part is a process
with a limit of its own, stopped there and at nine minutes altogether.

DIR gets results.json, page.md and log.txt. The first two are rewritten before and after every part, so that a machine
that is taken away leaves what was measured. Needs torch, numpy, pytest, matplotlib and nvcc, no network; the test of
whole training runs also pydantic, fsspec and safetensors, and is skipped without them.

Exit code 0: all parts passed. 1: some did not. 2: invalid input.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 540  # seconds
LARGEST_LOG = 15 * 2**20  # bytes: the device tool brings back files of 16 MiB
# Kernels whose operations count as model FLOPs; what else a step does is a loss.
MODEL_WORK = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|::mm\b|addmm|bmm|matmul|dot|flash|fmha|attention", re.IGNORECASE)
# Two ranks that each see this device as their own, as srun may bind them.
BOUND = ["SLURM_STEP_TASKS_PER_NODE=2", "SLURM_NODEID=0", "CUDA_VISIBLE_DEVICES=0"]
IDLE = {
    "host": "the device waits for the host",
    "data": "the device waits for data",
    "communication": "communication that nothing hides",
}
RATES = """
import json, sys, torch
from megahp.benchmark.machine import machine_of
from megahp.benchmark.rates import device_rates
device = torch.device(sys.argv[1])
memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else None
json.dump(machine_of(device) | device_rates(device, int(sys.argv[3])) | {"bytes": memory}, open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Part:
    """One process of the check."""

    name: str
    limit: int  # seconds
    command: Sequence[str]  # {found}: the file it writes
    tell: Callable[[Any], list[str]]  # what it found -> lines of the page
    exit_code: int = 0  # of a success
    says: str = ""  # in its output, of a success


def parts_of(device: str, tiny: bool) -> list[Part]:
    """Return the parts, what yields most first."""
    tool = [sys.executable, "-m", "megahp", "benchmark"]
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "--junit-xml={found}"]
    size = (
        ["--sequence", "32", "--micro-batch", "2", "--vocabulary", "128", "--turns", "2", "--steps", "1"]
        if tiny
        else ["--sequence", "2048", "--micro-batch", "8", "--vocabulary", "32768", "--turns", "9", "--steps", "4"]
    )
    training = [*tool, "training", "--device", device, "--dtype", "bfloat16", "--json={found}", "--profile", *size]
    side, one, eight = ("64", "2x64", "2x64") if tiny else ("8192", "16x2048", "llama-3-8b")
    noise = ["--contestants", "megahp", "megahp-without-noise"]
    alone = ["--contestants", "megahp", "--settings"]
    norm = [*tool, "norm", "--device", device, "--dtype", "bfloat16", "--peer", "torch", "--json={found}"]
    norm_size = ["2x8x64", "--turns", "1", "--op", "rms_norm"] if tiny else ["8x4096x2048", "8x4096x8192"]
    eight_size = size if tiny else ["--sequence", "4096", "--micro-batch", "1", "--turns", "3", "--steps", "2"]
    eight_size += [] if tiny else ["--vocabulary", "32768"]  # its own, of 128,256, does not fit beside the moments
    return [
        Part("rates of the device", 60, [sys.executable, "-c", RATES, device, "{found}", side], tell_rates),
        Part("build", 150, [sys.executable, "setup.py", "build_ext", "--inplace"], lambda _: []),
        Part("tests of the kernels", 120, [*tests, "tests/gpu/test_norm_gpu.py"], tell_tests),
        Part(f"training {one}, noise scale on and off", 150, [*training, "--shape", one, *noise], tell_training),
        Part("norms", 60, [*norm, "--shape", *norm_size], tell_norms),
        Part(
            "two processes on one GPU are refused",
            40,
            ["env", *BOUND, *tool, "training", "--device", "cuda", "--ranks", "2", "--contestants", "megahp"],
            lambda _: [],
            exit_code=2,
            says="compute on one CUDA device" if device == "cuda" else "needs a CUDA device",
        ),
        Part("other tests", 120, [*tests, "tests/gpu", "--ignore=tests/gpu/test_norm_gpu.py"], tell_tests),
        Part(
            f"training {eight}, all blocks recomputed",
            150,
            [*training, *eight_size, "--shape", eight, *alone, "compute.recompute=full"],
            tell_training,
        ),
        Part(
            f"training {one}, blocks {'eager, since compiling takes a CPU long' if tiny else 'compiled'}",
            150,
            [*training, "--shape", one, *alone, f"compute.compile={'false' if tiny else 'true'}"],
            tell_training,
        ),
        Part("node check", 60, [sys.executable, "-m", "megahp", "check-cluster", "--device", device], lambda _: []),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, page.md and log.txt")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes: tries the parts and measures nothing")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.rehearse:
        parser.error("--device cpu measures nothing of a GPU; add --rehearse to try the parts with tiny shapes")
    sees_cuda = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    if arguments.device == "cuda" and subprocess.run(sees_cuda).returncode:
        parser.error(f"torch of {sys.executable} sees no CUDA device; name a python that does, or rehearse on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "command": " ".join(["tools/gpu_check.py", *sys.argv[1:]]),
        "commit": commit(),
        "rehearsal": arguments.rehearse,
    }
    found = check(parts_of(arguments.device, arguments.rehearse), arguments.out, about, TOTAL)
    print((arguments.out / "page.md").read_text(encoding="utf-8"))
    return 0 if all(part["state"] == "passed" for part in found) else 1


def commit() -> str:
    """Return the commit of this checkout; a copy may have no history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def check(parts: Sequence[Part], out: Path, about: Mapping[str, Any], total: float) -> list[dict[str, Any]]:
    """Run the parts in turn, and write what is known before and after each. Returns a record of each."""
    end = time.monotonic() + total
    records = [{"name": part.name, "command": list(part.command), "state": "not run"} for part in parts]
    (out / "log.txt").write_bytes(b"")
    for part, record in zip(parts, records, strict=True):
        limit = min(part.limit, end - time.monotonic())
        if limit < 5:  # not enough to start one
            record["state"] = "not run: no time was left"
            continue
        record["state"] = "running"
        write(out, about, parts, records)
        record |= run(part, out / "log.txt", limit)
        write(out, about, parts, records)
    write(out, about, parts, records)
    return records


def run(part: Part, log: Path, limit: float) -> dict[str, Any]:
    """Run one part to its end or its limit. Returns its state, seconds, and what it found or last said."""
    with TemporaryDirectory() as folder, open(log, "ab") as output:
        found = Path(folder) / "found"
        output.write(f"\n=== {part.name}\n".encode())
        output.flush()
        begins, began = output.tell(), time.monotonic()
        command = [word.replace("{found}", str(found)) for word in part.command]
        # this checkout's package, and kernels for Hopper unless others are named
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = {"TORCH_CUDA_ARCH_LIST": "9.0", **os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            exit_code = process.wait(limit)
            state = "passed" if exit_code == part.exit_code else f"failed: exit code {exit_code}"
        except subprocess.TimeoutExpired:
            state = f"stopped at its limit of {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.wait()
        seconds = time.monotonic() - began
        result = read(found)
    said = log.read_bytes()[begins:].decode(errors="replace").splitlines()
    if state == "passed" and part.says not in "\n".join(said):
        state = f"failed: did not say {part.says!r}"
    os.truncate(log, min(log.stat().st_size, LARGEST_LOG))
    return {"state": state, "seconds": round(seconds, 1), "found": result, "said": said[-20:]}


def read(found: Path) -> Any:
    """Return what a part wrote: JSON, or pytest's XML as counts and the names of what failed; None where it did not
    come to it, or was stopped while it wrote."""
    try:
        text = found.read_text(encoding="utf-8")
        if not text.startswith("<"):
            return json.loads(text)
        cases = ElementTree.fromstring(text).findall(".//testcase")
    except (OSError, ValueError, ElementTree.ParseError):
        return None
    states = [{child.tag for child in case} for case in cases]
    failed = [case.get("name") for case, state in zip(cases, states, strict=True) if state & {"failure", "error"}]
    skipped = sum("skipped" in state for state in states)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def write(out: Path, about: Mapping[str, Any], parts: Sequence[Part], records: Sequence[Mapping[str, Any]]) -> None:
    """Replace results.json and page.md, each at once: the machine may go at any moment."""
    results = json.dumps({**about, "parts": records}, indent=1) + "\n"
    for name, text in (("results.json", results), ("page.md", page(about, parts, records))):
        partial = out / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def page(about: Mapping[str, Any], parts: Sequence[Part], records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page: a table of the parts, then what each found, or last said where it failed."""
    title = "# Rehearsal of the GPU check: nothing here is a measurement" if about["rehearsal"] else "# GPU check"
    lines = [title, "", f"{about['date']}, commit {about['commit']}, `{about['command']}`.", ""]
    lines += ["How to run and read it: docs/gpu.md of that commit.", ""]
    lines += ["| part | state | seconds |", "|---|---|---|"]
    lines += ["| {name} | {state} | {seconds} |".format(**{"seconds": "", **record}) for record in records]
    for part, record in zip(parts, records, strict=True):
        try:
            told = part.tell(record["found"]) if record.get("found") else []
        except (LookupError, TypeError, ValueError) as error:  # an error in the page must not stop the remaining parts
            told = [f"Not understood: {error!r}; results.json has it."]
        if record["state"] != "passed" and record.get("said") or part.exit_code:
            told += ["```", *record.get("said", []), "```"]
        if told:
            lines += ["", f"## {part.name}", "", *told]
    return "\n".join(lines) + "\n"


def tell_rates(found: Mapping[str, Any]) -> list[str]:
    products = ", ".join(f"{name} {rate / 1e12:,.3g}" for name, rate in found["products"].items())
    memory = f"{found['bytes'] / 2**30:,.1f} GiB, " if found["bytes"] else ""
    return [
        f"{found['device']}, {memory}torch {found['torch']}. Products in TFLOP/s: {products}. Copy, read and written: "
        f"{found['memory'] / 1e9:,.0f} GB/s. Launch of a kernel: {1e6 * found['launch']:.1f} us."
    ]


def tell_tests(found: Mapping[str, Any]) -> list[str]:
    counts = f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped."
    return [counts, *(f"- failed: `{name}`" for name in found["failed"])]


def tell_norms(found: Mapping[str, Any]) -> list[str]:
    """Share of a copy's bandwidth: ours (in the backward pass with the noise scale) beside torch's."""
    lines = ["| op | pass | shape | ms | share of a copy | torch's |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        ours = "measured" if row["pass"] == "backward" else "ours"
        ms, shares = row["ms"][ours], row["share of copy"]
        labels = f"| {row['op']} | {row['pass']} | {row['shape']} |"
        lines.append(f"{labels} {ms:.3f} | {shares[ours]:.0%} | {shares['torch']:.0%} |")
    return lines


def tell_training(found: Mapping[str, Any]) -> list[str]:
    """Speed, MFU (model FLOPs without the input embedding, half of causal attention), noise scale, largest losses."""
    if not found["rows"]:
        return ["Out of memory."]
    lines = ["| contestant | parameters | tokens/s | ms | MFU | HFU | GiB |", "|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        used = " | ".join("-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "hfu"))
        lines.append(
            f"| {row['contestant']} | {row['parameters'] / 1e9:.2f} B | {row['tokens_per_second']:,.0f} | "
            f"{1e3 * row['seconds']:,.1f} | {used} | {row['peak_memory'] / 2**30:.1f} |"
        )
    for cost in (comparison["noise_scale"] for comparison in found["comparisons"] if "noise_scale" in comparison):
        low, median, high = (cost[key] - 1 for key in ("low", "median", "high"))
        lines += ["", f"Noise scale: {median:+.2%} of a step [{low:+.2%}, {high:+.2%}]; wanted: at most 1 %."]
    lines += ["", "Largest losses, as shares of a profiled step of megahp:", ""]
    return lines + [f"- {share:.1%} {name}" for name, share in losses(found["rows"][0])[:6]]


def losses(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return where a step's time goes that is not model FLOPs at the device's peak, largest first."""
    idle: dict[str, float] = {name: row["split"][kind] for kind, name in IDLE.items()}
    kernels = {f"`{each['name']}`": each["share"] for each in row["costliest"]}
    work = sum(share for name, share in kernels.items() if MODEL_WORK.search(name))
    below_peak: dict[str, float] = (
        {} if row["mfu"] is None else {"products and attention below peak": max(0.0, work - row["mfu"])}
    )
    others = {name: share for name, share in kernels.items() if not MODEL_WORK.search(name)}
    return sorted((idle | below_peak | others).items(), key=lambda pair: -pair[1])


if __name__ == "__main__":
    sys.exit(main())
