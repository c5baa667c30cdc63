/* watch.c: finds the operator that made the first NaN or infinity.
 *
 * While the watch is on, every view that a front end checks (lac_view_get) and every output that it makes
 * (lac_tensor_new) is noted, and after a back end has run, LAC_SLOT comes here with the slot's arguments. A noted view
 * belongs to that run if its address stands in them; so no operator has to say what its inputs and outputs are, and
 * none can be forgotten. An operator may also run piece by piece (decoding, whose items stand at different positions):
 * a view in the arguments that lies inside a noted one belongs to it, and of an output only that piece is looked at,
 * because the others may not be made yet. Outputs, and the destination of in-place additions and copies, are read
 * through. While the watch is off the price is a predictable branch for each view and each run.
 *
 * What counts: a NaN always. An infinity only if no input holds one, because infinities are data here (masks are made
 * of them), and not the -inf of attention's log-sum-exp, which says that a row has no keys. Only the first is kept:
 * what follows from it is noise. Rejected: a check in each kernel (sixty places), comparing floating-point exception
 * flags (they do not say which element, and the BLAS raises them for nothing). Results on a GPU are first asked there
 * whether all is finite, and only come here to be counted when something is not; so the watch makes every operator
 * wait.
 */
#include "device.h"
#include "op_front.h"
#include <string.h>

int lac_watch_on;

typedef struct {
    lac_view view;
    lac_storage *storage; /* may be gone: only its address counts */
    int device;
    char op[24], name[24];
    bool output, used;
} noted;

enum { NOTED = 32 };
static noted ring[NOTED]; /* the caller's thread only: front ends do not run in parallel */
static unsigned next;
static lac_watch_info found;

void lac_watch_view(const char *op, const char *name, const lac_tensor *t, const lac_view *v, bool output)
{
    if (lac_graph_now) {
        lac_graph_view(op, name, t);
        return;
    }
    if (!lac_dtype_is_float(v->dtype)) return;
    /* lac_tensor_new has noted its output through lac_view_get already: say better what it is */
    if (output && ring[(next + NOTED - 1) % NOTED].view.data == v->data) next += NOTED - 1;
    noted *n = &ring[next++ % NOTED];
    *n = (noted){.view = *v, .storage = t->storage, .device = t->device, .output = output};
    strncpy(n->op, op, sizeof n->op - 1);
    strncpy(n->name, name, sizeof n->name - 1);
}

/* 0 finite, 1 NaN, 2 +inf, 3 -inf */
static int kind_at(int dtype, const char *p)
{
    double value;
    if (dtype == LAC_F64) memcpy(&value, p, 8);
    else if (dtype == LAC_F32) {
        float f;
        memcpy(&f, p, 4);
        value = (double)f;
    } else {
        uint16_t h, mask = dtype == LAC_F16 ? 0x7c00 : 0x7f80;
        memcpy(&h, p, 2);
        if ((h & mask) != mask) return 0;
        if (h & (uint16_t)(0x7fff & ~mask)) return 1;
        return h & 0x8000 ? 3 : 2;
    }
    return isfinite(value) ? 0 : isnan(value) ? 1 : value > 0 ? 2 : 3;
}

/* what a view holds: count[kind], and the row-major position of the first of each kind */
typedef struct {
    int64_t count[4], first[4];
} census;

static census count_here(const lac_view *v)
{
    census c = {.first = {-1, -1, -1, -1}};
    int64_t n = lac_view_numel(v), index[LAC_MAX_DIMS] = {0}, bytes = (int64_t)lac_dtype_size(v->dtype);
    const char *p = v->data;
    for (int64_t i = 0; i < n; i++) {
        int kind = kind_at(v->dtype, p);
        if (kind && c.count[kind]++ == 0) c.first[kind] = i;
        for (int d = v->ndim - 1; d >= 0; d--) {
            p += v->stride[d] * bytes;
            if (++index[d] < v->shape[d]) break;
            p -= v->stride[d] * bytes * v->shape[d];
            index[d] = 0;
        }
    }
    return c;
}

/* v's shape as one run of memory at `data` */
static lac_view dense_view(const lac_view *v, int dtype, void *data)
{
    lac_view dense = *v;
    dense.dtype = dtype;
    dense.data = data;
    for (int64_t d = v->ndim - 1, span = 1; d >= 0; span *= v->shape[d--]) dense.stride[d] = span;
    return dense;
}

