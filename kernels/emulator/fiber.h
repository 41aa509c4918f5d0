// Switching between the stacks of emulated threads: x86-64, System V calling convention.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

extern "C" void qc_switch_stack(void** save, void* load);
asm(R"(.text
.weak qc_switch_stack
.type qc_switch_stack,@function
qc_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emu {

class Fiber {
 public:
  // Sets the fiber to run `entry`, which must never return, from its beginning at the next resume.
  void start(void (*entry)()) {
    if (!stack_) {
      void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) abort();
      stack_ = static_cast<unsigned char*>(memory);
    }
    void** top = reinterpret_cast<void**>(stack_ + BYTES - 56);  // the stack pointer is 8 mod 16 when a function begins
    *--top = reinterpret_cast<void*>(entry);
    saved_ = top - 6;
  }
  void resume() { qc_switch_stack(&caller_, saved_); }
  void suspend() { qc_switch_stack(&saved_, caller_); }

 private:
  enum : size_t { BYTES = 64 << 10 };
  unsigned char* stack_ = nullptr;  // kept for the life of the process
  void* saved_ = nullptr;
  void* caller_ = nullptr;
};

}  // namespace emu
