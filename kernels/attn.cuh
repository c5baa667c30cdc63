/* attn.cuh: what the attention kernels share: the work list, the lattice, masks, merging, loads into shared memory.
 *
 * One launch serves all branches of a plan. A tile is (branch, batch item, head, segment, block of rows); its number
 * is decoded by arithmetic, so the list takes no memory and nothing is uploaded. Rows are read where they lie: row i
 * of a lattice is position base + i r, whatever the strides; there is no gathered copy, and what has no row (ends of
 * segments, padding) arrives as zeros without touching memory.
 *
 * Branches that meet in a row are merged in the order of the plan's phases. A tile computes its own softmax first and
 * only then waits for the tiles of earlier phases of its (batch item, head), whose counters say that their rows are
 * out; tiles are claimed in order, so what a tile waits for is already running. Sums live in f32 until the last branch
 * of a row, which lattice arithmetic knows, rounds them into the tensor. No float is ever added atomically: the same
 * call gives the same bits.
 *
 * Masks are one 64-bit word per row and tile of columns, made by the lane that has the row's number and handed round by
 * shuffles: causal, window, ends, padding and dedup cost the same few instructions, and dropout bits come the same way.
 * Rejected: gathered copies, partial results of every branch (twice the output's memory for LongNet), a mask tensor,
 * atomics, a tile list from the host (an upload per call, which a captured step could not repeat).
 */
#ifndef LAC_CUDA_ATTN_CUH
#define LAC_CUDA_ATTN_CUH
#include "common.cuh"
extern "C" {
#define atomic_int int /* plan.h counts references; the kernels do not */
#include "plan.h"
#undef atomic_int
}
#include "rng.h"

/* ---- arguments of every attention kernel, by value ---- */

struct attn_tensor {
    char *data;
    int64_t stride[4]; /* elements */
    int vec;           /* rows are contiguous, aligned to 16 bytes and a multiple of them long */
};
struct attn_branch {
    int64_t begin, tiles; /* numbers of its tiles */
    int segment, dilation, segment0, segments, head0, heads;
    int rank;   /* order of execution: smaller first where rows meet */
    int blocks; /* of one segment */
};
enum { ATTN_MERGE = 1, ATTN_SUM = 2 }; /* what happens to rows that several branches reach */
struct attn_args {
    attn_branch branch[LAC_MAX_BRANCHES];
    int branches, ranks, batch, n, m, shift, heads, kv_heads, group, head_dim, offset_rule, causal, dedup, window, sum;
    int deltas;             /* the query pass of the backward: only the rows' deltas */
    attn_tensor q, k, v, g; /* g: gradient of out */
    const uint8_t *padding;
    int64_t padding_stride[2];
    const void *lengths;
    int64_t lengths_stride;
    int lengths_wide;
    float p; /* dropout */
    double scale, gscale, keep_scale;
    float log2_scale, log2_magnitude; /* scale log2 e, and its magnitude */
    uint64_t seed, offset, draw;
    void *out, *acc;   /* result and its sums between branches (the result itself, or f32): forward out, backward dq */
    void *out2, *acc2; /* backward: dv (out and acc: dk) */
    void *lse, *branch_lse;
    int64_t branch_stride;                     /* of branch_lse between branches */
    void *lse2, *lse2_low, *delta, *delta_low; /* backward, compute type: [B, N, H], per branch if `per_branch` */
    int per_branch;
    attn_tensor dlse;      /* data NULL: none */
    const double *lse_all; /* [B, N, H]: base-2 lse of the merged softmax, for dlse's share */
    int *counter;          /* [1 + G B H]: next tile, finished tiles */
};
static_assert(sizeof(attn_args) <= 4096, "arguments of a kernel");

struct attn_tile {
    int g, b, h;  /* h: the head whose rows the tile owns: query head, or (key pass) the first head of the unit */
    int64_t base; /* position of lattice index 0 */
    int r, q0, q1, keys, live;     /* live: keys before the batch item's length */
    int after, before, first, end; /* rows [first, end) */
};

/* ---- the lattice ---- */

