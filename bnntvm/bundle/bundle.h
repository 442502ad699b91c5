/* What bnn.c and the file that runs the network share: tvm.c, or standalone.c where TVM has no runtime for the machine. */
#ifndef BUNDLE_H_
#define BUNDLE_H_
#include <bnn.h>
#include <stdatomic.h>
#include <stdint.h>

#define MOST 64

typedef struct {
  int code, bits, dims; /* of the type: 0 int, 1 unsigned, 2 float, 6 bool; its bits */
  int64_t shape[8];
  size_t bytes;
  void *data; /* of an input; the handle's */
} Tensor;

struct bnn {
  char message[1024];
  atomic_flag busy;
  int inputs, outputs, opened, has_result;
  Tensor in[MOST], out[MOST];
  size_t workspace; /* bytes that a direct entry works in; 0: the entry is no direct one */
  void *state; /* the backend's */
};

#pragma GCC visibility push(hidden)
/* Keep a message; returns `code`. */
int bnn_fail(bnn *net, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Make ready to run what network.txt calls `entry`; its tensors are known. */
int bnn_backend_open(bnn *net, const char *folder, const char *entry);
int bnn_backend_run(bnn *net);
/* Copy an output, of `bytes` bytes as network.txt says, of a run that succeeded. */
int bnn_backend_output(bnn *net, int index, void *data, size_t bytes);
/* Free `state`, whatever there is of it. */
void bnn_backend_close(bnn *net);
#pragma GCC visibility pop
#endif
