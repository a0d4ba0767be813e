// a = −exp(a_log), and da_log += da ⊙ a.
#include "h1.cuh"

#ifdef T_X
extern "C" __global__ void neg_exp(Rows<const T_X> a_log, Rows<float> a, long long rows, long long cols) {
    after_earlier();
    EACH(r, c, rows, cols) a.row(r)[c] = -expf(load(a_log.row(r) + c));
}
#else
extern "C" __global__ void neg_exp_backward(Rows<const float> a, Rows<const float> da, Rows<float> da_log,
                                            long long rows, long long cols) {
    after_earlier();
    EACH(r, c, rows, cols) da_log.row(r)[c] += da.row(r)[c] * a.row(r)[c];
}
#endif
