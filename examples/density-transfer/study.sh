#!/bin/sh
# Does the best learning rate stay where it is while weights are removed? Standard parameterization, muP and SmuPar at
# density 1, 1/4 and 1/16, three seeds: 171 runs, 52 minutes of CPU, 26 on two cores. After an interruption the same
# command goes on.   sh examples/density-transfer/study.sh   (results: docs/transfer.md)
set -eu
data=data/stdlib/bytes
if [ ! -e "$data.idx" ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    mkdir -p data/stdlib
    python tools/preprocess_data.py --input "$stdlib" --extensions .py --exclude site-packages dist-packages test idlelib \
        lib2to3 --tokenizer bytes --output "$data" --workers 2
fi
python tools/transfer_sweep.py examples/density-transfer/run.toml \
    --grid optimizer.lr=0.001,0.002,0.004,0.008,0.016 --family sparsity.density=1,0.25,0.0625 --seeds 1,2,3 \
    --variants "SP: optimizer.lr=0.0005,0.001,0.002,0.004,0.008,0.016,0.032,0.064" \
    "muP: parameterization.name=mup parameterization.base_width=64 parameterization.init_std=0.08 optimizer.lr=0.001,0.002,0.004,0.008,0.016,0.032" \
    "SmuPar: parameterization.name=smupar parameterization.base_width=64 parameterization.init_std=0.08" \
    --out runs/density-transfer --jobs 2 --json runs/density-transfer.json --plot runs/density-transfer.svg "$@"
