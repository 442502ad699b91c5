/* A QEMU plugin: which blocks the emulated program executes and how often, on standard error at its end: address, instructions, times.
 *
 * The declarations below are those of QEMU's plugin interface, version 1 (docs/devel/tcg-plugins in QEMU's source).
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t Id;
struct qemu_plugin_tb;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_trans_cb(Id id, void (*call)(Id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation, void *counter, uint64_t add);
void qemu_plugin_register_atexit_cb(Id id, void (*call)(Id, void *), void *data);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

#define BLOCKS 65536
static struct {
  uint64_t address, instructions, times;
} blocks[BLOCKS];
static size_t count;

static void translated(Id id, struct qemu_plugin_tb *block) {
  (void)id;
  if (count == BLOCKS) return;
  blocks[count].address = qemu_plugin_tb_vaddr(block);
  blocks[count].instructions = qemu_plugin_tb_n_insns(block);
  qemu_plugin_register_vcpu_tb_exec_inline(block, 0, &blocks[count++].times, 1);
}

static void finish(Id id, void *data) {
  (void)id, (void)data;
  if (count == BLOCKS) fputs("too many blocks\n", stderr);
  for (size_t i = 0; i < count; ++i)
    if (blocks[i].times)
      fprintf(stderr, "block %" PRIx64 " %" PRIu64 " %" PRIu64 "\n", blocks[i].address, blocks[i].instructions, blocks[i].times);
}

__attribute__((visibility("default"))) int qemu_plugin_install(Id id, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finish, NULL);
  return 0;
}
