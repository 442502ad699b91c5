/* An instrument of TVM's virtual machine (VirtualMachine.set_instrument): notes when calls begin and end, and what is called; calls
 * another function instead where it was told to.
 *
 * In C because a call takes microseconds: a function in Python would take as long, and its code and data would push those of the next
 * kernel out of the caches. Here a call costs two readings of the clock. One thread at a time.
 */
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

#define MOST 8192

static struct {
  int64_t begin, end; /* nanoseconds */
  int64_t rows;       /* extent of the first dimension of the first argument; 0 if it is no tensor */
  char name[48];
} records[MOST];
static int64_t count;

/* What to call instead, by the number of the call in its run. The objects belong to who gave them. */
static struct {
  TVMFFIObject *function; /* NULL: nothing */
  int64_t weights;        /* number of the argument that is replaced; negative: none */
  TVMFFIAny tensor;       /* by what */
} swaps[MOST];

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void note_name(const TVMFFIAny *any, char *to) {
  const char *data = "";
  size_t size = 0;
  if (any->type_index == kTVMFFIRawStr) {
    data = any->v_c_str, size = strlen(data);
  } else if (any->type_index == kTVMFFISmallStr) {
    data = any->v_bytes, size = any->small_str_len;
  } else if (any->type_index == kTVMFFIStr) {
    const TVMFFIByteArray *bytes = (const TVMFFIByteArray *)((const char *)any->v_obj + sizeof(TVMFFIObject));
    data = bytes->data, size = bytes->size;
  }
  if (size > sizeof records->name - 1) size = sizeof records->name - 1;
  memcpy(to, data, size);
  to[size] = 0;
}

static int64_t rows_of(const TVMFFIAny *any) {
  if (any->type_index != kTVMFFITensor) return 0;
  const DLTensor *tensor = (const DLTensor *)((const char *)any->v_obj + sizeof(TVMFFIObject));
  return tensor->ndim ? tensor->shape[0] : 0;
}

static void give(TVMFFIAny *result, int64_t value) {
  memset(result, 0, sizeof *result);
  result->type_index = kTVMFFIInt;
  result->v_int64 = value;
}

/* Call what stands for a call of ``size`` arguments. */
static int call_swapped(int64_t number, const TVMFFIAny *args, int32_t size) {
  TVMFFIObject *function = swaps[number].function;
  const TVMFFIFunctionCell *cell = (const TVMFFIFunctionCell *)((const char *)function + sizeof(TVMFFIObject));
  TVMFFIAny own[size + 1], nothing;
  memcpy(own, args, size * sizeof *own);
  if (swaps[number].weights >= 0 && swaps[number].weights < size) own[swaps[number].weights] = swaps[number].tensor;
  memset(&nothing, 0, sizeof nothing);
  records[number].begin = now();
  int failed = cell->safe_call(function, own, size, &nothing);
  records[number].end = now();
  return failed;
}

/* (function, its name, whether it is about to run, its result, its arguments...) -> 0: go on; 1: it has been done. */
int __tvm_ffi_bnn_probe(void *self, const TVMFFIAny *args, int32_t size, TVMFFIAny *result) {
  int64_t time = now();
  (void)self;
  give(result, 0);
  if (!args[2].v_int64) {
    if (count < MOST) records[count].end = time;
    count += 1;
  } else if (count < MOST) {
    note_name(&args[1], records[count].name);
    records[count].rows = size > 4 ? rows_of(&args[4]) : 0;
    if (swaps[count].function) {
      give(result, 1);
      return call_swapped(count++, args + 4, size - 4);
    }
    records[count].begin = now();
  }
  return 0;
}

/* (number of a call, function, number of an argument or -1, tensor): what to call instead. A number below 0: nothing any more, for all. */
int __tvm_ffi_bnn_probe_swap(void *self, const TVMFFIAny *args, int32_t size, TVMFFIAny *result) {
  int64_t number = args[0].v_int64;
  (void)self, (void)size;
  give(result, number < MOST);
  if (number < 0) {
    memset(swaps, 0, sizeof swaps);
  } else if (number < MOST) {
    swaps[number].function = (TVMFFIObject *)args[1].v_obj;
    swaps[number].weights = args[2].v_int64;
    swaps[number].tensor = args[3];
  }
  return 0;
}

/* Start again. */
int __tvm_ffi_bnn_probe_reset(void *self, const TVMFFIAny *args, int32_t size, TVMFFIAny *result) {
  (void)self, (void)args, (void)size;
  count = 0;
  give(result, MOST);
  return 0;
}

/* How many calls were made. */
int __tvm_ffi_bnn_probe_count(void *self, const TVMFFIAny *args, int32_t size, TVMFFIAny *result) {
  (void)self, (void)args, (void)size;
  give(result, count);
  return 0;
}

/* The address of the records. */
int __tvm_ffi_bnn_probe_records(void *self, const TVMFFIAny *args, int32_t size, TVMFFIAny *result) {
  (void)self, (void)args, (void)size;
  give(result, (int64_t)(intptr_t)records);
  return 0;
}