/* Are all elements of a view on a device finite? Answered there; one byte crosses. */
static int finite_there(const lac_backend *b, const lac_view *v, bool *finite)
{
    int64_t n = lac_view_numel(v);
    void *handle, *space = lac_scratch_get("nan_watch", (size_t)n + 1, &handle);
    if (!space) return LAC_E_MEMORY;
    lac_a_map1 map = {.fn = lac_map_id(1, "isfinite"), .x = *v, .out = dense_view(v, LAC_BOOL, space)};
    lac_a_reduce all = {.fn = LAC_ALL, .x = map.out, .out = map.out, .dims = (1u << v->ndim) - 1};
    all.out.data = (char *)space + n;
    for (int d = 0; d < v->ndim; d++) all.out.shape[d] = all.out.stride[d] = 1;
    uint8_t answer = 0;
    int status = b->map1(&map);
    if (!status) status = b->reduce(&all);
    if (!status) status = b->runtime->transfer(&answer, all.out.data, 1, true);
    *finite = answer;
    lac_scratch_put(handle);
    return status;
}

/* What a view holds, wherever it is: of a device that is not the host only what is not finite comes here to be counted.
 */
static int take_census(int device, const lac_view *v, census *out)
{
    const lac_backend *b = lac_backend_for(device);
    if (!b->runtime) return *out = count_here(v), 0;
    bool finite = true;
    size_t bytes = (size_t)lac_view_numel(v) * lac_dtype_size(v->dtype);
    *out = (census){.first = {-1, -1, -1, -1}};
    if (bytes) LAC_TRY(finite_there(b, v, &finite));
    if (finite) return 0;
    void *handle, *there = lac_scratch_get("nan_watch", bytes, &handle), *here = lac_workspace_get("nan_watch", bytes);
    int status = there && here ? 0 : LAC_E_MEMORY;
    lac_a_copy copy = {.x = *v, .out = dense_view(v, v->dtype, there)};
    if (!status) status = b->copy(&copy);
    if (!status) status = b->runtime->transfer(here, there, bytes, true);
    if (!status) {
        copy.out.data = here;
        *out = count_here(&copy.out);
    }
    lac_workspace_put(here);
    if (there) lac_scratch_put(handle);
    return status;
}

/* the newest note of this address that no run has used */
static noted *note_of(const void *address)
{
    for (unsigned i = 1; i <= NOTED; i++) {
        noted *n = &ring[(next + NOTED - i) % NOTED];
        if (n->view.data == address && !n->used) return n;
    }
    return NULL;
}

/* first and last byte of a view's elements, as distances from its data; strides of outputs are not negative */
static int64_t extent_of(const lac_view *v)
{
    int64_t last = 0;
    for (int d = 0; d < v->ndim; d++) last += (v->shape[d] - 1) * v->stride[d];
    return lac_view_numel(v) > 0 ? (last + 1) * (int64_t)lac_dtype_size(v->dtype) : 0;
}

/* Is v, read from the arguments, a part of the view that n notes? */
static bool is_piece(const noted *n, const lac_view *v)
{
    const lac_view *whole = &n->view;
    if (v->dtype != whole->dtype || v->ndim != whole->ndim) return false;
    for (int d = 0; d < v->ndim; d++)
        if (v->stride[d] != whole->stride[d] || v->shape[d] < 0 || v->shape[d] > whole->shape[d]) return false;
    uintptr_t begin = (uintptr_t)whole->data, at = (uintptr_t)v->data;
    return at >= begin && at + (uintptr_t)extent_of(v) <= begin + (uintptr_t)extent_of(whole);
}

/* the newest view of which v is a part, noted by the operator that noted last */
static noted *note_around(const lac_view *v)
{
    const char *op = ring[(next + NOTED - 1) % NOTED].op;
    for (unsigned i = 1; i <= NOTED; i++) {
        noted *n = &ring[(next + NOTED - i) % NOTED];
        if (strcmp(n->op, op) == 0 && is_piece(n, v)) return n;
    }
    return NULL;
}

