/* matmul.cu: matrix products on CUDA, over cuBLASLt.
 *
 * Everything is row-major here and column-major there, so C = A B is asked for as C^T = B^T A^T; a bias along C's rows
 * is then cuBLASLt's own epilogue. Operands are read in place when one of their last two strides is 1 and the other
 * spans it, which transposed and sliced views are; others are copied once into scratch memory. Batch axes that step
 * evenly are one strided-batch call; uneven ones (two broadcast axes) are one call per item of the outer axes.
 *
 * What follows a product inside the same kernel (bias, gelu_tanh) is an epilogue of cuBLASLt's; linear.cu uses them.
 * The choice of algorithm is cuBLASLt's first suggestion, remembered per shape: asking costs tens of microseconds, and
 * a training step repeats the same few dozen shapes. Large results of short sums in a half type on Hopper have the
 * suggestion with tiles of 128 x 128 instead, or else of 128 x 160: the first mostly has larger ones, and where there
 * are few steps along a sum, writing a tile down takes as long as half of them. Of 20 such shapes on an H200 none was
 * slower by it, the products of a training step of LongNet-125M took 34.3 ms instead of 36.7. Where what goes into gelu
 * is kept, the first is faster (up of a feed-forward layer 287 us to 302). Rejected: timing the suggestions at first
 * use, which could give other bits in every run. f32 runs in exact f32 unless the script allows TF32 (lac.use_tf32),
 * f16 and bf16 multiply on tensor cores and add in f32, f64 in f64. Same shape, same device: same algorithm, so the
 * same bits.
 */
#include "gemm.cuh"
#include <cstdio>
#include <cstring>
#include <cublasLt.h>

enum { REMEMBERED = 512, WORKSPACE = 32 << 20, SUGGESTED = 8, SHORT_SUM = 4096, MANY_RESULTS = 1 << 24 };

static cublasLtHandle_t handle;
static void *workspace;

static int blas_check(const char *op, cublasStatus_t status)
{
    if (status == CUBLAS_STATUS_SUCCESS) return 0;
    LAC_FAIL(INTERNAL, "%s: cuBLAS: %s", op, cublasLtGetStatusString(status));
}
#define BLAS_TRY(op, expression) LAC_TRY(blas_check(op, expression))
const char *lac_cuda_blas_text(int status) { return cublasLtGetStatusString((cublasStatus_t)status); }

/* what a remembered choice depends on */
struct shape_key {
    int64_t m, n, k, batch, lda, ldb, ldc, a_batch, b_batch, c_batch;
    int32_t dtype, c_dtype, a_transposed, b_transposed, tf32, align_a, align_b;
    int32_t epilogue; /* cublasLtEpilogue_t */
};
struct remembered {
    bool used, unknown; /* there is no algorithm */
    bool tried;         /* cuBLAS has taken such a product */
    shape_key key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};
static remembered memory[REMEMBERED];

static uint64_t hash_of(const shape_key *k)
{
    const unsigned char *p = (const unsigned char *)k;
    uint64_t h = 1469598103934665603ull;
    for (size_t i = 0; i < sizeof *k; i++) h = (h ^ p[i]) * 1099511628211ull;
    return h ^ h >> 29;
}

static cudaDataType_t data_type(int dtype)
{
    static const cudaDataType_t types[] = {CUDA_R_64F, CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF};
    return types[dtype];
}

