#!/bin/sh
# Check the activations of every parameterization over depths at density 1/4 and over densities at 8 layers: ten tables,
# a minute or two. Some fail, as theory predicts.
#     sh examples/depth-transfer/check.sh   (results: docs/transfer.md)
set -eu
base="parameterization.base_width=64"
completep="parameterization.name=completep $base parameterization.base_layers=2"
for variant in "SP: parameterization.name=sp" \
    "muP: parameterization.name=mup $base" \
    "SmuPar: parameterization.name=smupar $base" \
    "CompleteP: $completep" \
    "CompleteP x SmuPar: $completep parameterization.scale_density=true"; do
    for sizes in "--depths 2,4,8,16 sparsity.density=0.25" "--densities 1,0.5,0.25,0.125 model.layers=8"; do
        echo "${variant%%:*}, $sizes"
        megahp coordinate-check examples/depth-transfer/run.toml $sizes sparsity.method=static optimizer.lr=0.002 \
            model.vocab_size=257 ${variant#*: } "$@" || test $? = 1
    done
done
