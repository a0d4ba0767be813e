// The selective scan (selective_scan.cu) of a token or a few of each segment, as in a step of decoding.
//
// Bound by the bytes of the states, each read and written once: LANES lanes have a channel, STATES states each; nothing is
// shared but among them. A block has one segment.
//
// Macros: T_U, T_DELTA, T_P, T_OUT, D_STATE. Source: Gu and Dao, arXiv:2312.00752.
#define LANES (D_STATE <= 16 ? 4 : D_STATE <= 32 ? 8 : D_STATE <= 64 ? 16 : 32)
#define TILE 1
#define VECTOR 0
#define CUT 0
#include "scan.cuh"

extern "C" __global__ void selective_scan_step(SCAN_INPUTS, Rows<float> state_out, long long slots_out, Rows<T_OUT> out,
                                               int channels) {
    after_earlier();
    Segment segment = segments[blockIdx.y];
    if (segment.len == 0 || !segment.lies_in(tokens)) return;
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
    for (unsigned i = 0; i < segment.len; ++i) {
        long long t = (long long)segment.start + i;
        float input = load(u.row(t) + channel), dt = load(delta.row(t) + channel) + bias, y = 0.0f;
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
    if (!valid || !state_out.data || segment.slot >= slots_out) return;
    float* after = state_out.row(segment.slot) + of_channel;
    if (wide) {
        *reinterpret_cast<Together<STATES>*>(after + first) = state;
    } else {
        store_states(after, 0, first, true, state.values);
    }
}
