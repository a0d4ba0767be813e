// The embedding and its gradient.
//
// embed: out[t] = weight[ids[t]]; an id outside of the vocabulary gives NaN.
// embed_backward, in two launches: dweight[ids[t]] += dout[t] in the order of the rows.
//   embed_links: for each row whether its id came before, and the next row with the same id.
//   embed_backward: the first row of each id follows the links and sums, a thread a column.
#include "h1.cuh"

extern "C" __global__ void embed(const unsigned* ids, Rows<const T_W> weight, long long vocabulary, Rows<T_OUT> out,
                                 long long tokens, long long hidden) {
    after_earlier();
    bool wide = aligned(weight) && aligned(out);
    EACH_EIGHT(t, c, tokens, hidden) {
        float values[8];
        bool there = ids[t] < vocabulary;
        if (there) load_eight(values, weight.row(ids[t]) + c, hidden - c, wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = there ? values[i] : NOT_A_NUMBER;
        store_eight(out.row(t) + c, values, hidden - c, wide);
    }
}

extern "C" __global__ void embed_links(const unsigned* ids, unsigned* first, unsigned* next, unsigned tokens) {
    after_earlier();
    unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= tokens) return;
    unsigned id = ids[t], before = 0, after = t + 1;
    while (before < t && ids[before] != id) ++before;
    while (after < tokens && ids[after] != id) ++after;
    first[t] = before == t;
    next[t] = after;
}

extern "C" __global__ void embed_backward(const unsigned* ids, const unsigned* first, const unsigned* next,
                                          Rows<const T_X> dout, Rows<float> dweight, long long vocabulary,
                                          unsigned tokens, long long hidden) {
    after_earlier();
    EACH(t, c, tokens, hidden) {
        if (!first[t] || ids[t] >= vocabulary) continue;
        float sum = dweight.row(ids[t])[c];
        for (unsigned u = t; u < tokens; u = next[u]) sum += load(dout.row(u) + c);
        dweight.row(ids[t])[c] = sum;
    }
}
