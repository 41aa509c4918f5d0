// The checkers: bounds and alignment (memcheck), reads of what nobody wrote (initcheck), unordered accesses of two
// threads to one word (racecheck). Barriers that not all threads reach (synccheck) are the scheduler's to find.
#pragma once
#include <algorithm>

#include "machine.h"

namespace emu {

inline bool check_global(const void* pointer, u32 size, bool write, Where where) {
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  if (address % size) error("misaligned global access", where, address);
  for (size_t tried = 0; tried < machine.buffers.size(); tried++) {
    Buffer& buffer = machine.buffers[machine.last_buffer];
    if (address < buffer.base || address + size > buffer.base + buffer.bytes) {
      machine.last_buffer = (machine.last_buffer + 1) % machine.buffers.size();
      continue;
    }
    const uint64_t offset = address - buffer.base;
    for (uint64_t sector = offset / 32; sector <= (offset + size - 1) / 32; sector++)
      buffer.touched[sector / 64] |= 1ull << (sector % 64);
    if (!write) return true;
    if (!buffer.writable) {
      error("write to a read-only buffer", where, offset);
      return false;
    }
    const u32 me = machine.flat_block * 1024 + current->flat + 1;
    for (u32 i = 0; i < size; i += 4) {
      u32& writer = buffer.writer[(offset + i) / 4];
      if (writer && writer != me) error("global race: two threads write one word", where, offset);
      writer = me;
    }
    return true;
  }
  error(write ? "global write out of bounds" : "global read out of bounds", where, address);
  return false;
}

// Whether what thread `other` did in barrier interval `epoch` is ordered before what the current thread does now.
inline bool ordered(int other, u32 epoch) { return other == static_cast<int>(current->flat) || epoch < machine.epoch; }

// `starts_copy`: the write of an asynchronous copy when it is issued, which may find another copy under way.
inline bool check_shared(u32 address, u32 size, bool write, Where where, bool starts_copy = false) {
  if (address % size) {
    error("misaligned shared access", where, address);
    return false;
  }
  if (static_cast<u64>(address) + size > machine.shared_bytes) {
    error("shared access out of bounds", where, address);
    return false;
  }
  if (!machine.check) return true;
  for (u32 index = address / 4; index < (address + size) / 4; index++) {
    Word& word = machine.words[index];
    if (word.in_flight && !starts_copy) {
      error("shared access to a copy still in flight", where, address);
      continue;
    }
    if (word.last_writer >= 0 && !ordered(word.last_writer, word.write_epoch))
      error(write ? "shared race: write after unordered write" : "shared race: read after unordered write", where,
            address);
    if (write) {
      const bool read_now = word.read_epoch == machine.epoch;
      const bool by_others =
          word.readers & ~(1u << current->warp) || word.last_reader != static_cast<int>(current->flat);
      if (read_now && by_others) error("shared race: write after unordered read", where, address);
      word.last_writer = static_cast<int16_t>(current->flat), word.write_epoch = machine.epoch, word.initialised = true;
    } else {
      if (!word.initialised) error("read of uninitialised shared memory", where, address);
      if (word.read_epoch != machine.epoch) word.read_epoch = machine.epoch, word.readers = 0;
      word.readers |= 1u << current->warp, word.last_reader = static_cast<int16_t>(current->flat);
    }
  }
  return true;
}

}  // namespace emu
