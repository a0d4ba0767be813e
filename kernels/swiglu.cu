// out = silu(gate) ⊙ up, and its gradients.
#include "h1.cuh"

extern "C" __global__ void swiglu(Rows<const T_X> gate, Rows<const T_X> up, Rows<T_X> out, long long tokens,
                                  long long width) {
    after_earlier();
    EACH(t, c, tokens, width) store(out.row(t) + c, silu(load(gate.row(t) + c)) * load(up.row(t) + c));
}

extern "C" __global__ void swiglu_backward(Rows<const T_X> gate, Rows<const T_X> up, Rows<const T_X> dout,
                                           Rows<T_X> dgate, Rows<T_X> dup, long long tokens, long long width) {
    after_earlier();
    EACH(t, c, tokens, width) {
        float g = load(gate.row(t) + c), u = load(up.row(t) + c), d = load(dout.row(t) + c), s = sigmoid(g);
        store(dgate.row(t) + c, d * u * s * (1.0f + g * (1.0f - s)));
        store(dup.row(t) + c, d * g * s);
    }
}
