/* watch.c: finds the operator that made the first NaN or infinity.
 *
 * While the watch is on, every view that a front end checks (lac_view_get) and every output that it makes
 * (lac_tensor_new) is noted, and after a back end has run, LAC_SLOT comes here with the slot's arguments. A noted view
 * belongs to that run if its address stands in them; so no operator has to say what its inputs and outputs are, and
 * none can be forgotten. Outputs, and the destination of in-place additions and copies, are read through. While the
 * watch is off the price is a predictable branch for each view and each run.
 *
 * What counts: a NaN always. An infinity only if no input holds one, because infinities are data here (masks are made
 * of them), and not the -inf of attention's log-sum-exp, which says that a row has no keys. Only the first is kept:
 * what follows from it is noise. Rejected: a check in each kernel (sixty places), comparing floating-point exception
 * flags (they do not say which element, and the BLAS raises them for nothing).
 */
#include "op_front.h"
#include <string.h>

int lac_watch_on;

typedef struct {
    lac_view view;
    lac_storage *storage;
    char op[24], name[24];
    bool output, used;
} noted;

enum { NOTED = 32 };
static noted ring[NOTED]; /* the caller's thread only: front ends do not run in parallel */
static unsigned next;
static lac_watch_info found;

void lac_watch_view(const char *op, const char *name, const lac_tensor *t, const lac_view *v, bool output)
{
    if (!lac_dtype_is_float(v->dtype) || t->device != LAC_CPU) return;
    /* lac_tensor_new has noted its output through lac_view_get already: say better what it is */
    if (output && ring[(next + NOTED - 1) % NOTED].view.data == v->data) next += NOTED - 1;
    noted *n = &ring[next++ % NOTED];
    *n = (noted){.view = *v, .storage = t->storage, .output = output};
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

static census take_census(const lac_view *v)
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

/* the newest note of this address that no run has used */
static noted *note_of(const void *address)
{
    for (unsigned i = 1; i <= NOTED; i++) {
        noted *n = &ring[(next + NOTED - i) % NOTED];
        if (n->view.data == address && !n->used) return n;
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

static void record(const noted *out, const census *c, int kind, noted *const *inputs, const census *held, int n)
{
    found = (lac_watch_info){.found = 1, .storage = out->storage, .kind = kind, .first = c->first[kind], .inputs = n};
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

bool lac_watch_check(int slot, const void *args, size_t bytes)
{
    enum { MOST = 8 };
    noted *inputs[MOST], *outputs[MOST];
    int ins = 0, outs = 0;
    bool in_place = slot == LAC_SLOT_axpy || slot == LAC_SLOT_copy;
    for (size_t at = 0; at + sizeof(void *) <= bytes; at += sizeof(void *)) {
        void *address;
        memcpy(&address, (const char *)args + at, sizeof address);
        noted *n = address ? note_of(address) : NULL;
        if (!n) continue;
        n->used = true;
        if (is_stale(n, inputs, ins) || is_stale(n, outputs, outs)) continue;
        if (n->output || (in_place && strcmp(n->name, "dst") == 0)) {
            if (outs < MOST) outputs[outs++] = n;
        } else if (ins < MOST) inputs[ins++] = n;
    }
    lac_flags_global.attention = 1; /* the host looks after every operator: it notes where it was called */
    if (outs && !found.found) found.storage = outputs[0]->storage;
    for (int i = 0; i < outs && !found.found; i++) {
        census held[MOST], c = take_census(&outputs[i]->view);
        int64_t before = 0;
        bool attention = slot == LAC_SLOT_attend;
        if (c.count[1] + c.count[2] + (attention ? 0 : c.count[3]) == 0) continue;
        for (int k = 0; k < ins; k++) {
            held[k] = take_census(&inputs[k]->view);
            before += held[k].count[2] + held[k].count[3];
        }
        if (c.count[1]) record(outputs[i], &c, 1, inputs, held, ins);
        else if (!before) record(outputs[i], &c, c.count[2] ? 2 : 3, inputs, held, ins);
    }
    return found.found != 0;
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