static int layout_make(const char *op, cublasLtMatrixLayout_t *l, int dtype, int64_t rows, int64_t cols, int64_t ld,
                       int64_t batch, int64_t step)
{
    int32_t count = (int32_t)batch;
    BLAS_TRY(op, cublasLtMatrixLayoutCreate(l, data_type(dtype), (uint64_t)rows, (uint64_t)cols, ld));
    if (batch == 1) return 0;
    BLAS_TRY(op, cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    return blas_check(
        op, cublasLtMatrixLayoutSetAttribute(*l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &step, sizeof step));
}

static void forget(remembered *r)
{
    if (r->tried) lac_cuda_stream(); /* products that are queued use it */
    if (r->desc) cublasLtMatmulDescDestroy(r->desc);
    if (r->a) cublasLtMatrixLayoutDestroy(r->a);
    if (r->b) cublasLtMatrixLayoutDestroy(r->b);
    if (r->c) cublasLtMatrixLayoutDestroy(r->c);
    memset(r, 0, sizeof *r);
}

static cublasLtEpilogue_t epilogue_of(const lac_cuda_gemm_args *g)
{
    if (g->epilogue != GEMM_GELU) return g->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (g->aux) return g->bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    return g->bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
}

#define ATTRIBUTE(op, r, name, value)                                                                                  \
    BLAS_TRY(op, cublasLtMatmulDescSetAttribute((r)->desc, CUBLASLT_MATMUL_DESC_##name, &(value), sizeof(value)))

/* a product, as it is queued (launcher.cu) */
struct product {
    const remembered *r;
    const void *a, *b, *bias;
    void *c, *aux;
    int64_t aux_ld;
    union scalar {
        double wide;
        float narrow;
    } alpha, beta;
};

/* the pointers of this call's epilogue; only who hands products to cuBLAS, in their order, may set them */
static cublasStatus_t point(const product *p)
{
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    auto set = [&](cublasLtMatmulDescAttributes_t name, const void *value) {
        if (!status) status = cublasLtMatmulDescSetAttribute(p->r->desc, name, value, 8);
    };
    if (p->bias) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias);
    if (p->aux) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &p->aux);
    if (p->aux) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &p->aux_ld);
    return status;
}

static int run_product(const void *data, cudaStream_t to)
{
    const product *p = (const product *)data;
    const remembered *r = p->r;
    cublasStatus_t status = point(p);
    if (!status)
        status = cublasLtMatmul(handle, r->desc, &p->alpha, p->b, r->b, p->a, r->a, &p->beta, p->c, r->c, p->c, r->c,
                                &r->algorithm, workspace, WORKSPACE, to);
    return status ? LAC_CUDA_BLAS + (int)status : 0;
}

/* a number of an algorithm's configuration */
static int32_t setting(const cublasLtMatmulAlgo_t *algorithm, cublasLtMatmulAlgoConfigAttributes_t name)
{
    int32_t value = 0;
    size_t written;
    cublasLtMatmulAlgoConfigGetAttribute(algorithm, name, &value, sizeof value, &written);
    return value;
}

static bool on_hopper(void)
{
    static int major;
    if (!major) cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    return major == 9;
}

