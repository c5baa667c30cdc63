/* attn_hopper_rows.cuh: what a warpgroup does with its 64 query rows: the products, the softmax, the merge of branches.
 *
 * One flat pipeline over all blocks of all tiles. For block j: S_j = Q K_j and O += P_(j-1) V_(j-1) are queued, then
 * the softmax of S_j runs while the second product still does. The last P V of a tile is queued with the first Q K of
 * the next, so the tensor cores do not run dry between tiles. Warpgroups take turns at queueing (named barriers), so
 * that the exponentials of one run under the products of the others.
 *
 * The maximum of a row is taken once, in its first block. Later blocks keep that reference, because a softmax does not
 * depend on it as long as nothing overflows, and the block's sums, which are needed anyway, prove that. Where a sum
 * exceeds `most()`, the warp multiplies the block's scores again by plain instructions and takes a new reference. That
 * saves 64 maxima, the shuffles and the rescaling of O a block; results are as exact as with a running maximum.
 *
 * Where branches meet, the softmax of a row is one over the keys of all of them: a tile starts from the lse and results
 * of earlier branches, an f32 copy of the results that the last branch of a row rounds. What is read has been asked for
 * before the first block's exponentials are worked out, and nothing is read at a tile's end. Rejected: reading, adding
 * and writing row by row at the end, where nothing else runs (a third of the time of LongNet's five branches).
 *
 * A row that sees nothing of a block has the reference NOTHING there: masked scores, -inf, become 0, and the first
 * score that is not masked exceeds every sum, if `settle` has not seen it before.
 */
#ifndef LAC_CUDA_ATTN_HOPPER_ROWS_CUH
#define LAC_CUDA_ATTN_HOPPER_ROWS_CUH
#include "attn_hopper_forward.cuh"
#include "attn_hopper_wide.cuh"
#include "attn_mma.cuh"

/* MEETS: several branches meet in rows. OPTIONS: there may be dropout, slopes and padding (attn_hopper_pairs.cuh).
 * BLOCKS: keys come in steps, each of which says what the next one is (attn_hopper_blocks.cuh). T e4m3: queries, keys,
 * values and weights are of eight bits (attn_hopper_fp8.cuh). */
