// What the tensor cores do with bits when nothing else is in the way: products of registers, or of shared memory that is never written.
#include <cstdint>

constexpr int STEPS = 2048;

// mma: eight independent sums of 16 x 8, so that none waits for the last one. 2 * 16 * 8 * 256 operations each.
extern "C" __global__ void __launch_bounds__(128) limit_mma(unsigned* out) {
#if __CUDA_ARCH__ >= 800
  int sums[8][4] = {};
  unsigned a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = threadIdx.x * 2654435761u + i;
  for (int i = 0; i < 2; ++i) b[i] = threadIdx.x * 40503u + i;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+r"(sums[j][0]), "+r"(sums[j][1]), "+r"(sums[j][2]), "+r"(sums[j][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  int total = 0;
  for (int j = 0; j < 8; ++j) for (int i = 0; i < 4; ++i) total += sums[j][i];
  if (total == 42) out[0] = total;
#endif
}

// wgmma: one sum of 64 x 256 for each warpgroup, data and weights in shared memory without swizzle. 2 * 64 * 256 * 256 operations each.
extern "C" __global__ void __launch_bounds__(256) limit_wgmma(unsigned* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ alignas(1024) unsigned tile[(64 + 256) * 8];
  for (int i = threadIdx.x; i < (64 + 256) * 8; i += blockDim.x) tile[i] = i * 2654435761u;
  __syncthreads();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  unsigned base = (unsigned)__cvta_generic_to_shared(tile);
  // Descriptor: address, and how far apart groups of 8 x 16 bytes lie along K and along rows, all in units of 16 bytes.
  auto descriptor = [](unsigned address) { return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(128 >> 4) << 16 | (uint64_t)(256 >> 4) << 32; };
  uint64_t a = descriptor(base), b = descriptor(base + 64 * 32);
  int d[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) d[i] = 0;
#define R4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define R64(i) R16(i), R16(i + 16), R16(i + 32), R16(i + 48)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll 1
  for (int step = 0; step < STEPS / 8; ++step) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
      "%122,%123,%124,%125,%126,%127}, %128, %129, 1;"
      : R64(0), R64(64) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  int total = 0;
#pragma unroll
  for (int i = 0; i < 128; ++i) total += d[i];
  if (total == 42) out[0] = total;
#endif
}

// CUDA cores: xor, population count and addition of words in registers. 2 * 32 operations a word.
extern "C" __global__ void __launch_bounds__(256) limit_cores(unsigned* out) {
  unsigned x = threadIdx.x * 2654435761u, sums[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) sums[j] = j;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    x += 0x9E3779B9u;
#pragma unroll
    for (int j = 0; j < 16; ++j) sums[j] += __popc(x ^ (sums[j] + j));
  }
  unsigned total = 0;
  for (int j = 0; j < 16; ++j) total += sums[j];
  if (total == 42) out[0] = total;
}

// float32 fused multiply-adds in registers. 2 operations each.
extern "C" __global__ void __launch_bounds__(256) limit_fma(unsigned* out) {
  float x = threadIdx.x, sums[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) sums[j] = j;
#pragma unroll 1
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int j = 0; j < 16; ++j) sums[j] = __fmaf_rn(sums[j], 0.5f, x);
  float total = 0;
  for (int j = 0; j < 16; ++j) total += sums[j];
  if (total == 42.f) out[0] = 1;
}
