// The emulated machine: buffers in global memory, the block that is running, its threads, its shared memory.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "fiber.h"
#include "numbers.h"

namespace emu {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Where in the kernels' sources an instruction stands.
struct Where {
  const char* file;
  int line;
};
#define QC_HERE emu::Where where = {__builtin_FILE(), __builtin_LINE()}

struct Buffer {
  std::string name;
  uint64_t base, bytes;
  bool writable;
  std::vector<uint64_t> touched;  // a bit for every 32-byte sector
  std::vector<u32> writer;        // which thread wrote a 4-byte word; 0: none
};

// What one instruction of the source did, summed over all warps.
struct Site {
  u64 requests = 0;  // by warps
  u64 lanes = 0;     // lanes that took part
  u64 units = 0;     // 32-byte sectors of global memory, or wavefronts of shared memory
  u64 ideal = 0;     // the fewest units that could have carried the same bytes
  u64 phases = 0;    // of shared memory: the units had there been no bank conflicts
};

struct Copy {  // an asynchronous copy that has not landed
  u32 shared;
  unsigned char bytes[16];
};

enum class State : uint8_t { READY, AT_WARP_INSTRUCTION, AT_BARRIER, DONE };

struct Thread {
  Fiber fiber;
  State state = State::DONE;
  Dim index;
  u32 flat = 0, lane = 0, warp = 0;
  Where where{"", 0};
  const char* operation = nullptr;          // the warp instruction it waits at, ...
  void (*execute)(void** lanes) = nullptr;  // ... what that does once all lanes have come ...
  void* argument = nullptr;                 // ... and this lane's part
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
};

// What is known of 4 bytes of shared memory.
struct Word {
  u32 write_epoch = 0, read_epoch = 0, readers = 0;  // readers: a bit for every warp
  int16_t last_writer = -1, last_reader = -1;
  bool initialised = false, in_flight = false;
};

struct Access {
  u32 site, occurrence;
  uint8_t lane, size;
  bool global, store;
  uint64_t address;
};

// How threads are interleaved: warps in order, in reverse order, or at random with preemption.
enum class Schedule : int { FORWARD, BACKWARD, RANDOM };

struct Machine {
  Dim grid, block, block_index;
  u32 threads_per_block = 0, warps = 0, epoch = 1, flat_block = 0;  // epoch: counts the block's barriers
  bool dead = false;                                                // the block cannot go on
  std::vector<Thread> threads;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  u32 shared_bytes = 0;
  std::vector<Word> words;
  std::vector<Buffer> buffers;
  size_t last_buffer = 0;
  const std::function<void()>* body = nullptr;

  std::vector<const char*> files;  // of sites: site = line + 65536 * index of the file
  std::vector<std::vector<Access>> accesses;
  std::map<std::pair<std::string, u32>, Site> sites;
  std::map<std::string, u64> executed;
  std::vector<std::string> errors;
  u64 error_count = 0;

  Schedule schedule = Schedule::FORWARD;
  u64 random = 1;
  bool count_traffic = true, check = true;
};

inline Machine machine;
inline Thread* current = nullptr;

inline u32 random_u32() {  // xorshift64
  u64& state = machine.random;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<u32>(state >> 32);
}

inline const char* base_name(const char* path) {
  const char* slash = __builtin_strrchr(path, '/');
  return slash ? slash + 1 : path;
}

__attribute__((noinline)) inline void error(const char* what, Where where, uint64_t address = 0) {
  enum { KEPT = 20 };
  if (machine.error_count++ >= KEPT) return;
  char text[256];
  snprintf(text, sizeof text, "%s (%s:%d, block %u,%u,%u, thread %u, address %llx)", what, base_name(where.file),
           where.line, machine.block_index.x, machine.block_index.y, machine.block_index.z, current ? current->flat : 0,
           static_cast<u64>(address));
  machine.errors.push_back(text);
}

}  // namespace emu
