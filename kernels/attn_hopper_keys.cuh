/* attn_hopper_keys.cuh: the backward of attention on Hopper, head dimensions 64 and 128, to which the bulk copies pad
 * others with zeros: dk, dv, and what every tile of keys adds to dq. One launch for all branches.
 *
 * A thread block owns a tile of keys, one warpgroup 64 of them, and walks over blocks of 64 query rows. Scores come out
 * transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T are, in the registers where they are made, the left
 * operands of dV += P^T dO and dK += dS^T Q. Only dS passes through shared memory, for dQ = dS K, which needs the keys
 * of all warpgroups.
 *   - dQ is one product of 64 rows. D = 64: the warpgroups take it in turn; D = 128: each takes 64 columns. It is done
 *     one block late, and dS has a buffer per stage, so that no barrier holds the warpgroups in step: they drift apart,
 *     and the exponentials of one run under the products of the others.
 *   - S of the next block is queued behind dV and dK of this one; nothing waits for those earlier.
 *   - Registers decide everything: dk, dv, S and dP are all there is room for. P^T and dS^T are packed into what dP
 *     leaves, dQ uses the registers of S. A branch between two products makes the compiler wait for the first one.
 *   - Rows are read by clipping tensor maps where they lie, whatever the dilation (hopper.cuh).
 * One warp loads; the warps beside it (carriers) take the sums of dq from the warpgroups through shared memory, wait
 * for the block's turn, have them added in bulk and pass the turn on (attn_hopper_backward.cuh), so that neither the
 * order nor the additions cost the warpgroups anything. For D = 128 that takes the room of a second stage of v: the
 * next tile's v is asked for when the last product with this one's is done.
 * Active blocks: only these are walked over, and sums of dq are whole numbers, without turns
 * (attn_hopper_block_keys.cu).
 *
 * Rejected: 128 query rows a block (its dq needs twice the registers), converting sums of dq to their type where they
 * are finished (slower: few threads, bound by latency), starting tiles at different blocks (less reuse in the cache).
 */
#ifndef LAC_CUDA_ATTN_HOPPER_KEYS_CUH
#define LAC_CUDA_ATTN_HOPPER_KEYS_CUH
#include "attn_hopper_feed.cuh"
#include "attn_sums.cuh"
#include "launch.cuh"

/* ---- the warpgroups ---- */

/* 64 keys of one warpgroup, everything it holds in registers. MASKS: causal or a window. OPTIONS: there may be
 * dropout, slopes, padding, a mask and a bias (attn_hopper_pairs.cuh). */