template <class T, int D, bool MEETS, int OPTIONS, int BLOCKS> struct hopper_rows {
    typedef hopper_forward_shape<T, D, BLOCKS, (OPTIONS & HOPPER_ADDED) != 0> M;
    enum { BN = M::KEYS, TURN = 1, OWN = 8 }; /* named barriers: the turn of warpgroup 0; of its own warps */
    static constexpr bool MEET = MEETS;
    static constexpr float NOTHING = -1e38f, RISE = 8; /* bits by which slopes may lift a block over its reference */
    static constexpr bool PAIRS = OPTIONS & HOPPER_PAIRS, PADDED = OPTIONS & HOPPER_PADDED,
                          ADDED = OPTIONS & HOPPER_ADDED;
    static constexpr bool EIGHT = M::EIGHT, RUNNING = PAIRS || EIGHT; /* RUNNING: the reference follows the maximum */
    static constexpr float LIFT = EIGHT ? 8 : 0;                      /* bits by which weights exceed their share */
    static constexpr int LATE = PAIRS ? BN / 8 : M::LATE;
    static constexpr int BIASES = D == 64 ? 1 : 4; /* parts in which a block's are read */
    const hopper_forward_args &p;
    const uint32_t memory;
    const int w;
    const hopper_own_if<M::TEAMED, 0, 128> thread;
    const hopper_own_if<M::TEAMED, 0, 32> lane;
    const hopper_own_if<M::TEAMED, 5, 4> warp;
    float s[BN / 2], o[D / 2], top0, top1, sum0, sum1;        /* rows lane / 4 and lane / 4 + 8 of the warp's 16 */
    uint32_t weights[EIGHT ? BN / 8 : BN / 4], kept[BN / 64]; /* kept: a bit a register of s; PAIRS */
    uint32_t shown;                                           /* PADDED: keys that are none (hopper_shown_keys) */
    /* EIGHT: base-2 scores are products times unit; results of one block; what turns those before it into the
     * references that it has */
    float unit, part[EIGHT ? D / 2 : 1], late0, late1;
    /* blocks of keys taken so far (values lag by one while a product is due), tiles, block of the product that is due
     */
    uint32_t block, tiles, due;
    bool held, stored; /* the last tile's product and results are due; its results may not have left shared memory */

    __device__ __forceinline__ hopper_rows(const hopper_forward_args &p, uint32_t memory)
        : p(p), memory(memory),
          w(__shfl_sync(~0u, M::TEAMED ? (int)(threadIdx.x / 128 - 1) % M::GROUPS : (int)threadIdx.x / 128 - 1, 0)),
          thread((int)(threadIdx.x % 128)), lane((int)(threadIdx.x % 32)), warp((int)(threadIdx.x % 128 / 32)),
          block(0), tiles(0), due(0), held(false), stored(false)
    {
        top0 = top1 = sum0 = sum1 = 0;
        if (EIGHT) unit = 0, late0 = late1 = 1;
        clear();
    }
    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0;
    }
    static __device__ __forceinline__ float most() { return std::is_same_v<T, f16> ? 32768.f : 1.15e18f; }
    __device__ __forceinline__ const volatile hopper_forward_tile &tile(int slot) const
    {
        return *(const hopper_forward_tile *)__cvta_shared_to_generic(memory + M::TILE + HOPPER_TILE * slot);
    }

    /* what every lane has, so that the compiler knows it */
    static __device__ __forceinline__ int4 same(const int4 x)
    {
        return {__shfl_sync(~0u, x.x, 0), __shfl_sync(~0u, x.y, 0), __shfl_sync(~0u, x.z, 0), __shfl_sync(~0u, x.w, 0)};
    }

    /* ---- order ---- */

    __device__ __forceinline__ void wait_keys(uint32_t c)
    {
        hopper_wait(memory + M::K_FULL + 8 * (c % M::STAGES), c / M::STAGES & 1);
    }
    __device__ __forceinline__ void wait_values(uint32_t c)
    {
        hopper_wait(memory + M::V_FULL + 8 * (c % M::STAGES), c / M::STAGES & 1);
    }
    __device__ __forceinline__ void free_keys(uint32_t c)
    {
        if (lane == 0) hopper_arrive(memory + M::K_FREE + 8 * (c % M::STAGES));
    }
    __device__ __forceinline__ void free_values(uint32_t c)
    {
        if (lane == 0) hopper_arrive(memory + M::V_FREE + 8 * (c % M::STAGES));
    }
    __device__ __forceinline__ uint32_t queries(int slot) const
    {
        return memory + M::Q + slot % M::PLACES * M::QUERIES + w * M::PANEL;
    }
    /* among all warpgroups of the thread block */
    __device__ __forceinline__ int group() const
    {
        if constexpr (M::TEAMS == 1) return w;
        else return hopper_own<7, 8>(0) - 1;
    }
    __device__ __forceinline__ void take_turn() /* a warpgroup alone always has it */
    {
        if (M::GROUPS > 1) hopper_sync(TURN + group(), 256);
    }
    __device__ __forceinline__ void pass_turn()
    {
        if (M::GROUPS > 1) hopper_meet(TURN + (M::TEAMS > 1 ? group() ^ 1 : (w + 1) % M::GROUPS), 256);
    }
    __device__ __forceinline__ void meet() { hopper_sync(OWN + group(), 128); }
    /* a block that this warpgroup has no use for */
    __device__ __forceinline__ void skip()
    {
        take_turn();
        pass_turn();
        wait_keys(block);
        free_keys(block);
        wait_values(block);
        free_values(block);
        block++;
    }
    __device__ __forceinline__ void free_slot(int slot)
    {
        if (thread == 0) {
            hopper_bulk_read();
            hopper_arrive(memory + M::Q_FREE + 8 * slot);
        }
    }
    __device__ __forceinline__ void free_stored() /* of the tile before this one */
    {
        if (stored) free_slot((tiles - 1) & 1);
        stored = false;
    }

    /* ---- products ---- */

    __device__ __forceinline__ void queue_scores(int slot, bool begun = false) /* S = Q K^T, or S += */
    {
        const uint32_t q = hopper_operand(queries(slot), 16);
        const uint32_t k = hopper_operand(memory + M::K + block % M::STAGES * M::BLOCK, 16);
        hopper_pin(s);
        hopper_product_fence();
        if constexpr (EIGHT) {
#pragma unroll
            for (int i = 0; i < D / 32; i++)
                hopper_product_eight(s, hopper_descriptor(q, i * 32), hopper_descriptor(k, i * 32), i > 0);
        } else
#pragma unroll
            for (int i = 0; i < D / 16; i++)
                hopper_product<T, 0>(s, hopper_descriptor(q, (i >> 2) * M::GROUPS * M::PANEL + (i & 3) * 32),
                                     hopper_descriptor(k, (i >> 2) * BN * 128 + (i & 3) * 32), i > 0 || begun);
        hopper_product_commit();
    }
    __device__ __forceinline__ void queue_values(uint32_t c) /* O += P V */
    {
        const uint32_t v = hopper_operand(memory + M::V + c % M::STAGES * M::BLOCK, BN * 128);
        if constexpr (!EIGHT) hopper_pin(o);
        hopper_pin(weights);
        hopper_product_fence();
        if constexpr (EIGHT) {
            hopper_product_eight_first(part, weights, hopper_descriptor(v, 0));
#pragma unroll
            for (int i = 1; i < BN / 32; i++)
                hopper_product_eight_from(part, weights + 4 * i, hopper_descriptor(v, i * 32));
        } else {
#pragma unroll
            for (int i = 0; i < BN / 16; i++)
                hopper_product_from<T>(o, weights + 4 * i, hopper_descriptor(v, i * 2048));
        }
        hopper_product_commit();
    }
    /* when the products with values are there. EIGHT: their sums keep 14 bits, so that long ones would lose more than
     * rounding does: a block's are added here */
    __device__ __forceinline__ void have_values()
    {
        if constexpr (EIGHT) {
            hopper_pin(part);
#pragma unroll
            for (int i = 0; i < D / 2; i++) o[i] = fmaf(o[i], i & 2 ? late1 : late0, part[i]);
        } else hopper_pin(o);
        hopper_pin(weights);
    }
    __device__ __forceinline__ void settle_values(uint32_t c)
    {
        hopper_product_wait<0>();
        have_values();
        free_values(c);
    }

    /* ---- softmax ---- */

    __device__ __forceinline__ float log2_scale() const { return EIGHT ? unit : p.a.log2_scale; }
    __device__ __forceinline__ void exponentials(int i) /* of 8 columns */
    {
        s[4 * i] = attn_ex2(fmaf(s[4 * i], log2_scale(), -top0));
        s[4 * i + 1] = attn_ex2(fmaf(s[4 * i + 1], log2_scale(), -top0));
        s[4 * i + 2] = attn_ex2(fmaf(s[4 * i + 2], log2_scale(), -top1));
        s[4 * i + 3] = attn_ex2(fmaf(s[4 * i + 3], log2_scale(), -top1));
        sum0 += s[4 * i] + s[4 * i + 1];
        sum1 += s[4 * i + 2] + s[4 * i + 3];
    }
    __device__ __forceinline__ void pack(int i)
    {
        if constexpr (EIGHT) { /* of 16 columns, when the second 8 are there */
            const float *x = s + 4 * i - 4;
            if (i % 2 == 0) return;
            weights[i - 1] = hopper_pack_eight(x[0], x[1], x[4], x[5]);
            weights[i] = hopper_pack_eight(x[2], x[3], x[6], x[7]);
        } else {
            weights[2 * i] = hopper_pack<T>(s[4 * i], s[4 * i + 1]);
            weights[2 * i + 1] = hopper_pack<T>(s[4 * i + 2], s[4 * i + 3]);
        }
    }
    __device__ __forceinline__ void maxima(float &most0, float &most1) /* references of the block's scores, in base 2 */
    {
        most0 = fmaxf(s[0], s[1]), most1 = fmaxf(s[2], s[3]);
#pragma unroll
        for (int i = 1; i < BN / 8; i++) {
            most0 = fmaxf(most0, fmaxf(s[4 * i], s[4 * i + 1]));
            most1 = fmaxf(most1, fmaxf(s[4 * i + 2], s[4 * i + 3]));
        }
        most0 = fmaxf(quad_max(most0) * log2_scale() - LIFT, NOTHING);
        most1 = fmaxf(quad_max(most1) * log2_scale() - LIFT, NOTHING);
    }
    /* `first`: the first of `COUNT` keys, whose scores are x; `until`: where they end. What the mask needs is read
     * again each time: registers are for the main loop. */
    template <int COUNT> __device__ __forceinline__ void mask(int slot, float *x, int first, int until)
    {
        const volatile attn_tile &t = tile(slot).t;
        const int row = t.first + w * 64 + warp * 16 + lane / 4, at = first + lane % 4 * 2,
                  live = (BLOCKS ? until : t.live) - at, high = row + t.after + 1 - at, low = row - t.before - at;
        const int high0 = min(live, high), high1 = min(live, high + 8), low1 = low + 8;
#pragma unroll
        for (int i = 0; i < COUNT / 8; i++) {
            if (8 * i >= high0) x[4 * i] = -INFINITY;
            if (8 * i + 1 >= high0) x[4 * i + 1] = -INFINITY;
            if (8 * i >= high1) x[4 * i + 2] = -INFINITY;
            if (8 * i + 1 >= high1) x[4 * i + 3] = -INFINITY;
        }
        if (p.a.window < 0) return;
#pragma unroll
        for (int i = 0; i < COUNT / 8; i++) {
            if (8 * i < low) x[4 * i] = -INFINITY;
            if (8 * i + 1 < low) x[4 * i + 1] = -INFINITY;
            if (8 * i < low1) x[4 * i + 2] = -INFINITY;
            if (8 * i + 1 < low1) x[4 * i + 3] = -INFINITY;
        }
    }
    __device__ __forceinline__ void mask(int slot, const int4 &step)
    {
        if constexpr (BLOCKS) {
            mask<64>(slot, s, step.x, step.x + (M::PIECES == 1 ? step.w >> HOPPER_COUNT : step.w & 0xffff));
            if constexpr (M::PIECES == 2) mask<64>(slot, s + BN / 4, step.y, step.y + (step.w >> 16));
        } else mask<BN>(slot, s, step.x, 0);
    }
    /* slopes: scores lose by the distance of row and key */
    __device__ __forceinline__ void lean(int slot, int first)
    {
        const volatile hopper_forward_tile &f = tile(slot);
        const float slope = f.slope, apart = (float)(f.t.first + w * 64 + warp * 16 + lane / 4 - first - lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
            s[i] = fmaf(-slope, fabsf(apart + (float)(i % 4 / 2 * 8 - i / 4 * 8 - i % 2)), s[i]);
    }
    /* Which pairs of the block does dropout keep? Asked before its scores are queued: their registers are free. */
    __device__ __forceinline__ void choose(int slot, int first)
    {
        const volatile hopper_forward_tile &f = tile(slot);
        const int row = f.query + (f.t.first - f.t.q0 + w * 64 + warp * 16 + lane / 4) * f.t.r;
        const uint64_t head = (uint64_t)f.t.b * (uint64_t)p.a.heads + (uint64_t)f.t.h;
        const uint64_t at =
            p.a.draw + (head * (uint64_t)p.a.n + (uint64_t)row) * (uint64_t)p.a.m + (uint64_t)(f.key + first * f.t.r);
#pragma unroll
        for (int half = 0; half < BN / 64; half++)
            kept[half] = hopper_kept_keys(p.dropout, at + (uint64_t)(64 * half * f.t.r), p.a.m, f.t.r);
    }
    /* PADDED: which keys are none? Asked like choose(). */
    __device__ __forceinline__ void look(int slot, int first)
    {
        const volatile hopper_forward_tile &f = tile(slot);
        const int r = f.t.r;
        shown = f.holes ? hopper_shown_keys(p.a, f.t.b, f.key + first * r, r, f.t.live - first) : ~0u;
    }
    /* ADDED: of the lane's two rows and the block's keys */
    __device__ __forceinline__ hopper_lines lines(int slot, int first) const
    {
        const volatile hopper_forward_tile &f = tile(slot);
        const int r = f.t.r;
        hopper_lines at;
#pragma unroll
        for (int y = 0; y < 2; y++) {
            const int i = min(f.t.first + w * 64 + warp * 16 + lane / 4 + 8 * y, f.t.end - 1) - f.t.q0;
            const int64_t n = f.query + (int64_t)i * r, key = f.key + (first + lane % 4 * 2) * (int64_t)r;
            at.mask[y] = attn_pair_at(p.a.mask_stride, f.t.b, f.t.h, n, key);
            at.bias[y] = attn_pair_at(p.a.bias_stride, f.t.b, f.t.h, n, key);
        }
        at.mask_step = r * p.a.mask_stride[3], at.bias_step = r * p.a.bias_stride[3];
        at.left = f.t.live - first - lane % 4 * 2;
        return at;
    }
    /* may a row of the warp have seen nothing yet? */
    __device__ __forceinline__ bool unseen() const { return __any_sync(~0u, fminf(top0, top1) <= NOTHING); }
    /* scores of keys that are padding */
    __device__ __forceinline__ void hide()
    {
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
            if (!(shown >> (i / 4 % 4 * 8 + i / 16 * 2 + i % 2) & 1)) s[i] = -INFINITY;
    }
    /* the weights, which have been summed up, of pairs that are dropped */
    __device__ __forceinline__ void drop()
    {
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
            if (!(kept[i / 32] >> i % 32 & 1)) s[i] = 0;
    }
    /* the scores of the current block once more; needs no other warp */
    __device__ __forceinline__ void multiply_again(int slot)
    {
        const int row = warp * 16 + lane / 4;
        const uint32_t q = queries(slot) + row * 128;
        const uint32_t k = memory + M::K + block % M::STAGES * M::BLOCK + lane % 4 * 256;
#pragma unroll
        for (int i = 0; i < BN / 2; i++) s[i] = 0;
        /* two columns at a time need fewer registers, which teams do not have, and take longer */
        if constexpr (M::TEAMED) hopper_scores_again<T, D>(s, q, k, row & 7, lane % 4 * 2);
        else hopper_scores_again_by_eight<T, D, M::GROUPS>(s, q, k, row & 7, lane % 4 * 2);
    }
    __device__ __forceinline__ void first_softmax(int slot, float old0, float old1)
    {
        maxima(top0, top1);
        sum0 = sum1 = 0;
        if (EIGHT) late0 = late1 = 1;
        float share0, share1;
        if (MEETS) {
            top0 = fmaxf(top0, old0 - LIFT), top1 = fmaxf(top1, old1 - LIFT);
            share0 = attn_ex2(old0 - top0), share1 = attn_ex2(old1 - top1);
            if (lane % 4 == 0) sum0 = share0, sum1 = share1; /* once a row */
        }
        weigh();
        if (MEETS && RUNNING) share0 *= unweighted(slot), share1 *= unweighted(slot);
        if (MEETS) scale(share0, share1);
    }
    /* all weights of the block */
    __device__ __forceinline__ void weigh()
    {
        if constexpr (PAIRS) {
#pragma unroll
            for (int i = 0; i < BN / 8; i++) exponentials(i);
            if (p.dropout.dropped) drop();
#pragma unroll
            for (int i = 0; i < BN / 8; i++) pack(i);
        } else {
#pragma unroll
            for (int i = 0; i < BN / 8; i++) {
                exponentials(i);
                pack(i);
            }
        }
    }
    /* Results are times this, and what they begin with over it: weights are not multiplied one by one. */
    __device__ __forceinline__ float weight(int slot) const
    {
        if (EIGHT) return (float)p.a.gscale * tile(slot).value;
        return (float)(PAIRS ? p.a.gscale * p.a.keep_scale : p.a.gscale);
    }
    __device__ __forceinline__ float unweighted(int slot) const
    {
        return EIGHT ? 1 / tile(slot).value : (float)(1 / p.a.keep_scale);
    }
    /* new references; shrink0 and shrink1 turn what was summed up with the old ones into what it is with these */
    __device__ __forceinline__ void raise(float most0, float most1, float &shrink0, float &shrink1)
    {
        shrink0 *= attn_ex2(top0 - most0), shrink1 *= attn_ex2(top1 - most1);
        top0 = most0, top1 = most1;
    }
    __device__ __forceinline__ void scale(float weight0, float weight1) /* results so far */
    {
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            o[4 * i] *= weight0, o[4 * i + 1] *= weight0;
            o[4 * i + 2] *= weight1, o[4 * i + 3] *= weight1;
        }
    }

    /* ---- results ---- */

    /* Does any result hold NaN or infinity? A masked pair is a product with zero, and zero times NaN is NaN. ADDED: a
     * hidden pair may have the weight NaN itself, and where dropout drops it only the sum shows that. */
    __device__ __forceinline__ void look_for_spoilt()
    {
        if (!p.masks) return;
        float probe = 0;
#pragma unroll
        for (int i = 0; i < D / 2; i++) probe += o[i] * 0;
        if (ADDED) probe += (sum0 + sum1) * 0;
        if (probe != 0) *p.spoilt = p.call; /* NaN is not 0 either */
    }
    __device__ __forceinline__ uint32_t pair(float low, float high) const
    {
        if constexpr (!EIGHT) return hopper_pack<T>(low, high);
        return p.eight.half ? hopper_pack<f16>(low, high) : hopper_pack<bf16>(low, high);
    }
    __device__ __forceinline__ void store(int slot, float weight0, float weight1)
    {
        const uint32_t to = queries(slot);
        const int row = warp * 16 + lane % 16;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const float *x = o + 8 * k;
            hopper_put<false>(to + (k >> 2) * M::GROUPS * M::PANEL + row * 128 +
                                  (((k & 3) * 2 + (lane >> 4)) ^ (row & 7)) * 16,
                              pair(x[0] * weight0, x[1] * weight0), pair(x[2] * weight1, x[3] * weight1),
                              pair(x[4] * weight0, x[5] * weight0), pair(x[6] * weight1, x[7] * weight1));
        }
        hopper_shared_fence();
        meet();
        if (thread != 0) return;
        const volatile hopper_forward_tile &f = tile(slot);
        const int rows = f.rows, row0 = HOPPER_WRAP - rows + f.t.first - f.t.q0 + w * 64, head = f.t.h,
                  z = f.t.b * p.out_step + f.query + rows * f.t.r;
        const CUtensorMap *map = &p.map[f.map].out;
