// Copies from type to type, filling, scaling: what makes weights, which launches after this one read without a wait, so that
// none of these is launched early (ptx.cuh), and nothing is right after one.
#include "h1.cuh"

#ifdef T_X
extern "C" __global__ void copy(Rows<const T_X> src, Rows<T_OUT> out, int add, long long rows, long long cols) {
    bool wide = aligned(src) && aligned(out);
    EACH_EIGHT(r, c, rows, cols) {
        float values[8];
        load_eight(values, src.row(r) + c, cols - c, wide);
        put_eight(out.row(r) + c, values, cols - c, wide, add);
    }
}
#elif defined(T_OUT)
extern "C" __global__ void fill(float value, Rows<T_OUT> out, long long rows, long long cols) {
    bool wide = aligned(out);
    float values[8] = {value, value, value, value, value, value, value, value};
    EACH_EIGHT(r, c, rows, cols) store_eight(out.row(r) + c, values, cols - c, wide);
}

extern "C" __global__ void scale(float factor, Rows<T_OUT> x, long long rows, long long cols) {
    bool wide = aligned(x);
    EACH_EIGHT(r, c, rows, cols) {
        float values[8];
        load_eight(values, x.row(r) + c, cols - c, wide);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] *= factor;
        store_eight(x.row(r) + c, values, cols - c, wide);
    }
}
#else
extern "C" __global__ void copy_ids(Rows<const unsigned> src, Rows<unsigned> out, long long rows, long long cols) {
    EACH(r, c, rows, cols) out.row(r)[c] = src.row(r)[c];
}
#endif