template <class T, int D, bool MASKS, int OPTIONS> struct hopper_group {
    typedef hopper_shape<D, (OPTIONS & HOPPER_BLOCKS) != 0> M;
    static constexpr bool PAIRS = OPTIONS & HOPPER_PAIRS, PADDED = OPTIONS & HOPPER_PADDED,
                          ADDED = OPTIONS & HOPPER_ADDED;
    const hopper_keys_args &p;
    const uint32_t memory;
    const int w, thread, lane, warp;
    float s[32], d[32], dk[D / 2], dv[D / 2];
    uint32_t probability[16], ds[16]; /* P^T and dS^T as left operands */
    int ts = 0, tp = 0, qs = 0, qp = 0;
    int after, before; /* MASKS: of the tile's branch, lattice rows that a row may see */
    uint32_t kept;     /* PAIRS: does dropout keep the pair of this register of s? */
    int padded;        /* PADDED: are the thread's keys padding? a bit each */
    float fixed[2];    /* active blocks: scales of the thread's rows of dq in the block before */
    bool first, held;  /* no block before in this tile; q and dout of the block before are still being read */

    __device__ __forceinline__ hopper_group(const hopper_keys_args &args, uint32_t at)
        : p(args), memory(at), w(__shfl_sync(~0u, (int)threadIdx.x / 128 - 1, 0)), thread(threadIdx.x % 128),
          lane(threadIdx.x % 32), warp(threadIdx.x % 128 / 32)
    {
    }
    __device__ __forceinline__ int previous() const { return qs == 0 ? M::STAGES - 1 : qs - 1; }
    __device__ __forceinline__ void advance()
    {
        if (++qs == M::STAGES) qs = 0, qp ^= 1;
        first = false;
    }
    __device__ __forceinline__ void arrive(uint32_t barrier) const
    {
        if (lane == 0) hopper_arrive(memory + barrier);
    }

    /* x = rows of k or v times rows of q or dout */
    __device__ __forceinline__ void scores(float (&x)[32], uint32_t keys, uint32_t rows)
    {
        const uint32_t a = hopper_operand(keys + w * M::PANEL, 16), b = hopper_operand(rows, 16);
        hopper_product_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            hopper_product<T, 0>(x, hopper_descriptor(a, (i / 4) * M::GROUPS * M::PANEL + i % 4 * 32),
                                 hopper_descriptor(b, (i / 4) * M::PANEL + i % 4 * 32), i > 0);
        hopper_product_commit();
    }
    /* x += left operand (64 keys x 64 rows) times rows of q or dout */
    __device__ __forceinline__ void weighted(float (&x)[D / 2], const uint32_t (&left)[16], uint32_t rows)
    {
        const uint32_t b = hopper_operand(rows, M::PANEL);
        hopper_product_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) hopper_product_from<T>(x, left + 4 * i, hopper_descriptor(b, i * 2048));
        hopper_product_commit();
    }
    /* s = dS times k, over all the tile's keys */
    __device__ __forceinline__ void query_sums(int stage)
    {
        const uint32_t a = hopper_operand(memory + M::S + stage * M::DS, 16);
        const uint32_t b = hopper_operand(memory + M::K + ts * M::TILE + (D == 64 ? 0 : w * M::GROUPS * M::PANEL), 16);
        hopper_product_fence();
#pragma unroll
        for (int g = 0; g < M::GROUPS; g++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                hopper_product<T, 1>(s, hopper_descriptor(a, g * M::PANEL + i * 32),
                                     hopper_descriptor(b, g * M::PANEL + i * 2048), g + i > 0);
        hopper_product_commit();
    }

    /* this warpgroup's panel of dS: 64 rows of queries, 64 keys wide; ZERO: nothing to add */
    template <bool ZERO> __device__ __forceinline__ void put_ds()
    {
        const uint32_t to = memory + M::S + qs * M::DS + w * M::PANEL;
        hopper_wait(memory + M::DS_FREE + 8 * qs, qp ^ 1);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int row = k * 16 + lane % 8 + lane / 16 * 8, chunk = (warp * 2 + lane / 8 % 2) ^ row % 8;
            if constexpr (ZERO) hopper_put<true>(to + row * 128 + chunk * 16, 0, 0, 0, 0);
            else hopper_put<true>(to + row * 128 + chunk * 16, ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3]);
        }
        hopper_shared_fence();
        __syncwarp();
        arrive(M::DS_FULL + 8 * qs);
    }

    /* active blocks: the scales of this block's rows, for when its dq is done */
    __device__ __forceinline__ void read_scales(float (&x)[2]) const
    {
        const uint32_t from = memory + M::STATS + qs * M::STAT + 512 + (warp * 16 + lane / 4) * 4;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x[0]) : "r"(from));
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x[1]) : "r"(from + 32));
    }
    /* s in fixed point; what does not fit (NaN among it) marks the block, whose number is in `step` */
    __device__ __forceinline__ void fix(int step)
    {
        bool fits = true;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const float x = s[i] * fixed[i / 2 % 2];
            fits = fits && fabsf(x) < HOPPER_WHOLE;
            s[i] = __int_as_float(__float2int_rn(x));
        }
        if (!fits) p.turn[hopper_four(memory + M::STEP + 16 * step).y] = HOPPER_SPOILT;
    }

    /* dq of the block before, if it is this warpgroup's to do */
    __device__ __forceinline__ void add_dq()
    {
        const int stage = previous(), parity = qs == 0 ? qp ^ 1 : qp;
        if (D == 64 && (M::STAGES == M::GROUPS ? stage : stage % M::GROUPS) != w) return;
        hopper_wait(memory + M::DS_FULL + 8 * stage, parity);
        hopper_pin(s);
        query_sums(stage);
        hopper_product_wait<0>();
        hopper_pin(s);
        if constexpr (M::BLOCKS) fix(stage + M::STAGES * parity);
        uint32_t to = memory + thread * 16; /* to the carrier */
        if constexpr (D == 64) {            /* in the stage that has just been read by all four warps */
            to += M::S + stage * M::DS;
            hopper_sync(1 + w, 128);
        } else {
            to += M::DQ + w * (M::SUMS / 2);
            arrive(M::DS_FREE + 8 * stage);
            hopper_wait(memory + M::DQ_FREE, stage ^ 1);
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 2048), "f"(s[4 * i]),
                         "f"(s[4 * i + 1]), "f"(s[4 * i + 2]), "f"(s[4 * i + 3])
                         : "memory");
        hopper_shared_fence();
        __syncwarp();
        arrive(M::DQ_FULL + 8 * stage);
    }

    /* a block without visible pairs for this warpgroup: keeps the barriers going */
    __device__ __forceinline__ void pass_block()
    {
        hopper_wait(memory + M::Q_FULL + 8 * qs, qp);
        hopper_wait(memory + M::G_FULL + 8 * qs, qp);
        float kept_scales[2];
        if constexpr (M::BLOCKS) read_scales(kept_scales);
        __syncwarp();
        arrive(M::BLOCK_FREE + 8 * qs);
        put_ds<true>(); /* dq always sums over all the panels */
        if (!first) add_dq();
        if constexpr (M::BLOCKS) fixed[0] = kept_scales[0], fixed[1] = kept_scales[1];
        advance();
    }

    /* masked scores; from: first key minus first query of this warpgroup and block, left: keys before the end */
    __device__ __forceinline__ void mask(int from, int left)
    {
        const int key = warp * 16 + lane / 4, ahead = from + key - 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int more = e / 2 * 8, further = ahead + more - 8 * i - e % 2;
                if (key + more >= left || (MASKS && (further > after || further < -before)) ||
                    (PADDED && padded >> e / 2 & 1))
                    s[4 * i + e] = p.masked;
            }
    }

    /* Slopes: scores lose by the distance of key and row. from: see block() */
    __device__ __forceinline__ void lean(int from, int dilation, int head)
    {
        const float slope = hopper_slope(p.a, head, dilation);
        const float ahead = (float)(from + warp * 16 + lane / 4 - 2 * (lane % 4));
#pragma unroll
        for (int i = 0; i < 32; i++)
            s[i] = fmaf(-slope, fabsf(ahead + (float)(i % 4 / 2 * 8 - i / 4 * 8 - i % 2)), s[i]);
    }
    /* Dropout of the block whose first row is number m of the lattice's query rows. */
    __device__ __forceinline__ void choose(const volatile hopper_tile &t, int dilation, int m, int head)
    {
        const int row = t.row0 + (m + 2 * (lane % 4)) * dilation;
        const int key = t.key0 + ((t.first + w) * 64 + warp * 16 + lane / 4) * dilation;
        const uint64_t at =
            p.a.draw +
            (((uint64_t)t.batch * (uint64_t)p.a.heads + (uint64_t)head) * (uint64_t)p.a.n + (uint64_t)row) *
                (uint64_t)p.a.m +
            (uint64_t)key;
        kept = hopper_kept_rows(p.dropout, at, p.a.m, dilation);
    }
    /* ADDED: mask and bias of the block whose first row is number m of the lattice's query rows, by way of the
     * registers that dP will be in, while scores are worked out */
    __device__ __forceinline__ void add(const volatile hopper_tile &t, int dilation, int m, int head)
    {
        const int row = m + lane % 4 * 2, n = t.row0 + row * dilation;
        hopper_lines at;
#pragma unroll
        for (int y = 0; y < 2; y++) {
            const int key = t.key0 + min((t.first + w) * 64 + warp * 16 + lane / 4 + 8 * y, t.live - 1) * dilation;
            at.mask[y] = attn_pair_at(p.a.mask_stride, t.batch, head, n, key);
            at.bias[y] = attn_pair_at(p.a.bias_stride, t.batch, head, n, key);
        }
        at.mask_step = dilation * p.a.mask_stride[2], at.bias_step = dilation * p.a.bias_stride[2];
        at.left = t.rows - row;
        if (p.a.mask) hopper_mask<false>(p.a, d, at);
        else {
#pragma unroll
            for (int i = 0; i < 32; i++) d[i] = 0;
        }
        if (p.a.bias) hopper_bias<T, false, 4>(p.a, d, at);
        hopper_pin(d);
        hopper_product_wait<0>();
        hopper_pin(s);
#pragma unroll
        for (int i = 0; i < 32; i++) s[i] += d[i];
    }
    /* P and dS of a block from S and dP */
    __device__ __forceinline__ void probabilities(uint32_t stats)
    {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float2 lse = hopper_pair(stats + i * 32);
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[4 * i + e] = attn_ex2(fmaf(s[4 * i + e], p.log2_scale, e % 2 ? -lse.y : -lse.x));
        }
    }
    __device__ __forceinline__ void differences(uint32_t stats)
    {
        const float weight = p.weight;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float2 delta = hopper_pair(stats + 256 + i * 32);
            const float *x = s + 4 * i, *y = d + 4 * i;
            if (PAIRS && p.dropout.dropped) {
                lossy(i, weight, delta);
                continue;
            }
            probability[2 * i] = hopper_pack<T>(x[0], x[1]); /* here, not earlier: the registers are all taken */
            probability[2 * i + 1] = hopper_pack<T>(x[2], x[3]);
            ds[2 * i] = hopper_pack<T>(x[0] * fmaf(y[0], weight, -delta.x), x[1] * fmaf(y[1], weight, -delta.y));
            ds[2 * i + 1] = hopper_pack<T>(x[2] * fmaf(y[2], weight, -delta.x), x[3] * fmaf(y[3], weight, -delta.y));
        }
    }

    /* the same of four registers with dropout */
    __device__ __forceinline__ void lossy(int i, float weight, float2 delta)
    {
        float x[4], y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const bool stays = kept >> (4 * i + e) & 1;
            x[e] = stays ? s[4 * i + e] : 0.f, y[e] = stays ? d[4 * i + e] : 0.f;
            y[e] = s[4 * i + e] * fmaf(y[e], weight, e % 2 ? -delta.y : -delta.x);
        }
        probability[2 * i] = hopper_pack<T>(x[0], x[1]), probability[2 * i + 1] = hopper_pack<T>(x[2], x[3]);
        ds[2 * i] = hopper_pack<T>(y[0], y[1]), ds[2 * i + 1] = hopper_pack<T>(y[2], y[3]);
    }

    __device__ __forceinline__ void settle()
    {
        hopper_pin(dv);
        hopper_pin(dk);
        hopper_pin(probability);
        hopper_pin(ds);
        if (held) arrive(M::BLOCK_FREE + 8 * previous());
    }
    __device__ __forceinline__ void add_dv()
    {
        hopper_pin(dv);
        hopper_pin(probability);
        weighted(dv, probability, memory + M::G + qs * M::BLOCK);
    }
    /* one block; from, left: see mask(); last: nothing of the tile multiplies v after it */
    __device__ __forceinline__ void block(const volatile hopper_tile &t, int dilation, int from, int left, bool last)
    {
        hopper_wait(memory + M::Q_FULL + 8 * qs, qp);
        hopper_pin(s);
        scores(s, memory + M::K + ts * M::TILE, memory + M::Q + qs * M::BLOCK);
        hopper_product_wait<1>();
        settle();
        held = true;
        int4 step = {};
        if (PAIRS) step = hopper_four(memory + M::STEP + 16 * (qs + M::STAGES * qp));
        if (PAIRS && p.dropout.dropped) choose(t, dilation, 64 * step.x, step.w);
        if constexpr (ADDED) add(t, dilation, 64 * step.x, step.w);
        hopper_wait(memory + M::G_FULL + 8 * qs, qp);
        hopper_pin(d);
        scores(d, memory + M::V + M::value(ts) * M::TILE, memory + M::G + qs * M::BLOCK);
        hopper_product_wait<1>();
        hopper_pin(s);
        if constexpr (PAIRS) from -= 64 * step.x;
        else if constexpr (MASKS) from -= 64 * hopper_four(memory + M::STEP + 16 * (qs + M::STAGES * qp)).x;
        if (PAIRS && p.a.slopes) lean(from, dilation, step.w);
        if (left < 64 || (MASKS && (from + 63 > after || from - 63 < -before)) || (PADDED && padded)) mask(from, left);
        const uint32_t stats = memory + M::STATS + qs * M::STAT + lane % 4 * 8;
        probabilities(stats);
        hopper_product_wait<0>();
        hopper_pin(d);
        if (M::VALUES == 1 && last) arrive(M::V_FREE);
        differences(stats);
        /* with three warpgroups another one waits for dS, with two the tensor cores wait for dV */
        if constexpr (D == 128) add_dv();
        put_ds<false>();
        if constexpr (D == 64) add_dv();
        hopper_pin(dk);
        hopper_pin(ds);
        weighted(dk, ds, memory + M::Q + qs * M::BLOCK);
        if (!first) add_dq();
        if constexpr (M::BLOCKS) read_scales(fixed);
        advance();
    }

    /* x times `by`, staged in this warpgroup's own rows of v, which nobody else reads, and stored through the map */
    __device__ __forceinline__ void store(const float (&x)[D / 2], float by, const CUtensorMap *map, int step,
                                          int dilation, const volatile hopper_tile &t)
    {
        const uint32_t to = memory + (D == 64 ? M::V + ts * M::TILE : M::DQ) + w * M::BLOCK;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const int row = warp * 16 + lane % 16, chunk = (k % 4 * 2 + lane / 16) ^ row % 8;
            const float *y = x + 8 * k;
            hopper_put<false>(to + k / 4 * M::PANEL + row * 128 + chunk * 16, hopper_pack<T>(y[0] * by, y[1] * by),
                              hopper_pack<T>(y[2] * by, y[3] * by), hopper_pack<T>(y[4] * by, y[5] * by),
                              hopper_pack<T>(y[6] * by, y[7] * by));
        }
        hopper_shared_fence();
        hopper_sync(1 + w, 128);
        if (thread != 0) return;
        const int row = HOPPER_WRAP - t.keys + (t.first + w) * 64;
