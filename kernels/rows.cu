// Rows by number: gather (out[i] = src[rows[i]], NaN for a row that is not there) and scatter_add (out[rows[i]] += src[i],
// no row twice; rows that are not there are passed over).
#include "h1.cuh"

extern "C" __global__ void gather(Rows<const T_X> src, long long src_rows, const unsigned* rows, Rows<T_OUT> out,
                                  long long count, long long width) {
    after_earlier();
    bool wide = aligned(src) && aligned(out);
    EACH_EIGHT(i, c, count, width) {
        float values[8];
        bool there = rows[i] < src_rows;
        if (there) load_eight(values, src.row(rows[i]) + c, width - c, wide);
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = there ? values[j] : NOT_A_NUMBER;
        store_eight(out.row(i) + c, values, width - c, wide);
    }
}

extern "C" __global__ void scatter_add(Rows<const T_X> src, const unsigned* rows, Rows<T_OUT> out, long long out_rows,
                                       long long count, long long width) {
    after_earlier();
    bool wide = aligned(src) && aligned(out);
    EACH_EIGHT(i, c, count, width) {
        if (rows[i] >= out_rows) continue;
        float values[8];
        load_eight(values, src.row(i) + c, width - c, wide);
        put_eight(out.row(rows[i]) + c, values, width - c, wide, true);
    }
}
