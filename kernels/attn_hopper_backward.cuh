/* attn_hopper_backward.cuh: what the files of the backward in one pass share, on Hopper and elsewhere: the work list in
 * device memory, and turns.
 *
 * Terms. An item is one segment of one branch for one batch item and head. A block is 64 query rows of an item,
 * numbered over all branches; it owns 128 numbers of statistics (64 base-2 lse, 64 delta), sums of dq in f32 for 64
 * rows (of 64 or 128 columns on Hopper) and one `turn`. A tile is 64 to 192 keys of an item: what a thread block owns
 * (its dk and dv) and what it adds to the blocks that see these keys.
 *
 * Turns make the sums of dq deterministic. The tiles of an item are numbered by their keys; a block's turn is the
 * number of the tile that may add next, and whoever has added passes the turn on. The first one stores instead, so that
 * the sums need not be cleared, and a block that nobody touched is known by its turn. Tiles are claimed in the order of
 * their numbers, so a tile waits only for tiles that run already. With active blocks sums are whole numbers, which are
 * the same in any order, and there are no turns (attn_hopper_block_keys.cu).
 *
 * Where branches meet, their ranks add to dk and dv one after the other. A tile with keys waits until all tiles of the
 * last rank before that has any are done; one of these waited in the same way, so that all earlier ranks are done too.
 * Tiles without keys are done at once. A rank may have none but these (fewer keys than its offset): it waits for
 * nothing, and waiting for it would tell nothing about those before.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_BACKWARD_CUH
#define LAC_CUDA_ATTN_HOPPER_BACKWARD_CUH
#include "attn_pairs.cuh"
#include "hopper.cuh"

struct hopper_kept; /* attn_hopper_pairs.cuh */

/* ---- the work list ---- */

enum { HOPPER_ROWS = 64 };       /* query rows of a block, keys of a warpgroup */
enum { HOPPER_FRESH = 1 << 30 }; /* in a turn: nothing has been added yet */
enum { HOPPER_SPOILT = 1 };      /* with active blocks instead of a turn: what is added to dq did not fit */
enum { HOPPER_WHOLE = 1 << 30 }; /* what does not, and more */
enum { HOPPER_STOP = -1 };       /* instead of a tile or a block: there are no more */

struct hopper_branch {
    int first_block, blocks; /* blocks of all items before this branch's, and of one item */
    int first_tile, tiles;   /* tiles before its pool's, and of one item; a list entry may turn out to have no keys */
    int segments;            /* of one head */
    int earlier, stride;     /* the first item's place among those of the pool, and from one to the next */
    int alike;               /* branches from this one on that differ in their offset alone */
    int group, larger;       /* of the pool as many items are interleaved in the list; parts with one more */
    int awaits, needs;       /* the last rank before that has keys, or -1; its tiles */
    divider segment, dilation;
};
/* One tile; read by threads that have few registers, so everything that takes arithmetic is done beforehand. */
struct alignas(64) hopper_tile {
    int batch, kv_head;
    unsigned heads;         /* bit i: query head kv_head * group + i is one of the unit's */
    int keys, live, key0;   /* lattice rows of keys, those before the item's length; position of row 0 */
    int rows, row0, query0; /* lattice rows of queries; the first one's row in q and its lattice index */
    int first, width;       /* the tile's groups of 64 keys; width 0: no keys, not a tile */
    int low, high; /* blocks [low, high) of every head see its keys; active blocks: the first head's item, steps */
    int block;     /* number of the group's first head's first block */
    int order, branch;
};
/* A tile of the pass that works out deltas of branches (attn_hopper_deltas.cu). */
struct alignas(64) hopper_delta_tile {
    int branch, batch, head;
    int rows, row0, query0; /* as above */
    int first, groups;      /* the tile's first row of the lattice, and groups of 64 */
    int live, key0;         /* keys before the item's length; position of the lattice's first */
    int low, high;          /* blocks of keys that the rows see */
};
/* Active blocks: which blocks of rows a branch's tiles meet, a row of words a tile: how many, then a bit a block. */
struct hopper_steps {
    int64_t at;       /* of the branch's first row */
    int tiles, width; /* rows of an item; words of one */
};
struct hopper_args {
    hopper_branch branch[LAC_MAX_BRANCHES];
    hopper_tile *tile;
    float *stats;                  /* [blocks][2][64]: lse, delta */
    float *dq;                     /* [blocks][64 columns], in the order of the products' registers */
    int columns;                   /* of a row of these sums: at least the head dimension */
    int *turn;                     /* [blocks]; active blocks: HOPPER_SPOILT or 0 */
    int tiles;                     /* entries of the list */
    int late_first;                /* masks: tiles with late keys come first */
    int *counter;                  /* tiles claimed beyond the first of every thread block */
    int *ready;                    /* [ranks]: warpgroups that are done with a tile of that rank, where branches meet */
    int *spoilt;                   /* does any gradient hold NaN or infinity? */
    hopper_delta_tile *delta_tile; /* where the sums of dq will be */
    const float *squares;          /* [B, N, H], active blocks: sums of squares of dout's rows, where dq will be */
    int64_t sums;                  /* numbers of dq's sums */
    int *delta_counter;            /* tiles claimed of these */
    uint32_t *steps;               /* NULL: there are no active blocks */
    float *scales;                 /* [blocks][64], of sums of dq in fixed point */
    int *most;                     /* [B, Hk][2]: bits of the largest number of k, of the largest sum of squares of v */
    hopper_steps place[LAC_HOPPER_BRANCHES];
};

