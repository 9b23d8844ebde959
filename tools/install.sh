#!/bin/sh
# Make a virtual environment with megahp, its pinned dependencies and its compiled ops.   install.sh PYTHON VENV
# An installed torch >= 2.11 (a CUDA build, say) is kept and used; otherwise the pinned one is installed.
set -eu
python=$1 venv=$2
torch=torch==2.13.0

has_torch='import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))'
if [ ! -x "$venv/bin/python" ]; then
    if "$python" -c "$has_torch" 2>/dev/null; then inherit=--system-site-packages; else inherit=; fi
    "$python" -m venv $inherit "$venv" || {
        rm -rf "$venv"
        echo "megahp: $python cannot make a virtual environment; install python3-venv, or name another with PYTHON=..." >&2
        exit 2
    }
fi
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"
"$venv/bin/python" -c "$has_torch" 2>/dev/null || { echo "installing $torch"; $pip install "$torch"; }
echo "installing the pinned dependencies"
$pip install -r requirements.txt
echo "building megahp's compiled ops"
$pip install --no-deps --no-build-isolation -e .
