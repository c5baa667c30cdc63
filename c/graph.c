/* graph.c: a step of a script, captured once and launched as a whole.
 *
 * While a graph is captured, operators on the device are recorded by the driver (kernels/graph.cu) and not run. This
 * file keeps true what the recorded addresses assume. Memory that is taken meanwhile belongs to the graph (pool.c).
 * Storages that existed before and that an operator is given are held: the graph has a reference, and releasing them by
 * name has no effect as long as it lives. Results are asked for after each launch: their memory is the graph's, so a
 * launch releases the tensors of the last one, and new ones are made.
 *
 * What a graph would silently repeat is refused, by the hooks of the watch for NaN, which see every view and every run
 * of an operator: operators on the CPU, which run at once and never again, and updates of parameters, whose learning
 * rate and step number are the host's. What makes the host wait, or copies from its memory, the plug-in refuses.
 */
#include "device.h"
#include <stdio.h>
#include <stdlib.h>

typedef struct {
    void *block; /* of the graph; NULL: the storage is held */
    lac_storage *held;
    lac_tensor view;
} result;

struct lac_graph {
    void *exec;
    int64_t nodes, holds, room;
    lac_storage **held;
    result *results;
    int count;
    char refusal[256];
    lac_draws draws;
    lac_graph *next;
};

lac_graph *lac_graph_now;
static lac_graph *graphs; /* that are alive */

static const lac_device_graphs *device(void) { return lac_device_table()->graphs; }

/* numbers that no argument of a kernel has by chance: not addresses, not sizes, as doubles next to nothing */
static const uint64_t SEED = 0x0015a17c93e4d26b, OFFSET = 0x0009c3b000000080;
enum { MOST_DRAWS = 1 << 24 };

int lac_graph_begin(lac_graph **out, uint64_t *seed, uint64_t *offset, int *step)
{
    if (!out || !seed || !offset || !step) LAC_FAIL(ARGUMENT, "graph: nowhere to put it");
    *out = NULL;
    if (!lac_device_table()) return lac_backend_missing("graph", LAC_CUDA);
    if (lac_graph_now) LAC_FAIL(ARGUMENT, "graph: another one is being captured");
    if (lac_profile_on || lac_watch_on)
        LAC_FAIL(ARGUMENT, "graph: the profiler and the watch for NaN wait for every operator: stop them first");
    lac_graph *g = calloc(1, sizeof *g);
    if (!g) LAC_FAIL(MEMORY, "out of memory for a graph");
    int status = device()->begin();
    if (status) {
        free(g);
        return status;
    }
    *seed = SEED, *offset = OFFSET, *step = LAC_DRAW_STEP;
    g->draws = (lac_draws){SEED, OFFSET, 0};
    g->next = graphs;
    *out = graphs = lac_graph_now = g;
    lac_pool_capture(g);
    lac_watch_on = 1;
    lac_profile_on = 2;
    return 0;
}

void lac_graph_drop(lac_graph *g)
{
    if (!g) return;
    for (lac_graph **at = &graphs; *at; at = &(*at)->next)
        if (*at == g) {
            *at = g->next;
            break;
        }
    if (g->exec) device()->drop(g->exec);
    lac_pool_uncapture(g);
    for (int64_t i = 0; i < g->holds; i++) lac_storage_drop(g->held[i]);
    free(g->held);
    free(g->results);
    free(g);
}

int lac_graph_end(lac_graph *g, int keep, int64_t draws)
{
    if (!g || g != lac_graph_now) LAC_FAIL(ARGUMENT, "graph: it is not being captured");
    char why[256];
    snprintf(why, sizeof why, "%s", g->refusal);
    lac_graph_now = NULL;
    lac_watch_on = lac_profile_on = 0;
    lac_pool_capture(NULL);
    g->draws.count = draws;
    bool wanted = keep && !why[0] && draws < MOST_DRAWS;
    int status = device()->end(wanted, &g->draws, &g->exec, &g->nodes);
    if (!status && wanted) return 0;
    lac_graph_drop(g);
    if (status || !keep) return status;
    if (why[0]) LAC_FAIL(ARGUMENT, "%s", why);
    LAC_FAIL(ARGUMENT, "graph: %lld random draws are too many", (long long)draws);
}

bool lac_graph_holds(const lac_storage *s)
{
    for (const lac_graph *g = graphs; g; g = g->next)
        for (int64_t i = g->holds - 1; i >= 0; i--)
            if (g->held[i] == s) return true;
    return false;
}

