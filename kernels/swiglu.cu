// out = silu(gate) ⊙ up, and its gradients.
#include "h1.cuh"

extern "C" __global__ void swiglu(Rows<const T_X> gate, Rows<const T_X> up, Rows<T_X> out, long long tokens,
                                  long long width) {
    after_earlier();
    bool wide = aligned(gate) && aligned(up) && aligned(out);
    EACH_EIGHT(t, c, tokens, width) {
        float g[8], u[8], product[8];
        load_eight(g, gate.row(t) + c, width - c, wide);
        load_eight(u, up.row(t) + c, width - c, wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) product[i] = silu(g[i]) * u[i];
        store_eight(out.row(t) + c, product, width - c, wide);
    }
}

extern "C" __global__ void swiglu_backward(Rows<const T_X> gate, Rows<const T_X> up, Rows<const T_X> dout,
                                           Rows<T_X> dgate, Rows<T_X> dup, long long tokens, long long width) {
    after_earlier();
    bool wide = aligned(gate) && aligned(up) && aligned(dout) && aligned(dgate) && aligned(dup);
    EACH_EIGHT(t, c, tokens, width) {
        float g[8], u[8], d[8], of_gate[8], of_up[8];
        load_eight(g, gate.row(t) + c, width - c, wide);
        load_eight(u, up.row(t) + c, width - c, wide);
        load_eight(d, dout.row(t) + c, width - c, wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float s = sigmoid(g[i]);
            of_gate[i] = d[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
            of_up[i] = d[i] * g[i] * s;
        }
        store_eight(dgate.row(t) + c, of_gate, width - c, wide);
        store_eight(dup.row(t) + c, of_up, width - c, wide);
    }
}
