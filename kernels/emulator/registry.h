// The entry points of the kernels that were compiled in, by name.
#pragma once
#include <map>
#include <string>

#include "numbers.h"

namespace emu {

struct Kernel {
  u32 threads, shared_bytes, argument_bytes;
  void (*run)(const void* args);
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

struct Registration {
  Registration(const char* name, u32 threads, u32 shared_bytes, u32 argument_bytes, void (*run)(const void*)) {
    kernels()[name] = {threads, shared_bytes, argument_bytes, run};
  }
};

}  // namespace emu
