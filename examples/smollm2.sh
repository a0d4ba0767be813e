#!/usr/bin/env bash
# The four arms of examples/smollm2.toml, each with the same tokens: in stages by reverse KL; the 15 layers that the stages
# came to at once by reverse KL, and by forward KL; in stages by forward KL. A run that was stopped goes on where it was.
# Usage: examples/smollm2.sh [FOLDER]          (default: runs). H1 names the program; H1_OPTIONS are given to each run;
# H1_TOKENS are the tokens of the three stages.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
runs=${1:-runs}
h1=${H1:-h1}
read -r -a options <<< "${H1_OPTIONS:-}"
read -r first second third <<< "${H1_TOKENS:-25088 30208 40448}"

arm() { "$h1" distill "$here/smollm2.toml" --out "$runs/smollm2-$1" --resume "${options[@]}" "${@:2}"; }
stage() { echo "{ mamba = $1, ranking = \"loo\", tokens = $2 }"; }

stages="stages=[$(stage 6 "$first"), $(stage 10 "$second"), $(stage 15 "$third")]"
by_forward_kl=(--set loss.reverse_kl=0.0 --set loss.forward_kl=1.0)
arm staged --set "$stages"
layers=$("$h1" inspect "$runs/smollm2-staged/stages/03" | sed -n 's/^mamba .*layers //p' | tr ' ' ',')
single="stages=[{ layers = \"$layers\", tokens = $((first + second + third)) }]"
arm reverse --set "$single"
arm forward --set "$single" "${by_forward_kl[@]}"
arm staged-forward --set "$stages" "${by_forward_kl[@]}"
