#!/usr/bin/env bash
# The runs of docs/gpu.md on one card, each with its command before its output.
# Usage: benches/gpu.sh PART...    (right, example, small, kernels, mixers, loss, step, decode, prompt, wgsl)
# H1 names the program; DIFFERENTIAL and BURN the compiled tests/differential and benches/burn, where they are not for cargo
# to find.
set -uo pipefail
cd "$(dirname "$0")/.."
h1=${H1:-h1}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

run() { printf '\n$ %s\n' "$*"; timeout 300 "$@" 2>&1; }
differential() {
    if [ -n "${DIFFERENTIAL:-}" ]; then run "$DIFFERENTIAL" "$@"; else run cargo test --release --test differential -- "$@"; fi
}

right() {
    run "$h1" doctor
    for backend in cuda wgpu; do run "$h1" verify tests/goldens --backend "$backend" | tail -1; done
    H1_REQUIRE_CUDA=1 differential on_cuda:: | tail -12
    CI=1 differential on_wgpu:: | tail -12
}

example() {
    for options in "cuda --dtype f32" "cuda --dtype bf16" "wgpu --dtype f32" "wgpu --dtype f16"; do
        # shellcheck disable=SC2086
        run "$h1" distill examples/arithmetic.toml --out "$out/${options// /}" --backend $options | grep '^\$\|^stage-\|^teacher ' 
    done
}

small() {
    for dtype in f32 bf16; do
        run "$h1" bench train --backend cuda --tokens 2048 --dtype "$dtype"
        run "$h1" bench throughput --backend cuda --shape smollm2-135m --prompt 512 --new-tokens 64 --batch 1,16 --dtype "$dtype"
    done
}

kernels() { run "$h1" bench kernels --backend cuda --shape apriel-15b --tokens 4096 --dtype bf16 --budget 200; }

mixers() { run python3 benches/mixers.py kernels; }

# Both heads with reverse KL beside PyTorch's.
loss() {
    run "$h1" bench kernels --backend cuda --shape apriel-15b --tokens 16384 --dtype bf16 --budget 1500 --only loss
    run python3 benches/head.py
}

# WGSL through the card's Vulkan, by itself and beside burn's.
wgsl() {
    for dtype in f32 f16; do
        run "$h1" bench kernels --backend wgpu --dtype "$dtype" --budget 60
        if [ -n "${BURN:-}" ]; then
            run "$BURN" --dtype "$dtype"
        else
            run cargo run --release --manifest-path benches/burn/Cargo.toml -- --dtype "$dtype"
        fi
    done
}

# The largest stack of the 15B's layers whose training fits 80 GB.
step() {
    run "$h1" bench train --backend cuda --shape apriel-15b --layers 6 --tokens 4096 --dtype bf16 --steps 3
    run "$h1" bench train --backend cuda --shape apriel-15b --layers 6 --mamba 0 --tokens 4096 --dtype bf16 --steps 3
}

# In the middle of 16,384 tokens, at the largest batches that have room for their ends.
decode() {
    while read -r mamba batches; do
        run "$h1" bench throughput --backend cuda --shape apriel-15b --dtype bf16 --mamba "$mamba" --past 8192 --new-tokens 24 \
            --batch "$batches" | tail -n +5
    done <<< $'0 1,8,15\n25 1,8,30\n30 1,8,37\n34 1,8,46\n40 1,8,64,73'
}

prompt() {
    for mamba in 0 25 30 34 40; do
        run "$h1" bench throughput --backend cuda --shape apriel-15b --dtype bf16 --mamba "$mamba" --prompt 16384 --new-tokens 8 \
            --call 16384 --repeats 2 | tail -n +5
    done
}

for part in "$@"; do "$part"; done
