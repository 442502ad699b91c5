/* An instrument of TVM's virtual machine (VirtualMachine.set_instrument): notes when calls begin and end, and what is called.
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
  char name[48];
} records[MOST];
static int64_t count;

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

static void give(TVMFFIAny *result, int64_t value) {
  memset(result, 0, sizeof *result);
  result->type_index = kTVMFFIInt;
  result->v_int64 = value;
}

/* (function, its name, whether it is about to run, its result, its arguments...) -> 0: go on. */
int __tvm_ffi_bnn_probe(void *self, const TVMFFIAny *args, int32_t size, TVMFFIAny *result) {
  int64_t time = now();
  (void)self, (void)size;
  give(result, 0);
  if (!args[2].v_int64) {
    if (count < MOST) records[count].end = time;
    count += 1;
  } else if (count < MOST) {
    note_name(&args[1], records[count].name);
    records[count].begin = now();
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
