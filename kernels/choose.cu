// The next token, a block a row of logits.
//
// argmax: the largest logit, the lowest of equals; NaN never wins, and a row of nothing else gives 0.
// sample: the first index, in order, whose cumulative probability passes uniform·total. Each warp sums the weights
// exp((logit − max) / temperature) of a stretch in f64; the stretch in which the target lies is shared out in the same way,
// until a warp can walk it, 32 at a time. Temperature 0 is argmax.
#include "h1.cuh"

// Values that a warp walks.
#define WALKED 128

struct Best {
    float value;
    unsigned index;
};

H1_DEVICE Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

H1_DEVICE Best warp_best(Best best) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        Best other = {__shfl_xor_sync(WHOLE_WARP, best.value, offset), __shfl_xor_sync(WHOLE_WARP, best.index, offset)};
        best = better(best, other);
    }
    return best;
}

// The best of a row, in every thread; −∞ at index 0 where there is none.
H1_DEVICE Best block_best(const T_X* row, unsigned count, Best* shared) {
    Best best = {-INFINITE, 0};
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
        float value = load(row + i);
        if (value > best.value) best = {value, i};
    }
    best = warp_best(best);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = best;
    __syncthreads();
    Best none = {-INFINITE, 0};
    return warp_best(threadIdx.x % WARP < blockDim.x / WARP ? shared[threadIdx.x % WARP] : none);
}

extern "C" __global__ void argmax(Rows<const T_X> logits, unsigned vocabulary, unsigned* out) {
    after_earlier();
    __shared__ Best shared[WARP];
    Best best = block_best(logits.row(blockIdx.x), vocabulary, shared);
    if (threadIdx.x == 0) out[blockIdx.x] = best.index;
}

H1_DEVICE float weight_of(float logit, float most, float temperature) {
    return logit == logit ? expf((logit - most) / temperature) : 0.0f;
}

extern "C" __global__ void sample(Rows<const T_X> logits, unsigned vocabulary, const float* temperatures,
                                  const float* uniforms, unsigned* out) {
    after_earlier();
    __shared__ Best shared[WARP];
    __shared__ double masses[WARP];
    const T_X* row = logits.row(blockIdx.x);
    float temperature = temperatures[blockIdx.x];
    Best best = block_best(row, vocabulary, shared);
    if (temperature == 0 || best.value == -INFINITE) {
        if (threadIdx.x == 0) out[blockIdx.x] = best.index;
        return;
    }
    unsigned warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    unsigned first = 0, end = vocabulary;
    double before = 0, target = -1;
    bool at_end = false;
    do {
        unsigned stretch = (end - first + warps - 1) / warps;
        unsigned from = min(first + warp * stretch, end), to = min(from + stretch, end);
        double mass = 0;
#pragma unroll 8
        for (unsigned i = from + lane; i < to; i += WARP) mass += weight_of(load(row + i), best.value, temperature);
        for (int offset = WARP / 2; offset > 0; offset /= 2) mass += __shfl_xor_sync(WHOLE_WARP, mass, offset);
        __syncthreads();
        if (lane == 0) masses[warp] = mass;
        __syncthreads();
        if (target < 0) {
            double total = 0;
            for (unsigned w = 0; w < warps; ++w) total += masses[w];
            target = (double)uniforms[blockIdx.x] * total;
        }
        unsigned chosen = 0, last = 0;
        double until = before;
        while (chosen < warps && (at_end || until + masses[chosen] <= target)) {
            if (masses[chosen] > 0) last = chosen;
            until += masses[chosen++];
        }
        before = until;
        // Rounding may put the target past the end: then the last stretch with any mass has it.
        if (chosen == warps) {
            at_end = true;
            chosen = last;
        }
        first = min(first + chosen * stretch, end);
        end = min(first + stretch, end);
    } while (end - first > WALKED);
    if (warp > 0) return;
    unsigned token = 0;
    for (unsigned base = first; base < end; base += WARP) {
        unsigned i = base + lane;
        float weight = i < end ? weight_of(load(row + i), best.value, temperature) : 0.0f;
        double sum = weight;
        for (int offset = 1; offset < WARP; offset *= 2) {
            double below = __shfl_up_sync(WHOLE_WARP, sum, offset);
            if (lane >= offset) sum += below;
        }
        unsigned present = __ballot_sync(WHOLE_WARP, weight > 0);
        unsigned passed = __ballot_sync(WHOLE_WARP, !at_end && weight > 0 && before + sum > target);
        if (passed) {
            token = base + __ffs(passed) - 1;
            break;
        }
        if (present) token = base + 31 - __clz(present);
        before += __shfl_sync(WHOLE_WARP, sum, WARP - 1);
    }
    if (lane == 0) out[blockIdx.x] = token;
}
