/* op_attn.h: what the front end of attention consists of: op_attn.c calls these parts for options of single pairs, for
 * packed sequences, for long ones and for rounded inputs.
 */
#ifndef LAC_OP_ATTN_H
#define LAC_OP_ATTN_H
#include "plan.h"

/* op_pairs.c */
/* checks args' mask, bias, alibi and block_mask, and expands them into a's views */
int lac_attn_pairs(const lac_plan *p, const lac_attn_args *args, lac_a_attend *a);
/* makes the dense gradient of bias before the backward, and sums it to bias' shape and dtype afterwards */
int lac_attn_bias_begin(lac_a_attend_bwd *a, const lac_attn_args *args, lac_tensor *pairs);
int lac_attn_bias_end(const lac_attn_args *args, const lac_tensor *pairs, lac_tensor *dbias);

/* op_fp8.c */
/* checks that q's dtype and device can be rounded to e4m3 */
int lac_fp8_check(const lac_attn_args *args);
/* the slot attend; of rounded q, k and v if the call wants them so */
int lac_fp8_attend(const lac_a_attend *a, int device);

/* op_packed.c */
/* checks the starts of packed sequences against the plan and the other arguments */
int lac_packed_check(const lac_plan *p, const lac_attn_args *args);
/* the slots attend and attend_bwd, once or sequence by sequence */
int lac_packed_attend(const lac_a_attend *a, const lac_attn_args *args);
int lac_packed_attend_bwd(const lac_a_attend_bwd *a, const lac_attn_args *args);

/* op_parts.c */
/* the slot attend_bwd, once or for parts of the sequence and of the batch */
int lac_parts_attend_bwd(const lac_a_attend_bwd *a, int device);

#endif
