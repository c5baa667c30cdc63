/* streams.cuh: what backend.cu, graph.cu, streams.cu and launcher.cu need of each other. */
#ifndef LAC_CUDA_STREAMS_CUH
#define LAC_CUDA_STREAMS_CUH
#include "common.cuh"
extern "C" {
#include "device.h"
}

/* launcher.cu: makes the operators' stream; a CUDA error */
cudaError_t lac_cuda_launcher_open(int major, bool synchronous);
extern int64_t lac_cuda_operators; /* how many have been queued */
/* What a call of the driver returned that failed since this was last asked, in the numbers of lac_cuda_later(), and how
 * many operators had been queued before it; 0: none is known to have failed. */
int lac_cuda_failed(int64_t *number);
const char *lac_cuda_blas_text(int status); /* matmul.cu */
/* waits until all that was queued is with the driver, and reports what of it failed */
int lac_cuda_settled(const char *op);

int lac_cuda_streams_open(void);   /* a CUDA error */
void lac_cuda_mark(void);          /* after a launch */
int lac_cuda_idle(const char *op); /* waits for everything; why nothing can be captured */

/* graph.cu */
extern bool lac_cuda_capturing;
extern const lac_device_graphs lac_cuda_graphs;
cudaError_t lac_cuda_copies_wait(void);

#endif
