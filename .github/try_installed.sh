#!/usr/bin/env bash
# What a newcomer does with an installed anneal (the first one on PATH), outside of any checkout:
#
#     try_installed.sh EXAMPLES        the folder examples/ of a checkout: a corpus and a tiny model, no code of ours
set -euo pipefail
examples=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset PYTHONPATH
export HF_HUB_OFFLINE=1

anneal --version
anneal --help > help.txt
grep -q 'doctor' help.txt
anneal --show-completion bash > completion.sh
# Without an engine the doctor has a note to give, and nothing wrong.
anneal doctor
anneal cache build "$examples/own-data.jsonl" --model "$examples/tiny-base" --out cache --engine transformers
anneal cache inspect cache --row 0 > row.txt
anneal cache verify cache
anneal train cache --model "$examples/tiny-base" --out model --set training.max_steps=2
anneal eval cache --model model
test -f model/model.safetensors
grep -q 'What it kept' model/README.md
echo "the installed anneal works"
