#!/bin/sh
# Continue study.sh at 80 tokens a weight and at lower rates, the constant one's at 5 and 20 too. 114 runs, 40 minutes on
# two cores. After an interruption the same command resumes. Then: python examples/decay-to-zero/compare.py
set -eu
sh examples/stdlib-bytes.sh
mkdir -p runs
megahp transfer-sweep examples/decay-to-zero/run.toml --family train.tokens=204800,3276800 --seeds 1,2,3 \
    --grid optimizer.lr=0.00025,0.0005,0.001 --variants \
    "D2Z: schedule.name=decay-to-zero optimizer.lr=0.00025,0.0005,0.001,0.002" \
    "cosine to 10 %: schedule.name=cosine schedule.floor=0.1 optimizer.lr=0.00025,0.0005,0.001,0.002" \
    "WSD: schedule.name=wsd schedule.decay=0.2" \
    "inverse sqrt: schedule.name=inverse-sqrt" \
    "constant: schedule.name=constant" \
    --out runs/decay-to-zero-80 --json examples/decay-to-zero/results-80.json "$@"
megahp transfer-sweep examples/decay-to-zero/run.toml --family train.tokens=204800,819200 --seeds 1,2,3 \
    --grid optimizer.lr=0.000125,0.00025 --variants "constant: schedule.name=constant" \
    --out runs/decay-to-zero-constant --json examples/decay-to-zero/results-constant.json "$@"
