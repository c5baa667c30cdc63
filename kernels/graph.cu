/* graph.cu: a captured step as a CUDA graph.
 *
 * The operators' launches are recorded by the driver instead of run; what comes out is launched as a whole, without the
 * host's cost and the gaps between kernels. Arguments are frozen in it. That is right for addresses, which the engine
 * keeps reserved (graph.c), and wrong for random numbers, of which every run needs others. While it captures, the
 * engine lets operators draw from a seed and offsets that cannot occur otherwise; here the arguments of every kernel
 * are searched for these numbers, and before each launch they are replaced by those that are due. So no kernel needs to
 * know of graphs, and an operator that hides its offset from the search is refused, not frozen.
 *
 * Capturing is relaxed: memory may be taken from the driver meanwhile. Functions of the driver's own interface are
 * asked for at run time, because the plug-in links the CUDA runtime statically and nothing else.
 */
#include "streams.cuh"
#include <cstdio>
#include <cstring>
#include <cuda.h>
#include <vector>

namespace
{

struct patch { /* eight bytes of an argument */
    int argument, at;
    int64_t draw; /* -1: the seed */
};
struct node_patches {
    CUgraphNode node;
    CUDA_KERNEL_NODE_PARAMS params;
    std::vector<std::vector<char>> bytes;
    std::vector<void *> pointers;
    std::vector<patch> patches;
};
struct captured {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    std::vector<node_patches> draws;
};

/* functions of the driver */
struct driver {
    CUresult (*get)(CUgraphNode, CUDA_KERNEL_NODE_PARAMS *);
    CUresult (*set)(CUgraphExec, CUgraphNode, const CUDA_KERNEL_NODE_PARAMS *);
    CUresult (*function_argument)(CUfunction, size_t, size_t *, size_t *);
    CUresult (*kernel_argument)(CUkernel, size_t, size_t *, size_t *);
} api;

template <class F> bool find(const char *name, F *f)
{
    cudaDriverEntryPointQueryResult found;
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, (void **)f, 12040, cudaEnableDefault, &found);
    cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess && *f;
}

int find_driver(void)
{
    if (api.get) return 0;
    if (!find("cuGraphExecKernelNodeSetParams", &api.set) || !find("cuFuncGetParamInfo", &api.function_argument) ||
        !find("cuKernelGetParamInfo", &api.kernel_argument) || !find("cuGraphKernelNodeGetParams", &api.get))
        LAC_FAIL(DEVICE, "graph: random numbers need a driver of CUDA 12.4 or later");
    return 0;
}

/* copies the arguments of a kernel */
bool read_arguments(node_patches *n)
{
    if (api.get(n->node, &n->params) != CUDA_SUCCESS || !n->params.kernelParams) return false;
    for (size_t i = 0, offset, size;; i++) {
        CUresult r = n->params.func ? api.function_argument(n->params.func, i, &offset, &size)
                                    : api.kernel_argument(n->params.kern, i, &offset, &size);
        if (r != CUDA_SUCCESS) break;
        const char *from = (const char *)n->params.kernelParams[i];
        n->bytes.emplace_back(from, from + size);
    }
    return true;
}

void search(node_patches *n, const lac_draws *d, std::vector<char> *seen)
{
    for (size_t a = 0; a < n->bytes.size(); a++)
        for (size_t at = 0; at + 8 <= n->bytes[a].size(); at += 4) {
            uint64_t word;
            memcpy(&word, n->bytes[a].data() + at, 8);
            uint64_t beyond = word - d->offset;
            int64_t draw = beyond % LAC_DRAW_STEP ? -1 : (int64_t)(beyond / LAC_DRAW_STEP);
            if (word == d->seed) n->patches.push_back({(int)a, (int)at, -1});
            else if (draw >= 0 && draw < d->count) {
                n->patches.push_back({(int)a, (int)at, draw});
                (*seen)[(size_t)draw] = 1;
            }
        }
}

int find_draws(captured *c, const lac_draws *d, int64_t *nodes)
{
    size_t count = 0;
    CUDA_TRY("graph", cudaGraphGetNodes(c->graph, NULL, &count));
    std::vector<cudaGraphNode_t> list(count);
    CUDA_TRY("graph", cudaGraphGetNodes(c->graph, list.data(), &count));
    *nodes = (int64_t)count;
    if (d->count == 0) return 0;
    LAC_TRY(find_driver());
    std::vector<char> seen((size_t)d->count);
    for (cudaGraphNode_t node : list) {
        cudaGraphNodeType type;
        CUDA_TRY("graph", cudaGraphNodeGetType(node, &type));
        if (type != cudaGraphNodeTypeKernel) continue;
        node_patches n = {};
        n.node = (CUgraphNode)node;
        if (!read_arguments(&n)) continue;
        search(&n, d, &seen);
        if (!n.patches.empty()) c->draws.push_back(std::move(n));
    }
    for (node_patches &n : c->draws) {
        for (auto &bytes : n.bytes) n.pointers.push_back(bytes.data());
        n.params.kernelParams = n.pointers.data();
        n.params.extra = NULL;
    }
    for (int64_t i = 0; i < d->count; i++)
        if (!seen[(size_t)i])
            LAC_FAIL(ARGUMENT,
                     "graph: random draw number %lld of the step is in no kernel's arguments, so a graph would "
                     "repeat its numbers",
                     (long long)i + 1);
    return 0;
}

} // namespace

bool lac_cuda_capturing;

static int begin(void)
{
    LAC_TRY(lac_cuda_idle("graph"));
    CUDA_TRY("graph", cudaStreamBeginCapture(lac_cuda_stream(), cudaStreamCaptureModeRelaxed));
    lac_cuda_capturing = true;
    return 0;
}

static void drop(void *graph)
{
    captured *c = (captured *)graph;
    if (!c) return;
    if (c->exec) cudaGraphExecDestroy(c->exec);
    if (c->graph) cudaGraphDestroy(c->graph);
    cudaGetLastError();
    delete c;
}

static int end(bool keep, const lac_draws *draws, void **out, int64_t *nodes)
{
    captured *c = new captured();
    lac_cuda_capturing = false;
    cudaError_t error = cudaStreamEndCapture(lac_cuda_stream(), &c->graph);
    cudaGetLastError(); /* of a capture that failed, once */
    *out = NULL;
    int status = keep ? lac_cuda_check("graph", error) : 0;
    if (keep && !status) status = find_draws(c, draws, nodes);
    if (keep && !status) status = lac_cuda_check("graph", cudaGraphInstantiate(&c->exec, c->graph, 0));
    if (!keep || status) drop(c);
    else *out = c;
    return status;
}

static int launch(void *graph, uint64_t seed, uint64_t offset)
{
    captured *c = (captured *)graph;
    for (node_patches &n : c->draws) {
        for (const patch &p : n.patches) {
            uint64_t value = p.draw < 0 ? seed : offset + (uint64_t)p.draw;
            memcpy(n.bytes[(size_t)p.argument].data() + p.at, &value, 8);
        }
        CUresult r = api.set((CUgraphExec)c->exec, n.node, &n.params);
        if (r != CUDA_SUCCESS) LAC_FAIL(INTERNAL, "graph: the driver refused new random numbers (error %d)", (int)r);
    }
    CUDA_TRY("graph", cudaGraphLaunch(c->exec, lac_cuda_stream()));
    return lac_cuda_launched("graph");
}

const lac_device_graphs lac_cuda_graphs = {begin, end, launch, drop};
