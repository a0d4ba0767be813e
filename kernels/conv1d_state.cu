// The state after segments of the convolution (conv1d.cu), a thread a segment and input channel: the last TAPS inputs. Launched
// after what reads the state before, so that it may lie where that lay.
//
// Macros: T_X, TAPS.
#include "conv1d.cuh"

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
