/* op_attn.c: the front end of attention: checks tensors against a plan, makes the results, calls the back end.
 *
 * The plan has already validated the configuration, so only what differs from call to call is looked at here: that
 * every tensor is alive, of the plan's sizes, of one dtype and on one device, and that the run-time numbers are in
 * range. Every message names the tensor, the dimension and both sizes, because "shape mismatch" sends people to a
 * debugger. The optional tensors are all or nothing: a pointer that is given is honoured or refused, never ignored.
 *
 * Results are made before the back end runs and dropped if it fails, so a failing call leaves nothing behind.
 */
#include "op_attn.h"
#include <math.h>

typedef struct {
    const char *name;
    int64_t size;
} dimension;

/* t is a live view with these dimensions and, unless dtype is -1, this dtype; on the device of q */
static int get_view(const char *name, const lac_tensor *t, int ndim, const dimension *dims, int dtype,
                    const lac_tensor *q, lac_view *v)
{
    LAC_TRY(lac_view_get("attention", name, t, v));
    if (t->ndim != ndim) LAC_FAIL(SHAPE, "attention: %s must have %d dimensions, got %s", name, ndim, lac_describe(t));
    for (int i = 0; i < ndim; i++)
        if (t->shape[i] != dims[i].size)
            LAC_FAIL(SHAPE, "attention: %s has %lld %s, the plan has %lld (%s is %s)", name, (long long)t->shape[i],
                     dims[i].name, (long long)dims[i].size, name, lac_shape_text(t->shape, t->ndim));
    if (dtype >= 0 && t->dtype != dtype)
        LAC_FAIL(DTYPE, "attention: %s must be %s, got %s", name, lac_dtype_name(dtype), lac_dtype_name(t->dtype));
    return lac_same_device("attention", name, t, "q", q);
}

static int get_optional(const lac_plan *p, const lac_attn_args *args, lac_a_attend *a)
{
    const lac_attn_desc *d = &p->desc;
    const dimension mask[] = {{"batch items", d->batch}, {"keys", d->m}}, lengths[] = {{"batch items", d->batch}};
    if (args->key_padding) LAC_TRY(get_view("key_padding", args->key_padding, 2, mask, LAC_BOOL, args->q, &a->padding));
    if (args->key_lengths) {
        LAC_TRY(get_view("key_lengths", args->key_lengths, 1, lengths, -1, args->q, &a->lengths));
        if (a->lengths.dtype != LAC_I64 && a->lengths.dtype != LAC_I32)
            LAC_FAIL(DTYPE, "attention: key_lengths must be i64 or i32, got %s", lac_dtype_name(a->lengths.dtype));
    }
    if (!isfinite(args->scale)) LAC_FAIL(ARGUMENT, "attention: scale must be finite, got %g", args->scale);
    if (!(args->dropout >= 0 && args->dropout < 1))
        LAC_FAIL(ARGUMENT, "attention: dropout must be in [0, 1), got %g", args->dropout);
    if (args->kernel < LAC_KERNEL_AUTO || args->kernel > LAC_KERNEL_HOPPER)
        LAC_FAIL(ARGUMENT, "attention: kernel must be from 0 to %d, got %d", LAC_KERNEL_HOPPER, args->kernel);
    if (args->kernel == LAC_KERNEL_HOPPER && args->q->device < LAC_CUDA)
        LAC_FAIL(DEVICE,
                 "attention: kernel 'hopper' is for cuda, q is %s; move q, k and v there or leave the choice to "
                 "kernel 'auto'",
                 lac_describe(args->q));
    if (args->fp8) LAC_TRY(lac_fp8_check(args));
    a->fp8 = args->fp8;
    a->kernel = args->kernel;
    a->scale = args->scale != 0 ? args->scale : 1 / sqrt((double)d->head_dim);
    a->dropout = args->dropout;
    a->seed = args->seed;
    a->offset = args->offset;
    LAC_TRY(lac_attn_pairs(p, args, a));
    return args->sequences ? lac_packed_check(p, args) : 0;
}

static int get_inputs(lac_plan *p, const lac_attn_args *args, lac_a_attend *a)
{
    if (!p) LAC_FAIL(ARGUMENT, "attention: the plan is a null pointer");
    if (!args) LAC_FAIL(ARGUMENT, "attention: the arguments are a null pointer");
    const lac_attn_desc *d = &p->desc;
    const dimension qs[] = {
        {"batch items", d->batch}, {"queries", d->n}, {"heads", d->heads}, {"head dimensions", d->head_dim}};
    const dimension ks[] = {
        {"batch items", d->batch}, {"keys", d->m}, {"heads", d->kv_heads}, {"head dimensions", d->head_dim}};
    *a = (lac_a_attend){.plan = p};
    LAC_TRY(lac_view_get("attention", "q", args->q, &a->q));
    LAC_TRY(lac_need_float("attention", "q", args->q));
    LAC_TRY(get_view("q", args->q, 4, qs, -1, args->q, &a->q));
    LAC_TRY(get_view("k", args->k, 4, ks, -1, args->q, &a->k));
    LAC_TRY(get_view("v", args->v, 4, ks, -1, args->q, &a->v));
    LAC_TRY(lac_same_dtype("attention", "q", args->q, "k", args->k));
    LAC_TRY(lac_same_dtype("attention", "q", args->q, "v", args->v));
    return get_optional(p, args, a);
}

/* lse of f64 inputs is f64, of all others f32 */
static int lse_dtype(int dtype) { return dtype == LAC_F64 ? LAC_F64 : LAC_F32; }

