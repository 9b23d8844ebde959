#!/bin/sh
# Measure what batch growth costs and saves: loss and steps against batch.target, four seeds each; hours on two cores.
# Run the quick start first, which prepares the corpus.   sh examples/batch-target/study.sh   (results: docs/log.md)
set -eu
train() {
    name=$1 seed=$2
    shift 2
    megahp train examples/quickstart/run.toml --resume auto "log.name=$name-$seed" "train.seed=$seed" train.tokens=1.2e6 \
        train.validate_every=0 checkpoint.every=0 batch.micro_batch=8 "$@"
}
for seed in 1 2 3 4; do
    train constant8 "$seed" batch.policy=constant
    train constant16 "$seed" batch.policy=constant batch.global_batch=16
    for target in 0.1 0.2 0.4 0.8; do
        train "target$target" "$seed" "batch.target=$target"
    done
done
