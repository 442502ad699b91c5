/* Runs a network on the C interface of TVM's runtime, whose libraries are loaded from the bundle. */
#define _GNU_SOURCE
#include "bundle.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <tvm/ffi/c_api.h>

/* A piece of memory and what the runtime calls it. */
typedef struct {
  DLManagedTensor managed;
  int64_t shape[8], strides[8];
  TVMFFIObjectHandle tensor;
} Lent;

typedef struct {
  Lent in[MOST], out[MOST], workspace, table; /* all but `in` are for direct entries only; their memory is the state's */
  TVMFFIObjectHandle module, machine, entry;
  TVMFFIAny constants, result;
} State;

static int (*function_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
static int (*function_call)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
static int (*object_release)(TVMFFIObjectHandle);
static int (*tensor_from)(DLManagedTensor *, int32_t, int32_t, TVMFFIObjectHandle *);
static void (*error_take)(TVMFFIObjectHandle *);

static int reported(bnn *net, const char *doing) {
  TVMFFIObjectHandle error = NULL;
  if (error_take) error_take(&error);
  if (!error) return bnn_fail(net, BNN_RUNTIME, "%s failed", doing);
  TVMFFIErrorCell *cell = (TVMFFIErrorCell *)((char *)error + sizeof(TVMFFIObject));
  bnn_fail(net, BNN_RUNTIME, "%s failed: %.*s", doing, (int)(cell->message.size > 800 ? 800 : cell->message.size), cell->message.data);
  object_release(error);
  return strstr(net->message, "std::bad_alloc") ? BNN_MEMORY : BNN_RUNTIME;
}

static int same_file(const char *left, const char *right) {
  FILE *files[2] = {fopen(left, "rb"), fopen(right, "rb")};
  char data[2][4096];
  size_t got = 0, other = 0;
  int same = files[0] && files[1];
  do {
    if (same) got = fread(data[0], 1, sizeof data[0], files[0]), other = fread(data[1], 1, sizeof data[1], files[1]);
    same = same && got == other && !memcmp(data[0], data[1], got);
  } while (same && got);
  same = same && !ferror(files[0]) && !ferror(files[1]);
  for (int i = 0; i < 2; ++i)
    if (files[i]) fclose(files[i]);
  return same;
}

/* A process can hold one runtime: a second one ends it. The one of another bundle, or of Python's tvm_ffi, is as good if it is the same. */
static void *load(bnn *net, const char *folder, const char *name) {
  char path[4096];
  struct link_map *found;
  snprintf(path, sizeof path, "%s/lib/%s", folder, name);
  int own = !access(path, F_OK); /* a bundle without the runtime uses the system's */
  void *library = dlopen(name, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  if (!library) {
    if (!(library = dlopen(own ? path : name, RTLD_NOW | RTLD_GLOBAL))) bnn_fail(net, BNN_FILE, "%s", dlerror());
  } else if (own && !dlinfo(library, RTLD_DI_LINKMAP, &found) && !same_file(found->l_name, path)) {
    bnn_fail(net, BNN_FILE, "this process has loaded another %s, %s: use one version of the runtime", name, found->l_name);
    dlclose(library);
    library = NULL;
  }
  return library;
}

static int load_runtime(bnn *net, const char *folder) {
  /* As bnntvm/runtime.py: TVM would set its workers' affinity and the caller's, and workers would spin for long before they sleep, or end. */
  setenv("TVM_BIND_THREADS", "0", 0);
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "20000", 0);
  void *ffi = load(net, folder, "libtvm_ffi.so");
  if (!ffi || !load(net, folder, "libtvm_runtime.so")) return BNN_FILE;
  *(void **)&function_global = dlsym(ffi, "TVMFFIFunctionGetGlobal");
  *(void **)&function_call = dlsym(ffi, "TVMFFIFunctionCall");
  *(void **)&object_release = dlsym(ffi, "TVMFFIObjectDecRef");
  *(void **)&tensor_from = dlsym(ffi, "TVMFFITensorFromDLPack");
  *(void **)&error_take = dlsym(ffi, "TVMFFIErrorMoveFromRaised");
  if (function_global && function_call && object_release && tensor_from && error_take) return BNN_OK;
  return bnn_fail(net, BNN_FILE, "libtvm_ffi.so is not the one of this bundle");
}

static TVMFFIAny object(TVMFFIObjectHandle handle) {
  TVMFFIAny any;
  memset(&any, 0, sizeof any);
  any.type_index = ((TVMFFIObject *)handle)->type_index;
  any.v_obj = handle;
  return any;
}

static TVMFFIAny text(const char *value) {
  TVMFFIAny any;
  memset(&any, 0, sizeof any);
  any.type_index = kTVMFFIRawStr;
  any.v_c_str = value;
  return any;
}

static TVMFFIAny number(int64_t value, int type) {
  TVMFFIAny any;
  memset(&any, 0, sizeof any);
  any.type_index = type;
  any.v_int64 = value;
  return any;
}

static void release(TVMFFIAny *any) {
  if (any->type_index >= kTVMFFIStaticObjectBegin && any->v_obj) object_release(any->v_obj);
  memset(any, 0, sizeof *any);
}

static int call_global(const char *name, TVMFFIAny *args, int count, TVMFFIAny *result) {
  TVMFFIByteArray bytes = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  memset(result, 0, sizeof *result);
  if (function_global(&bytes, &function) || !function) return -1;
  int status = function_call(function, args, count, result);
  object_release(function);
  return status;
}

static int member(bnn *net, TVMFFIObjectHandle module, const char *name, int imports, TVMFFIObjectHandle *function) {
  TVMFFIAny args[3] = {object(module), text(name), number(imports, kTVMFFIBool)}, result;
  if (call_global("ffi.ModuleGetFunction", args, 3, &result)) return reported(net, name);
  if (result.type_index < kTVMFFIStaticObjectBegin) return bnn_fail(net, BNN_FILE, "the library has no function %s", name);
  *function = result.v_obj;
  return BNN_OK;
}

static int start(bnn *net, State *state, const char *path, const char *entry) {
  TVMFFIAny args[3] = {text(path), text("so"), text("")}, result;
  TVMFFIObjectHandle function;
  if (call_global("ffi.Module.load_from_file.so", args, 2, &result)) return reported(net, "loading the network");
  state->module = result.v_obj;
  int status = member(net, state->module, "vm_load_executable", 0, &function);
  if (status) return status;
  memset(&result, 0, sizeof result);
  status = function_call(function, NULL, 0, &result);
  object_release(function);
  if (status) return reported(net, "loading the network");
  state->machine = result.v_obj;
  if ((status = member(net, state->machine, "vm_initialization", 0, &function))) return status;
  TVMFFIAny where[3] = {number(kDLCPU, kTVMFFIInt), number(0, kTVMFFIInt), number(2, kTVMFFIInt)};
  memset(&result, 0, sizeof result);
  status = function_call(function, where, 3, &result);
  object_release(function);
  if (status) return reported(net, "starting the virtual machine");
  release(&result);
  return net->workspace ? member(net, state->module, entry, 1, &state->entry) : member(net, state->machine, entry, 0, &state->entry);
}

static void keep(DLManagedTensor *self) { (void)self; } /* the memory is the handle's, which frees it */

static int lend(bnn *net, Lent *lent, const Tensor *from, void *data) {
  DLTensor *t = &lent->managed.dl_tensor;
  int64_t stride = 1;
  memcpy(lent->shape, from->shape, sizeof lent->shape);
  for (int i = from->dims - 1; i >= 0; --i) lent->strides[i] = stride, stride *= from->shape[i];
  t->device.device_type = kDLCPU;
  t->ndim = from->dims, t->shape = lent->shape, t->strides = lent->strides, t->data = data;
  t->dtype.code = (uint8_t)from->code, t->dtype.bits = (uint8_t)from->bits, t->dtype.lanes = 1;
  lent->managed.deleter = keep;
  return tensor_from(&lent->managed, 0, 0, &lent->tensor) ? reported(net, "making a tensor") : BNN_OK;
}

/* The same of memory that is made for it. */
static int lend_new(bnn *net, Lent *lent, const Tensor *like) {
  void *data = aligned_alloc(64, (like->bytes + 64) / 64 * 64);
  if (!data) return bnn_fail(net, BNN_MEMORY, "no memory for the network");
  int status = lend(net, lent, like, data);
  if (status) free(data), lent->managed.dl_tensor.data = NULL;
  return status;
}

/* The table with the addresses of the constants, which the virtual machine has: see bnntvm/direct.py. */
static int find_constants(bnn *net, State *state) {
  TVMFFIObjectHandle function;
  TVMFFIAny size, args[2];
  int status = member(net, state->machine, "main_constants", 0, &function);
  if (status) return status;
  status = function_call(function, NULL, 0, &state->constants);
  object_release(function);
  if (status || call_global("ffi.ArraySize", &state->constants, 1, &size)) return reported(net, "finding the constants");
  Tensor table = {.code = kDLInt, .bits = 64, .dims = 1};
  table.shape[0] = size.v_int64 ? size.v_int64 : 1, table.bytes = (size_t)table.shape[0] * 8;
  if ((status = lend_new(net, &state->table, &table))) return status;
  int64_t *addresses = state->table.managed.dl_tensor.data;
  for (int64_t i = 0; i < size.v_int64; ++i) {
    TVMFFIAny item;
    args[0] = state->constants, args[1] = number(i, kTVMFFIInt);
    if (call_global("ffi.ArrayGetItem", args, 2, &item)) return reported(net, "finding the constants");
    DLTensor *tensor = (DLTensor *)((char *)item.v_obj + sizeof(TVMFFIObject));
    addresses[i] = (int64_t)(intptr_t)tensor->data + (int64_t)tensor->byte_offset;
    release(&item);
  }
  return BNN_OK;
}

/* What a direct entry takes beside the inputs. */
static int lend_direct(bnn *net, State *state) {
  Tensor workspace = {.code = kDLUInt, .bits = 8, .dims = 1, .shape = {(int64_t)net->workspace}, .bytes = net->workspace};
  int status = lend_new(net, &state->workspace, &workspace);
  if (!status) status = find_constants(net, state);
  for (int i = 0; !status && i < net->outputs; ++i) status = lend_new(net, &state->out[i], &net->out[i]);
  return status;
}

int bnn_backend_open(bnn *net, const char *folder, const char *entry) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* the functions of the runtime belong to all handles */
  char path[4096];
  State *state = net->state = calloc(1, sizeof *state);
  if (!state) return bnn_fail(net, BNN_MEMORY, "no memory for the network");
  pthread_mutex_lock(&lock);
  int status = load_runtime(net, folder);
  pthread_mutex_unlock(&lock);
  snprintf(path, sizeof path, "%s/lib/network.so", folder);
  if (!status) status = start(net, state, path, entry);
  for (int i = 0; !status && i < net->inputs; ++i) status = lend(net, &state->in[i], &net->in[i], net->in[i].data);
  return !status && net->workspace ? lend_direct(net, state) : status;
}