__device__ __forceinline__ int attn_offset(const attn_args &a, int g, int h)
{
    int r = a.branch[g].dilation;
    if (a.offset_rule == LAC_OFFSET_BRANCH) return g % r;
    if (a.offset_rule == LAC_OFFSET_MOD) return h % r;
    return h / ((a.heads - 1) / r + 1);
}

__device__ __forceinline__ bool attn_runs(const attn_args &a, int g, int h)
{
    return h >= a.branch[g].head0 && h < a.branch[g].head0 + a.branch[g].heads;
}

__device__ __forceinline__ int attn_count(int64_t base, int r, int64_t end)
{
    if (end <= base) return 0;
    const unsigned last = (unsigned)(end - base - 1); /* at most a segment apart */
    return (int)(r == 1 ? last : last / (unsigned)r) + 1;
}

/* does branch g keep `position` for head h, in a segment that has tiles? */
__device__ __forceinline__ bool attn_keeps(const attn_args &a, int g, int h, unsigned position)
{
    const attn_branch &br = a.branch[g];
    if (!attn_runs(a, g, h)) return false;
    unsigned s = position / (unsigned)br.segment;
    int at = (int)(position - s * (unsigned)br.segment) - attn_offset(a, g, h);
    return at >= 0 && at % br.dilation == 0 && (int)s >= br.segment0 && (int)s < br.segment0 + br.segments;
}

/* Units: does head h own the keys of its key/value head in branch g, for its offset? and the next head of the unit
 * after h, or -1 */
__device__ __forceinline__ bool attn_leads(const attn_args &a, int g, int h)
{
    for (int e = h / a.group * a.group; e < h; e++)
        if (attn_runs(a, g, e) && attn_offset(a, g, e) == attn_offset(a, g, h)) return false;
    return true;
}
__device__ __forceinline__ int attn_follows(const attn_args &a, int g, int h)
{
    for (int e = h + 1; e < (h / a.group + 1) * a.group; e++)
        if (attn_runs(a, g, e) && attn_offset(a, g, e) == attn_offset(a, g, h)) return e;
    return -1;
}

/* The lattice of segment s of branch g for head h of item b: everything of a tile but its rows. */
__device__ __forceinline__ void attn_span(const attn_args &a, int g, int b, int h, int s, attn_tile &t)
{
    const attn_branch &br = a.branch[g];
    int64_t start = (int64_t)s * br.segment, end = start + br.segment, q_end = (int64_t)a.shift + a.n;
    t.g = g;
    t.h = h;
    t.b = b;
    t.base = start + attn_offset(a, g, h);
    t.r = br.dilation;
    t.q0 = attn_count(t.base, t.r, a.shift < end ? a.shift : end);
    t.q1 = attn_count(t.base, t.r, q_end < end ? q_end : end);
    t.keys = t.live = attn_count(t.base, t.r, a.m < end ? a.m : end);
    if (a.lengths) {
        int64_t l = a.lengths_wide ? ((const int64_t *)a.lengths)[t.b * a.lengths_stride]
                                   : ((const int32_t *)a.lengths)[t.b * a.lengths_stride];
        int live = attn_count(t.base, t.r, l < end ? l : end);
        t.live = live < t.keys ? live : t.keys;
    }
    t.before = a.window < 0 ? 1 << 30 : a.window / t.r;
    t.after = a.causal ? 0 : t.before;
}

/* Number -> tile; its rows are found by attn_rows() from the number within the segment, which is the result. KEYS: rows
 * are keys and h the head of a unit. */
template <bool KEYS> __device__ __forceinline__ int attn_decode(const attn_args &a, int64_t id, attn_tile &t)
{
    int g = 0;
    while (id < a.branch[g].begin || id >= a.branch[g].begin + a.branch[g].tiles) g++;
    const attn_branch &br = a.branch[g];
    unsigned rem = (unsigned)(id - br.begin), block = rem % (unsigned)br.blocks;
    rem /= (unsigned)br.blocks;
    unsigned s = rem % (unsigned)br.segments;
    rem /= (unsigned)br.segments;
    if (!KEYS)
        block = (unsigned)br.blocks - 1 - block; /* causal: the last rows are the heaviest, and so are the first keys */
    attn_span(a, g, (int)(rem / (unsigned)br.heads), br.head0 + (int)(rem % (unsigned)br.heads), br.segment0 + (int)s,
              t);
    return (int)block;
}

