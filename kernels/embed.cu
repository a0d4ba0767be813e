// The embedding and its gradient.
//
// embed: out[t] = weight[ids[t]]; an id outside of the vocabulary gives NaN.
// embed_backward, in two launches: dweight[ids[t]] += dout[t] in the order of the rows.
//   embed_links: for each row whether its id came before, and the next row with the same id.
//   embed_backward: the first row of each id follows the links and sums, a thread a column.
#include "h1.cuh"

extern "C" __global__ void embed(const unsigned* ids, Rows<const T_W> weight, long long vocabulary, Rows<T_OUT> out,
                                 long long tokens, long long hidden) {
    EACH(t, c, tokens, hidden) {
        unsigned id = ids[t];
        store(out.row(t) + c, id < vocabulary ? load(weight.row(id) + c) : NOT_A_NUMBER);
    }
}

extern "C" __global__ void embed_links(const unsigned* ids, unsigned* first, unsigned* next, unsigned tokens) {
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
    EACH(t, c, tokens, hidden) {
        if (!first[t] || ids[t] >= vocabulary) continue;
        float sum = dweight.row(ids[t])[c];
        for (unsigned u = t; u < tokens; u = next[u]) sum += load(dout.row(u) + c);
        dweight.row(ids[t])[c] = sum;
    }
}
