// The embedding's gradient, dweight[ids[t]] += dout[t] in the order of the rows, in two launches. The embedding itself is
// rows.cu's gather.
//
//   embed_links: for each row whether its id came before, and the next row with the same id.
//   embed_backward: the first row of each id follows the links and sums, a thread a column.
#include "h1.cuh"

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
