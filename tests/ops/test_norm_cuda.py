"""The CUDA kernels without a GPU: run on the CPU by an emulator against float64, and compiled by nvcc.

The emulator (cuda_emulator.h) compiles csrc/norm_cuda.cu itself with g++, so that binding, launch shapes, workspace and
device code are those of the GPU; it registers the ops for CPU tensors in a namespace of their own.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops import norm_cases
from ops.norm_cases import EPS, assert_equals_float64
from torch import Tensor

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(TORCH / "include")]
OPS = ["norm", "norm_backward"]
Case = functools.partial(norm_cases.Case, mean=0.5)
# Half a unit in the last place of the greatest value, and room for sums.
PRECISION = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# Mistakes planted into the device code, each by an exact replacement in which MISTAKE says whether it is switched on.
MISTAKES = {
    "the first row of the next example is taken along": (
        "(block + 1) / p.blocks}",
        "(block + 1) / p.blocks + (MISTAKE && example == 0 && block + 1 == p.blocks)}",
    ),
    "the last part of an example is not added": (
        "block < p.blocks; block += slices",
        "block < p.blocks - MISTAKE; block += slices",
    ),
    "statistics are rounded to bfloat16": (
        "p.rstd[row] = rstd;",
        "p.rstd[row] = MISTAKE ? A(torch::headeronly::BFloat16(float(rstd))) : rstd;",
    ),
    "a warp's sum is left out of its row's": ("lane < warps ?", "lane < warps - MISTAKE ?"),
    "a row is read before it has arrived": (
        "__pipeline_wait_prior(kStages - 1)",
        "__pipeline_wait_prior(kStages - 1 + MISTAKE)",
    ),
}


class Emulated:
    """The ops of one compiled copy of the sources."""

    def __init__(self, folder: Path, namespace: str):
        for op in OPS:
            schema = str(getattr(torch.ops.megahp, op).default._schema)
            torch.library.define(f"{namespace}::{op}", schema[schema.index("(") :])
        library = folder / f"{namespace}.so"
        headers = folder / "cuda"  # every header of CUDA is the emulator
        headers.mkdir(parents=True)
        for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_pipeline.h", "cuda_runtime.h"):
            (headers / name).write_text(f'#include "{Path(__file__).parent / "cuda_emulator.h"}"\n')
        subprocess.run(
            ["g++", "-x", "c++", str(folder / "norm_cuda.cu"), "-shared", "-fPIC", "-O1", *FLAGS]
            + [f"-I{headers}", f"-Dmegahp={namespace}", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
            + [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-Wl,-Bsymbolic", "-o", str(library)],
            check=True,
        )
        torch.ops.load_library(library)
        self.ops = getattr(torch.ops, namespace)
        self.switches = ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    return Emulated(folder, "megahp_emulated")


# Widths of one vector and less, of a warp, of several, odd ones, and ones that take 1,024 threads or the way for wide
# rows; more examples than warps reduce at a time; more rows than the blocks take at once, and fewer.
SMALL = [(1, 1, 1), (2, 3, 7), (2, 5, 8), (3, 130, 24), (5, 11, 257), (40, 3, 128), (3, 2, 5, 1032), (5,), (3, 16)]
EMPTY = [(0, 3, 8), (2, 0, 8), (0, 8)]
WIDE = [(2, 3, 4096), (1, 3, 8192)]
WIDEST = [(1, 2, 12288), (1, 2, 16384), (1, 2, 16388), (1, 2, 65536), (2, 1, 65535), (300, 2, 2048)]


@pytest.mark.parametrize("shape", SMALL + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_equals_float64(kernels, dtype, shape):
    assert_equals_float64(Case(shape, dtype), kernels.ops, PRECISION)


@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_float64_when_wide(kernels, dtype, shape):
    assert_equals_float64(Case(shape, dtype), kernels.ops, PRECISION)


@pytest.mark.slow
@pytest.mark.parametrize("shape", WIDE + WIDEST, ids=str)
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_equals_float64_up_to_the_widest(kernels, dtype, shape):
    assert_equals_float64(Case(shape, dtype), kernels.ops, PRECISION)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_with_little_shared_memory(kernels, dtype):
    """Where the rows, and then the sums too, do not fit."""
    try:
        for kilobytes in (16, 2):
            kernels.switches.emulator_shared_memory(kilobytes * 1024)
            assert_equals_float64(Case((3, 7, 1024), dtype), kernels.ops, PRECISION)
    finally:
        kernels.switches.emulator_shared_memory(227 * 1024)


@pytest.mark.parametrize("weight_dtype", PRECISION, ids=str)
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_weight_of_another_dtype(kernels, dtype, weight_dtype):
    assert_equals_float64(Case((3, 5, 64), dtype, weight_dtype), kernels.ops, PRECISION)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_layout_does_not_matter(kernels, dtype):
    """Strided tensors, and contiguous ones that do not begin at a multiple of 16 bytes."""
    case = Case((3, 6, 64), dtype)
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case.dy, case.dstream = case.dy[:, ::2], case.dstream[:, 1::2]
    case.x, case.branch = case.x[:, :3], case.branch[:, 3:]
    assert_equals_float64(case, kernels.ops, PRECISION)
    for name, tensor in vars(case).items():
        moved = torch.empty(tensor.numel() + 1, dtype=dtype)[1:].view(tensor.shape).copy_(tensor)
        assert_equals_float64_with(case, kernels, name, moved)


def assert_equals_float64_with(case: norm_cases.Case, kernels: Emulated, name: str, tensor: Tensor) -> None:
    original = getattr(case, name)
    setattr(case, name, tensor)
    assert_equals_float64(case, kernels.ops, PRECISION)
    setattr(case, name, original)


@pytest.mark.parametrize("shape", [(3, 130, 24), (5, 11, 257), (40, 3, 128), (2, 9, 1032)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_in_whatever_order_blocks_and_threads_run(kernels, dtype, shape):
    case = Case(shape, dtype)
    first, again = case.outcome(kernels.ops), case.outcome(kernels.ops)
    try:
        kernels.switches.emulator_scramble(True)
        scrambled = case.outcome(kernels.ops)
    finally:
        kernels.switches.emulator_scramble(False)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, scrambled[name]), name


def test_variance_is_that_of_the_deviations(kernels):
    """The difference of mean square and squared mean would lose it all."""
    x, weight = Case((2, 3, 1032), torch.float32).x + 1000, torch.ones(1032)
    _, y, _ = kernels.ops.norm(x, None, 1.0, weight, None, None, True, EPS, "")
    wanted = torch.nn.functional.layer_norm(x.double(), (1032,), eps=EPS)
    assert (y - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(broken, mistake):
    cases = [Case(shape, torch.float32) for shape in [(3, 40, 24), (2, 9, 1032)]]
    broken.switches.plant(-1)
    for case in cases:
        assert_equals_float64(case, broken.ops, PRECISION)
    broken.switches.plant(list(MISTAKES).index(mistake))
    with pytest.raises(AssertionError, match="error"):
        for case in cases:
            assert_equals_float64(case, broken.ops, PRECISION)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The kernels with every mistake in them, one of which at a time is switched on."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    source = folder / "norm_kernels.cuh"
    text = source.read_text()
    for number, (right, wrong) in enumerate(MISTAKES.values()):
        assert right in text
        text = text.replace(right, wrong.replace("MISTAKE", f"(planted == {number})"))
    plant = 'int planted = -1;\nextern "C" void plant(int number) { planted = number; }\n'
    source.write_text(text.replace("namespace megahp {\n", plant + "namespace megahp {\n", 1))
    return Emulated(folder, "megahp_broken")


# nvcc, where there is one, needs no GPU.


@functools.cache
def compiled(architecture: str) -> str:
    """What nvcc and ptxas say as they compile the sources for one architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on PATH")
    command = ["nvcc", "-c", str(CSRC / "norm_cuda.cu"), "-o", os.devnull, "-O3", *FLAGS, f"-arch=sm_{architecture}"]
    command += ["-Xptxas=-v", "-Xcompiler=-fPIC,-Wall", "-Werror=all-warnings"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


ARCHITECTURES = [pytest.param("80", marks=pytest.mark.slow), "90", pytest.param("100", marks=pytest.mark.slow)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_without_warnings(architecture):
    assert "warning" not in compiled(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture):
    report = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores", compiled(architecture), re.S
    )
    assert len(report) >= 30
    assert [name for name, *numbers in report if numbers != ["0", "0"]] == []


# setup.py, which builds the object.


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=CSRC.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_wrong_settings_of_the_build_are_told():
    run = setup_py("--name", MEGAHP_CUDA="yes")
    assert run.returncode != 0 and "MEGAHP_CUDA must be auto, 0 or 1, not 'yes'" in run.stderr
    run = setup_py("--name", MEGAHP_CUDA="1", CUDA_HOME="/nowhere", PATH="")
    assert run.returncode != 0 and "there is no nvcc" in run.stderr
    for fine in ("auto", "0"):
        assert setup_py("--name", MEGAHP_CUDA=fine, CUDA_HOME="/nowhere", PATH="").returncode == 0


@pytest.mark.slow
def test_the_object_is_built_without_a_gpu(tmp_path):
    """For the architectures asked for, also against a torch without CUDA, under which it is then not looked for."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on PATH")
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temporary")]
    run = setup_py("build_ext", *folders, MEGAHP_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert run.returncode == 0, run.stderr
    assert "arch=compute_80,code=sm_80 " in run.stdout and "arch=compute_90,code=[sm_90,compute_90]" in run.stdout
    built = (tmp_path / "lib" / "megahp" / "_cuda.abi3.so").read_bytes()
    assert b"sm_80" in built and b"sm_90" in built
