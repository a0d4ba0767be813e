// Rows by number: gather (out[i] = src[rows[i]], NaN for a row that is not there) and scatter_add (out[rows[i]] += src[i],
// no row twice; rows that are not there are passed over).
#include "h1.cuh"

extern "C" __global__ void gather(Rows<const T_X> src, long long src_rows, const unsigned* rows, Rows<T_OUT> out,
                                  long long count, long long width) {
    after_earlier();
    EACH(i, c, count, width)
        store(out.row(i) + c, rows[i] < src_rows ? load(src.row(rows[i]) + c) : NOT_A_NUMBER);
}

extern "C" __global__ void scatter_add(Rows<const T_X> src, const unsigned* rows, Rows<T_OUT> out, long long out_rows,
                                       long long count, long long width) {
    after_earlier();
    EACH(i, c, count, width)
        if (rows[i] < out_rows) put(out.row(rows[i]) + c, load(src.row(i) + c), true);
}
