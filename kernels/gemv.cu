// One row times a weight, and what is made of that at once. Values are read VECTOR at a time; x, the weight and its rows are
// aligned to that.
//
// gemv: out[n] = Σ_k x[k]·weight[n, k] (+ bias[n]) (+ out[n]), a warp an output. gemv_swiglu: out[n] = silu(gate)·up, two such
// sums of rows of the weight, a warp an output.
//
// Bound by the weight's bytes. A lane asks for its first AHEAD packs of a row before it waits for whoever makes x, so that
// memory is busy while the launch before this one ends.
#include "h1.cuh"

template <class T>
struct alignas(sizeof(T) * VECTOR) Pack {
    T values[VECTOR];
};

// The sums Σ_k x[k]·weight[n, k] of ROWS rows, by a warp.
template <int ROWS, int AHEAD>
struct Sums {
    static constexpr int STEP = WARP * VECTOR;
    const T_W* rows[ROWS];
    long long inputs;
    int first = threadIdx.x % WARP * VECTOR;
    Pack<T_W> ahead[ROWS][AHEAD];

    H1_DEVICE Pack<T_W> pack(int row, long long k) const { return *reinterpret_cast<const Pack<T_W>*>(rows[row] + k); }

    // Asks for the first packs.
    H1_DEVICE Sums(const T_W* weight, const long long (&numbers)[ROWS], long long inputs) : inputs(inputs) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) rows[row] = weight + numbers[row] * inputs;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
#pragma unroll
            for (int row = 0; row < ROWS; ++row)
                if (first + i * STEP < inputs) ahead[row][i] = pack(row, first + i * STEP);
    }

    // The sums, in all lanes, once x is there.
    H1_DEVICE void make(const T_X* x, float (&sums)[ROWS]) const {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sums[row] = 0.0f;
        auto take = [&](const Pack<T_X>& v, const Pack<T_W>& w, float& sum) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum += load(v.values + i) * load(w.values + i);
        };
        auto of_x = [&](long long k) { return *reinterpret_cast<const Pack<T_X>*>(x + k); };
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (first + i * STEP < inputs) {
                Pack<T_X> v = of_x(first + i * STEP);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) take(v, ahead[row][i], sums[row]);
            }
#pragma unroll 4
        for (long long k = first + AHEAD * STEP; k < inputs; k += STEP) {
            Pack<T_X> v = of_x(k);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) take(v, pack(row, k), sums[row]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sums[row] = warp_sum(sums[row]);
    }
};

extern "C" __global__ void gemv(const T_X* x, const T_W* weight, const void* bias, int bias_type,
                                T_OUT* out, int add, long long outputs, long long inputs) {
    long long n = blockIdx.x * (long long)(blockDim.x / WARP) + threadIdx.x / WARP;
    if (n >= outputs) return;
    Sums<1, 8> of(weight, {n}, inputs);
    after_earlier();
    float sums[1];
    of.make(x, sums);
    if (threadIdx.x % WARP == 0) put(out + n, sums[0] + (bias ? load_as(bias, bias_type, n) : 0.0f), add);
}

// Rows of the weight from `gate` and from `up` on.
extern "C" __global__ void gemv_swiglu(const T_X* x, const T_W* weight, T_OUT* out, long long outputs, long long inputs,
                                       long long gate, long long up) {
    long long n = blockIdx.x * (long long)(blockDim.x / WARP) + threadIdx.x / WARP;
    if (n >= outputs) return;
    Sums<2, 4> of(weight, {gate + n, up + n}, inputs);
    after_earlier();
    float sums[2];
    of.make(x, sums);
    if (threadIdx.x % WARP == 0) store(out + n, silu(sums[0]) * sums[1]);
}