/* Columns [low, high) of the other side that rows of the tile may see: keys, or (KEYS) query rows. Not rounded down:
 * decoding has no memory before its reach. */
template <bool KEYS> __device__ __forceinline__ void attn_reach(const attn_tile &t, int *low, int *high)
{
    if (KEYS) {
        const int first = t.first - t.after, end = t.end - 1 + t.before + 1;
        *low = first > t.q0 ? first : t.q0;
        *high = end < t.q1 ? end : t.q1;
        if (t.first >= t.live) *high = *low;
    } else {
        const int first = t.first - t.before, end = t.end - 1 + t.after + 1;
        *low = first < 0 ? 0 : first;
        *high = end < t.live ? end : t.live;
    }
}

/* ---- order among tiles ---- */

/* One counter a branch, batch item and head (key pass: key/value head). Not one a head: tiles without rows are done at
 * once, whatever their rank. */
template <bool KEYS> __device__ __forceinline__ int *attn_done(const attn_args &a, const attn_tile &t, int g)
{
    return a.counter + 1 + ((int64_t)g * a.batch + t.b) * a.heads + (KEYS ? t.h / a.group : t.h);
}

/* How those meet who work on a tile: here all threads of the block. */
struct attn_block_meets {
    __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

/* Waits for the tiles of smaller rank of the same batch item and head (key pass: of the heads that share its keys).
 * Everybody who meets calls it, and so it is with attn_signal(); thread 0 is among them. */
template <bool KEYS, class Meet = attn_block_meets>
__device__ __forceinline__ void attn_wait(const attn_args &a, const attn_tile &t, Meet meet = {})
{
    int rank = a.branch[t.g].rank, h0 = KEYS ? t.h / a.group * a.group : t.h, h1 = KEYS ? h0 + a.group : h0 + 1;
    if (rank == 0) return;
    if (threadIdx.x == 0)
        for (int g = 0; g < a.branches; g++) {
            const attn_branch &br = a.branch[g];
            int low = br.head0 > h0 ? br.head0 : h0, high = br.head0 + br.heads < h1 ? br.head0 + br.heads : h1;
            if (br.rank >= rank || high <= low) continue;
            const int *at = attn_done<KEYS>(a, t, g), expected = (high - low) * br.segments * br.blocks;
            for (int seen;;) {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
                if (seen >= expected) break;
                __nanosleep(40);
            }
        }
    meet();
}

/* Says that the tile is done. */
template <bool KEYS, class Meet = attn_block_meets>
__device__ __forceinline__ void attn_signal(const attn_args &a, const attn_tile &t, Meet meet = {})
{
    if (a.ranks == 1) return;
    meet();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(attn_done<KEYS>(a, t, t.g), 1);
    }
}

/* Which other branches reach a row: bit 0: one of smaller rank, bit 1: one of larger rank. */
template <bool KEYS>
__device__ __forceinline__ int attn_others(const attn_args &a, const attn_tile &t, unsigned position)
{
    if (a.ranks == 1) return 0;
    int rank = a.branch[t.g].rank, found = 0, h0 = KEYS ? t.h / a.group * a.group : t.h,
        h1 = KEYS ? h0 + a.group : h0 + 1;
    for (int g = 0; g < a.branches; g++) {
        int which = a.branch[g].rank < rank ? 1 : a.branch[g].rank > rank ? 2 : 0;
        if (which & ~found)
            for (int h = h0; h < h1; h++)
                if (attn_keeps(a, g, h, position)) {
                    found |= which;
                    break;
                }
    }
    return found;
}

/* ---- masks ---- */

__device__ __forceinline__ uint64_t attn_below(int x) /* the low x bits */
{
    return x <= 0 ? 0 : x >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << x) - 1;
}

__device__ __forceinline__ bool attn_padded(const attn_args &a, int b, int64_t key)
{
    return a.padding && !a.padding[b * a.padding_stride[0] + key * a.padding_stride[1]];
}

