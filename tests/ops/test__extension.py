"""Finding and loading the compiled ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from ops.test_norm import kernel_loaded

import megahp.ops
from megahp.ops import _extension


def test_a_missing_extension_is_told_once_and_the_reference_serves(tmp_path):
    package = tmp_path / "megahp"
    shutil.copytree(Path(megahp.ops.__file__).parent, package / "ops")
    (package / "__init__.py").touch()
    script = """if True:
        import torch
        from megahp.ops import normalize
        assert not torch._C._dispatch_has_kernel_for_dispatch_key("megahp::norm", "CPU")
        x, weight = torch.randn(2, 3, 5), torch.randn(5)
        for _ in range(3):
            y = normalize(x, weight, centered=False, eps=1e-6)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (5,), weight, 1e-6))
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("UserWarning: megahp: the slower PyTorch reference") == 1
    assert "holds no _cpu object" in run.stderr


def test_an_extension_that_does_not_load_says_why(tmp_path, monkeypatch):
    (tmp_path / "_cpu.abi3.so").write_bytes(b"not an object")
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "ops" / "_extension.py"))
    with pytest.warns(UserWarning, match=r"_cpu\.abi3\.so") as caught:
        assert not _extension.load("_cpu")
    assert len(caught) == 1


def test_an_extension_that_loads_is_silent():
    if not kernel_loaded():
        pytest.skip("the C++ kernels are not built: run `make install`")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension.load("_cpu")
