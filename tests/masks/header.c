/* Reads cases, as test_header.py writes them, and prints the masks of tridrop_mask.h. It is C, C++
 * and CUDA: there, with the argument "device", a thread of the GPU fills the masks. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tridrop_mask.h"

typedef struct {
  int attention, dims, has_noise, has_shard, folds;
  unsigned domain;
  long long seed, stream;
  double p;
  int64_t shape[4], noise[4], whole[4], origin[4], fold[4];
  int status;
  unsigned char keep[4096], shared[8];
} job;

/* One mask; also the decisions one by one, which shared[0] says are the same. */
TRIDROP_FN void run(job *j) {
  int64_t stream = j->stream;
  int k;
  if (j->folds) {
    stream = 0;
    for (k = 0; k < j->folds; ++k) stream = tridrop_fold_in(stream, j->fold[k]);
  }
  if (j->attention)
    j->status = tridrop_attention_keep_mask(j->seed, stream, j->shape, j->p,
                                            j->has_shard ? j->origin : NULL, j->keep);
  else
    j->status = tridrop_keep_mask(j->seed, stream, j->dims, j->shape, j->p,
                                  j->has_noise ? j->noise : NULL, j->has_shard ? j->whole : NULL,
                                  j->has_shard ? j->origin : NULL, j->domain, j->keep);
  j->shared[0] = 1;
  if (j->attention && j->status == 0) {
    tridrop_key key = tridrop_key_of(j->seed, stream);
    int64_t i, n = j->shape[0] * j->shape[1] * j->shape[2] * j->shape[3];
    for (i = 0; i < n; ++i) {
      int64_t at = i % j->shape[3], q = i / j->shape[3] % j->shape[2];
      int64_t h = i / j->shape[3] / j->shape[2] % j->shape[1];
      int64_t b = i / j->shape[3] / j->shape[2] / j->shape[1];
      const int64_t zero[4] = {0, 0, 0, 0}, *o = j->has_shard ? j->origin : zero;
      uint32_t bits = tridrop_attention_bits(key, (uint32_t)(o[0] + b), (uint32_t)(o[1] + h),
                                             (uint32_t)(o[2] + q), (uint64_t)(o[3] + at));
      j->shared[0] &= j->keep[i] == (bits >= tridrop_threshold(j->p));
    }
  }
}

#ifdef __CUDACC__
__global__ void run_kernel(job *j) { run(j); }
#endif

static int numbers(int64_t *to, int count) {
  int k;
  long long value;
  for (k = 0; k < count; ++k) {
    if (scanf("%lld", &value) != 1) return 0;
    to[k] = value;
  }
  return 1;
}

int main(int argc, char **argv) {
  int device = argc > 1 && strcmp(argv[1], "device") == 0;
  job *j = (job *)malloc(sizeof(job));
  if (!j) return 2;
  while (scanf("%d %d %d %d %d %u %lld %lld %la", &j->attention, &j->dims, &j->has_noise,
               &j->has_shard, &j->folds, &j->domain, &j->seed, &j->stream, &j->p) == 9) {
    int64_t n = 1, k;
    if (!numbers(j->shape, j->dims) || !numbers(j->noise, j->dims)) return 3;
    if (!numbers(j->whole, j->dims) || !numbers(j->origin, j->dims)) return 3;
    if (!numbers(j->fold, j->folds)) return 3;
    if (device) {
#ifdef __CUDACC__
      job *there;
      if (cudaMalloc(&there, sizeof(job)) != cudaSuccess) return 4;
      cudaMemcpy(there, j, sizeof(job), cudaMemcpyHostToDevice);
      run_kernel<<<1, 1>>>(there);
      if (cudaMemcpy(j, there, sizeof(job), cudaMemcpyDeviceToHost) != cudaSuccess) return 4;
      cudaFree(there);
#else
      return 5;
#endif
    } else {
      run(j);
    }
    if (!j->shared[0]) return 6;
    for (k = 0; k < j->dims; ++k) n *= j->shape[k];
    printf(j->status ? "refused" : "=");
    for (k = 0; k < n && !j->status; ++k) putchar(j->keep[k] ? '1' : '0');
    putchar('\n');
  }
  free(j);
  return 0;
}
