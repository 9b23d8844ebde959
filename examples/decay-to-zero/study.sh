#!/bin/sh
# Compare decay to zero with cosine to a tenth, WSD, inverse square root and a constant rate, each at its own best peak
# rate, at 5 and 20 tokens a weight (41 thousand weights); three seeds. Then: python examples/decay-to-zero/compare.py
# 150 runs, about 15 minutes on two cores. After an interruption the same command resumes. At 80 tokens: long.sh.
set -eu
sh examples/stdlib-bytes.sh
mkdir -p runs
megahp transfer-sweep examples/decay-to-zero/run.toml --family train.tokens=204800,819200 --seeds 1,2,3 \
    --grid optimizer.lr=0.0005,0.001,0.002,0.004,0.008 --variants \
    "D2Z: schedule.name=decay-to-zero" \
    "cosine to 10 %: schedule.name=cosine schedule.floor=0.1" \
    "WSD: schedule.name=wsd schedule.decay=0.2" \
    "inverse sqrt: schedule.name=inverse-sqrt" \
    "constant: schedule.name=constant" \
    --out runs/decay-to-zero --json examples/decay-to-zero/results.json --plot runs/decay-to-zero.svg "$@"