/* keys [first, first + 64) that are not padding; by one warp */
__device__ __forceinline__ uint64_t attn_alive(const attn_args &a, const attn_tile &t, int first)
{
    uint64_t alive = attn_below(t.live - first);
    if (!a.padding) return alive;
    int lane = threadIdx.x % 32, low = first + lane, high = low + 32;
    bool x = low < t.live && !attn_padded(a, t.b, t.base + (int64_t)low * t.r);
    bool y = high < t.live && !attn_padded(a, t.b, t.base + (int64_t)high * t.r);
    uint64_t bits = __ballot_sync(~0u, x) | (uint64_t)__ballot_sync(~0u, y) << 32;
    return alive & bits;
}

/* Of columns [first, first + 64): those whose pair with the row at lattice index i belongs to an earlier branch. */
__device__ __forceinline__ uint64_t attn_taken(const attn_args &a, const attn_tile &t, int h, int i, int first)
{
    uint64_t taken = 0;
    unsigned row = (unsigned)(t.base + (int64_t)i * t.r);
#pragma unroll 1
    for (int e = 0; e < t.g; e++) {
        if (!attn_runs(a, e, h)) continue;
        const attn_branch &br = a.branch[e];
        unsigned w = (unsigned)br.segment, start = row / w * w;
        int o = attn_offset(a, e, h), at = (int)(row - start) - o;
        if (at < 0 || at % br.dilation) continue;
#pragma unroll 1
        for (int j = 0; j < 64; j++) {
            int64_t in = t.base + (int64_t)(first + j) * t.r - start;
            if (in >= o && in < w && (in - o) % br.dilation == 0) taken |= (uint64_t)1 << j;
        }
    }
    return taken;
}

/* Visible keys of query row i, and visible query rows of key j, among 64 columns from `first` on. */
__device__ __forceinline__ uint64_t attn_row_keys(const attn_args &a, const attn_tile &t, int h, int i, int first,
                                                  uint64_t alive)
{
    uint64_t x = alive & attn_below(i + t.after + 1 - first) & ~attn_below(i - t.before - first);
    if (a.dedup) x &= ~attn_taken(a, t, h, i, first);
    return x;
}
__device__ __forceinline__ uint64_t attn_key_rows(const attn_args &a, const attn_tile &t, int h, int j, int first)
{
    if (j >= t.live || attn_padded(a, t.b, t.base + (int64_t)j * t.r)) return 0;
    uint64_t x = attn_below(t.q1 - first) & attn_below(j + t.before + 1 - first) & ~attn_below(j - t.after - first);
    if (a.dedup) x &= ~attn_taken(a, t, h, j, first);
    return x;
}

/* Kept pairs (dropout) of query lattice row i with 64 keys, or of key i with 64 query rows. */
template <bool KEYS>
__device__ __forceinline__ uint64_t attn_kept(const attn_args &a, const attn_tile &t, int h, int i, int first)
{
    uint64_t kept = 0, block = ~(uint64_t)0, head = (uint64_t)t.b * (uint64_t)a.heads + (uint64_t)h;
    uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int j = 0; j < 64; j++) {
        int64_t query = t.base + (int64_t)(KEYS ? first + j : i) * t.r - a.shift;
        int64_t key = t.base + (int64_t)(KEYS ? i : first + j) * t.r;
        uint64_t at = a.draw + (head * (uint64_t)a.n + (uint64_t)query) * (uint64_t)a.m + (uint64_t)key;
        if (at >> 2 != block) lac_philox(a.seed, a.offset, block = at >> 2, word);
        uint32_t w = at & 2 ? (at & 1 ? word[3] : word[2]) : (at & 1 ? word[1] : word[0]);
        kept |= (uint64_t)lac_rng_keep(w, a.p) << j;
    }
    return kept;
}

/* ---- arithmetic ---- */

#define ATTN_LOG2E 1.442695040888963407359924681
#define ATTN_LN2 0.693147180559945309417232121

__device__ __forceinline__ float attn_ex2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* log(e^a + e^b); -inf means "nothing" */
__device__ __forceinline__ double attn_log_add(double a, double b)
{
    double top = a > b ? a : b, low = a > b ? b : a;
    if (top == -INFINITY) return a != a || b != b ? (double)NAN : top;
    return top + log1p(exp(low - top));
}