#pragma unroll
        for (int c = 0; c < M::PANELS; c++) hopper_store(map, to + c * M::GROUPS * M::PANEL, 64 * c, row0, z, head);
        hopper_bulk_commit();
    }
    /* natural lse of a row whose base-2 reference and sum are known */
    static __device__ __forceinline__ float lse_of(float top, float sum)
    {
        return sum == 0 ? -INFINITY : (top + hopper_log2(sum)) * (float)ATTN_LN2;
    }
    /* `old`: base-2 lse of earlier branches, where branches are summed up */
    __device__ __forceinline__ void put_lse(int64_t at, int g, float mine, float old)
    {
        if (p.a.branch_lse) ((float *)p.a.branch_lse)[g * p.a.branch_stride + at] = mine;
        if (MEETS && old != -INFINITY) {
            old *= (float)ATTN_LN2;
            const float high = fmaxf(old, mine), low = fminf(old, mine);
            mine = high == -INFINITY ? high : high + log1pf(expf(low - high));
        }
        ((float *)p.a.lse)[at] = mine;
    }
    __device__ __forceinline__ void finish_alone(int slot, float total0, float total1)
    {
        if (lane % 4 == 0) {
            const volatile hopper_forward_tile &f = tile(slot);
            const int i = f.t.first + w * 64 + warp * 16 + lane / 4, end = f.t.end, step = f.step;
            const int64_t at = f.at + (int64_t)i * step;
            if (i < end) put_lse(at, f.g, lse_of(top0, total0), -INFINITY);
            if (i + 8 < end) put_lse(at + 8 * (int64_t)step, f.g, lse_of(top1, total1), -INFINITY);
        }
        const float all = weight(slot);
        const float weight0 = total0 == 0 ? 0 : all / total0, weight1 = total1 == 0 ? 0 : all / total1;
        if constexpr (M::WIDE) return hopper_put_wide(*this, slot, weight0, weight1, 0);
        meet(); /* all warps are past their last use of the queries */
        if (BLOCKS && cut(slot)) put_rows(slot, weight0, weight1, 0);
        else store(slot, weight0, weight1);
    }
    /* BLOCKS: do rows of the next block follow among this warpgroup's 64? They are another tile's. */
    __device__ __forceinline__ bool cut(int slot) const
    {
        const volatile attn_tile &t = tile(slot).t;
        return t.end < t.first + 64 * (w + 1) && t.end < t.q1;
    }
    /* the thread's rows one by one; after: those that later branches reach, a bit a row */
    __device__ __forceinline__ void put_rows(int slot, float weight0, float weight1, uint32_t after)
    {
        const volatile hopper_forward_tile &f = tile(slot);
        const int i = f.t.first + w * 64 + warp * 16 + lane / 4, end = f.t.end, step = f.step;
        const int64_t at = f.at + (int64_t)i * step;
        if (i < end) put_row(at, 0, weight0, !(after & 1));
        if (i + 8 < end) put_row(at + 8 * (int64_t)step, 2, weight1, !(after >> 8 & 1));
    }

    /* ---- branches that meet ---- */

    /* base-2 lse that earlier branches left in the thread's rows */
    __device__ __forceinline__ void before(int slot, float &old0, float &old1)
    {
        const float *x = (const float *)__cvta_shared_to_generic(memory + M::BEFORE + 256 * (M::GROUPS * slot + w));
        old0 = x[warp * 16 + lane / 4], old1 = x[warp * 16 + lane / 4 + 8];
    }
    /* What earlier branches made of the thread's row ROW of two, if they did, becomes every other pair of x; or, EACH
     * 2, every pair. */
    template <int ROW, int EACH> __device__ __forceinline__ void fetch(int slot, float *x, float old)
    {
        const volatile hopper_forward_tile &f = tile(slot);
        const int i = f.t.first + w * 64 + warp * 16 + lane / 4 + 8 * ROW;
        const float *from = (const float *)p.a.acc + (f.at + (int64_t)i * f.step) * p.a.head_dim + lane % 4 * 2;
#pragma unroll
        for (int e = 0; e < D / 8; e++)
            hopper_fetch(x[EACH * e], x[EACH * e + 1], from + 8 * e, old != -INFINITY && 8 * e < p.a.head_dim);
    }
    /* A tile begins where earlier branches stopped: their lse is a reference whose sum is 1, their results are sums.
     * They come from the cache while the first block's maxima and exponentials are worked out. */
    __device__ __forceinline__ void carry(int slot, float &old0, float &old1)
    {
        hopper_wait(memory + M::CARRIED + 8 * slot, tiles >> 1 & 1);
        old0 = old1 = -INFINITY;
        if (p.a.sum) return;
        before(slot, old0, old1);
        fetch<0, 4>(slot, o, old0);
        fetch<1, 4>(slot, o + 2, old1);
    }
    __device__ __forceinline__ void put_row(int64_t row, int first, float weight, bool last)
    {
        float *acc = (float *)p.a.acc + row * p.a.head_dim + lane % 4 * 2;
        uint16_t *out = (uint16_t *)p.a.out + row * p.a.head_dim + lane % 4 * 2;
#pragma unroll
        for (int e = 0; e < D / 8; e++) {
            if (8 * e >= p.a.head_dim) break;
            const float2 v = {o[4 * e + first] * weight, o[4 * e + first + 1] * weight};
            if (last) *(uint32_t *)(out + 8 * e) = pair(v.x, v.y);
            else *(float2 *)(acc + 8 * e) = v;
        }
    }
    template <int ROW> __device__ __forceinline__ void add(int slot, float weight, float old)
    {
        if constexpr (M::WIDE) hopper_add_wide<ROW>(*this, slot, weight, old);
        else {
            float x[D / 4];
#pragma unroll
            for (int e = 0; e < D / 4; e++) x[e] = 0;
            fetch<ROW, 2>(slot, x, old);
#pragma unroll
            for (int e = 0; e < D / 8; e++) {
                o[4 * e + 2 * ROW] = fmaf(o[4 * e + 2 * ROW], weight, x[2 * e]);
                o[4 * e + 2 * ROW + 1] = fmaf(o[4 * e + 2 * ROW + 1], weight, x[2 * e + 1]);
            }
        }
    }
    __device__ __forceinline__ void finish_together(int slot, float total0, float total1)
    {
        const float all = weight(slot);
        float weight0 = total0 == 0 ? 0 : all / total0, weight1 = total1 == 0 ? 0 : all / total1;
        float old0 = -INFINITY, old1 = -INFINITY;
        if (p.a.sum) { /* branches have a softmax each, and their results are added up */
            before(slot, old0, old1);
            add<0>(slot, weight0, old0);
            add<1>(slot, weight1, old1);
            weight0 = weight1 = 1;
        }
        const volatile hopper_forward_tile &f = tile(slot);
        const int i = f.t.first + w * 64 + warp * 16 + lane / 4, end = f.t.end, step = f.step;
        const int64_t at = f.at + (int64_t)i * step;
        if (lane % 4 == 0) {
            if (i < end) put_lse(at, f.g, lse_of(top0, total0), old0);
            if (i + 8 < end) put_lse(at + 8 * (int64_t)step, f.g, lse_of(top1, total1), old1);
        }
        if constexpr (M::WIDE)
            hopper_put_wide(*this, slot, weight0, weight1, f.after[2 * w + warp / 2] >> (warp % 2 * 16 + lane / 4));
        else if (f.after[2 * w] | f.after[2 * w + 1] || (BLOCKS && cut(slot)))
            put_rows(slot, weight0, weight1, f.after[2 * w + warp / 2] >> (warp % 2 * 16 + lane / 4));
        else {
            meet();
            store(slot, weight0, weight1);
        }
    }
    __device__ __forceinline__ void say_done(int slot) /* every warp, of every tile */
    {
        __syncwarp();
        if (MEETS && lane == 0) hopper_arrive(memory + M::DONE + 8 * slot);
    }
    __device__ __forceinline__ void finish(int slot)
    {
        const float total0 = quad_sum(sum0), total1 = quad_sum(sum1);
        look_for_spoilt();
        if constexpr (MEETS) finish_together(slot, total0, total1);
        else finish_alone(slot, total0, total1);
        say_done(slot);
        stored = true;
        clear();
    }
    __device__ __forceinline__ void begin_alone(int slot) /* with what earlier branches left */
    {
        top0 = top1 = sum0 = sum1 = 0;
        if (MEETS) {
            carry(slot, top0, top1);
            if (lane % 4 == 0) sum0 = top0 != -INFINITY, sum1 = top1 != -INFINITY;
            if (RUNNING && !p.a.sum) scale(unweighted(slot), unweighted(slot));
        }
    }
    __device__ __forceinline__ void no_keys(int slot) /* for any of the rows */
    {
        begin_alone(slot);
        finish(slot);
    }
    /* the product and the results that are due, where no next tile hides them */
    __device__ __forceinline__ void flush(int slot)
    {
        wait_values(due);
        queue_values(due);
        settle_values(due);
        finish(slot);
        held = false;
    }

    /* ---- a tile ---- */

    /* two whole paths: a branch between two products makes the compiler wait for the first one */
    __device__ __forceinline__ void first_block(int slot)
    {
        wait_keys(block);
        take_turn();
        if (!M::WIDE && held) {
            queue_scores(slot, ADDED && p.a.mask);
            wait_values(due);
            queue_values(due);
            pass_turn();
            hopper_product_wait<0>();
            hopper_pin(s);
            have_values();
            free_keys(block);
            free_values(due);
            finish(slot ^ 1);
        } else {
            queue_scores(slot, ADDED && p.a.mask);
            pass_turn();
            hopper_product_wait<0>();
            hopper_pin(s);
            free_keys(block);
        }
        block++;
    }
    /* MASKED: may there be masked pairs in the block? `step`: its first key, or with BLOCKS the step; `then`: BLOCKS,
     * becomes the next; `fresh`: rows may have seen nothing yet; `half`: all pairs with the second half of the keys are
     * masked, whose exponentials are zero and not worked out; `some`: are any masked? Their products are not saved: a
     * choice between two widths makes the compiler run products one after the other. Blocks without masked pairs have
     * code of their own, because every branch in the softmax costs them 2%. */
    template <bool MASKED>
    __device__ __forceinline__ void later_block(int slot, bool fresh, const int4 step, bool half, bool some = true,
                                                int4 *then = NULL)
    {
        if (M::TEAMED) half = false; /* beyond() has seen to it */
        const int key = step.x;
        if (PAIRS && p.dropout.dropped) choose(slot, key);
        if (PADDED && MASKED) look(slot, key);
        if (ADDED && p.a.mask) hopper_mask<true>(p.a, s, lines(slot, key));
        wait_keys(block);
        take_turn();
        queue_scores(slot, ADDED && p.a.mask);
        wait_values(block - 1);
        queue_values(block - 1);
        pass_turn();
        if (BLOCKS) *then = step_after(block); /* beside the products */
        hopper_product_wait<1>();
        hopper_pin(s);
        float shrink0 = 1, shrink1 = 1;
        if constexpr (ADDED)
            if (p.a.bias) hopper_bias<T, true, BIASES>(p.a, s, lines(slot, key));
        if (PAIRS && p.a.slopes) lean(slot, key);
        if (PADDED && MASKED && shown != ~0u) hide();
        if (MASKED && some) mask(slot, again(step));
        if (EIGHT) free_keys(block);
        if (RUNNING || (MASKED && fresh)) {
            float most0, most1;
            maxima(most0, most1);
            if (EIGHT) {
                raise(fmaxf(most0, top0), fmaxf(most1, top1), shrink0, shrink1);
            } else if (PAIRS) { /* slopes: near keys weigh more, often by far */
                raise(most0 > top0 + RISE ? most0 : top0, most1 > top1 + RISE ? most1 : top1, shrink0, shrink1);
            } else {
                top0 = top0 <= NOTHING ? most0 : top0;
                top1 = top1 <= NOTHING ? most1 : top1;
            }
        }
        if (MASKED && half) {
#pragma unroll
            for (int i = BN / 4; i < BN / 2; i++) s[i] = 0;
        }
        const float kept0 = sum0, kept1 = sum1;
        if (RUNNING) sum0 *= shrink0, sum1 *= shrink1;
        else sum0 = sum1 = 0;
#pragma unroll
        for (int i = 0; i < BN / 16; i++) exponentials(i);
        if (!MASKED || !half) {
#pragma unroll
            for (int i = BN / 16; i < LATE; i++) exponentials(i);
        }
        hopper_hold(sum0 + sum1);
        settle_values(block - 1);
        if (!PAIRS) {
#pragma unroll
            for (int i = 0; i < LATE; i++) pack(i);
        }
        if (!MASKED || !half) {
#pragma unroll
            for (int i = LATE; i < BN / 8; i++) exponentials(i);
        }
        if (!PAIRS) {
#pragma unroll
            for (int i = LATE; i < BN / 8; i++) pack(i);
        }
        if constexpr (PAIRS) {
            if (p.dropout.dropped) drop();
#pragma unroll
            for (int i = 0; i < BN / 8; i++) pack(i);
            if (__any_sync(~0u, shrink0 != 1 || shrink1 != 1)) scale(shrink0, shrink1);
        } else if constexpr (EIGHT) {
            late0 = shrink0, late1 = shrink1;
        } else if (__any_sync(~0u, !(sum0 < most() && sum1 < most()))) {
            multiply_again(slot);
            if (PADDED && MASKED && shown != ~0u) hide();
            if (MASKED) mask(slot, again(step));
            float most0, most1;
            maxima(most0, most1);
            raise(fmaxf(most0, top0), fmaxf(most1, top1), shrink0, shrink1);
            sum0 = sum1 = 0;
            weigh();
            scale(shrink0, shrink1);
            __syncwarp(); /* all lanes have read the keys before lane 0 frees them */
        }
        if (!EIGHT) free_keys(block);
        if (!RUNNING) sum0 = fmaf(kept0, shrink0, sum0), sum1 = fmaf(kept1, shrink1, sum1);
    }
    __device__ __forceinline__ void run()
    {
        if constexpr (BLOCKS) run_steps();
        else if constexpr (M::WIDE) hopper_run_wide(*this);
        else run_blocks();
    }
    __device__ __forceinline__ void run_blocks()
    {
        if (w == 0) hopper_meet(TURN, 256); /* warpgroup 0 has the first turn */
        for (;; tiles++) {
            const int slot = tiles & 1;
            hopper_wait(memory + M::Q_FULL + 8 * slot, tiles >> 1 & 1);
            const uint32_t record = memory + M::TILE + HOPPER_TILE * slot;
            const int4 all = same(hopper_four(record)), part = same(hopper_four(record + 16 + 16 * w));
            if (all.x == HOPPER_STOP) break;
            const int low = all.y, blocks = all.z, lead = part.x, stop = (part.y + 1) / 2, plain = part.z,
                      full = part.w;
            if (held && (lead > 0 || stop == lead)) flush(slot ^ 1);
            for (int i = 0; i < lead; i++) skip();
            if (stop > lead) {
                const uint32_t start = block - lead;
                float old0, old1;
                if (PAIRS && p.dropout.dropped) choose(slot, low + lead * BN);
                if (PADDED) look(slot, low + lead * BN);
                if (ADDED && p.a.mask) hopper_mask<true>(p.a, s, lines(slot, low + lead * BN));
                first_block(slot);
                if (EIGHT) unit = tile(slot).score;
                if (MEETS) carry(slot, old0, old1);
                if constexpr (ADDED)
                    if (p.a.bias) hopper_bias<T, true, BIASES>(p.a, s, lines(slot, low + lead * BN));
                if (PAIRS && p.a.slopes) lean(slot, low + lead * BN);
                if (PADDED && shown != ~0u) hide();
                if (lead < plain || lead >= full) mask(slot, {low + lead * BN, 0, 0, 0});
                first_softmax(slot, old0, old1);
                /* the store of the last tile's results has read its memory by the end of the next block */
                if (stop - lead == 1) {
                    if (MEETS) meet();
                    free_stored();
                }
                const uint32_t ending = start + stop, from = start + plain, until = start + full, release = block;
#pragma unroll 1
                while (block < ending) {
                    /* with both options there are registers for one of the two */
                    const bool holes = PADDED && tile(slot).holes, first = block == release;
                    if (!(PADDED && PAIRS) && block > from && block < until && !holes) {
                        /* a loop of their own, because each branch costs a block 1% */
                        const uint32_t last = first ? block + 1 : min(ending, until);
#pragma unroll 1
                        do {
                            later_block<false>(slot, false, {PAIRS ? low + (int)(block - start) * BN : 0, 0, 0, 0},
                                               false);
                            block++;
                        } while (!RUNNING && block < last);
                    } else {
                        later_block<true>(slot, block <= from || (holes && unseen()),
                                          {low + (int)(block - start) * BN, 0, 0, 0}, block + 1 == ending && part.y & 1,
                                          !PADDED || block <= from || block >= until);
                        block++;
                    }
                    if (first) free_stored();
                }
                held = true, due = block - 1;
            } else {
                free_stored();
                if (w < all.w) no_keys(slot);
                else say_done(slot);
            }
            /* the last product waits for the next tile only if the values that are skipped meanwhile find room */
            if (held && blocks - stop >= M::STAGES) flush(slot);
            for (int i = stop; i < blocks; i++) skip();
            if (stop == lead) {
                meet();
                free_slot(slot);
                stored = false;
            }
        }
        if (held) flush((tiles - 1) & 1);
        if (thread == 0) hopper_bulk_done();
    }

    /* ---- a tile of active blocks ---- */

    /* the step after that of block c, which has come; all lanes know its kinds */
    __device__ __forceinline__ int4 step_after(uint32_t c) const
    {
        int4 step = hopper_four(memory + M::STEPS + c % (2 * M::STAGES) * (int)sizeof(hopper_step));
        step.z = __shfl_sync(~0u, step.z, 0);
        return step;
    }
    __device__ __forceinline__ bool is(const int4 &step, int kind) const { return step.z >> HOPPER_GROUP * w & kind; }
    /* is there a step, without masked pairs? */
    __device__ __forceinline__ bool plain(const int4 &step) const
    {
        const int kinds = HOPPER_SOME | (HOPPER_MASKED | HOPPER_HALF) << HOPPER_GROUP * w;
        return (step.z & kinds) == HOPPER_SOME;
    }
    /* the step of the current block, not the first: read once more, where its numbers have no registers */
    __device__ __forceinline__ int4 again(const int4 &step) const
    {
        if constexpr (!BLOCKS || M::PIECES == 2) return step;
        return hopper_four(memory + M::STEPS + (block - 1) % (2 * M::STAGES) * (int)sizeof(hopper_step));
    }
    /* is the only piece of a step hidden from all rows? Then so are those after it. */
    __device__ __forceinline__ bool beyond(const int4 &step) const { return M::PIECES == 1 && is(step, HOPPER_HALF); }
    __device__ __forceinline__ void run_steps()
    {
        if (M::GROUPS > 1 && w == 0) hopper_meet(TURN + group(), 256);
        for (;; tiles++) {
            const int slot = tiles & 1;
            hopper_wait(memory + M::Q_FULL + 8 * slot, tiles >> 1 & 1);
            const uint32_t record = memory + M::TILE + HOPPER_TILE * slot;
            const int4 all = same(hopper_four(record));
            int4 step = same(hopper_four(record + 16));
            if (all.x == HOPPER_STOP) break;
            const bool sees = w < all.w && step.z && !beyond(step);
            if (held && !sees) flush(slot ^ 1);
            if (sees) {
                const uint32_t release = block + 1;
                float old0, old1;
                bool fresh = is(step, HOPPER_MASKED); /* may rows have seen nothing yet? */
                first_block(slot);
                if (MEETS) carry(slot, old0, old1);
                if (fresh) mask(slot, M::PIECES == 1 ? hopper_four(record + 16) : step);
                first_softmax(slot, old0, old1);
                step = step_after(block - 1);
                if (!step.z || beyond(step)) {
                    if (MEETS) meet();
                    free_stored();
                }
#pragma unroll 1
                while (step.z && !beyond(step)) {
                    const bool masked = is(step, HOPPER_MASKED), first = block == release;
                    int4 then;
                    if (!masked && !fresh) {
#pragma unroll 1
                        do {
                            later_block<false>(slot, false, step, false, false, &then);
                            step = then;
                            block++;
                        } while (M::PIECES == 1 && !first && plain(step));
                    } else {
                        later_block<true>(slot, fresh, step, is(step, HOPPER_HALF), true, &then);
                        fresh = fresh && masked;
                        step = then;
                        block++;
                    }
                    if (first) free_stored();
                }
                held = true, due = block - 1;
#pragma unroll 1
                for (int i = 1; M::PIECES == 1 && step.z; i++) {
                    if (held && i == M::STAGES) flush(slot); /* values that are skipped need room */
                    skip();
                    step = step_after(block - 1);
                }
                continue;
            }
            free_stored();
            if (w < all.w) no_keys(slot);
            else say_done(slot);
            while (step.z) {
                skip();
                step = step_after(block - 1);
            }
            meet();
            free_slot(slot);
            stored = false;
        }
        if (held) flush((tiles - 1) & 1);
        if (thread == 0) hopper_bulk_done();
    }
};

#endif
