#!/bin/sh
# Measure whether CompleteP (depth) and SmuPar (density) hold together: the depth study with a quarter of the weights,
# and the rate tuned on no sparse model. Three seeds: 204 runs, about an hour of CPU. Full form: --seeds 1,2,3,4,5.
# After an interruption the same command resumes.
#     sh examples/depth-transfer/sparse.sh [--jobs N] [...]
set -eu
mkdir -p runs
sh examples/stdlib-bytes.sh
base="parameterization.base_width=64"
completep="parameterization.name=completep $base parameterization.base_layers=2"
megahp transfer-sweep examples/depth-transfer/run.toml sparsity.method=static sparsity.density=0.25 \
    --family model.layers=2,4,8,16 --seeds 1,2,3 --grid optimizer.lr=0.016,0.032,0.064 --variants \
    "SP: parameterization.name=sp optimizer.lr=0.016,0.032,0.064,0.128" \
    "muP: parameterization.name=mup $base optimizer.lr=0.032,0.064,0.128" \
    "SmuPar: parameterization.name=smupar parameterization.weight_decay=width $base" \
    "CompleteP: $completep optimizer.lr=0.032,0.064,0.128,0.256" \
    "CompleteP x SmuPar: $completep parameterization.scale_density=true" \
    --out runs/depth-sparse --json runs/depth-sparse.json --plot runs/depth-sparse.svg "$@"
