/* Runs the network once: inputs are read from files of raw numbers, all outputs are written to standard output as such.
 *
 *     ./example FOLDER INPUT... > OUTPUTS
 *
 * Without inputs it runs on zeros, and says how large the outputs are.
 */
#include <bnn.h>
#include <network.h>
#include <stdio.h>

int main(int count, char **words) {
  static const size_t outputs[] = BNN_OUTPUT_BYTES;
  static char data[BNN_LARGEST_BYTES + 1];
  bnn *net = NULL;
  int status = bnn_open(count > 1 ? words[1] : ".", &net);
  for (int i = 2; i < count && !status; ++i) {
    FILE *file = fopen(words[i], "rb");
    size_t bytes = file ? fread(data, 1, sizeof data, file) : 0;
    if (file) fclose(file);
    status = bnn_input(net, i - 2, data, bytes);
  }
  if (!status) status = bnn_run(net);
  for (size_t i = 0; i < sizeof outputs / sizeof *outputs && !status; ++i) {
    status = bnn_output(net, (int)i, data, outputs[i]);
    if (!status && count > 2) fwrite(data, 1, outputs[i], stdout);
    if (!status && count <= 2) printf("output %d: %lu bytes\n", (int)i, (unsigned long)outputs[i]);
  }
  if (status) fprintf(stderr, "error %d: %s\n", status, bnn_error(net));
  bnn_close(net);
  return status;
}
