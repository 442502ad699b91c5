/* A compiled network: six functions that throw nothing. The folder is what `bnntvm package` made.
 *
 *     bnn *net;
 *     if (bnn_open("bundle", &net)) { puts(bnn_error(net)); ... }
 *     bnn_input(net, 0, pixels, sizeof pixels);
 *     bnn_run(net);
 *     bnn_output(net, 0, scores, sizeof scores);
 *     bnn_close(net);
 *
 * A handle serves one thread at a time: a call while another thread is in one returns BNN_BUSY and does nothing. Handles are independent:
 * threads may open, use and close their own at the same time. bnn_close is for a handle that no other thread uses any more.
 */
#ifndef BNN_H_
#define BNN_H_
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct bnn bnn;

enum {
  BNN_OK = 0,
  BNN_ARGUMENT = 1, /* a null pointer, no such input or output */
  BNN_SIZE = 2,     /* not the number of bytes that the tensor has */
  BNN_FILE = 3,     /* a file is missing, cannot be read, or is not what was packaged */
  BNN_MACHINE = 4,  /* built for another architecture, or this processor lacks instructions */
  BNN_MEMORY = 5,   /* no memory */
  BNN_BUSY = 6,     /* another thread uses the handle */
  BNN_RUNTIME = 7   /* TVM's runtime reported an error */
};

/* Open the bundle in `folder`. *net is a handle also where this fails, for bnn_error and bnn_close; NULL only without memory. */
int bnn_open(const char *folder, bnn **net);
/* Copy an input; inputs and outputs are numbered as in manifest.json, dense, row-major. Nothing looks for NaN and infinity,
 * for which a network promises no particular numbers. */
int bnn_input(bnn *net, int index, const void *data, size_t bytes);
/* Run the network on the inputs that were last given (zeros where none was). */
int bnn_run(bnn *net);
/* Copy an output of the last run. */
int bnn_output(bnn *net, int index, void *data, size_t bytes);
/* What the last call on the handle that failed had to say; never NULL. */
const char *bnn_error(const bnn *net);
void bnn_close(bnn *net);

#ifdef __cplusplus
}
#endif
#endif
