#!/bin/sh
# The original project's own table, with the row that it lacks: GPT-2 trained on the same tokens.
#
#     sh benchmarks/reproduce_original.sh OUT [more options of dmpt-export train]
#
# Needs a network that reaches the Hugging Face hub (GPT-2, WikiText-103: about 1 GB) and
#     pip install '.[train,bench,data]' -c constraints.txt
# A GPU is expected: both trainings take 369 million tokens each; add --bf16 there. Started again after an
# interruption, it goes on where it stopped. The result is the table on the screen and in OUT/report.
#
# What the original reports, for the same 280,232 tokens of WikiText-103's test split in windows of 1024 by 512:
#     GPT-2 as published          perplexity 38.306    accuracy 35.04 %    log-probability -1,021,618.53
#     dual path, eight heads      perplexity 30.442    accuracy 39.47 %    log-probability   -957,220.16
#
# GPT2, TRAIN, VALID, TEST and RECIPE may name other models, texts (see dmpt-export train --help) and phases.
set -eu
OUT=${1:?"usage: reproduce_original.sh OUT [options of dmpt-export train]"}
shift
DMPT=${DMPT:-dmpt-export}
GPT2=${GPT2:-gpt2}
TRAIN=${TRAIN:-wikitext-103}
VALID=${VALID:-wikitext-103:validation}
TEST=${TEST:-wikitext-103:test}
RECIPE=${RECIPE:-dual-multi-head}

# $DMPT may be several words, as in "python -m dmpt_export"
train() {
    folder=$1
    shift
    $DMPT train "$GPT2" "$folder" --resume --recipe "$RECIPE" --data "$TRAIN" --eval-data "$VALID" "$@"
}

train "$OUT/dmpt" "$@"
# The control: the same phases, tokens and order, on GPT-2 as it is
train "$OUT/control" --splits none --heads 1 --freeze-schedule '{}' "$@"

$DMPT compare "published=$GPT2" "control=$OUT/control" "dmpt=$OUT/dmpt" --control control --data "$TEST" \
    --out "$OUT/report" --overwrite