static bool holds(const lac_graph *g, const lac_storage *s)
{
    for (int64_t i = g->holds - 1; i >= 0; i--)
        if (g->held[i] == s) return true;
    return false;
}

static int hold(lac_graph *g, lac_storage *s)
{
    if (holds(g, s)) return 0;
    if (g->holds == g->room) {
        int64_t room = g->room ? 2 * g->room : 256;
        lac_storage **list = realloc(g->held, (size_t)room * sizeof *list);
        if (!list) LAC_FAIL(MEMORY, "out of memory for a graph");
        g->held = list, g->room = room;
    }
    lac_storage_retain(s);
    g->held[g->holds++] = s;
    return 0;
}

void lac_graph_view(const char *op, const char *name, const lac_tensor *t)
{
    lac_graph *g = lac_graph_now;
    if (g->refusal[0]) return;
    if (t->device == LAC_CPU)
        snprintf(g->refusal, sizeof g->refusal, "%s: %s is on the cpu, and a graph holds only what runs on cuda", op,
                 name);
    else if (!lac_pool_captured(t->storage, g) && hold(g, t->storage))
        snprintf(g->refusal, sizeof g->refusal, "%s: %s", op, lac_last_error());
}

int lac_graph_check(const char *op, int slot)
{
    lac_graph *g = lac_graph_now;
    if (slot == LAC_SLOT_optim_many)
        LAC_FAIL(ARGUMENT,
                 "%s: a graph would repeat the learning rate and the number of this step: leave the optimizer "
                 "outside of it",
                 op);
    if (g->refusal[0]) LAC_FAIL(ARGUMENT, "%s", g->refusal);
    return 0;
}

/* ---- results ---- */

int lac_graph_result(lac_graph *g, const lac_tensor *t, int *number)
{
    if (!g || g != lac_graph_now || !t || !number) LAC_FAIL(ARGUMENT, "graph: no graph is captured, or no tensor");
    if (!t->storage || !t->storage->data) LAC_FAIL(RELEASED, "graph: a result was released");
    if (t->device == LAC_CPU) LAC_FAIL(DEVICE, "graph: a result is on the cpu, where nothing is captured");
    bool own = lac_pool_captured(t->storage, g);
    if (!own) LAC_TRY(hold(g, t->storage));
    result *list = realloc(g->results, (size_t)(g->count + 1) * sizeof *list);
    if (!list) LAC_FAIL(MEMORY, "out of memory for a graph");
    g->results = list;
    list[g->count] = (result){own ? t->storage->owner : NULL, own ? NULL : t->storage, *t};
    *number = g->count++;
    return 0;
}

static int check_number(const lac_graph *g, int number)
{
    if (!g || !g->exec) LAC_FAIL(ARGUMENT, "graph: there is no captured graph");
    if (number < 0 || number >= g->count) LAC_FAIL(ARGUMENT, "graph: it has no result %d", number);
    return 0;
}

int lac_graph_launch(lac_graph *g, uint64_t seed, uint64_t offset)
{
    if (!g || !g->exec) LAC_FAIL(ARGUMENT, "graph: there is no captured graph");
    if (lac_graph_now) LAC_FAIL(ARGUMENT, "graph: a graph cannot be launched while another one is captured");
    for (int i = 0; i < g->count; i++)
        if (g->results[i].block) lac_pool_end(g->results[i].block);
    return device()->launch(g->exec, seed, offset);
}

int lac_graph_take(lac_graph *g, int number, lac_tensor *out)
{
    if (!out) LAC_FAIL(ARGUMENT, "graph: no tensor to fill");
    out->storage = NULL;
    LAC_TRY(check_number(g, number));
    const result *r = &g->results[number];
    lac_storage *s = r->held;
    if (r->block) LAC_TRY(lac_pool_revive(r->block, &r->view, &s));
    else lac_storage_retain(s);
    *out = r->view;
    out->storage = s;
    return 0;
}

int lac_graph_same(const lac_graph *g, int number, const lac_tensor *t)
{
    if (check_number(g, number) || !t || !t->storage || !t->storage->block) return 0;
    const result *r = &g->results[number];
    return (r->block ? t->storage->owner == r->block : t->storage == r->held) && t->offset == r->view.offset;
}

int64_t lac_graph_nodes(const lac_graph *g) { return g ? g->nodes : 0; }
int64_t lac_graph_bytes(const lac_graph *g) { return g ? lac_pool_reserved(g) : 0; }
