/* The implementation of bnn.h: what a bundle is made of, and whose call it is. What runs the network is in another file, see bundle.h. */
#define _GNU_SOURCE
#include "bundle.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#define ALIGNMENT 64
#define CHECK_BYTES 71 /* of "check ", 64 digits, end of line */

int bnn_fail(bnn *net, int code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(net->message, sizeof net->message, format, values);
  va_end(values);
  return code;
}

/* SHA-256 (FIPS 180-4) ------------------------------------------------------------------------------------------------------------- */

static const uint32_t constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t turned(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void digest_block(uint32_t state[8], const unsigned char *block) {
  uint32_t w[64], v[8];
  for (int i = 0; i < 16; ++i)
    w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (turned(a, 7) ^ turned(a, 18) ^ a >> 3) + w[i - 7] + (turned(b, 17) ^ turned(b, 19) ^ b >> 10);
  }
  memcpy(v, state, sizeof v);
  for (int i = 0; i < 64; ++i) {
    uint32_t e = v[4], a = v[0];
    uint32_t first = v[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + constants[i] + w[i];
    uint32_t second = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    memmove(v + 1, v, 7 * sizeof *v);
    v[4] += first;
    v[0] = first + second;
  }
  for (int i = 0; i < 8; ++i) state[i] += v[i];
}

/* The digest of a file, of its first bytes only if `tail` at its end are to be left out. */
static int digest_file(const char *path, long tail, char text[65]) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char block[64];
  uint64_t length = 0;
  FILE *file = fopen(path, "rb");
  if (!file) return -1;
  long left = fseek(file, 0, SEEK_END) ? -1 : ftell(file) - tail;
  int bad = left < 0 || fseek(file, 0, SEEK_SET);
  size_t got = 0;
  while (!bad && (got = fread(block, 1, left < 64 ? (size_t)left : 64, file)) == 64) digest_block(state, block), length += 64, left -= 64;
  bad = bad || ferror(file) || got != (size_t)left;
  fclose(file);
  if (bad) return -1;
  length = (length + got) * 8;
  block[got++] = 0x80;
  if (got > 56) {
    memset(block + got, 0, 64 - got);
    digest_block(state, block);
    got = 0;
  }
  memset(block + got, 0, 56 - got);
  for (int i = 0; i < 8; ++i) block[56 + i] = (unsigned char)(length >> (56 - 8 * i));
  digest_block(state, block);
  for (int i = 0; i < 8; ++i) snprintf(text + 8 * i, 9, "%08x", (unsigned)state[i]);
  return 0;
}

/* The processor -------------------------------------------------------------------------------------------------------------------- */

#if defined(__aarch64__)
static const char *const this_machine = "aarch64";
static const struct {
  const char *name;
  int bit;
} capabilities[] = {{"asimd", 1}, {"atomics", 8}, {"fphp", 9}, {"asimdhp", 10}, {"asimdrdm", 12}, {"jscvt", 13}, {"fcma", 14},
                    {"sha3", 17}, {"asimddp", 20}, {"asimdfhm", 23}, {"flagm", 27}, {"i8mm", 32 + 13}};

static int has(const char *flag) {
  for (size_t i = 0; i < sizeof capabilities / sizeof *capabilities; ++i)
    if (!strcmp(flag, capabilities[i].name)) {
      int bit = capabilities[i].bit;
      return bit < 32 ? getauxval(AT_HWCAP) >> bit & 1 : getauxval(AT_HWCAP2) >> (bit - 32) & 1;
    }
  return 0;
}
#else
#if defined(__x86_64__)
#include <sys/syscall.h>
static const char *const this_machine = "x86_64";

/* Linux gives the tile registers of AMX only to processes that ask for them: ARCH_REQ_XCOMP_PERM for XTILEDATA. */
static int permitted(const char *flag) { return strcmp(flag, "amx_tile") || !syscall(SYS_arch_prctl, 0x1023, 18); }
#elif defined(__arm__)
static const char *const this_machine = "arm";
#else
static const char *const this_machine = "unknown";
#endif
#if !defined(__x86_64__)
static int permitted(const char *flag) { return flag != NULL; }
#endif

