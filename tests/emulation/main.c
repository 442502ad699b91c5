/* Runs one of several kernels without a TVM runtime: reads its arguments from standard input, writes all of them to standard output.
 * The kernel is chosen by its number in a table that is linked in.
 *
 * Input: int32 count, int32 repeat; per argument int32 ndim, int32 dtype code, int32 bits, int64 shape[ndim], the data. An integer has
 * ndim -1, and its value as an int64 behind the bits. All little endian.
 */
#include <dlpack/dlpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void *sync;
  int32_t tasks;
} Group;
typedef int (*Lambda)(int task, Group *group, void *data);

typedef int (*Kernel)(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result);
extern const Kernel kernels[];
extern int (*__TVMBackendParallelLaunch)(Lambda, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
int (*__TVMBackendParallelLaunch)(Lambda, void *, int) __attribute__((weak));
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
int (*__TVMBackendFreeWorkspace)(int, int, void *) __attribute__((weak));

static int launch(Lambda body, void *data, int tasks) {
  Group group = {0, 3}; /* three workers, one after the other: each takes its share */
  (void)tasks;
  for (int i = 0; i < 3; ++i)
    if (body(i, &group, data)) return -1;
  return 0;
}

static void *aligned(uint64_t bytes) {
  void *memory = 0;
  return posix_memalign(&memory, 64, bytes + 64) ? 0 : memory;
}

static void *workspace(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  void *memory = aligned(bytes);
  memset(memory, 0x5a, bytes); /* garbage: nobody may count on zeros */
  return memory;
}

static int release(int device, int id, void *memory) {
  (void)device, (void)id;
  free(memory);
  return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

static void take(void *to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(3);
}

int main(int argc, char **argv) {
  int32_t count, repeat;
  take(&count, 4), take(&repeat, 4);
  DLTensor *tensors = calloc(count, sizeof *tensors);
  TVMFFIAny *args = calloc(count, sizeof *args), result = {0};
  size_t *bytes = calloc(count, sizeof *bytes);
  for (int i = 0; i < count; ++i) {
    int32_t head[3];
    take(head, sizeof head);
    if (head[0] < 0) {
      args[i].type_index = kTVMFFIInt;
      take(&args[i].v_int64, 8);
      continue;
    }
    DLTensor *t = &tensors[i];
    t->device.device_type = kDLCPU, t->ndim = head[0];
    t->dtype.code = head[1], t->dtype.bits = head[2], t->dtype.lanes = 1;
    t->shape = calloc(head[0] + 1, 8), t->strides = calloc(head[0] + 1, 8);
    take(t->shape, 8 * head[0]);
    size_t size = 1;
    for (int d = head[0] - 1; d >= 0; --d) t->strides[d] = size, size *= t->shape[d];
    bytes[i] = size * (head[2] / 8);
    t->data = aligned(bytes[i]);
    take(t->data, bytes[i]);
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_int64 = 0;
    memcpy(&args[i].v_int64, &t, sizeof t);
  }
  __TVMBackendParallelLaunch = launch, __TVMBackendAllocWorkspace = workspace, __TVMBackendFreeWorkspace = release;
  for (int i = 0; i < repeat; ++i)
    if (kernels[argc > 1 ? atoi(argv[1]) : 0](0, args, count, &result)) return 2;
  for (int i = 0; i < count; ++i) fwrite(tensors[i].data, 1, bytes[i], stdout);
  return 0;
}