int bnn_backend_run(bnn *net) {
  State *state = net->state;
  TVMFFIAny args[2 * MOST + 2];
  int count = 0;
  if (net->workspace) args[count++] = object(state->workspace.tensor), args[count++] = object(state->table.tensor);
  for (int i = 0; i < net->inputs; ++i) args[count++] = object(state->in[i].tensor);
  for (int i = 0; net->workspace && i < net->outputs; ++i) args[count++] = object(state->out[i].tensor);
  release(&state->result);
  return function_call(state->entry, args, count, &state->result) ? reported(net, "running the network") : BNN_OK;
}

int bnn_backend_output(bnn *net, int index, void *data, size_t bytes) {
  State *state = net->state;
  if (net->workspace) {
    memcpy(data, state->out[index].managed.dl_tensor.data, bytes);
    return BNN_OK;
  }
  TVMFFIAny item = state->result, args[2] = {state->result, number(index, kTVMFFIInt)};
  int array = state->result.type_index == kTVMFFIArray;
  if (array && call_global("ffi.ArrayGetItem", args, 2, &item)) return reported(net, "reading an output");
  int status = BNN_OK;
  const DLTensor *tensor = item.type_index == kTVMFFITensor ? (DLTensor *)((char *)item.v_obj + sizeof(TVMFFIObject)) : NULL;
  size_t size = tensor ? tensor->dtype.bits / 8 : 0;
  for (int i = 0; tensor && i < tensor->ndim; ++i) size *= (size_t)tensor->shape[i];
  if (size == bytes && tensor) memcpy(data, (const char *)tensor->data + tensor->byte_offset, bytes);
  else status = bnn_fail(net, BNN_RUNTIME, "output %d is not what network.txt says", index);
  if (array) release(&item);
  return status;
}

static void give_back(Lent *lent, int own) {
  if (lent->tensor) object_release(lent->tensor);
  if (own) free(lent->managed.dl_tensor.data);
}

void bnn_backend_close(bnn *net) {
  State *state = net->state;
  if (!state) return;
  release(&state->result);
  for (int i = 0; i < MOST; ++i) give_back(&state->in[i], 0), give_back(&state->out[i], 1);
  give_back(&state->workspace, 1);
  give_back(&state->table, 1);
  release(&state->constants);
  TVMFFIObjectHandle handles[3] = {state->entry, state->machine, state->module};
  for (int i = 0; i < 3; ++i)
    if (handles[i]) object_release(handles[i]);
  free(state);
}