static int has(const char *flag) {
  char line[8192];
  FILE *file = fopen("/proc/cpuinfo", "r");
  int found = file ? 0 : 1; /* a system that does not tell */
  while (file && !found && fgets(line, sizeof line, file)) {
    if (strncmp(line, "flags", 5) && strncmp(line, "Features", 8)) continue;
    for (char *save, *word = strtok_r(line, " \t\n", &save); word && !found; word = strtok_r(NULL, " \t\n", &save)) found = !strcmp(word, flag);
    break;
  }
  if (file) fclose(file);
  return found && permitted(flag);
}
#endif

/* The bundle ----------------------------------------------------------------------------------------------------------------------- */

/* A line of network.txt: type code, bits, number of dimensions, dimensions. */
static int read_tensor(FILE *file, Tensor *tensor, int allocate) {
  int dims, bits;
  if (fscanf(file, "%d %d %d", &tensor->code, &bits, &dims) != 3 || dims < 0 || dims > 8 || bits < 8 || bits > 64) return BNN_FILE;
  size_t count = 1;
  for (int i = 0; i < dims; ++i) {
    long long size;
    if (fscanf(file, "%lld", &size) != 1 || size < 0 || (count && (unsigned long long)size > SIZE_MAX / 16 / count)) return BNN_FILE;
    tensor->shape[i] = size, count *= (size_t)size;
  }
  tensor->dims = dims, tensor->bits = bits, tensor->bytes = count * (size_t)bits / 8;
  if (!allocate) return BNN_OK;
  size_t room = (tensor->bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT;
  tensor->data = aligned_alloc(ALIGNMENT, room);
  if (!tensor->data) return BNN_MEMORY;
  memset(tensor->data, 0, room);
  return BNN_OK;
}

/* network.txt ends with the digest of what stands before it. */
static int check_description(bnn *net, const char *path) {
  char line[CHECK_BYTES + 1] = "", found[65];
  FILE *file = fopen(path, "r");
  if (!file) return bnn_fail(net, BNN_FILE, "%s cannot be read", path);
  int good = !fseek(file, -CHECK_BYTES, SEEK_END) && fread(line, 1, CHECK_BYTES, file) == CHECK_BYTES;
  fclose(file);
  good = good && !strncmp(line, "check ", 6) && !digest_file(path, CHECK_BYTES, found) && !strncmp(line + 6, found, 64);
  return good ? BNN_OK : bnn_fail(net, BNN_FILE, "%s is damaged", path);
}

/* "file DIGEST NAME": the file must be the one that was packaged. */
static int check_file(bnn *net, const char *folder, FILE *file) {
  char path[4096], expected[65], name[128], found[65];
  if (fscanf(file, "%64s %127s", expected, name) != 2) return BNN_FILE;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  if (digest_file(path, 0, found)) return bnn_fail(net, BNN_FILE, "%s cannot be read", path);
  return strcmp(found, expected) ? bnn_fail(net, BNN_FILE, "%s is not the file that was packaged", path) : BNN_OK;
}

static int read_bundle(bnn *net, const char *folder, char *entry) {
  char path[4096], word[128];
  snprintf(path, sizeof path, "%s/network.txt", folder);
  int status = check_description(net, path);
  if (status) return status;
  FILE *file = fopen(path, "r");
  if (!file) return bnn_fail(net, BNN_FILE, "%s cannot be read", path);
  while (!status && fscanf(file, "%127s", word) == 1) {
    if (!strcmp(word, "machine")) {
      if (fscanf(file, "%127s", word) != 1) status = BNN_FILE;
      else if (strcmp(word, this_machine)) status = bnn_fail(net, BNN_MACHINE, "built for %s, this machine is %s", word, this_machine);
    } else if (!strcmp(word, "needs")) {
      if (fscanf(file, "%127s", word) != 1) status = BNN_FILE;
      else if (!has(word)) status = bnn_fail(net, BNN_MACHINE, "this processor lacks %s", word);
    } else if (!strcmp(word, "entry")) {
      if (fscanf(file, "%63s", entry) != 1) status = BNN_FILE;
    } else if (!strcmp(word, "workspace")) {
      if (fscanf(file, "%zu", &net->workspace) != 1) status = BNN_FILE;
    } else if (!strcmp(word, "file")) {
      status = check_file(net, folder, file);
    } else if (!strcmp(word, "check")) {
      break;
    } else if (!strcmp(word, "input") && net->inputs < MOST) {
      status = read_tensor(file, &net->in[net->inputs], 1);
      net->inputs += 1;
    } else if (!strcmp(word, "output") && net->outputs < MOST) {
      status = read_tensor(file, &net->out[net->outputs++], 0);
    } else {
      status = BNN_FILE;
    }
  }
  fclose(file);
  if (status == BNN_MEMORY) return bnn_fail(net, status, "no memory for the inputs");
  if (status && !*net->message) bnn_fail(net, status, "%s is damaged", path);
  return status;
}

int bnn_open(const char *folder, bnn **out) {
  if (!out) return BNN_ARGUMENT;
  bnn *net = *out = calloc(1, sizeof *net);
  if (!net) return BNN_MEMORY;
  atomic_flag_clear(&net->busy);
  if (!folder || strlen(folder) > 3900) return bnn_fail(net, BNN_ARGUMENT, "no folder is given, or its name is too long");
  char entry[64] = "main";
  int status = read_bundle(net, folder, entry);
  if (!status) status = bnn_backend_open(net, folder, entry);
  net->opened = !status;
  return status;
}

static int enter(bnn *net) {
  if (!net) return BNN_ARGUMENT;
  if (atomic_flag_test_and_set(&net->busy)) return BNN_BUSY; /* the message belongs to the other thread */
  return BNN_OK;
}

static int leave(bnn *net, int status) {
  atomic_flag_clear(&net->busy);
  return status;
}

int bnn_input(bnn *net, int index, const void *data, size_t bytes) {
  int status = enter(net);
  if (status) return status;
  if (!net->opened) return leave(net, bnn_fail(net, BNN_ARGUMENT, "the network was not opened"));
  if (index < 0 || index >= net->inputs || !data) return leave(net, bnn_fail(net, BNN_ARGUMENT, "there is no input %d, or no data", index));
  Tensor *tensor = &net->in[index];
  if (bytes != tensor->bytes) return leave(net, bnn_fail(net, BNN_SIZE, "input %d has %zu bytes, not %zu", index, tensor->bytes, bytes));
  memcpy(tensor->data, data, bytes);
  return leave(net, BNN_OK);
}

int bnn_run(bnn *net) {
  int status = enter(net);
  if (status) return status;
  if (!net->opened) return leave(net, bnn_fail(net, BNN_ARGUMENT, "the network was not opened"));
  net->has_result = 0;
  status = bnn_backend_run(net);
  net->has_result = !status;
  return leave(net, status);
}

static int copy_output(bnn *net, int index, void *data, size_t bytes) {
  if (!net->has_result) return bnn_fail(net, BNN_ARGUMENT, "the network has not run");
  if (index < 0 || index >= net->outputs || !data) return bnn_fail(net, BNN_ARGUMENT, "there is no output %d, or no room for it", index);
  if (bytes != net->out[index].bytes) return bnn_fail(net, BNN_SIZE, "output %d has %zu bytes, not %zu", index, net->out[index].bytes, bytes);
  return bnn_backend_output(net, index, data, bytes);
}

int bnn_output(bnn *net, int index, void *data, size_t bytes) {
  int status = enter(net);
  return status ? status : leave(net, copy_output(net, index, data, bytes));
}

const char *bnn_error(const bnn *net) { return net ? net->message : "no handle"; }

void bnn_close(bnn *net) {
  if (!net) return;
  bnn_backend_close(net);
  for (int i = 0; i < net->inputs; ++i) free(net->in[i].data);
  free(net);
}