/* What a finished row becomes. In: base-2 maximum and sum of the branch's softmax. Out: out = mine * own + before *
 * sums so far, and the lse to store. C is double for f64 only. */
template <class C> struct attn_row {
    C own, before;
    int64_t at; /* (b N + n) H + h */
    bool last;
};
template <class C>
__device__ __forceinline__ attn_row<C> attn_finish(const attn_args &a, const attn_tile &t, int i, C top, C sum)
{
    attn_row<C> row;
    int64_t position = t.base + (int64_t)i * t.r, n = position - a.shift;
    row.at = ((int64_t)t.b * a.n + n) * a.heads + t.h;
    int others = attn_others<false>(a, t, (unsigned)position);
    C *lse = (C *)a.lse + row.at;
    double mine = sum == 0 ? -(double)INFINITY : ((double)top + log2((double)sum)) * ATTN_LN2;
    row.last = !(others & 2);
    row.own = sum == 0 ? C(0) : (C)a.gscale / sum;
    row.before = 0;
    if (a.sum && a.branch_lse) ((C *)a.branch_lse)[t.g * a.branch_stride + row.at] = (C)mine;
    if (others & 1) {
        double old = (double)__ldcg(lse), all = attn_log_add(old, mine);
        row.before = 1;
        if (!a.sum) {
            row.before = old == -INFINITY ? C(0) : (C)exp(old - all);
            row.own = mine == -INFINITY ? C(0) : (C)(exp(mine - all) / (double)sum);
        }
        mine = all;
    }
    *lse = (C)mine;
    return row;
}

/* The same for the rows of a warp whose `lanes` neighbouring lanes share a row: the first of them asks and writes. */
template <class C, int LANES>
__device__ __forceinline__ attn_row<C> attn_finish_shared(const attn_args &a, const attn_tile &t, int i, bool valid,
                                                          C top, C sum)
{
    attn_row<C> f = {};
    const int from = threadIdx.x % 32 / LANES * LANES;
    if (valid && threadIdx.x % LANES == 0) f = attn_finish<C>(a, t, i, top, sum);
    f.own = __shfl_sync(~0u, f.own, from), f.before = __shfl_sync(~0u, f.before, from);
    f.at = __shfl_sync(~0u, f.at, from), f.last = __shfl_sync(~0u, (int)f.last, from);
    return f;
}

/* ---- loads ---- */

__device__ __forceinline__ uint32_t attn_shared(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void attn_copy16(uint32_t to, const void *from, bool valid)
{
    int bytes = valid ? 16 : 0; /* the rest is filled with zeros */
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void attn_copy4(uint32_t to, const void *from)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void attn_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void attn_arrived() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

/* Hides from the compiler where x comes from: addresses computed from it are not kept in registers across the loop. */
__device__ __forceinline__ uint32_t attn_opaque(uint32_t x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* Lattice rows [first, first + ROWS) of (b, h) into a tile of shared memory; rows from `limit` on, columns past the
 * head dimension, and (`padding`) rows that are padding become zeros. Tile::at(row, chunk) is the byte of a 16-byte
 * chunk. */
template <class Tile, class T, int ROWS, int DP, int THREADS_>
__device__ __forceinline__ void attn_load(uint32_t to, const attn_args &a, const attn_tensor &x, const attn_tile &t,
                                          int h, int shift, int first, int limit, bool padding)
{
    constexpr int PER = 16 / (int)sizeof(T), CHUNKS = DP / PER;
    h = (int)attn_opaque((uint32_t)h);
    const T *rows =
        (const T *)x.data + (int64_t)t.b * x.stride[0] + (int64_t)h * x.stride[2] + (t.base - shift) * x.stride[1];
    int64_t step = (int64_t)t.r * x.stride[1];
    if (x.vec) {
#pragma unroll 1
        for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS_) {
            int row = at / CHUNKS, chunk = at % CHUNKS;
            bool valid = first + row < limit && chunk * PER < a.head_dim;
            if (padding && valid) valid = !attn_padded(a, t.b, t.base + (int64_t)(first + row) * t.r);
            attn_copy16(to + Tile::at(row, chunk),
                        valid ? rows + (first + row) * step + chunk * PER : (const T *)x.data, valid);
        }
        return;
    }
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS * CHUNKS; at += THREADS_) {
        int row = at / CHUNKS, chunk = at % CHUNKS;
        bool valid = first + row < limit;
        if (padding && valid) valid = !attn_padded(a, t.b, t.base + (int64_t)(first + row) * t.r);
        alignas(16) T e[PER];
#pragma unroll
        for (int i = 0; i < PER; i++)
            e[i] = valid && chunk * PER + i < a.head_dim ? rows[(first + row) * step + (chunk * PER + i) * x.stride[3]]
                                                         : from_compute<T>(compute_t<T>(0));
        const uint4 v = *(const uint4 *)e;
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(to + Tile::at(row, chunk)), "r"(v.x), "r"(v.y),
                     "r"(v.z), "r"(v.w)
                     : "memory");
    }
}

