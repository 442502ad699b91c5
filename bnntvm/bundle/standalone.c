/* Runs a network that was written as C (src/model), which is compiled into this library. It has one workspace: runs take turns. */
#include "bundle.h"
#include "network.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

void bnn_network_run(void *const *in, void *const *out); /* network.c, of this network */

int bnn_backend_open(bnn *net, const char *folder, const char *entry) {
  static const size_t inputs[] = BNN_INPUT_BYTES, outputs[] = BNN_OUTPUT_BYTES;
  int count = sizeof inputs / sizeof *inputs, results = sizeof outputs / sizeof *outputs;
  int same = !strcmp(entry, BNN_NETWORK) && net->inputs == count && net->outputs == results;
  for (int i = 0; same && i < count; ++i) same = net->in[i].bytes == inputs[i];
  for (int i = 0; same && i < results; ++i) same = net->out[i].bytes == outputs[i];
  if (!same) return bnn_fail(net, BNN_FILE, "libbnn.so is not the one of the bundle %s", folder);
  if (!(net->state = calloc(MOST, sizeof(void *)))) return bnn_fail(net, BNN_MEMORY, "no memory for the network");
  for (int i = 0; i < results; ++i)
    if (!(((void **)net->state)[i] = calloc(1, outputs[i] + 1))) return bnn_fail(net, BNN_MEMORY, "no memory for the outputs");
  return BNN_OK;
}

int bnn_backend_run(bnn *net) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  void *in[MOST];
  for (int i = 0; i < net->inputs; ++i) in[i] = net->in[i].data;
  pthread_mutex_lock(&lock);
  bnn_network_run(in, net->state);
  pthread_mutex_unlock(&lock);
  return BNN_OK;
}

int bnn_backend_output(bnn *net, int index, void *data, size_t bytes) {
  memcpy(data, ((void **)net->state)[index], bytes);
  return BNN_OK;
}

void bnn_backend_close(bnn *net) {
  for (int i = 0; net->state && i < MOST; ++i) free(((void **)net->state)[i]);
  free(net->state);
}
