"""Builds the native objects of megahp.ops; everything else about the package is in pyproject.toml.

The objects use libtorch's stable ABI: they need torch's headers and libraries, not torch itself running, and one build
serves torch 2.11 and later. pip builds in an environment of its own, so the torch it will run with is looked for beside
the interpreter too; only where there is none at all is the pinned one fetched to build against.

The CUDA object needs nvcc, not a GPU. MEGAHP_CUDA=0 leaves it out, =1 insists on it, and auto, the default, builds it
where nvcc is found and torch is a CUDA build, which alone can load it. TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") names the
architectures.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

TORCH = "torch==2.13.0"
LANGUAGE = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # torch 2.11
FLAGS = [*LANGUAGE, "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]


def torch_folder() -> Path | None:
    """The folder of the torch package to build against, if any is installed."""
    found = importlib.util.find_spec("torch")
    if found and found.origin:
        return Path(found.origin).parent
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    beside = (Path(sysconfig.get_path("platlib")), Path(sysconfig.get_path("platlib", vars=base)))
    return next((path / "torch" for path in beside if (path / "torch" / "lib").is_dir()), None)


def cpu_object(torch: Path) -> Extension:
    """``megahp/_cpu.abi3.so``."""
    return Extension(
        "megahp._cpu",
        ["csrc/norm_cpu.cpp"],
        depends=["csrc/norm.h", "csrc/norm_rows.h"],
        language="c++",
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args=FLAGS,
        py_limited_api=True,
    )


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc", path=f"{home / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")


def wants_cuda(torch: Path) -> bool:
    """What MEGAHP_CUDA says; exits where it is no such setting, or insists and there is no nvcc."""
    setting = os.environ.get("MEGAHP_CUDA", "auto")
    if setting == "auto":
        return nvcc() is not None and (torch / "lib" / "libtorch_cuda.so").exists()
    if setting not in ("0", "1"):
        sys.exit(f"MEGAHP_CUDA must be auto, 0 or 1, not {setting!r}")
    if setting == "1" and nvcc() is None:
        sys.exit(
            "MEGAHP_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME/bin: install the CUDA toolkit, or leave it 0"
        )
    return setting == "1"


def architectures(compiler: str) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, or for A100, H100, B200 as far as it knows them, and later."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        listed = [arch for arch in ("8.0", "9.0", "10.0") if f"compute_{arch.replace('.', '')}" in known]
        listed[-1] += "+PTX"
    options = []
    for name in listed:
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


def cuda_object(torch: Path) -> Extension:
    """``megahp/_cuda.abi3.so``. libtorch.so brings in libtorch_cuda.so where it is loaded."""
    has_cuda = (torch / "lib" / "libtorch_cuda.so").exists()
    return Extension(
        "megahp._cuda",
        ["csrc/norm_cuda.cu"],
        depends=["csrc/norm.h", "csrc/norm_kernels.cuh"],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["c10", "torch", "torch_cpu", *(["torch_cuda"] if has_cuda else [])],
        py_limited_api=True,
    )


class BuildObjects(build_ext):
    """Compiles and links CUDA sources by nvcc, which knows where its own libraries are."""

    def build_extension(self, extension: Extension) -> None:
        compiler = nvcc()
        if compiler is None or not extension.sources[0].endswith(".cu"):
            return super().build_extension(extension)
        target = self.get_ext_fullpath(extension.name)
        if not (self.force or newer_group([*extension.sources, *extension.depends], target)):
            return None
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, "--shared", "--cudart=shared", "--threads=2", *LANGUAGE, *architectures(compiler)]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xlinker=--no-as-needed"]
        command += [f"-isystem={folder}" for folder in extension.include_dirs]
        command += [f"-L{folder}" for folder in extension.library_dirs]
        self.spawn([*command, *extension.sources, "-o", target, *(f"-l{name}" for name in extension.libraries)])


torch = torch_folder()
objects = [cpu_object(torch)] if torch else []
if torch and wants_cuda(torch):
    objects.append(cuda_object(torch))
setup(
    ext_modules=objects,
    cmdclass={"build_ext": BuildObjects},
    setup_requires=[] if torch else [TORCH],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
