/* hopper.cu: the host's side of hopper.cuh: tensor maps, and whether kernels for Hopper can run at all.
 *
 * Maps are encoded by the driver, whose function is found at run time, because the plug-in does not link libcuda. One
 * costs less than a microsecond, so they are made for every call and never kept.
 */
#include "hopper.cuh"

typedef CUresult (*map_encoder)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static map_encoder encoder(void)
{
    static map_encoder found;
    void *address = NULL;
    cudaDriverEntryPointQueryResult status;
    if (!found && cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault,
                                                   &status) == cudaSuccess)
        found = (map_encoder)address;
    return found;
}

/* bytes from one token, and one head, to the next; where there is one alone, any that a map takes */
static int64_t token_bytes(const lac_view *x)
{
    if (x->shape[1] > 1) return dtype_bytes(x->dtype) * x->stride[1];
    if (x->shape[0] > 1 && x->stride[0] > 0) return dtype_bytes(x->dtype) * x->stride[0];
    return (dtype_bytes(x->dtype) * x->shape[3] + 15) / 16 * 16;
}
static int64_t head_bytes(const lac_view *x) { return x->shape[2] > 1 ? dtype_bytes(x->dtype) * x->stride[2] : 16; }
static int64_t batch_bytes(const lac_view *x) { return x->shape[0] > 1 ? dtype_bytes(x->dtype) * x->stride[0] : 0; }

int hopper_batch_step(const lac_view *x) { return (int)(batch_bytes(x) / token_bytes(x)); }

bool hopper_readable(const lac_view *x, const char **why)
{
    int64_t token = token_bytes(x), head = head_bytes(x), batch = batch_bytes(x);
    if (x->stride[3] != 1) *why = "the head dimension is not contiguous";
    else if ((uintptr_t)x->data % 16 || token % 16 || head % 16)
        *why = "a row does not begin at a multiple of 16 bytes";
    else if (token <= 0 || head < 0 || batch < 0 || batch % token) *why = "strides do not fit a tensor map";
    else if (batch / token * x->shape[0] + x->shape[1] > INT32_MAX / 4) *why = "there are more than 2^29 tokens";
    else return true;
    return false;
}

int hopper_map(CUtensorMap *map, const lac_view *x, int64_t r, int rows)
{
    const uint64_t token = (uint64_t)token_bytes(x), head = (uint64_t)head_bytes(x), wide = (uint64_t)x->shape[3];
    const uint32_t bytes = (uint32_t)dtype_bytes(x->dtype);
    const CUtensorMapDataType type = bytes == 1             ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                     : x->dtype == LAC_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const cuuint64_t size[5] = {wide, HOPPER_WRAP, 0x7fff0000, (cuuint64_t)x->shape[2], 0x7fff0000};
    const cuuint64_t stride[4] = {(uint64_t)r * token, token, head ? head : 16,
                                  ((uint64_t)1 << 34) - (uint64_t)r * token};
    const cuuint32_t box[5] = {128 / bytes, (cuuint32_t)rows, 1, 1, 1}, each[5] = {1, 1, 1, 1, 1};
    map_encoder encode = encoder();
    if (!encode) LAC_FAIL(INTERNAL, "attention: the driver has no tensor maps");
    CUresult status = encode(
        map, type, 5, x->data, size, stride, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        wide * bytes <= 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status) LAC_FAIL(INTERNAL, "attention: the driver refuses a tensor map (error %d)", (int)status);
    return 0;
}

bool hopper_compiled(const void *kernel)
{
    cudaFuncAttributes found;
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
    if (major != 9 || minor != 0) return false;
    if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    return found.ptxVersion >= 90;
}
