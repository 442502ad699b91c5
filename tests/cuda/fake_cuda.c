/* A device that is not there: the functions of NVIDIA's driver (-DDRIVER) and run time that TVM and bnntvm call, on the host's memory.
 *
 * Kernels are started by a function of the test (set_hooks), which is given the name and the parameters. Streams are in order and synchronous. What
 * a real device would refuse while a stream is recorded is refused: allocations of the recording thread, copies, waiting.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };
typedef int (*launch_hook)(const char *name, void **params, unsigned grid, unsigned block, unsigned shared, void *stream);
typedef long (*graph_hook)(int operation, void *first, void *second);
enum { BEGIN, END, INSTANTIATE, LAUNCH, DESTROY };

#ifdef DRIVER

static launch_hook launch; /* without one, kernels do nothing */
void set_launch(launch_hook hook) { launch = hook; }

typedef struct { char *image; } module;
typedef struct { char name[512]; module *owner; } function;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} config;

int cuInit(unsigned flags) { return OK; }
int cuDeviceGet(int *device, int number) { *device = number; return number ? 101 : OK; }
int cuDeviceGetName(char *name, int length, int device) { snprintf(name, length, "a device that is not there"); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const char *text = getenv(attribute == 75 ? "FAKE_MAJOR" : "FAKE_MINOR");
  *value = text ? atoi(text) : 0;
  return OK;
}
int cuFuncSetAttribute(function *f, int attribute, int value) { return OK; }
int cuGetErrorName(int status, const char **text) { *text = "CUDA_ERROR_OF_THE_TEST"; return OK; }
int cuGetErrorString(int status, const char **text) { *text = "an error of the test"; return OK; }
int cuModuleLoadData(module **out, const char *image) {
  if (memcmp(image, "\177ELF", 4)) return 200;
  *out = malloc(sizeof **out);
  (*out)->image = (char *)image;
  return OK;
}
int cuModuleUnload(module *m) { free(m); return OK; }
int cuModuleGetFunction(function **out, module *m, const char *name) {
  *out = malloc(sizeof **out);
  /* Code that has a name of its own: "NAME/kernel". */
  if (memcmp(m->image + 4, "name:", 5)) snprintf((*out)->name, sizeof (*out)->name, "%s", name);
  else snprintf((*out)->name, sizeof (*out)->name, "%s/%s", m->image + 9, name);
  (*out)->owner = m;
  return OK;
}
int cuLaunchKernelEx(const config *c, function *f, void **params, void **extra) {
  if (c->grid[1] != 1 || c->grid[2] != 1 || c->block[1] != 1 || c->block[2] != 1 || !c->grid[0] || c->block[0] > 1024) return INVALID_VALUE;
  return launch ? launch(f->name, params, c->grid[0], c->block[0], c->shared, c->stream) : OK;
}
int cuLaunchKernel(function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
                   void **params, void **extra) {
  config c = {{gx, gy, gz}, {bx, by, bz}, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&c, f, params, extra);
}
int cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }

#else

static long no_graphs(int operation, void *first, void *second) { return operation == END || operation == INSTANTIATE; }
static graph_hook graphs = no_graphs;
static _Thread_local int recording, device, last;
static int recorded_streams;
static double now; /* milliseconds; kernels take time only where the test says so */
typedef struct { int recording; } stream;

void set_graphs(graph_hook hook) { graphs = hook; }
void pass_time(double ms) { now += ms; }
static int give(int status) { return status ? (last = status) : OK; }
static int busy(stream *s) { return s > (stream *)2 && s->recording; }