/* which of cuBLASLt's suggestions to take */
static int preferred(const shape_key *k, const cublasLtMatmulHeuristicResult_t *found, int count)
{
    static const int32_t tiles[] = {CUBLASLT_MATMUL_TILE_128x128, CUBLASLT_MATMUL_TILE_128x160};
    auto whole = [&](int i) { return setting(&found[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1; };
    bool kept = k->epilogue == CUBLASLT_EPILOGUE_GELU_AUX || k->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    bool large = !kept && k->dtype >= LAC_F16 && k->batch == 1 && k->k <= SHORT_SUM && k->m * k->n >= MANY_RESULTS;
    if (!large || !on_hopper() || !whole(0)) return 0;
    for (int32_t tile : tiles)
        for (int i = 0; i < count; i++)
            if (whole(i) && setting(&found[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID) == tile) return i;
    return 0;
}

static int choose(const char *op, const lac_cuda_gemm_args *g, const shape_key *k, const product *p, remembered *r)
{
    cublasComputeType_t compute = k->dtype == LAC_F64              ? CUBLAS_COMPUTE_64F
                                  : k->dtype == LAC_F32 && k->tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                                   : CUBLAS_COMPUTE_32F;
    cudaDataType_t scale = k->dtype == LAC_F64 ? CUDA_R_64F : CUDA_R_32F;
    cublasOperation_t turned = CUBLAS_OP_T;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t found[SUGGESTED] = {};
    size_t bytes = WORKSPACE;
    int count = 0;
    BLAS_TRY(op, cublasLtMatmulDescCreate(&r->desc, compute, scale));
    /* cuBLAS's first operand is our B: stored [k, n] row-major is [n, k] column-major */
    if (k->b_transposed) ATTRIBUTE(op, r, TRANSA, turned);
    if (k->a_transposed) ATTRIBUTE(op, r, TRANSB, turned);
    ATTRIBUTE(op, r, EPILOGUE, k->epilogue);
    BLAS_TRY(op, point(p));
    LAC_TRY(layout_make(op, &r->b, k->dtype, k->b_transposed ? k->k : k->n, k->b_transposed ? k->n : k->k, k->ldb,
                        k->batch, k->b_batch));
    LAC_TRY(layout_make(op, &r->a, k->dtype, k->a_transposed ? k->m : k->k, k->a_transposed ? k->k : k->m, k->lda,
                        k->batch, k->a_batch));
    LAC_TRY(layout_make(op, &r->c, k->c_dtype, k->n, k->m, k->ldc, k->batch, k->c_batch));
    BLAS_TRY(op, cublasLtMatmulPreferenceCreate(&preference));
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
    uint32_t align_b = (uint32_t)k->align_b, align_a = (uint32_t)k->align_a;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &align_b, 4);
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &align_a, 4);
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle, r->desc, r->b, r->a, r->c, r->c, preference, SUGGESTED, found, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    r->unknown = status == CUBLAS_STATUS_NOT_SUPPORTED || count == 0;
    if (!r->unknown) BLAS_TRY(op, status);
    else if (g->epilogue == GEMM_PLAIN) LAC_FAIL(INTERNAL, "%s: cuBLAS knows no algorithm for this product", op);
    r->algorithm = found[r->unknown ? 0 : preferred(k, found, count)].algo;
    r->key = *k;
    r->used = true;
    return 0;
}

static int alignment(const void *p)
{
    uintptr_t x = (uintptr_t)p;
    return x % 16 == 0 ? 16 : x % 8 == 0 ? 8 : x % 4 == 0 ? 4 : 2;
}

int lac_cuda_gemm(const char *op, const lac_cuda_gemm_args *g)
{
    if (!handle) {
        BLAS_TRY(op, cublasLtCreate(&handle));
        CUDA_TRY(op, cudaMalloc(&workspace, WORKSPACE));
    }
    shape_key key;
    memset(&key, 0, sizeof key);
    key.m = g->m, key.n = g->n, key.k = g->k, key.batch = g->batch;
    key.lda = g->lda, key.ldb = g->ldb, key.ldc = g->ldc;
    key.a_batch = g->a_batch, key.b_batch = g->b_batch, key.c_batch = g->c_batch;
    key.dtype = g->dtype, key.c_dtype = g->c_dtype, key.a_transposed = g->a_transposed;
    key.b_transposed = g->b_transposed, key.tf32 = lac_cuda_engine->settings->tf32;
    key.align_a = alignment(g->a), key.align_b = alignment(g->b);
    key.epilogue = epilogue_of(g);
    remembered *r = &memory[hash_of(&key) % REMEMBERED];
    product p = {r, g->a, g->b, g->bias, g->c, g->aux, g->n, {}, {}};
    if (g->dtype == LAC_F64) p.alpha.wide = 1, p.beta.wide = g->accumulate;
    else p.alpha.narrow = 1, p.beta.narrow = g->accumulate;
    if (!r->used || memcmp(&r->key, &key, sizeof key)) {
        forget(r);
        int status = choose(op, g, &key, &p, r);
        if (status) return forget(r), status;
    }
    if (r->unknown) return GEMM_UNKNOWN;
    /* the first of a shape at once: what cuBLAS refuses is the caller's own error */
    const int code = r->tried ? lac_cuda_later(run_product, &p, sizeof p) : run_product(&p, lac_cuda_stream());
    if (code) return blas_check(op, (cublasStatus_t)(code - LAC_CUDA_BLAS));
    r->tried = true;
    return lac_cuda_launched(op);
}

/* ---- the slot ---- */

/* can cuBLAS read the last two axes in place? fills the transposition and the leading dimension */
static bool reads(const lac_view *v, bool *transposed, int64_t *ld)
{
    int64_t rows = v->shape[v->ndim - 2], cols = v->shape[v->ndim - 1];
    int64_t rs = v->stride[v->ndim - 2], cs = v->stride[v->ndim - 1];
    if ((cs == 1 || cols == 1) && (rs >= cols || rows == 1)) {
        *transposed = false;
        *ld = rows == 1 || rs < cols ? cols : rs;
        return true;
    }
    if ((rs == 1 || rows == 1) && (cs >= rows || cols == 1)) {
        *transposed = true;
        *ld = cols == 1 || cs < rows ? rows : cs;
        return true;
    }
    return false;
}

/* v as cuBLAS can read it: itself, or a dense copy in scratch memory (of the matrices that are there once) */
static int readable(const lac_view *v, lac_scratch **space, lac_view *to, bool *transposed, int64_t *ld)
{
    *to = *v;
    if (reads(v, transposed, ld)) return 0;
    int64_t span = 1;
    for (int d = v->ndim - 1; d >= 0; d--) {
        if (v->stride[d] == 0 && d < v->ndim - 2) { /* a broadcast batch axis stays one */
            to->stride[d] = 0;
            continue;
        }
        to->stride[d] = span;
        span *= v->shape[d];
    }
    *space = new lac_scratch("matmul", (size_t)(span * dtype_bytes(v->dtype)));
    if (!(*space)->data) return LAC_E_MEMORY;
    to->data = (*space)->data;
    lac_a_copy copy = {};
    copy.x = *v;
    copy.out = *to;
    for (int d = 0; d < v->ndim - 2; d++)
        if (to->stride[d] == 0) copy.x.shape[d] = copy.out.shape[d] = 1;
    reads(to, transposed, ld);
    return lac_cuda_copy(&copy);
}

extern "C" int lac_cuda_matmul(const lac_a_matmul *a)
{
    int nd = a->out.ndim, axes = nd - 2;
    int64_t m = a->out.shape[nd - 2], n = a->out.shape[nd - 1], k = a->a.shape[nd - 1], items = 1;
    for (int d = 0; d < axes; d++) items *= a->out.shape[d];
    if (m * n * items == 0) return 0;
    bool add = a->bias.data == a->out.data, with_bias = a->bias.data && !add,
         epilogue = with_bias && a->a.dtype != LAC_F64 && a->bias.stride[0] == 1;
    lac_view bias = a->bias;
    if (k == 0 && add) return 0;
    if (k == 0 || (with_bias && !epilogue)) { /* the product is added to the bias */
        lac_a_copy copy = {};
        lac_a_fill fill = {};
        copy.out = fill.x = a->out;
        if (!with_bias) {
            LAC_TRY(lac_cuda_fill(&fill));
        } else {
            copy.x = a->out;
            copy.x.data = bias.data;
            for (int d = 0; d < nd; d++) copy.x.stride[d] = d == nd - 1 ? bias.stride[0] : 0;
            LAC_TRY(lac_cuda_copy(&copy));
        }
        if (k == 0) return 0;
    }
    lac_scratch *space[2] = {};
    lac_view va, vb;
    lac_cuda_gemm_args g = {};
    int status = readable(&a->a, &space[0], &va, &g.a_transposed, &g.lda);
    if (!status) status = readable(&a->b, &space[1], &vb, &g.b_transposed, &g.ldb);
    if (!status) {
        g.m = m, g.n = n, g.k = k;
        g.dtype = g.c_dtype = a->a.dtype;
        g.ldc = n;
        g.bias = epilogue ? bias.data : NULL;
        g.accumulate = add || (with_bias && !epilogue);
        /* the innermost run of batch axes that step evenly is one call */
        int inner = axes;
        g.batch = 1, g.c_batch = m * n;
        while (inner > 0) {
            int d = inner - 1;
            int64_t sa = va.stride[d], sb = vb.stride[d];
            if (g.batch > 1 && (sa != g.a_batch * g.batch || sb != g.b_batch * g.batch) && va.shape[d] > 1) break;
            if (g.batch == 1 && va.shape[d] > 1) g.a_batch = sa, g.b_batch = sb;
            if (g.batch * a->out.shape[d] > INT32_MAX) break;
            g.batch *= a->out.shape[d];
            inner--;
        }
        int64_t outer = items / g.batch, bytes = dtype_bytes(a->a.dtype);
        for (int64_t i = 0; i < outer && !status; i++) {
            int64_t rest = i, oa = 0, ob = 0;
            for (int d = inner - 1; d >= 0; d--) {
                int64_t at = rest % a->out.shape[d];
                rest /= a->out.shape[d];
                oa += at * va.stride[d];
                ob += at * vb.stride[d];
            }
            g.a = (const char *)va.data + oa * bytes;
            g.b = (const char *)vb.data + ob * bytes;
            g.c = (char *)a->out.data + i * g.batch * m * n * bytes;
            status = lac_cuda_gemm("matmul", &g);
        }
    }
    delete space[0];
    delete space[1];
    return status;
}
