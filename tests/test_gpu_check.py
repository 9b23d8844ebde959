"""The GPU check, rehearsed on the CPU, and what it leaves where a part hangs, fails, or the machine goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_check as tool

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "gpu_check.py"


def part(code: str, limit: int = 20, **more: Any) -> Any:
    command = [sys.executable, "-c", code, "{found}"]
    return tool.Part(code[:12], limit, command, lambda found: [f"told {found}"], **more)


def check(tmp_path: Path, parts: list[Any], total: float = 60) -> tuple[list[str], str]:
    found = tool.check(parts, tmp_path, {"rehearsal": False, "date": "", "commit": "", "command": ""}, total)
    assert json.loads((tmp_path / "results.json").read_text())["parts"] == found
    return [record["state"] for record in found], (tmp_path / "page.md").read_text()


def test_rehearsal(tmp_path: Path) -> None:
    """Every part runs, on shapes so small that nothing is measured, and the page says so first."""
    words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--rehearse"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"results.json", "page.md", "log.txt"} and max(files.values()) < 2**24
    page = (tmp_path / "out" / "page.md").read_text()
    assert page.startswith("# Rehearsal") and "CUDA device for each of 2 ranks" in page
    parts = {each["name"]: each for each in json.loads((tmp_path / "out" / "results.json").read_text())["parts"]}
    noise = parts["training 2x64, noise scale on and off"]["found"]
    assert [row["contestant"] for row in noise["rows"]] == ["megahp", "megahp-without-noise"]
    assert "Noise scale: " in page and "Largest losses" in page


def test_a_part_that_hangs_ends_at_its_limit_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); p.wait()"
    states, page = check(tmp_path, [part(child, limit=5), part("open(__import__('sys').argv[1], 'w').write('3')")])
    assert states == ["stopped at its limit of 5 s", "passed"] and "told 3" in page
    child_id = json.loads((tmp_path / "results.json").read_text())["parts"][0]["said"][0]
    status = Path(f"/proc/{child_id}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_failures_are_told_and_refusals_expected(tmp_path: Path) -> None:
    fail = "raise SystemExit('it broke')"
    another = replace(part(fail, exit_code=1), says="it was refused")  # another error with the code of a refusal
    states, page = check(tmp_path, [part(fail), part(fail, exit_code=1), part(""), another])
    assert states == ["failed: exit code 1", "passed", "passed", "failed: did not say 'it was refused'"]
    assert page.count("it broke") == 3


def test_a_part_that_leaves_nonsense_costs_no_other(tmp_path: Path) -> None:
    half, odd = ("open(__import__('sys').argv[1], 'w').write(" + text + ")" for text in ("'{'", "'[1]'"))
    states, page = check(tmp_path, [part(half), replace(part(odd), tell=tool.tell_rates), part("")])
    assert states == ["passed"] * 3 and "Not understood: TypeError" in page


def test_the_whole_has_a_limit(tmp_path: Path) -> None:
    states, _ = check(tmp_path, [part("import time; time.sleep(60)", limit=60), part("")], total=6)
    assert states == ["stopped at its limit of 6 s", "not run: no time was left"]


def test_a_machine_that_goes_leaves_what_was_measured(tmp_path: Path) -> None:
    """Killed in the second part, the page has the first one's results and names the second."""
    hang = "import time; time.sleep(300)"
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tools")!r})
from pathlib import Path
from gpu_check import Part, check
parts = [Part("first", 20, [sys.executable, "-c", "open(__import__('sys').argv[1], 'w').write('7')", "{{found}}"],
              lambda found: [f"told {{found}}"]),
         Part("second", 20, [sys.executable, "-c", {hang!r}], lambda found: [])]
check(parts, Path({str(tmp_path)!r}), dict(rehearsal=False, date="", commit="", command=""), 60)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    page, end = tmp_path / "page.md", time.monotonic() + 30
    while not (page.exists() and "| second | running |" in page.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "| first | passed |" in page.read_text() and "told 7" in page.read_text()
    assert [each["state"] for each in json.loads((tmp_path / "results.json").read_text())["parts"]] == [
        "passed",
        "running",
    ]


def test_the_limits_of_what_comes_back(tmp_path: Path) -> None:
    """A part that floods the log leaves a file that the device tool still takes."""
    check(tmp_path, [part("print('x' * (2**24 + 1))")])
    assert (tmp_path / "log.txt").stat().st_size == tool.LARGEST_LOG < 2**24


@pytest.mark.parametrize("device, said", [("cpu", "add --rehearse"), ("cuda", "sees no CUDA device")])
def test_without_a_gpu_nothing_starts(tmp_path: Path, device: str, said: str) -> None:
    words = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--device", device]
    done = subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mfu, wanted", [(0.4, "products and attention below peak"), (None, "elementwise")])
def test_losses_are_what_is_no_model_work_at_the_peak(mfu: float | None, wanted: str) -> None:
    kernels = [("nvjet_hsh_128x256", 0.6), ("flash_fwd_kernel", 0.1), ("vectorized_elementwise_kernel", 0.15)]
    costliest = [{"name": name, "share": share} for name, share in kernels]
    split = {"host": 0.1, "data": 0.0, "communication": 0.0}
    found = tool.losses({"split": split, "costliest": costliest, "mfu": mfu})
    assert wanted in found[0][0] and not any("nvjet" in name or "flash" in name for name, _ in found)
    if mfu:
        assert found[0][1] == pytest.approx(0.3)
