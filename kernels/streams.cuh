/* streams.cuh: what backend.cu and graph.cu need of the streams (streams.cu). */
#ifndef LAC_CUDA_STREAMS_CUH
#define LAC_CUDA_STREAMS_CUH
#include "common.cuh"
extern "C" {
#include "device.h"
}

int lac_cuda_streams_open(void);   /* a CUDA error */
void lac_cuda_mark(void);          /* after a launch */
int lac_cuda_idle(const char *op); /* waits for everything; why nothing can be captured */

/* graph.cu */
extern bool lac_cuda_capturing;
extern const lac_device_graphs lac_cuda_graphs;
cudaError_t lac_cuda_copies_wait(void);

#endif
