#!/bin/sh
# Run the quick start: text that every machine has -> corpus -> tokenizer -> model -> sample and report.
#     train.sh RUN.toml
set -eu
run=$1
data=data/quickstart
if [ ! -e "$data/corpus.idx" ]; then
    stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    echo "preparing a corpus from Python's own standard library, $stdlib"
    megahp preprocess --input "$stdlib" --extensions .py .rst .txt \
        --exclude site-packages dist-packages --most-bad 0.05 \
        --tokenizer "$data/tokenizer.model" --train-sentencepiece 4096 --output "$data/corpus" --workers 2
fi
megahp train "$run" --resume auto
megahp sample runs/quickstart --prompt "def read" --save
megahp report runs/quickstart