int cudaGetDeviceCount(int *count) { *count = getenv("FAKE_DEVICES") ? atoi(getenv("FAKE_DEVICES")) : 1; return *count ? OK : give(100); }
int cudaDriverGetVersion(int *version) { *version = getenv("FAKE_DRIVER") ? atoi(getenv("FAKE_DRIVER")) : 13000; return OK; }
int cudaDeviceGetAttribute(int *value, int attribute, int number) {
  const char *text = attribute == 75 ? getenv("FAKE_MAJOR") : attribute == 76 ? getenv("FAKE_MINOR") : attribute == 16 ? "132" : attribute == 38 ? "65536" : "0";
  *value = text ? atoi(text) : 0;
  return OK;
}
int cudaGetDeviceProperties(void *properties, int number) { return give(INVALID_VALUE); }
int cudaGetDevice(int *number) { *number = device; return OK; }
int cudaSetDevice(int number) { device = number; return number ? give(101) : OK; }
int cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)1 << 34; return OK; }
int cudaMalloc(void **out, size_t size) {
  if (recording) return give(CAPTURE_UNSUPPORTED);
  if (posix_memalign(out, 256, size ? size : 1)) return give(OUT_OF_MEMORY);
  memset(*out, 0xCD, size);
  return OK;
}
int cudaFree(void *p) { if (recording) return give(CAPTURE_UNSUPPORTED); free(p); return OK; }
int cudaMallocHost(void **out, size_t size) { return cudaMalloc(out, size); }
int cudaFreeHost(void *p) { return cudaFree(p); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, stream *s) {
  if (busy(s)) return kind == 3 ? OK : give(CAPTURE_UNSUPPORTED); /* copies on the device may be recorded; nothing checks what they do */
  memmove(to, from, size);
  return OK;
}
int cudaMemcpyPeerAsync(void) { return give(INVALID_VALUE); }
int cudaMemsetAsync(void *to, int value, size_t size, stream *s) {
  if (busy(s)) return give(CAPTURE_UNSUPPORTED);
  memset(to, value, size);
  return OK;
}
int cudaDeviceSynchronize(void) { return recorded_streams ? give(CAPTURE_UNSUPPORTED) : OK; }
int cudaStreamCreateWithFlags(stream **out, unsigned flags) { *out = calloc(1, sizeof **out); return OK; }
int cudaStreamCreate(stream **out) { return cudaStreamCreateWithFlags(out, 0); }
int cudaStreamDestroy(stream *s) { free(s); return OK; }
int cudaStreamSynchronize(stream *s) { return busy(s) ? give(CAPTURE_UNSUPPORTED) : OK; }
int cudaStreamWaitEvent(stream *s, void *event, unsigned flags) { return OK; }
int cudaEventCreate(void **event) { *event = calloc(1, sizeof now); return OK; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return cudaEventCreate(event); }
int cudaEventRecord(void *event, stream *s) { *(double *)event = now; return OK; }
int cudaEventQuery(void *event) { return getenv("FAKE_BUSY") ? give(600) : OK; }
int cudaEventSynchronize(void *event) { return OK; }
int cudaEventElapsedTime(float *ms, void *first, void *second) { *ms = *(double *)second - *(double *)first; return OK; }
int cudaEventDestroy(void *event) { free(event); return OK; }
int cudaStreamBeginCapture(stream *s, int mode) {
  if (s <= (stream *)2 || s->recording) return give(INVALID_VALUE);
  s->recording = recording = 1;
  ++recorded_streams;
  graphs(BEGIN, s, NULL);
  return OK;
}
int cudaStreamEndCapture(stream *s, void **graph) {
  if (!busy(s)) return give(INVALID_VALUE);
  s->recording = recording = 0;
  --recorded_streams;
  *graph = (void *)graphs(END, s, NULL);
  return OK;
}
int cudaGraphInstantiate(void **ready, void *graph, unsigned long long flags) { *ready = (void *)graphs(INSTANTIATE, graph, NULL); return OK; }
int cudaGraphLaunch(void *ready, stream *s) { return graphs(LAUNCH, ready, s) ? give(INVALID_VALUE) : OK; }
int cudaGraphDestroy(void *graph) { return OK; }
int cudaGraphExecDestroy(void *ready) { graphs(DESTROY, ready, NULL); return OK; }
const char *cudaGetErrorName(int status) { return status == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorOfTheTest"; }
const char *cudaGetErrorString(int status) { return "an error of the test"; }
int cudaGetLastError(void) { int status = last; last = OK; return status; }
int cudaPeekAtLastError(void) { return last; }

#endif
