// Runs the network once on zeros and prints the first number of its first output.
#include <bnn.h>
#include <network.h>

#include <cstdio>
#include <memory>
#include <vector>

int main(int count, char **words) {
  bnn *opened = nullptr;
  int status = bnn_open(count > 1 ? words[1] : ".", &opened);
  std::unique_ptr<bnn, void (*)(bnn *)> net(opened, bnn_close);
  const std::size_t outputs[] = BNN_OUTPUT_BYTES;
  std::vector<float> result(outputs[0] / sizeof(float) + 1);
  if (!status) status = bnn_run(net.get());
  if (!status) status = bnn_output(net.get(), 0, result.data(), outputs[0]);
  if (status) return std::fprintf(stderr, "error %d: %s\n", status, bnn_error(net.get())), status;
  std::printf("%g\n", result[0]);
}