/* The same for tiles that follow each other, without padding: the thread's address moves along, so that a chunk costs a
 * comparison and an addition. `quick` says whether a tensor can be read so. */
template <class Tile, class T, int ROWS, int DP, int THREADS_, bool FOLLOW> struct attn_stream {
    enum { PER = 16 / (int)sizeof(T), CHUNKS = DP / PER, EACH = THREADS_ / CHUNKS, TURNS = ROWS / EACH };
    static_assert(THREADS_ % CHUNKS == 0 && ROWS % EACH == 0, "a thread always has the same chunk");
    const char *from;
    attn_stream() = default;
    __device__ __forceinline__ attn_stream(const char *&) {}
    __device__ __forceinline__ void start(const attn_args &a, const attn_tensor &x, const attn_tile &t, int h,
                                          int shift, int first)
    {
        const int row = first + threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        from = (const char *)((const T *)x.data + (int64_t)t.b * x.stride[0] + (int64_t)h * x.stride[2] +
                              (t.base - shift) * x.stride[1] + row * ((int64_t)t.r * x.stride[1]) + chunk * PER);
    }
    /* the tile that begins `first` rows into the lattice, which has `limit` */
    __device__ __forceinline__ void next(uint32_t to, const attn_args &a, const attn_tensor &x, const attn_tile &t, int,
                                         int first, int limit)
    {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS,
                  hop = t.r * (int)x.stride[1] * (EACH * (int)sizeof(T));
        const int left = chunk * PER < a.head_dim ? limit - first - row : 0;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            attn_copy16(to + Tile::at(i * EACH + row, chunk), from, i * EACH < left);
            from += hop;
        }
    }
};
/* The same for tiles anywhere in the lattice and in any head; where the lattice begins lies in shared memory (`start`
 * is followed by a barrier). */
template <class Tile, class T, int ROWS, int DP, int THREADS_> struct attn_stream<Tile, T, ROWS, DP, THREADS_, false> {
    enum { PER = 16 / (int)sizeof(T), CHUNKS = DP / PER, EACH = THREADS_ / CHUNKS, TURNS = ROWS / EACH };
    static_assert(THREADS_ % CHUNKS == 0 && ROWS % EACH == 0, "a thread always has the same chunk");
    const char *&origin;
    __device__ __forceinline__ attn_stream(const char *&origin) : origin(origin) {}
    __device__ __forceinline__ void start(const attn_args &, const attn_tensor &x, const attn_tile &t, int, int shift,
                                          int)
    {
        if (threadIdx.x == 0)
            origin = (const char *)((const T *)x.data + (int64_t)t.b * x.stride[0] + (t.base - shift) * x.stride[1]);
    }
    __device__ __forceinline__ void next(uint32_t to, const attn_args &a, const attn_tensor &x, const attn_tile &t,
                                         int h, int first, int limit)
    {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS,
                  step = t.r * (int)x.stride[1] * (int)sizeof(T);
        const int left = chunk * PER < a.head_dim ? limit - first - row : 0;
        const char *from = origin + h * (x.stride[2] * (int)sizeof(T)) + (int64_t)(first + row) * step + chunk * 16;
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            attn_copy16(to + Tile::at(i * EACH + row, chunk), from, i * EACH < left);
            from += EACH * step;
        }
    }
};
__device__ __forceinline__ bool attn_quick(const attn_args &a, const attn_tensor &x, const attn_tile &t)
{
    const int64_t step = (int64_t)t.r * x.stride[1];
    return x.vec && !a.padding && step < 1 << 23 && step > -(1 << 23);
}