#pragma unroll
        for (int c = 0; c < M::PANELS; c++)
            hopper_store(map, to + c * M::PANEL, 64 * c, row, t.batch * step + t.key0 + t.keys * dilation, t.kv_head);
        hopper_bulk_commit();
        hopper_bulk_read();
    }
    template <class Q> static __device__ __forceinline__ auto &word(Q &x, int e) /* of an array of uint4 */
    {
        uint4 &v = x[e / 4];
        return e % 4 == 0 ? v.x : e % 4 == 1 ? v.y : e % 4 == 2 ? v.z : v.w;
    }
    /* merge_row() for rows that are padded: every sum where its column is, because a thread's may not begin evenly */
    __device__ __forceinline__ void merge_padded(const float (&x)[D / 2], int i, float by, void *out, void *low,
                                                 int64_t at, int others)
    {
        const int64_t from = (at * p.a.head_dim) / 2 + lane % 4;
        const uint32_t eights = ~0u >> (32 - p.a.head_dim / 8); /* a bit for eight columns that rows have */
        uint32_t *const upper = (uint32_t *)out + from;
        uint16_t *const rest = (uint16_t *)low + from;
        uint32_t u[D / 8], r[D / 8];
#pragma unroll
        for (int e = 0; e < D / 8; e++) {
            const bool add = (others & 1 ? eights : 0) >> e & 1;
            u[e] = add ? __ldcg(upper + 4 * e) : 0, r[e] = add ? __ldcg(rest + 4 * e) : 0;
        }
#pragma unroll
        for (int e = 0; e < D / 8; e++) {
            if (!(eights >> e & 1)) break;
            float2 sum = attn_joined_two(u[e], r[e], 0);
            sum.x += x[4 * e + 2 * i] * by, sum.y += x[4 * e + 2 * i + 1] * by;
            const uint32_t a = attn_cut(sum.x), b = attn_cut(sum.y);
            upper[4 * e] = others & 2 ? attn_upper_two(a, b) : hopper_pack<T>(sum.x, sum.y);
            if (others & 2) rest[4 * e] = (uint16_t)attn_low_two(a, b);
        }
    }
    /* One row of x times `by` where branches meet: sums of earlier branches are added, those for later ones stay in
     * 24 bits (attn_sums.cuh), a thread's side by side in the row, whatever their columns. All are read before the
     * first is written: one wait, and a row's last results do not fall on what its other threads have still to read. */
    __device__ __forceinline__ void merge_row(const float (&x)[D / 2], int i, float by, void *out, void *low,
                                              int64_t at, int others)
    {
        if (p.a.head_dim != D) return merge_padded(x, i, by, out, low, at, others);
        uint4 *const upper = (uint4 *)((T *)out + at * D) + lane % 4 * (D / 32);
        uint4 *const rest = (uint4 *)((uint8_t *)low + at * D) + lane % 4 * (D / 64);
        uint4 u[D / 32] = {}, r[D / 64] = {};
        if (others & 1) {
#pragma unroll
            for (int e = 0; e < D / 32; e++) u[e] = __ldcg(upper + e);
#pragma unroll
            for (int e = 0; e < D / 64; e++) r[e] = __ldcg(rest + e);
        }
        float2 sum[D / 8];
#pragma unroll
        for (int e = 0; e < D / 8; e++) {
            sum[e] = attn_joined_two(word(u, e), word(r, e / 2), e % 2);
            sum[e].x += x[4 * e + 2 * i] * by, sum[e].y += x[4 * e + 2 * i + 1] * by;
        }
        if (others & 2) {
#pragma unroll
            for (int e = 0; e < D / 8; e += 2) {
                const uint32_t a = attn_cut(sum[e].x), b = attn_cut(sum[e].y);
                const uint32_t c = attn_cut(sum[e + 1].x), d = attn_cut(sum[e + 1].y);
                word(u, e) = attn_upper_two(a, b), word(u, e + 1) = attn_upper_two(c, d);
                word(r, e / 2) = __byte_perm(attn_low_two(a, b), attn_low_two(c, d), 0x5410);
            }
#pragma unroll
            for (int e = 0; e < D / 32; e++) upper[e] = u[e];
#pragma unroll
            for (int e = 0; e < D / 64; e++) rest[e] = r[e];
            return;
        }
        __syncwarp(0xfu << lane / 4 * 4);
        uint32_t *const to = (uint32_t *)((T *)out + at * D) + lane % 4;
#pragma unroll
        for (int e = 0; e < D / 8; e++) to[4 * e] = hopper_pack<T>(sum[e].x, sum[e].y);
    }
    __device__ __forceinline__ void merge(const volatile hopper_tile &t, const hopper_keys_branch &branch)
    {
        attn_tile mine;
        mine.g = t.branch, mine.h = t.kv_head * p.heads_each;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = (t.first + w) * 64 + warp * 16 + lane / 4 + 8 * i;
            if (row >= t.keys) continue;
            const int64_t position = t.key0 + (int64_t)row * branch.dilation;
            const int64_t at = ((int64_t)t.batch * p.a.m + position) * p.a.kv_heads + t.kv_head;
            const int others = attn_others<true>(p.a, mine, (unsigned)position);
            merge_row(dk, i, p.scale, p.a.out, p.a.acc, at, others);
            merge_row(dv, i, p.weight, p.a.out2, p.a.acc2, at, others);
        }
    }
    /* ranks before have been added by all (they were claimed earlier, so this seldom waits); this tile has */
    __device__ __forceinline__ void meet(const volatile hopper_tile &t, const hopper_keys_branch &branch, bool busy)
    {
        if (busy && branch.awaits >= 0) {
            if (thread == 0) hopper_counted(p.ready + branch.awaits, branch.needs);
            hopper_sync(1 + w, 128);
        }
        if (busy) merge(t, branch);
        __threadfence();
        hopper_sync(1 + w, 128);
        if (thread == 0) atomicAdd(p.ready + branch.rank, 1);
    }
    __device__ __forceinline__ void finish(const volatile hopper_tile &t, const hopper_keys_branch &branch, bool busy)
    {
        if (busy && p.masks) {
            float probe = 0;
#pragma unroll
            for (int i = 0; i < D / 2; i++) probe += dk[i] * 0 + dv[i] * 0;
            if (probe != 0) *p.spoilt = 1;
        }
        hopper_sync(1 + w, 128); /* every warp is past its last product with v, and with k */
        if (branch.meets) meet(t, branch, busy);
        else if (busy) {
            store(dv, p.weight, &branch.dv, p.batch_step[5], branch.dilation, t);
            hopper_sync(1 + w, 128);
            store(dk, p.scale, &branch.dk, p.batch_step[4], branch.dilation, t);
        }
    }

    /* PADDED: which of the thread's two keys are none */
    __device__ __forceinline__ void look(const volatile hopper_tile &t, int dilation)
    {
        padded = 0;
        if (!p.padding || !(p.padding[t.batch].first | p.padding[t.batch].holes)) return;
#pragma unroll
        for (int y = 0; y < 2; y++) {
            const int row = (t.first + w) * 64 + warp * 16 + lane / 4 + 8 * y;
            if (row < t.live && hopper_padded(p.a, t.batch, t.key0 + row * dilation)) padded |= 1 << y;
        }
    }
    /* a loop that is known to run once would cost registers that there are not */
    static __device__ __forceinline__ int once()
    {
        int one = 1;
        asm volatile("" : "+r"(one));
        return one;
    }
    /* the keys of one tile */
    __device__ __forceinline__ void tile(const volatile hopper_tile &t)
    {
        const bool busy = w < __shfl_sync(~0u, t.width, 0);
        const hopper_keys_branch &branch = p.branch[__shfl_sync(~0u, t.branch, 0)];
        if (MASKS) after = branch.after, before = branch.before;
        if (PADDED) look(t, branch.dilation);
        first = true;
        bool last = false; /* did this warpgroup multiply in the last head's last block? */
#pragma unroll
        for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) probability[i] = ds[i] = 0;
        if (busy || M::VALUES == 1) hopper_wait(memory + M::V_FULL + 8 * M::value(ts), M::VALUES == 1 ? ts : tp);