/* the tiles of all branches (attn_hopper_keys.cu) */
int attn_hopper_keys(const attn_pair_args &a, const hopper_args &p, const lac_a_attend_bwd *w,
                     const hopper_kept *padding);
/* delta of every branch (attn_hopper_deltas.cu) */
int attn_hopper_deltas(const attn_args &a, const hopper_args &p, const lac_a_attend_bwd *w);
/* lattice rows of a segment of branch g, at most, when the sequence has n positions */
inline int64_t hopper_lattice_rows(const lac_plan *p, int g, int64_t n)
{
    int64_t w = p->segment[g] < n ? p->segment[g] : n;
    return (w - 1) / p->desc.dilation[g] + 1;
}
/* groups of 64 keys of a tile; columns that tiles compute: the tensor maps fill up those that rows do not have */
inline int attn_hopper_groups(int head_dim, bool blocks) { return head_dim <= 64 && !blocks ? 3 : 2; }
inline int attn_hopper_columns(int head_dim) { return head_dim <= 64 ? 64 : 128; }
/* active blocks, before the list: what tiles meet, and largest keys and values (attn_hopper_block_keys.cu) */
int attn_hopper_steps(const attn_pair_args &a, const hopper_args &p, int dtype);
/* can this process's device run its kernels, and were they compiled for it? */
bool attn_hopper_keys_exist(void);
/* The backward as lac_cuda_attend_bwd() calls it. Fits: NULL, or why these kernels cannot do it. */
const char *attn_hopper_backward_fits(const lac_a_attend_bwd *w);
/* Of device memory beside statistics: the list's, *sums those of dq. Joint: tiles by the portable kernel; blocks: there
 * are active blocks. */
size_t attn_hopper_backward_bytes(const lac_plan *plan, bool joint, bool blocks, size_t *sums);
/* all but statistics, which with active blocks have left sums of squares of dout's rows in dq's memory, in f32: nothing
 * else is there before the tiles; dk_acc, dv_acc: low bytes of what branches add to these (attn_sums.cuh); padding:
 * attn_hopper_ends() of attn_hopper_pairs.cuh; zeros: dk and dv get them where no branch reaches keys */
int attn_hopper_backward(attn_pair_args &a, const lac_a_attend_bwd *w, bool joint, void *space, void *sums,
                         void *dk_acc, void *dv_acc, const hopper_kept *padding, bool zeros);
/* Can it write these zeros? Where keys are the rows of queries, which its pass over dq looks up. */
bool attn_hopper_zeros(const attn_pair_args &a);
/* The same with the portable kernel for tiles (attn_joint.cu): can it do the call? has the device the memory for it? */
bool attn_joint_fits(const lac_a_attend_bwd *w);
bool attn_joint_runs(int head_dim);
int attn_joint_tiles(const attn_args &a, const hopper_args &p, int dtype);

/* ---- rows ---- */

/* Of a row's 64 columns lane i of four has 8 e + 2 i and 8 e + 2 i + 1 in u[e]; then 16 i to 16 i + 15. */
HOPPER_FN void hopper_sort_columns(uint32_t (&u)[8])
{
#pragma unroll
    for (int m = 1; m < 4; m *= 2)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (e & 2 * m) continue;
            const bool upper = threadIdx.x & m;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? u[e] : u[e + 2 * m], m);
            if (upper) u[e] = got;
            else u[e + 2 * m] = got;
        }
    const uint32_t x[8] = {u[0], u[2], u[4], u[6], u[1], u[3], u[5], u[7]};
#pragma unroll
    for (int e = 0; e < 8; e++) u[e] = x[e];
}

/* ---- turns ---- */

/* waits until it is tile `order`'s turn; was the block fresh? */
HOPPER_FN int hopper_turn(const int *turn, int order)
{
    int seen;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turn) : "memory");
    while ((seen & ~HOPPER_FRESH) != order);
    return seen & HOPPER_FRESH;
}
/* waits until `count` have been counted */
HOPPER_FN void hopper_counted(const int *counted, int count)
{
    int seen;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counted) : "memory");
    while (seen < count);
}
/* what this thread did, and what it knows that others did, comes before */
HOPPER_FN void hopper_pass(int *turn, int order)
{
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(order + 1) : "memory");
}

#endif