/* index into lse2, lse2_low and delta of query lattice row i */
__device__ __forceinline__ int64_t attn_stat(const attn_args &a, const attn_tile &t, int h, int i, bool per_branch)
{
    int64_t n = t.base + (int64_t)i * t.r - a.shift, at = ((int64_t)t.b * a.n + n) * a.heads + h;
    return per_branch ? (int64_t)t.g * a.batch * a.n * a.heads + at : at;
}

/* The scale of base-2 scores in two parts, of which the second is not 0 and has the sign of the first: a score of -inf
 * by both is -inf, and its weight 0. (Rounded to the nearest the first may be the larger one, or all of it, and the sum
 * of both products is no number.) */
__device__ __forceinline__ void attn_two_scales(const attn_args &a, double &high, double &low)
{
    const double scale = a.scale * ATTN_LOG2E;
    high = __longlong_as_double(__double_as_longlong(scale) - 1); /* the next one towards 0 */
    low = scale - high;
}
__device__ __forceinline__ void attn_two_scales(const attn_args &a, float &high, float &low)
{
    double most, rest;
    attn_two_scales(a, most, rest);
    high = __double2float_rz(most);
    low = (float)(most - (double)high + rest);
}

/* The branch's own delta of query lattice row i: stored, less what the gradient of lse adds. */
template <class C> __device__ __forceinline__ void attn_put_delta(const attn_args &a, const attn_tile &t, int i, C own)
{
    int64_t n = t.base + (int64_t)i * t.r - a.shift, at = attn_stat(a, t, t.h, i, true);
    const attn_tensor &g = a.dlse;
    C gl = g.data ? ((const C *)g.data)[t.b * g.stride[0] + n * g.stride[1] + t.h * g.stride[2]] : C(0);
    if (gl != 0) {
        double mine = (double)((const C *)a.lse2)[at] + (double)((const C *)a.lse2_low)[at], share = 1;
        if (a.sum && mine != INFINITY) share = exp2(mine - a.lse_all[attn_stat(a, t, t.h, i, false)]);
        own -= gl * (C)share;
    }
    ((C *)a.delta)[at] = own;
}

/* what delta's rounding left (the gradient of lse may be much smaller); deltas of branches have none */
template <class C> __device__ __forceinline__ C attn_delta_low(const attn_args &a, int64_t at)
{
    return a.delta_low ? ((const C *)a.delta_low)[at] : C(0);
}

/* ---- launches: one function a file ---- */

/* f16, bf16 and (tf32) f32 on tensor cores */
int attn_forward_tensor(attn_args &a, const lac_plan *plan, int dtype);
int attn_keys_tensor(attn_args &a, const lac_plan *plan, int dtype);
int attn_queries_tensor(attn_args &a, const lac_plan *plan, int dtype);
/* on Hopper: NULL, or why its kernel cannot do this; and the forward itself */
const char *attn_hopper_forward_fits(const lac_a_attend *f);
/* numbers the tiles of `height` rows, which end where blocks of `block` rows end (0: no blocks); gives their count in
 * *tiles */
int attn_number(attn_args &a, const lac_plan *plan, bool keys, int height, int64_t *tiles, int block = 0);

template <class K, class A> int attn_launch(K kernel, A &a, int64_t tiles, int threads, size_t shared)
{
    if (tiles == 0) return 0;
    CUDA_TRY("attention", lac_cuda_shared((const void *)kernel, shared));
    void *arguments[] = {&a};
    const uint32_t bytes = sizeof a;
    lac_cuda_launch_after((const void *)kernel, (unsigned)tiles, (unsigned)threads, shared, arguments, &bytes, 1);
    return lac_cuda_launched("attention");
}

#endif
