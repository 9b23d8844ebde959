"""Builds the native objects of megahp.ops; everything else about the package is in pyproject.toml.

The CPU object uses libtorch's stable ABI: it needs torch's headers and libraries, not torch itself running, and one
build serves torch 2.11 and later. pip builds in an environment of its own, so the torch it will run with is looked for
beside the interpreter too; only where there is none at all is the pinned one fetched to build against.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

TORCH = "torch==2.13.0"
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11
]


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


torch = torch_folder()
setup(
    ext_modules=[cpu_object(torch)] if torch else [],
    setup_requires=[] if torch else [TORCH],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
