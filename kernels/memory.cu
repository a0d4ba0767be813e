// Copies from type to type, filling, scaling.
#include "h1.cuh"

#ifdef T_X
extern "C" __global__ void copy(Rows<const T_X> src, Rows<T_OUT> out, int add, long long rows, long long cols) {
    EACH(r, c, rows, cols) put(out.row(r) + c, load(src.row(r) + c), add);
}
#elif defined(T_OUT)
extern "C" __global__ void fill(float value, Rows<T_OUT> out, long long rows, long long cols) {
    EACH(r, c, rows, cols) store(out.row(r) + c, value);
}

extern "C" __global__ void scale(float factor, Rows<T_OUT> x, long long rows, long long cols) {
    EACH(r, c, rows, cols) store(x.row(r) + c, factor * load(x.row(r) + c));
}
#else
extern "C" __global__ void copy_ids(Rows<const unsigned> src, Rows<unsigned> out, long long rows, long long cols) {
    EACH(r, c, rows, cols) out.row(r)[c] = src.row(r)[c];
}
#endif
