#!/bin/sh
# Measure whether the best learning rate of a model of 2 layers holds for one of 16. SP, muP, CompleteP at alpha 1/2 and
# 1, three seeds: 240 runs, about 50 minutes of CPU. After an interruption the same command resumes.
#     sh examples/depth-transfer/study.sh [--jobs N] [...]
# Each parameterization has the five rates around its optima, found with one seed and every other rate.
set -eu
sh examples/stdlib-bytes.sh
mkdir -p runs
base="parameterization.base_width=64"
completep="parameterization.name=completep $base parameterization.base_layers=2"
megahp transfer-sweep examples/depth-transfer/run.toml --family model.layers=2,4,8,16 --seeds 1,2,3 \
    --grid optimizer.lr=0.008,0.016,0.032,0.064,0.128 --variants \
    "SP: parameterization.name=sp optimizer.lr=0.002,0.004,0.008,0.016,0.032" \
    "muP: parameterization.name=mup $base optimizer.lr=0.004,0.008,0.016,0.032,0.064" \
    "alpha 1/2: $completep parameterization.depth_alpha=0.5" \
    "CompleteP: $completep" \
    --out runs/depth-transfer --json runs/depth-transfer.json --plot runs/depth-transfer.svg "$@"
