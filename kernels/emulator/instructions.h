// The emulator's bodies of the functions of cuda/intrinsics.cuh: the same signatures, and the caller's place in the
// source.
#pragma once
#include "planted.h"
#include "registry.h"
#include "scheduler.h"

struct alignas(8) u32x2 {
  u32 x, y;
};
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};
struct alignas(16) f32x4 {
  float x, y, z, w;
};

#define QC_DEVICE inline __attribute__((always_inline))
#define QC_KERNEL(name, threads, min_blocks, shared_bytes, Args)                                                       \
  static void name(const Args args);                                                                                   \
  static const emu::Registration name##_registration(#name, threads, shared_bytes, sizeof(Args),                       \
                                                     [](const void* args) { name(*static_cast<const Args*>(args)); }); \
  static void name(const Args args)

#define threadIdx (emu::current->index)
#define blockIdx (emu::machine.block_index)
#define gridDim (emu::machine.grid)
#define blockDim (emu::machine.block)

// ---- shared memory ----

inline u32 shared_base() { return 0; }

namespace emu {
template <class T>
T load_shared(u32 address, Where where) {
  T value;
  memset(&value, 0xFF, sizeof value);
  log_access(false, false, address, sizeof value, where);
  if (check_shared(address, sizeof value, false, where)) memcpy(&value, machine.shared + address, sizeof value);
  return value;
}
}  // namespace emu

inline u32 load_shared_u32(u32 address, QC_HERE) { return emu::load_shared<u32>(address, where); }
inline u32x2 load_shared_u32x2(u32 address, QC_HERE) { return emu::load_shared<u32x2>(address, where); }
inline u32x4 load_shared_u32x4(u32 address, QC_HERE) { return emu::load_shared<u32x4>(address, where); }
inline f32x4 load_shared_f32x4(u32 address, QC_HERE) { return emu::load_shared<f32x4>(address, where); }
inline void store_shared_f32x4(u32 address, f32x4 value, QC_HERE) {
  emu::log_access(false, true, address, sizeof value, where);
  if (emu::check_shared(address, sizeof value, true, where))
    memcpy(emu::machine.shared + address, &value, sizeof value);
}

// The bytes are read now and written when the copy is waited for; until then the target is poisoned. So both a read
// that comes too early and an overwritten tile that is still in use show.
inline void copy_async_16(u32 shared, const void* global, bool valid, QC_HERE) {
  emu::Copy copy{shared, {}};
  if (valid && emu::check_global(global, 16, false, where)) {
    memcpy(copy.bytes, global, 16);
    emu::log_access(true, false, reinterpret_cast<uint64_t>(global), 16, where);
  }
  if (!emu::check_shared(shared, 16, true, where, true)) return;
  emu::log_access(false, true, shared, 16, where);
  memset(emu::machine.shared + shared, 0xFF, 16);
  for (u32 i = 0; i < 4; i++) emu::machine.words[shared / 4 + i].in_flight = true;
  emu::current->open.push_back(copy);
}

inline void copy_async_commit() {
  emu::current->committed.push_back(std::move(emu::current->open));
  emu::current->open.clear();
}

template <int PENDING>
inline void copy_async_wait(QC_HERE) {
  auto& groups = emu::current->committed;
  for (; groups.size() > PENDING; groups.erase(groups.begin()))
    for (const emu::Copy& copy : groups.front()) {
      for (u32 i = 0; i < 4; i++) emu::machine.words[copy.shared / 4 + i].in_flight = false;
      if (emu::check_shared(copy.shared, 16, true, where)) memcpy(emu::machine.shared + copy.shared, copy.bytes, 16);
    }
}

inline void sync_threads(QC_HERE) { emu::barrier(where); }

// ---- global memory ----

namespace emu {
template <class T>
T load_global(const void* address, Where where) {
  T value{};
  log_access(true, false, reinterpret_cast<uint64_t>(address), sizeof value, where);
  if (check_global(address, sizeof value, false, where)) memcpy(&value, address, sizeof value);
  return value;
}
template <class T>
void store_global(void* address, T value, Where where) {
  log_access(true, true, reinterpret_cast<uint64_t>(address), sizeof value, where);
  if (check_global(address, sizeof value, true, where)) memcpy(address, &value, sizeof value);
}
}  // namespace emu

