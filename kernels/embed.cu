// The embedding's gradient, dweight[ids[t]] += dout[t] in the order of the rows, in two launches. The embedding itself is
// rows.cu's gather.
//
//   embed_links: for each row whether its id came before, and the next row with the same id, a warp a row.
//   embed_backward: the first row of each id follows the links and sums, a thread a column.
#include "h1.cuh"

extern "C" __global__ void embed_links(const unsigned* ids, unsigned* first, unsigned* next, unsigned tokens) {
    after_earlier();
    unsigned t = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (t >= tokens) return;
    unsigned id = ids[t];
    // The first row of `from..to` with this id; `to` if there is none.
    auto find = [&](unsigned from, unsigned to) {
        for (; from < to; from += WARP) {
            unsigned found = __ballot_sync(WHOLE_WARP, from + lane < to && ids[from + lane] == id);
            if (found) return from + __ffs(found) - 1;
        }
        return to;
    };
    unsigned before = find(0, t), after = find(t + 1, tokens);
    if (lane > 0) return;
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