#pragma unroll 1
        for (int heads = M::BLOCKS ? once() : __popc(t.heads); heads > 0; heads--) {
            const int from = (t.first + w) * 64 - t.query0, left = t.live - (t.first + w) * 64;
            int blocks = __shfl_sync(~0u, M::BLOCKS ? t.high : t.high - t.low, 0);
            int idle = 0; /* blocks whose rows are all too early to see these keys */
            if (MASKS && !M::BLOCKS && from > after) idle = (from - after) / 64 - t.low;
            idle = __shfl_sync(~0u, !busy || left <= 0 || idle > blocks ? blocks : idle < 0 ? 0 : idle, 0);
            blocks -= idle;
            last = blocks > 0;
            held = false;
            if (p.late_first)
#pragma unroll 1
                for (; idle > 0; idle--) pass_block();
#pragma unroll 1
            for (; blocks > 0; blocks--) block(t, branch.dilation, from, left, heads + blocks == 2);
            hopper_product_wait<0>();
            settle();
#pragma unroll 1
            for (; idle > 0; idle--) pass_block();
        }
        if constexpr (D == 64) {
            if (!first) add_dq();
            finish(t, branch, busy);
        } else {
            if (!last) arrive(M::V_FREE);
            /* results leave through the memory of the sums before the last block's get there: the ones before it have
             * long been added, these would have to be waited for */
            hopper_wait(memory + M::DQ_FREE, first ? previous() : previous() ^ 1);
            finish(t, branch, busy);
            hopper_sync(1 + w, 128);
            if (!first) add_dq();
        }
        if (thread == 0) hopper_arrive(memory + M::TILE_FREE + 8 * ts);
        if (++ts == M::TILES) ts = 0, tp ^= 1;
    }
    __device__ __forceinline__ void run()
    {
        for (;;) {
            hopper_wait(memory + M::K_FULL + 8 * ts, tp);
            const volatile hopper_tile &t =
                *(const hopper_tile *)__cvta_shared_to_generic(memory + M::TILE_INFO + ts * 64);
            if (__shfl_sync(~0u, t.width, 0) == HOPPER_STOP) break;
            tile(t);
        }
        if (thread == 0) hopper_bulk_done();
    }
};

