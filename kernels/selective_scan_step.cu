// The selective scan (selective_scan.cu) of a token or a few of each segment, as in a step of decoding; where TAPS is given, of
// what the convolution (conv1d.cu) makes of their x.
//
// Bound by the bytes of the states, each read and written once: LANES lanes have a channel, STATES states each. A block has one
// segment; with a convolution all outputs of one of its heads, so that the inputs' state may lie where it lay before. States and
// weights are asked for before the launch before this one is done: an earlier one wrote them.
//
// Macros: T_U, T_DELTA, T_P, T_OUT, D_STATE; of the convolution TAPS, HEAD, T_X, T_W. Source: Gu and Dao, arXiv:2312.00752.
#define LANES (D_STATE <= 16 ? 4 : D_STATE <= 32 ? 8 : D_STATE <= 64 ? 16 : 32)
#define TILE 1
#define VECTOR 0
#define CUT 0
#include "scan.cuh"

#ifdef TAPS
#include "conv1d.cuh"
// `made` is where u is kept, if it is.
#define OF_CONV                                                                                                       \
    , Rows<const T_X> x, Rows<const T_W> weight, const T_W *conv_bias, int repeat_first, Rows<const float> inputs_in, \
        long long inputs_slots, Rows<float> inputs_out, long long inputs_slots_out, Rows<T_U> made
#define TAPS_OF_LANE ((TAPS + LANES - 1) / LANES)
#else
#define OF_CONV
#endif

extern "C" __global__ void selective_scan_step(SCAN_INPUTS, Rows<float> state_out, long long slots_out, Rows<T_OUT> out,
                                               int channels OF_CONV) {
    Segment segment = segments[blockIdx.y];
    // Of one that is not there no token is read and no slot written; every block waits for earlier launches.
    if (segment.len == 0 || !segment.lies_in(tokens)) segment = {0, 0, 0, ~0u, 0};
    int channel = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, first = threadIdx.x % LANES * STATES;
    // Lanes past the last channel take part in the sums of their warp.
    bool valid = channel < channels;
    channel = min(channel, channels - 1);
    bool wide = D_STATE % STATES == 0 && first < D_STATE && aligned(state_in) && aligned(state_out) && aligned(a);
    auto read = [&](const float* row, bool there, float scale) {
        Together<STATES> values = {};
        if (wide && there) {
            values = *reinterpret_cast<const Together<STATES>*>(row + first);
#pragma unroll
            for (int s = 0; s < STATES; ++s) values.values[s] *= scale;
        } else {
            load_states(row, 0, first, there, scale, values.values);
        }
        return values;
    };
    bool goes_on = segment.past > 0 && state_in.data && segment.slot < slots;
    long long of_channel = (long long)channel * D_STATE;
    Together<STATES> state = read(state_in.row(goes_on ? segment.slot : 0) + of_channel, goes_on, 1.0f);
    Together<STATES> decay = read(a.row(channel), true, LOG2_E);
    float skip = d ? d[channel] : 0.0f, bias = delta_bias ? delta_bias[channel] : 0.0f;
    b.data += channel / per_b * D_STATE;
    c.data += channel / per_c * D_STATE;
#ifdef TAPS
    // A lane has TAPS_OF_LANE neighbouring taps of its channel.
    int repeat = threadIdx.x / LANES / HEAD, from = blockIdx.x * HEAD + threadIdx.x / LANES % HEAD;
    int first_tap = threadIdx.x % LANES * TAPS_OF_LANE, filter = repeat_first ? channel : from;
    float taps[TAPS_OF_LANE], window[TAPS_OF_LANE], base = conv_bias ? load(conv_bias + filter) : 0.0f;
#pragma unroll
    for (int k = 0; k < TAPS_OF_LANE; ++k) {
        bool there = first_tap + k < TAPS;
        taps[k] = there ? load(weight.row(filter) + first_tap + k) : 0.0f;
        long long t = (long long)segment.start - TAPS + first_tap + k;
        window[k] = there ? past_input(x, inputs_in, inputs_slots, segment, t, from) : 0.0f;
    }
    auto u_of = [&](long long t) {
        float sum = first_tap == 0 ? base : 0.0f, of_next = __shfl_down_sync(WHOLE_WARP, window[0], 1);
#pragma unroll
        for (int k = 0; k < TAPS_OF_LANE; ++k) {
            window[k] = k + 1 < TAPS_OF_LANE ? window[k + 1] : of_next;
            if (first_tap + k == TAPS - 1) window[k] = load(x.row(t) + from);
            sum = fmaf(taps[k], window[k], sum);
        }
        for (int offset = 1; offset < LANES; offset *= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, offset);
        float value = silu(sum);
        if (made.data && first == 0) store(made.row(t) + channel, value);
        return value;
    };
#else
    auto u_of = [&](long long t) { return load(u.row(t) + channel); };
#endif
    after_earlier();
    for (unsigned i = 0; i < segment.len; ++i) {
        long long t = (long long)segment.start + i;
        float input = u_of(t), dt = load(delta.row(t) + channel) + bias, y = 0.0f;
        if (softplus) dt = softplus_of(dt);
#pragma unroll
        for (int s = 0; s < STATES; ++s) {
            if (first + s >= D_STATE) break;
            float now = fmaf(exp2_fast(dt * decay.values[s]), state.values[s], dt * input * load(b.row(t) + first + s));
            state.values[s] = now;
            y = fmaf(now, load(c.row(t) + first + s), y);
        }
        for (int offset = 1; offset < LANES; offset *= 2) y += __shfl_xor_sync(WHOLE_WARP, y, offset);
        y = fmaf(skip, input, y);
        if (z.data) y *= silu(load(z.row(t) + channel));
        if (valid && first == 0) store(out.row(t) + channel, y);
    }
#ifdef TAPS
    // Of the outputs that an input has, the first one writes its state, which all have read.
    __syncthreads();
    if (repeat == 0 && inputs_out.data && segment.slot < inputs_slots_out) {
        float* last = inputs_out.row(segment.slot) + (long long)from * TAPS + first_tap;
#pragma unroll
        for (int k = 0; k < TAPS_OF_LANE; ++k)
            if (first_tap + k < TAPS) last[k] = window[k];
    }
#endif
    if (!valid || !state_out.data || segment.slot >= slots_out) return;
    float* after = state_out.row(segment.slot) + of_channel;
    if (wide) {
        *reinterpret_cast<Together<STATES>*>(after + first) = state;
    } else {
        store_states(after, 0, first, true, state.values);
    }
}
