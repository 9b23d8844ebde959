#!/bin/sh
# Make a virtual environment with megahp, its pinned dependencies and its compiled ops.
#     install.sh PYTHON VENV
# If PYTHON has torch >= 2.11 (a CUDA build, say), the environment uses it in place; otherwise the pinned one is
# installed.
set -eu
python=$1 venv=$2
torch=torch==2.13.0

has_torch='import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))'
folder_of_torch='import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])'
own_packages='import sysconfig; print(sysconfig.get_path("purelib"))'

if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        echo "megahp: $python cannot make a virtual environment; install python3-venv, or set PYTHON=..." >&2
        exit 2
    }
    if "$python" -c "$has_torch" 2>/dev/null; then
        "$python" -c "$folder_of_torch" > "$("$venv/bin/python" -c "$own_packages")/torch_of_the_system.pth"
    fi
fi
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
if "$venv/bin/python" -c "$has_torch" 2>/dev/null; then
    "$venv/bin/python" -c 'import torch; print(f"using torch {torch.__version__} of {torch.__file__}")'
else
    echo "installing $torch"
    $pip install "$torch"
fi
echo "installing the pinned dependencies"
$pip install -r requirements.txt
echo "building megahp's compiled ops"
$pip install --no-deps --no-build-isolation -e .
