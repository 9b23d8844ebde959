#!/bin/sh
# Measure whether the best learning rate stays the same while weights are removed. Standard parameterization, muP and
# SmuPar at density 1, 1/4 and 1/16, three seeds: 162 runs, 49 minutes of CPU, 25 on two cores. After an interruption
# the same command resumes.
#     sh examples/density-transfer/study.sh   (results: docs/transfer.md)
set -eu
sh examples/stdlib-bytes.sh
mkdir -p runs
megahp transfer-sweep examples/density-transfer/run.toml \
    --grid optimizer.lr=0.002,0.004,0.008,0.016,0.032 --family sparsity.density=1,0.25,0.0625 --seeds 1,2,3 \
    --variants "SP: optimizer.lr=0.0005,0.001,0.002,0.004,0.008,0.016,0.032" \
    "muP: parameterization.name=mup parameterization.base_width=64 parameterization.init_std=0.08 optimizer.lr=0.004,0.008,0.016,0.032,0.064,0.128" \
    "SmuPar: parameterization.name=smupar parameterization.base_width=64 parameterization.init_std=0.08" \
    --out runs/density-transfer --jobs 2 --json runs/density-transfer.json --plot runs/density-transfer.svg "$@"
