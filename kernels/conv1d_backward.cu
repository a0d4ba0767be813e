// The gradients of the convolution (conv1d.cu). With a the sum before the silu, computed again, and da = dout·silu'(a):
// dx[t, i] = Σ over repeats c and taps k of weight[f, k]·da[t + TAPS − 1 − k, c], within the segment, plus the gradient
// of the state after it; dweight[f, k] = Σ_t da[t, c]·x[t − TAPS + 1 + k, i]; dbias[f] = Σ_t da[t, c].
//
// conv1d_backward: a block takes CONV_ROWS rows, and a thread an input channel with all its repeats: it goes down these rows
// and TAPS − 1 more, with the last inputs and the unfinished gradients of the last rows in registers, and leaves its sums
// over the block's rows in `partial`, [row block][filter][TAPS + 1] (a shared filter sums over its repeats first).
// conv1d_backward_state: a thread a segment and input channel, the gradient of the state before.
// conv1d_backward_sum: a thread a filter and tap adds the row blocks' sums in order.
//
// Macros: T_X, T_W, T_DOUT, T_DX, TAPS, REPEAT.
#include "conv1d.cuh"

// Rows whose values a thread loads at once.
#define BACK_AHEAD 4

H1_DEVICE float silu_derivative(float x) {
    float s = sigmoid(x);
    return s * fmaf(x, 1.0f - s, 1.0f);
}

extern "C" __global__ void conv1d_backward(Rows<const T_X> x, Rows<const T_W> weight, const T_W* bias,
                                           const Segment* segments, int capacity, long long tokens, int filters,
                                           int head, int repeat_first, Rows<const float> state_in, long long slots,
                                           Rows<const T_DOUT> dout, Rows<const float> dstate_out,
                                           long long dstate_slots, Rows<T_DX> dx, float* partial) {
    constexpr int ROWS = CONV_ROWS + TAPS - 1;
    __shared__ int owner[ROWS];
    long long first = blockIdx.x * (long long)CONV_ROWS;
    int rows = min((long long)ROWS, tokens - first), own = min(rows, CONV_ROWS);
    find_owners(segments, capacity, tokens, first, rows, owner);
    int channels_in = repeat_first ? filters / REPEAT : filters, input = blockIdx.y * blockDim.x + threadIdx.x;
    if (input >= channels_in) return;
    int output = input / head * head * REPEAT + input % head;
    float taps[REPEAT][TAPS], base[REPEAT], dtaps[REPEAT][TAPS + 1] = {};
#pragma unroll
    for (int r = 0; r < REPEAT; ++r) {
        int filter = repeat_first ? output + r * head : input;
        base[r] = bias ? load(bias + filter) : 0.0f;
#pragma unroll
        for (int k = 0; k < TAPS; ++k) taps[r][k] = load(weight.row(filter) + k);
    }
    // The last inputs, and what the gradient of row − k has so far; `alike` rows up to this are of its segment.
    float window[TAPS] = {}, pending[TAPS] = {};
    int before = -1, alike = 0;
    Segment segment = {};
    auto finish = [&](int row, float sum) {
        if (row >= own) return;
        long long t = first + row, state = t - ((long long)segment.start + segment.len - TAPS);
        if (state >= 0 && dstate_out.data && segment.slot < dstate_slots)
            sum += dstate_out.row(segment.slot)[(long long)input * TAPS + state];
        store(dx.row(t) + input, sum);
    };
    // The rows before `row` of the last segment have all that they get.
    auto finish_all = [&](int row) {
#pragma unroll
        for (int k = 0; k < TAPS - 1; ++k)
            if (k < alike) finish(row - 1 - k, pending[k]);
    };
    for (int start = 0; start < rows; start += BACK_AHEAD) {
        float inputs[BACK_AHEAD], gradients[BACK_AHEAD][REPEAT];
#pragma unroll
        for (int j = 0; j < BACK_AHEAD; ++j) {
            bool there = start + j < rows;
            long long t = first + (there ? start + j : 0);
            inputs[j] = there ? load(x.row(t) + input) : 0.0f;
#pragma unroll
            for (int r = 0; r < REPEAT; ++r) gradients[j][r] = there ? load(dout.row(t) + output + r * head) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < BACK_AHEAD; ++j) {
            int row = start + j, now = row < rows ? owner[row] : -1;
            if (now != before) {
                finish_all(row);
                before = now;
                alike = 0;
                if (now >= 0) segment = segments[now];
#pragma unroll
                for (int k = 0; k < TAPS; ++k) {
                    pending[k] = 0.0f;
                    if (now >= 0 && k > 0)
                        window[k] = past_input(x, state_in, slots, segment, first + row - TAPS + k, input);
                }
            }
            if (now < 0) continue;
            ++alike;
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) window[k] = window[k + 1];
            window[TAPS - 1] = inputs[j];
#pragma unroll
            for (int k = TAPS - 1; k > 0; --k) pending[k] = pending[k - 1];
            pending[0] = 0.0f;
#pragma unroll
            for (int r = 0; r < REPEAT; ++r) {
                float sum = base[r];
#pragma unroll
                for (int k = 0; k < TAPS; ++k) sum = fmaf(taps[r][k], window[k], sum);
                float gradient = gradients[j][r] * silu_derivative(sum);
#pragma unroll
                for (int k = 0; k < TAPS; ++k) pending[k] = fmaf(taps[r][TAPS - 1 - k], gradient, pending[k]);
                if (row >= own) continue;
                dtaps[r][TAPS] += gradient;
#pragma unroll
                for (int k = 0; k < TAPS; ++k) dtaps[r][k] = fmaf(gradient, window[k], dtaps[r][k]);
            }
            if (alike >= TAPS) finish(row - TAPS + 1, pending[TAPS - 1]);
        }
    }
    finish_all(rows);
    float* to = partial + blockIdx.x * (long long)filters * (TAPS + 1);
