#!/bin/sh
# Measure what batch growth saves in the quick start: five seeds of its run, and of the same run with a constant batch
# of 16, two at a time. 40 minutes on two cores; run again, it resumes.
#     sh examples/quickstart/seeds.sh   (after `make train`)
set -eu
export OMP_NUM_THREADS=1
for seed in 1 2 3 4 5; do
    for largest in 16 0; do # 0 = no limit
        megahp train examples/quickstart/run.toml --resume auto "batch.largest=$largest" \
            "train.seed=$seed" "log.name=seeds-$largest-$seed" log.every=20 log.tensorboard=false log.baselines=false \
            checkpoint.keep=1 &
    done
    wait
done
python - <<'EOF'
import json
import statistics

found = {}
for name, largest in (("constant", 16), ("growing", 0)):
    files = [f"runs/seeds-{largest}-{seed}/metrics.jsonl" for seed in range(1, 6)]
    ends = [json.loads(open(file).readlines()[-1]) for file in files]
    found[name] = [end["validation_loss"] for end in ends]
    losses, steps = " ".join(f"{loss:.4f}" for loss in found[name]), statistics.mean(end["step"] for end in ends)
    print(f"{name:<9} {steps:6.0f} steps, validation {statistics.mean(found[name]):.4f}: {losses}")
differences = [one - other for one, other in zip(found["growing"], found["constant"])]
half = 2.776 * statistics.stdev(differences) / 5**0.5  # Student's t, 4 degrees of freedom
print(f"difference {statistics.mean(differences):+.4f} +- {half:.4f} (95 %)")
EOF