static void describe(lac_watch_operand *o, const noted *n, const census *c)
{
    memcpy(o->name, n->name, sizeof o->name);
    o->dtype = n->view.dtype;
    o->ndim = n->view.ndim;
    memcpy(o->shape, n->view.shape, sizeof o->shape);
    o->nan = c->count[1];
    o->inf = c->count[2] + c->count[3];
}

/* an output of a run: its note, and which part of it the run has made */
typedef struct {
    noted *note;
    lac_view piece;
} made;

static void record(const made *m, const census *c, int kind, noted *const *inputs, const census *held, int n)
{
    const noted *out = m->note;
    /* of a piece, which lies in the whole as the front end made it: dense, so a place is a distance */
    int64_t before = ((char *)m->piece.data - (char *)out->view.data) / (int64_t)lac_dtype_size(out->view.dtype);
    found = (lac_watch_info){.found = 1, .storage = out->storage, .kind = kind, .inputs = n};
    found.first = before + c->first[kind];
    memcpy(found.op, out->op, sizeof found.op);
    describe(&found.output, out, c);
    for (int i = 0; i < n; i++) describe(&found.input[i], inputs[i], &held[i]);
}

/* Whether another operator's note has the address of one in the list: then the word was left over on the stack. */
static bool is_stale(const noted *n, noted *const *list, int count)
{
    for (int i = 0; i < count; i++)
        if (list[i]->view.data == n->view.data && strcmp(list[i]->op, n->op) != 0) return true;
    return false;
}

int lac_watch_check(const char *name, int slot, const void *args, size_t bytes)
{
    if (lac_graph_now) return lac_graph_check(name, slot);
    enum { MOST = 8 };
    noted *inputs[MOST];
    made outputs[MOST];
    int ins = 0, outs = 0;
    bool in_place = slot == LAC_SLOT_axpy || slot == LAC_SLOT_copy;
    for (size_t at = 0; at + sizeof(void *) <= bytes; at += sizeof(void *)) {
        void *address;
        lac_view v = {.dtype = -1};
        memcpy(&address, (const char *)args + at, sizeof address);
        if (!address) continue;
        if (at + sizeof v <= bytes) memcpy(&v, (const char *)args + at, sizeof v);
        noted *n = note_of(address);
        if (!n) n = note_around(&v);
        if (!n) continue;
        n->used = true;
        if (is_stale(n, inputs, ins)) continue;
        bool stale = false;
        for (int i = 0; i < outs; i++) stale = stale || is_stale(n, &outputs[i].note, 1);
        if (stale) continue;
        if (n->output || (in_place && strcmp(n->name, "dst") == 0)) {
            if (outs < MOST) outputs[outs++] = (made){n, n->output && is_piece(n, &v) ? v : n->view};
        } else if (ins < MOST) inputs[ins++] = n;
    }
    lac_flags_global.attention = 1; /* the host looks after every operator: it notes where it was called */
    if (outs && !found.found) found.storage = outputs[0].note->storage;
    for (int i = 0; i < outs && !found.found; i++) {
        census held[MOST], c;
        LAC_TRY(take_census(outputs[i].note->device, &outputs[i].piece, &c));
        int64_t before = 0;
        bool attention = slot == LAC_SLOT_attend;
        if (c.count[1] + c.count[2] + (attention ? 0 : c.count[3]) == 0) continue;
        for (int k = 0; k < ins; k++) {
            LAC_TRY(take_census(inputs[k]->device, &inputs[k]->view, &held[k]));
            before += held[k].count[2] + held[k].count[3];
        }
        if (c.count[1]) record(&outputs[i], &c, 1, inputs, held, ins);
        else if (!before) record(&outputs[i], &c, c.count[2] ? 2 : 3, inputs, held, ins);
    }
    if (found.found) LAC_FAIL(ARGUMENT, "%s: made a number that is not finite", name);
    return 0;
}

int lac_watch(int on)
{
    memset(ring, 0, sizeof ring);
    found = (lac_watch_info){0};
    lac_watch_on = on != 0;
    lac_profile_on = (lac_profile_on & 1) | (on ? 2 : 0);
    return 0;
}

int lac_watch_last(lac_watch_info *out)
{
    if (!out) LAC_FAIL(ARGUMENT, "watch: no struct to fill");
    *out = found;
    return 0;
}
