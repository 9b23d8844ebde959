#!/bin/sh
# What growth is worth in the quick start: five seeds of its run, and of the same run with a constant batch. An hour and
# a half on two cores; again, it resumes.   sh examples/quickstart/seeds.sh    (after `make train`, which makes the data)
set -eu
run=examples/quickstart/run.toml
for seed in 1 2 3 4 5; do
    for policy in constant measured; do
        megahp train "$run" --ranks 2 --resume auto "batch.policy=$policy" "train.seed=$seed" "log.name=seeds-$policy-$seed" \
            log.every=20 log.tensorboard=false log.baselines=false checkpoint.keep=1
    done
done
python - <<'EOF'
import json
import statistics

found = {}
for policy in ("constant", "measured"):
    ends = [open(f"runs/seeds-{policy}-{seed}/metrics.jsonl").readlines()[-1] for seed in range(1, 6)]
    found[policy] = [json.loads(end) for end in ends]
    losses = [end["validation_loss"] for end in found[policy]]
    steps = statistics.mean(end["step"] for end in found[policy])
    print(f"{policy:<9} {steps:6.0f} steps, validation {statistics.mean(losses):.4f}: " + " ".join(f"{x:.4f}" for x in losses))
pairs = zip(found["measured"], found["constant"])
differences = [one["validation_loss"] - other["validation_loss"] for one, other in pairs]
half = 2.776 * statistics.stdev(differences) / 5**0.5  # Student's t, 4 degrees of freedom
print(f"difference {statistics.mean(differences):+.4f} +- {half:.4f} (95 %)")
EOF
