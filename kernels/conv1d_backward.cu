// The gradients of the convolution (conv1d.cu). With a the sum before the silu, computed again, and da = dout·silu'(a):
// dx[t, i] = Σ over repeats c and taps k of weight[f, k]·da[t + TAPS − 1 − k, c], within the segment, plus the gradient
// of the state after it; dweight[f, k] = Σ_t da[t, c]·x[t − TAPS + 1 + k, i]; dbias[f] = Σ_t da[t, c].
//
// conv1d_backward: a block takes CONV_ROWS rows, TAPS − 1 rows after them, and up to CONV_CHANNELS input channels, of whole
// heads or of one, with all their repeats. First a thread a repeated channel goes down the rows, leaves da in shared
// memory, [rows][repeat][CONV_CHANNELS], and its sums over the block's rows in `partial`, [row block][filter][TAPS + 1]
// (a shared filter sums over its repeats first). Then a thread an input channel and a quarter of the rows makes dx.
// conv1d_backward_state: a thread a segment and input channel, the gradient of the state before.
// conv1d_backward_sum: a thread a filter and tap adds the row blocks' sums in order.
//
// Macros: T_X, T_W, T_DOUT, T_DX, TAPS, REPEAT.
#include "conv1d.cuh"

#define CONV_CHANNELS 32

H1_DEVICE float silu_derivative(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

extern "C" __global__ void conv1d_backward(Rows<const T_X> x, Rows<const T_W> weight, const T_W* bias,
                                           const Segment* segments, int capacity, long long tokens, int filters,
                                           int head, int repeat_first, Rows<const float> state_in, long long slots,
                                           Rows<const T_DOUT> dout, Rows<const float> dstate_out,
                                           long long dstate_slots, Rows<T_DX> dx, float* partial) {
    constexpr int ROWS = CONV_ROWS + TAPS - 1, COLUMNS = REPEAT * CONV_CHANNELS;
    __shared__ int owner[ROWS];
    H1_DYNAMIC_SHARED(shared);
    float* da = reinterpret_cast<float*>(shared);
    float* sums = da + ROWS * COLUMNS;
    int channels_in = repeat_first ? filters / REPEAT : filters;
    int whole = CONV_CHANNELS / head * head, tiles = (head + CONV_CHANNELS - 1) / CONV_CHANNELS;
    int inside = blockIdx.y % tiles * CONV_CHANNELS;
    int input0 = whole > 0 ? blockIdx.y * whole : blockIdx.y / tiles * head + inside;
    int channels = whole > 0 ? min(whole, channels_in - input0) : min(CONV_CHANNELS, head - inside);
    long long first = blockIdx.x * (long long)CONV_ROWS;
    int rows = min((long long)ROWS, tokens - first), own = min(rows, CONV_ROWS);
    find_owners(segments, capacity, tokens, first, rows, owner);
    for (int i = threadIdx.x; i < COLUMNS; i += blockDim.x) {
        int r = i / CONV_CHANNELS, c = i % CONV_CHANNELS;
        if (c >= channels) continue;
        int input = input0 + c, output = (input / head * REPEAT + r) * head + input % head;
        int filter = repeat_first ? output : input;
        float taps[TAPS], window[TAPS], dtaps[TAPS] = {}, dbase = 0.0f;
        for (int k = 0; k < TAPS; ++k) taps[k] = load(weight.row(filter) + k);
        float base = bias ? load(bias + filter) : 0.0f;
        int before = -1;
        for (int base_row = 0; base_row < rows; base_row += AHEAD) {
            float ahead[AHEAD], gradients[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                long long t = first + base_row + j;
                ahead[j] = base_row + j < rows ? load(x.row(t) + input) : 0.0f;
                gradients[j] = base_row + j < rows ? load(dout.row(t) + output) : 0.0f;
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                int row = base_row + j, now = row < rows ? owner[row] : -1;
                if (now < 0) continue;
                if (now != before) {
                    before = now;
                    Segment segment = segments[before];
#pragma unroll
                    for (int k = 0; k < TAPS; ++k)
                        window[k] = past_input(x, state_in, slots, segment, first + row - TAPS + 1 + k, input);
                } else {
#pragma unroll
                    for (int k = 0; k + 1 < TAPS; ++k) window[k] = window[k + 1];
                    window[TAPS - 1] = ahead[j];
                }
                float sum = base;
#pragma unroll
                for (int k = 0; k < TAPS; ++k) sum = fmaf(taps[k], window[k], sum);
                float gradient = gradients[j] * silu_derivative(sum);
                da[row * COLUMNS + i] = gradient;
                if (row >= own) continue;
                dbase += gradient;
#pragma unroll
                for (int k = 0; k < TAPS; ++k) dtaps[k] = fmaf(gradient, window[k], dtaps[k]);
            }
        }
        float* to = repeat_first ? partial + (blockIdx.x * (long long)filters + filter) * (TAPS + 1)
                                 : sums + i * (TAPS + 1);
        for (int k = 0; k < TAPS; ++k) to[k] = dtaps[k];
        to[TAPS] = dbase;
    }
    __syncthreads();
    for (int i = threadIdx.x; !repeat_first && i < channels * (TAPS + 1); i += blockDim.x) {
        int c = i / (TAPS + 1), k = i % (TAPS + 1);
        float sum = 0.0f;
        for (int r = 0; r < REPEAT; ++r) sum += sums[(r * CONV_CHANNELS + c) * (TAPS + 1) + k];
        partial[(blockIdx.x * (long long)filters + input0 + c) * (TAPS + 1) + k] = sum;
    }
    int c = threadIdx.x % CONV_CHANNELS, input = input0 + c, share = CONV_ROWS * CONV_CHANNELS / blockDim.x;
    int from = threadIdx.x / CONV_CHANNELS * share, end = min(from + share, own);
    if (c >= channels) return;
    float taps[REPEAT][TAPS], pending[TAPS] = {};
#pragma unroll
    for (int r = 0; r < REPEAT; ++r)
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
            taps[r][k] = load(weight.row(repeat_first ? (input / head * REPEAT + r) * head + input % head : input) + k);
    // Down the rows, `pending[k]` is what row − k has so far, and `alike` how many rows up to this are of its segment.
    for (int row = from, alike = 0, before = -1; row < end + TAPS - 1; ++row) {
        int now = row < rows ? owner[row] : -1;
        alike = now < 0 ? 0 : now == before ? alike + 1 : 1;
        before = now;
#pragma unroll
        for (int k = TAPS - 1; k > 0; --k) pending[k] = pending[k - 1];
        pending[0] = 0.0f;
#pragma unroll
        for (int r = 0; r < REPEAT; ++r) {
            float gradient = now < 0 ? 0.0f : da[row * COLUMNS + r * CONV_CHANNELS + c];
#pragma unroll
            for (int k = 0; k < TAPS; ++k)
                if (k < alike) pending[k] = fmaf(taps[r][TAPS - 1 - k], gradient, pending[k]);
        }
        int done = row - TAPS + 1;
        if (done < from || owner[done] < 0) continue;
        Segment segment = segments[owner[done]];
        long long t = first + done, state = t - ((long long)segment.start + segment.len - TAPS);
        float sum = pending[TAPS - 1];
        if (state >= 0 && dstate_out.data && segment.slot < dstate_slots)
            sum += dstate_out.row(segment.slot)[(long long)input * TAPS + state];
        store(dx.row(t) + input, sum);
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
