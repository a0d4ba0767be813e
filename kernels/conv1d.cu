// Causal depthwise convolution over segments with a repeat of heads and silu:
// out[t, c] = silu(bias[f] + Σ_k weight[f, k]·x[t − TAPS + 1 + k, i]), where output channel c reads the input channel
// i = c / (head·repeat)·head + c % head and the filter f = c (repeat first) or i. Inputs before a segment are its state,
// the last TAPS inputs `[channels_in, TAPS]`, oldest first, or 0 where past = 0.
//
// conv1d: a block takes `block_rows` rows, CONV_ROWS at most, and blockDim units of columns, a thread a unit: PACK neighbouring
// input channels with REPEAT of the `repeat` output channels that read each. It goes down the rows with the last TAPS inputs in
// registers, and fills them anew where a segment begins. conv1d_state: a thread a segment and input channel, launched
// afterwards, so that the state may lie where it lay before. conv1d_step does the work of both for a step of decoding, whose
// segments are short: a thread a segment and input channel, with all output channels that read it.
//
// Macros: T_X, T_W, T_OUT, TAPS; REPEAT, which divides `repeat`; PACK, which divides `head` and what rows of x and of out are
// aligned to. Source: Dao-AILab/causal-conv1d; the repeat: jxiw/M1.
#include "conv1d.cuh"

// Neighbouring values, read and written at once.
template <class T>
struct alignas(sizeof(T) * PACK) Pack {
    T values[PACK];
};

extern "C" __global__ void conv1d(Rows<const T_X> x, Rows<const T_W> weight, const T_W* bias, const Segment* segments,
                                  int capacity, long long tokens, int channels_in, int head, int repeat,
                                  int repeat_first, Rows<const float> state_in, long long slots, Rows<T_OUT> out,
                                  int block_rows) {
    after_earlier();
    __shared__ int owner[CONV_ROWS];
    int packs = channels_in / PACK, units = packs * (repeat / REPEAT);
    for (long long first = blockIdx.x * (long long)block_rows; first < tokens;
         first += gridDim.x * (long long)block_rows) {
        int rows = min((long long)block_rows, tokens - first);
        __syncthreads();
        find_owners(segments, capacity, tokens, first, rows, owner);
        for (int unit = blockIdx.y * blockDim.x + threadIdx.x; unit < units; unit += gridDim.y * blockDim.x) {
            int input = unit % packs * PACK;
            // Of the first of the repeats; the others are `head` channels apart.
            int output = input / head * head * repeat + unit / packs * REPEAT * head + input % head;
            float taps[REPEAT][PACK][TAPS], base[REPEAT][PACK], window[PACK][TAPS];
#pragma unroll
            for (int r = 0; r < REPEAT; ++r)
#pragma unroll
                for (int p = 0; p < PACK; ++p) {
                    int filter = (repeat_first ? output + r * head : input) + p;
                    base[r][p] = bias ? load(bias + filter) : 0.0f;
#pragma unroll
                    for (int k = 0; k < TAPS; ++k) taps[r][p][k] = load(weight.row(filter) + k);
                }
            int before = -1;
            for (int row = 0; row < rows; row += AHEAD) {
                Pack<T_X> ahead[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; ++i)
                    if (row + i < rows) ahead[i] = *reinterpret_cast<const Pack<T_X>*>(x.row(first + row + i) + input);
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    int now = row + i < rows ? owner[row + i] : -1;
                    if (now < 0) continue;
                    long long t = first + row + i;
                    if (now != before) {
                        before = now;
                        Segment segment = segments[before];
#pragma unroll
                        for (int p = 0; p < PACK; ++p)
#pragma unroll
                            for (int k = 0; k < TAPS; ++k)
                                window[p][k] = past_input(x, state_in, slots, segment, t - TAPS + 1 + k, input + p);
                    } else {
#pragma unroll
                        for (int p = 0; p < PACK; ++p) {
#pragma unroll
                            for (int k = 0; k + 1 < TAPS; ++k) window[p][k] = window[p][k + 1];
                            window[p][TAPS - 1] = load(ahead[i].values + p);
                        }
                    }
#pragma unroll
                    for (int r = 0; r < REPEAT; ++r) {
                        Pack<T_OUT> made;
#pragma unroll
                        for (int p = 0; p < PACK; ++p) {
                            float sum = base[r][p];
#pragma unroll
                            for (int k = 0; k < TAPS; ++k) sum = fmaf(taps[r][p][k], window[p][k], sum);
                            store(made.values + p, silu(sum));
                        }
                        *reinterpret_cast<Pack<T_OUT>*>(out.row(t) + output + r * head) = made;
                    }
                }
            }
        }
    }
}

extern "C" __global__ void conv1d_state(Rows<const T_X> x, const Segment* segments, long long tokens, int channels_in,
                                        Rows<const float> state_in, long long slots_in, Rows<float> state_out,
                                        long long slots_out) {
    after_earlier();
    Segment segment = segments[blockIdx.x];
    if (segment.len == 0 || !segment.lies_in(tokens) || segment.slot >= slots_out) return;
    for (int c = blockIdx.y * blockDim.x + threadIdx.x; c < channels_in; c += gridDim.y * blockDim.x) {
        float last[TAPS];
        long long end = (long long)segment.start + segment.len;
#pragma unroll
        for (int k = 0; k < TAPS; ++k) last[k] = past_input(x, state_in, slots_in, segment, end - TAPS + k, c);
#pragma unroll
        for (int k = 0; k < TAPS; ++k) state_out.row(segment.slot)[(long long)c * TAPS + k] = last[k];
    }
}

extern "C" __global__ void conv1d_step(Rows<const T_X> x, Rows<const T_W> weight, const T_W* bias, const Segment* segments,
                                       long long tokens, int channels_in, int head, int repeat, int repeat_first,
                                       Rows<const float> state_in, long long slots_in, Rows<float> state_out,
                                       long long slots_out, Rows<T_OUT> out) {
    after_earlier();
    Segment segment = segments[blockIdx.x];
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
    for (int c = blockIdx.y * blockDim.x + threadIdx.x; c < channels_in; c += gridDim.y * blockDim.x) {
        float window[TAPS];
        long long start = segment.start, end = start + segment.len;
#pragma unroll
        for (int k = 0; k < TAPS; ++k) window[k] = past_input(x, state_in, slots_in, segment, start - TAPS + k, c);
        for (long long t = start; t < end; ++t) {
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) window[k] = window[k + 1];
            window[TAPS - 1] = load(x.row(t) + c);
            for (int r = 0; r < repeat; ++r) {
                int to = (c / head * repeat + r) * head + c % head, filter = repeat_first ? to : c;
                float sum = bias ? load(bias + filter) : 0.0f;
#pragma unroll
                for (int k = 0; k < TAPS; ++k) sum = fmaf(load(weight.row(filter) + k), window[k], sum);
                store(out.row(t) + to, silu(sum));
            }
        }
        if (!state_out.data || segment.slot >= slots_out) continue;
#pragma unroll
        for (int k = 0; k < TAPS; ++k) state_out.row(segment.slot)[(long long)c * TAPS + k] = window[k];
    }
}