inline int load_global_i32(const int* address, QC_HERE) { return emu::load_global<int>(address, where); }
inline u32 load_global_u16(const void* address, QC_HERE) { return emu::load_global<uint16_t>(address, where); }
inline u32x4 load_global_u32x4(const void* address, QC_HERE) { return emu::load_global<u32x4>(address, where); }
inline f32x4 load_global_f32x4(const void* address, QC_HERE) { return emu::load_global<f32x4>(address, where); }
inline void store_global_u32x2(void* address, u32x2 value, QC_HERE) { emu::store_global(address, value, where); }
inline void store_global_u32x4(void* address, u32x4 value, QC_HERE) { emu::store_global(address, value, where); }
inline void store_global_f32x4(void* address, f32x4 value, QC_HERE) { emu::store_global(address, value, where); }

// ---- tensor cores ----

namespace emu {
struct MmaLane {
  float* d;
  const u32* a;
  u32 b[2];
  float c[4];
};

// Fragments of mma.m16n8k16 as the PTX ISA gives them, with g = lane / 4 and t = lane % 4. The order in which real
// tensor cores add is not specified; here it is that of k.
template <class Number>
void mma(void** lanes) {
  alignas(32) float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const MmaLane& part = *static_cast<const MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 2; half++)
        a[g + (i & 1) * 8][t * 2 + half + (i >> 1) * 8] = Number::load(part.a[i] >> (16 * half) & 0xFFFF);
    for (int i = 0; i < 2; i++)
      for (int half = 0; half < 2; half++) b[t * 2 + half + i * 8][g] = Number::load(part.b[i] >> (16 * half) & 0xFFFF);
    for (int i = 0; i < 4; i++) c[g + (i >> 1) * 8][t * 2 + (i & 1)] = part.c[i];
  }
  for (int row = 0; row < 16; row++) {
    __m256 sums = _mm256_load_ps(c[row]);
    for (int k = 0; k < 16; k++) sums = _mm256_fmadd_ps(_mm256_set1_ps(a[row][k]), _mm256_load_ps(b[k]), sums);
    _mm256_store_ps(c[row], sums);
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      static_cast<MmaLane*>(lanes[lane])->d[i] = c[lane / 4 + (i >> 1) * 8][lane % 4 * 2 + (i & 1)];
}
}  // namespace emu

inline void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1, float c2, float c3, QC_HERE) {
  emu::MmaLane lane{d, a, {b0, b1}, {c0, c1, c2, c3}};
  emu::warp_instruction("mma.m16n8k16.f16", emu::mma<emu::Half>, &lane, where);
}
inline void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, float c0, float c1, float c2, float c3,
                     QC_HERE) {
  emu::MmaLane lane{d, a, {b0, b1}, {c0, c1, c2, c3}};
  emu::warp_instruction("mma.m16n8k16.bf16", emu::mma<emu::Bfloat>, &lane, where);
}

// ---- bits and numbers ----

template <u32 SELECT>
inline u32 permute_bytes(u32 low, u32 high) {
  static_assert(!(SELECT & 0x8888), "replication of signs is not emulated");
  const u64 bytes = low | static_cast<u64>(high) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<u32>(bytes >> (8 * (SELECT >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}
template <u32 COUNT>
inline u32 rotate_right(u32 value) {
  return value >> COUNT | value << (32 - COUNT);
}
inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
inline u32 add_f16x2(u32 a, u32 b) { return emu::fma_pair<emu::Half>(a, 0x3C003C00u, b); }
inline u32 fma_f16x2(u32 a, u32 b, u32 c) { return emu::fma_pair<emu::Half>(a, b, c); }
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) { return emu::fma_pair<emu::Bfloat>(a, b, c); }
inline u32 pack_f16x2(float low, float high) { return emu::pack_pair<emu::Half>(low, high); }
inline u32 pack_bf16x2(float low, float high) { return emu::pack_pair<emu::Bfloat>(low, high); }
inline float float_from_f16(u32 bits) { return emu::Half::load(bits); }
inline float float_from_bits(u32 bits) { return emu::float_of(bits); }
inline float fma_f32(float a, float b, float c) { return std::fma(a, b, c); }
inline void fma_f32x2(float a0, float a1, float b0, float b1, float& c0, float& c1) {
  c0 = fma_f32(a0, b0, c0), c1 = fma_f32(a1, b1, c1);
}
inline float mul_f32(float a, float b) { return a * b; }
