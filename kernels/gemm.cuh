/* gemm.cuh: one dense matrix product on CUDA, for the operators that need one inside (matmul.cu). */
#ifndef LAC_CUDA_GEMM_CUH
#define LAC_CUDA_GEMM_CUH
#include "common.cuh"

/* C = A B (+ C) (+ bias), row-major: C [m, n] with rows ldc apart. A [m, k] is stored with rows lda apart, or, if
 * a_transposed, as [k, m]; B likewise. Strides count elements; *_batch are the distances of batch items. A and B have
 * one dtype; C may be f32 where they are f16 or bf16. */
enum {
    GEMM_PLAIN,
    GEMM_GELU /* C = gelu_tanh(A B + bias); aux [m, n]: what goes into it, or NULL */
};
struct lac_cuda_gemm_args {
    int64_t m, n, k, batch;
    const void *a, *b, *bias; /* bias [n], dense, of C's dtype; or NULL */
    void *c;
    int dtype, c_dtype;
    bool a_transposed, b_transposed, accumulate;
    int64_t lda, ldb, ldc, a_batch, b_batch, c_batch;
    int epilogue; /* beside GEMM_PLAIN one item, not accumulated; aux has rows n apart, all have C's dtype */
    void *aux;
};
/* what lac_cuda_gemm returns, with nothing done and no error set, where cuBLASLt has no kernel with that epilogue */
enum { GEMM_UNKNOWN = -1 };
int lac_cuda_gemm(const char *op, const lac_cuda_gemm_args *g);

/* act_bwd.cu: grad [R, H] becomes grad * f'(pre), f gelu or (`tanh`) gelu_tanh; sums [H]: its sums over rows; act
 * [R, H]: f(pre). Data NULL: not wanted. Half types, dense, R and H > 0, H a multiple of 8, aligned to 16 bytes. */
int lac_cuda_act_back(bool tanh, const lac_view *pre, const lac_view *grad, const lac_view *sums, const lac_view *act);

#endif
