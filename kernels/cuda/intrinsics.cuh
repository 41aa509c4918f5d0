// Every hardware instruction that the kernels use, one thin function each.
// For nvcc and NVRTC the bodies are inline PTX: no CUDA header is included, so NVRTC needs no include path.
// For other compilers they are those of the CPU emulator, with the same signatures.
#pragma once

#ifndef __CUDACC__
#include "../emulator/instructions.h"
#else

typedef unsigned int u32;
typedef unsigned long long u64;
struct alignas(8) u32x2 {
  u32 x, y;
};
struct alignas(16) u32x4 {
  u32 x, y, z, w;
};
struct alignas(16) f32x4 {
  float x, y, z, w;
};

#define QC_DEVICE __device__ __forceinline__
// An entry point. `shared_bytes` is what a launch must grant as dynamic shared memory; only the emulator reads it.
#define QC_KERNEL(name, threads, min_blocks, shared_bytes, Args) \
  extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const Args args)
// Bugs planted for the tests of the emulator's checks; they exist in its builds only.
#define QC_PLANTED(bug) false

// ---- shared memory: addresses are 32-bit offsets in the shared window ----

QC_DEVICE u32 shared_base() {
  extern __shared__ __align__(1024) unsigned char qc_shared[];
  return (u32)__cvta_generic_to_shared(qc_shared);
}

QC_DEVICE u32 load_shared_u32(u32 address) {
  u32 value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

QC_DEVICE u32x2 load_shared_u32x2(u32 address) {
  u32x2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

QC_DEVICE u32x4 load_shared_u32x4(u32 address) {
  u32x4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

QC_DEVICE f32x4 load_shared_f32x4(u32 address) {
  f32x4 v;
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

QC_DEVICE void store_shared_f32x4(u32 address, f32x4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// Copies 16 bytes from global to shared memory in the background; writes zeros where `valid` is false.
QC_DEVICE void copy_async_16(u32 shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

QC_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's newest groups of copies are still under way.
template <int PENDING>
QC_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

QC_DEVICE void sync_threads() { asm volatile("bar.sync 0;" ::: "memory"); }

// ---- global memory ----

QC_DEVICE int load_global_i32(const int* address) {
  int value;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

QC_DEVICE u32 load_global_u16(const void* address) {
  unsigned short value;
  asm volatile("ld.global.nc.b16 %0, [%1];" : "=h"(value) : "l"(address));
  return value;
}

QC_DEVICE u32x4 load_global_u32x4(const void* address) {
  u32x4 v;
  asm volatile("ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

QC_DEVICE f32x4 load_global_f32x4(const void* address) {
  f32x4 v;
  asm volatile("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(address));
  return v;
}

QC_DEVICE void store_global_u32x2(void* address, u32x2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(address), "r"(v.x), "r"(v.y) : "memory");
}

QC_DEVICE void store_global_u32x4(void* address, u32x4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

QC_DEVICE void store_global_f32x4(void* address, f32x4 v) {
  asm volatile("st.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// ---- tensor cores: d = a * b + c, a 16 x 16 row-major, b 16 x 8 column-major, f32 sums ----

#define QC_MMA(name, type)                                                                                       \
  QC_DEVICE void name(float (&d)[4], const u32(&a)[4], u32 b0, u32 b1, float c0, float c1, float c2, float c3) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                   \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                                         \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));     \
  }
QC_MMA(mma_f16, "f16")
QC_MMA(mma_bf16, "bf16")

// ---- bits and numbers ----

// Byte i of the result is byte SELECT[4i..4i+2] of the eight bytes low, high.
template <u32 SELECT>
QC_DEVICE u32 permute_bytes(u32 low, u32 high) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "n"(SELECT));
  return d;
}

template <u32 COUNT>
QC_DEVICE u32 rotate_right(u32 value) {
  u32 d;
  asm("shf.r.wrap.b32 %0, %1, %1, %2;" : "=r"(d) : "r"(value), "n"(COUNT));
  return d;
}

// (a & b) | c in one instruction.
QC_DEVICE u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

QC_DEVICE u32 add_f16x2(u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

QC_DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

QC_DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {  // sm_80 has no other bf16 arithmetic
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

QC_DEVICE u32 pack_f16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

QC_DEVICE u32 pack_bf16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The float16 number in the low 16 bits.
QC_DEVICE float float_from_f16(u32 bits) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((unsigned short)bits));
  return d;
}

QC_DEVICE float float_from_bits(u32 bits) {
  float d;
  asm("mov.b32 %0, %1;" : "=f"(d) : "r"(bits));
  return d;
}

// a * b + c and a * b, each rounded once; written out so that no compiler flag decides which of the two is used.
QC_DEVICE float fma_f32(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// Two of them: c0 = a0 * b0 + c0, c1 = a1 * b1 + c1. One instruction from sm_100 on, with the same results.
QC_DEVICE void fma_f32x2(float a0, float a1, float b0, float b1, float& c0, float& c1) {
#if __CUDA_ARCH__ >= 1000
  u64 a, b, c;
  asm("mov.b64 %0, {%1, %2};" : "=l"(a) : "f"(a0), "f"(a1));
  asm("mov.b64 %0, {%1, %2};" : "=l"(b) : "f"(b0), "f"(b1));
  asm("mov.b64 %0, {%1, %2};" : "=l"(c) : "f"(c0), "f"(c1));
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(c) : "l"(a), "l"(b), "l"(c));
  asm("mov.b64 {%0, %1}, %2;" : "=f"(c0), "=f"(c1) : "l"(c));
#else
  c0 = fma_f32(a0, b0, c0), c1 = fma_f32(a1, b1, c1);
#endif
}

QC_DEVICE float mul_f32(float a, float b) {
  float d;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

#endif