template <class T, int D, bool MASKS, int OPTIONS>
__global__ void __launch_bounds__(hopper_shape<D, (OPTIONS & HOPPER_BLOCKS) != 0>::THREADS_, 1)
    attn_hopper_keys_kernel(const __grid_constant__ hopper_keys_args p)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    typedef hopper_shape<D, (OPTIONS & HOPPER_BLOCKS) != 0> M;
    extern __shared__ __align__(1024) uint8_t bytes[]; /* nothing else is shared: addresses are constants and stages */
    const uint32_t memory = attn_shared(bytes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < M::TILES; i++) {
            hopper_barrier(memory + M::K_FULL + 8 * i, 1);
            hopper_barrier(memory + M::V_FULL + 8 * i, 1);
            hopper_barrier(memory + M::TILE_FREE + 8 * i, M::GROUPS);
        }
        for (int i = 0; i < M::STAGES; i++) {
            hopper_barrier(memory + M::Q_FULL + 8 * i, 1);
            hopper_barrier(memory + M::G_FULL + 8 * i, 1);
            hopper_barrier(memory + M::BLOCK_FREE + 8 * i, 4 * M::GROUPS + 1); /* every warp, and the carrier */
            hopper_barrier(memory + M::DS_FULL + 8 * i, 4 * M::GROUPS);
            hopper_barrier(memory + M::DS_FREE + 8 * i, D == 64 ? 1 : 4 * M::GROUPS);
            hopper_barrier(memory + M::DQ_FULL + 8 * i, D == 64 ? 4 : 4 * M::GROUPS);
        }
        hopper_barrier(memory + M::V_FREE, 4 * M::GROUPS);
        hopper_barrier(memory + M::DQ_FREE, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    previous_done();
    __syncthreads();
    if (threadIdx.x < 128) {
        hopper_fewer<M::LOADER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x % 32 != 0) return;
        if (warp == 0) hopper_loader<M>(p, memory);
        else if (warp <= M::CARRIERS) hopper_carrier<M>(p, memory, warp - 1);
        else if (M::VALUES == 1 || !M::BLOCKS) hopper_value_loader<M>(p, memory);
    } else {
        hopper_more<M::GROUP_REGISTERS>();
        hopper_group<T, D, MASKS, OPTIONS>(p, memory).run();
    }
#endif
}

/* ---- the host's side ---- */

template <class T, int D, bool MASKS, int OPTIONS> int launch_keys(const hopper_keys_args &p)
{
    auto kernel = attn_hopper_keys_kernel<T, D, MASKS, OPTIONS>;
    const int memory = hopper_shape<D, (OPTIONS & HOPPER_BLOCKS) != 0>::MEMORY,
              blocks = p.tiles < lac_cuda_processors ? p.tiles : lac_cuda_processors;
    if (p.tiles == 0) return 0;
    CUDA_TRY("attention", lac_cuda_shared((const void *)kernel, memory));
    launch(kernel, blocks, hopper_shape<D, (OPTIONS & HOPPER_BLOCKS) != 0>::THREADS_, memory, p);
    return lac_cuda_launched("attention");
}

/* with active blocks alone (attn_hopper_block_keys.cu) */
int attn_hopper_block_keys(const hopper_keys_args &p, bool half, bool masks);

#endif