static int attend(lac_a_attend *a, const lac_attn_args *args, lac_tensor *out, lac_tensor *lse, lac_tensor *branch_lse)
{
    const lac_attn_desc *d = &a->plan->desc;
    int device = args->q->device;
    const int64_t shape[] = {d->batch, d->n, d->heads, d->head_dim};
    const int64_t branches[] = {d->branches, d->batch, d->n, d->heads};
    LAC_TRY(lac_tensor_new("attention", a->q.dtype, device, 4, shape, out, &a->out));
    LAC_TRY(lac_tensor_new("attention", lse_dtype(a->q.dtype), device, 3, shape, lse, &a->lse));
    if (branch_lse && lac_plan_branch_softmax(a->plan))
        LAC_TRY(lac_tensor_new("attention", lse_dtype(a->q.dtype), device, 4, branches, branch_lse, &a->branch_lse));
    return lac_packed_attend(a, args);
}

int lac_attend(lac_plan *plan, const lac_attn_args *args, lac_tensor *out, lac_tensor *lse, lac_tensor *branch_lse)
{
    lac_a_attend a;
    if (!out) LAC_FAIL(ARGUMENT, "attention: there is no tensor for out");
    if (!lse) LAC_FAIL(ARGUMENT, "attention: there is no tensor for lse");
    out->storage = lse->storage = NULL;
    if (branch_lse) branch_lse->storage = NULL;
    LAC_TRY(get_inputs(plan, args, &a));
    int status = attend(&a, args, out, lse, branch_lse);
    if (status) {
        lac_tensor_drop(out);
        lac_tensor_drop(lse);
        lac_tensor_drop(branch_lse);
    }
    return status;
}

/* what the forward left, and the gradients that arrive */
static int get_saved(lac_a_attend_bwd *a, const lac_attn_args *args, const lac_tensor *out, const lac_tensor *lse,
                     const lac_tensor *branch_lse, const lac_tensor *dout, const lac_tensor *dlse)
{
    const lac_plan *p = a->forward.plan;
    const lac_attn_desc *d = &p->desc;
    const dimension os[] = {
        {"batch items", d->batch}, {"queries", d->n}, {"heads", d->heads}, {"head dimensions", d->head_dim}};
    const dimension bs[] = {
        {"branches", d->branches}, {"batch items", d->batch}, {"queries", d->n}, {"heads", d->heads}};
    int dtype = args->q->dtype, stats = lse_dtype(dtype);
    LAC_TRY(get_view("out", out, 4, os, dtype, args->q, &a->forward.out));
    LAC_TRY(get_view("lse", lse, 3, os, stats, args->q, &a->forward.lse));
    LAC_TRY(get_view("dout", dout, 4, os, dtype, args->q, &a->dout));
    if (dlse) LAC_TRY(get_view("dlse", dlse, 3, os, stats, args->q, &a->dlse));
    if (!lac_plan_branch_softmax(p)) return 0;
    if (!branch_lse || !branch_lse->storage)
        LAC_FAIL(ARGUMENT, "attention: merge '%s' over %d branches needs the forward's branch_lse in the backward",
                 d->merge == LAC_MERGE_MEAN ? "mean" : "sum", d->branches);
    return get_view("branch_lse", branch_lse, 4, bs, stats, args->q, &a->forward.branch_lse);
}

static int attend_bwd(lac_a_attend_bwd *a, const lac_attn_args *args, lac_tensor *dq, lac_tensor *dk, lac_tensor *dv)
{
    const lac_a_attend *f = &a->forward;
    int device = args->q->device;
    LAC_TRY(lac_tensor_new("attention", f->q.dtype, device, 4, f->q.shape, dq, &a->dq));
    LAC_TRY(lac_tensor_new("attention", f->q.dtype, device, 4, f->k.shape, dk, &a->dk));
    LAC_TRY(lac_tensor_new("attention", f->q.dtype, device, 4, f->v.shape, dv, &a->dv));
    return lac_packed_attend_bwd(a, args);
}

int lac_attend_bwd(lac_plan *plan, const lac_attn_args *args, const lac_tensor *out, const lac_tensor *lse,
                   const lac_tensor *branch_lse, const lac_tensor *dout, const lac_tensor *dlse, lac_tensor *dq,
                   lac_tensor *dk, lac_tensor *dv, lac_tensor *dbias)
{
    lac_a_attend_bwd a = {0};
    lac_tensor pairs = {0}; /* one gradient a pair, before it is summed to bias' shape */
    if (!dq || !dk || !dv) LAC_FAIL(ARGUMENT, "attention: there is no tensor for %s", !dq ? "dq" : !dk ? "dk" : "dv");
    dq->storage = dk->storage = dv->storage = NULL;
    if (dbias) dbias->storage = NULL;
    LAC_TRY(get_inputs(plan, args, &a.forward));
    if (args->fp8) LAC_FAIL(ARGUMENT, "attention: fp8 has no backward; leave fp8 out where gradients are wanted");
    LAC_TRY(get_saved(&a, args, out, lse, branch_lse, dout, dlse));
    int status = dbias ? lac_attn_bias_begin(&a, args, &pairs) : 0;
    if (!status) status = attend_bwd(&a, args, dq, dk, dv);
    if (!status && dbias) status = lac_attn_bias_end(args, &pairs, dbias);
    lac_tensor_drop(&pairs);
    if (status) {
        lac_tensor_drop(dq);
        lac_tensor_drop(dk);
        lac_tensor_drop(dv);
    }
    return status;
}