#pragma unroll
    for (int k = 0; k <= TAPS; ++k) {
        float shared = 0.0f;
#pragma unroll
        for (int r = 0; r < REPEAT; ++r) {
            shared += dtaps[r][k];
            if (repeat_first) to[(output + r * head) * (TAPS + 1) + k] = dtaps[r][k];
        }
        if (!repeat_first) to[input * (TAPS + 1) + k] = shared;
    }
}

extern "C" __global__ void conv1d_backward_state(Rows<const T_X> x, Rows<const T_W> weight, const T_W* bias,
                                                 const Segment* segments, long long tokens, int channels_in, int head,
                                                 int repeat_first, Rows<const float> state_in, long long slots,
                                                 Rows<const T_DOUT> dout, Rows<const float> dstate_out,
                                                 long long dstate_slots, Rows<float> dstate_in, long long slots_out) {
    Segment segment = segments[blockIdx.x];
    if (segment.len == 0 || !segment.lies_in(tokens) || segment.slot >= slots_out) return;
    for (int c = blockIdx.y * blockDim.x + threadIdx.x; c < channels_in; c += gridDim.y * blockDim.x) {
        float* to = dstate_in.row(segment.slot) + (long long)c * TAPS;
        float state[TAPS] = {};
        for (int j = int(segment.len); j < TAPS; ++j)
            if (dstate_out.data && segment.slot < dstate_slots)
                state[j] = dstate_out.row(segment.slot)[(long long)c * TAPS + j - segment.len];
        for (int r = 0; r < REPEAT; ++r) {
            int output = c / head * head * REPEAT + r * head + c % head, filter = repeat_first ? output : c;
            for (int row = 0; row + 1 < TAPS && row < int(segment.len); ++row) {
                long long t = (long long)segment.start + row;
                float sum = bias ? load(bias + filter) : 0.0f;
                for (int k = 0; k < TAPS; ++k)
                    sum = fmaf(load(weight.row(filter) + k),
                               past_input(x, state_in, slots, segment, t - TAPS + 1 + k, c), sum);
                float gradient = load(dout.row(t) + output) * silu_derivative(sum);
                // State j stands TAPS − j rows before the segment, so that tap j − 1 − row of this row reads it.
                for (int j = row + 1; j < TAPS; ++j)
                    state[j] = fmaf(load(weight.row(filter) + j - 1 - row), gradient, state[j]);
            }
        }
        for (int j = 0; j < TAPS; ++j) to[j] = segment.past > 0 ? state[j] : 0.0f;
    }
}

extern "C" __global__ void conv1d_backward_sum(const float* partial, int row_blocks, int filters,
                                               Rows<float> dweight, float* dbias) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < filters * (TAPS + 1); i += gridDim.x * blockDim.x) {
        int filter = i / (TAPS + 1), k = i % (TAPS + 1);
        float sum = 0.0f;
#pragma unroll 8
        for (int block = 0; block < row_blocks; ++block) sum += partial[(long long)block * filters * (TAPS + 1) + i];
        if (k < TAPS && dweight.data) dweight.row(filter)[k] += sum;
        if (k == TAPS && dbias) dbias[filter] += sum;
    }
}
