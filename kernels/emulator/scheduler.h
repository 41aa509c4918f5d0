// Runs grids: one fiber for every thread of a block, blocks one after the other.
#pragma once
#include <algorithm>

#include "checks.h"
#include "traffic.h"

namespace emu {

inline void thread_entry() {
  (*machine.body)();
  bool in_flight = !current->open.empty();
  for (const auto& group : current->committed) in_flight |= !group.empty();
  if (in_flight) error("thread ends with copies in flight", current->where);
  current->state = State::DONE;
  current->fiber.suspend();
  abort();
}

// Called by a thread: waits until all lanes of its warp have come to the same instruction and it has been executed.
inline void warp_instruction(const char* operation, void (*execute)(void**), void* argument, Where where) {
  Thread& me = *current;
  me.operation = operation, me.execute = execute, me.argument = argument, me.where = where;
  me.state = State::AT_WARP_INSTRUCTION;
  me.fiber.suspend();
}

inline void barrier(Where where) {
  current->where = where;
  current->state = State::AT_BARRIER;
  current->fiber.suspend();
}

// Runs a warp until all of its lanes wait at a barrier or are done, or until it is preempted.
inline void run_warp(u32 warp) {
  const u32 first = warp * 32, lanes = std::min(32u, machine.threads_per_block - first);
  for (;;) {
    for (u32 i = 0; i < lanes; i++) {
      Thread& thread = machine.threads[first + (machine.schedule == Schedule::BACKWARD ? lanes - 1 - i : i)];
      if (thread.state != State::READY) continue;
      current = &thread;
      thread.fiber.resume();
      current = nullptr;
    }
    flush_accesses(warp);
    u32 waiting = 0;
    Thread* leader = nullptr;
    bool same = true;
    for (u32 i = 0; i < lanes; i++) {
      Thread& thread = machine.threads[first + i];
      if (thread.state != State::AT_WARP_INSTRUCTION) continue;
      waiting++;
      if (!leader) leader = &thread;
      same &= thread.where.line == leader->where.line && thread.execute == leader->execute;
    }
    if (!waiting) return;
    if (waiting != lanes || !same) {
      current = leader;
      error("synccheck: a warp instruction is reached by a part of the warp only", leader->where);
      current = nullptr, machine.dead = true;
      return;
    }
    void* arguments[32] = {};
    for (u32 i = 0; i < lanes; i++) arguments[i] = machine.threads[first + i].argument;
    machine.executed[leader->operation]++;
    current = leader;
    leader->execute(arguments);
    current = nullptr;
    for (u32 i = 0; i < lanes; i++) machine.threads[first + i].state = State::READY;
    if (machine.schedule == Schedule::RANDOM && random_u32() % 4 == 0) return;
  }
}

inline void start_block() {
  for (u32 i = 0; i < machine.threads_per_block; i++) {
    Thread& thread = machine.threads[i];
    thread.fiber.start(thread_entry);
    thread.state = State::READY;
    thread.open.clear(), thread.committed.clear();
    thread.flat = i, thread.lane = i % 32, thread.warp = i / 32, thread.index = {i, 0, 0};
  }
  memset(machine.shared, 0xFF, machine.shared_bytes);  // a NaN in every type that the kernels use
  std::fill(machine.words.begin(), machine.words.end(), Word());
  machine.epoch = 1, machine.dead = false;
}

inline void run_block() {
  start_block();
  for (;;) {
    for (u32 i = 0; i < machine.warps && !machine.dead; i++)
      run_warp(machine.schedule == Schedule::FORWARD    ? i
               : machine.schedule == Schedule::BACKWARD ? machine.warps - 1 - i
                                                        : random_u32() % machine.warps);
    if (machine.dead) return;
    u32 at_barrier = 0, done = 0;
    for (const Thread& thread : machine.threads)
      at_barrier += thread.state == State::AT_BARRIER, done += thread.state == State::DONE;
    if (done == machine.threads_per_block) return;
    if (at_barrier + done < machine.threads_per_block) continue;
    // bar.sync counts the threads that have not exited; waiting at different barriers, or for threads that have gone,
    // is a bug.
    const Thread* waiting = nullptr;
    for (Thread& thread : machine.threads) {
      if (thread.state != State::AT_BARRIER) continue;
      if (waiting && (thread.where.line != waiting->where.line || thread.where.file != waiting->where.file))
        error("synccheck: threads of a block wait at different barriers", thread.where);
      waiting = &thread;
    }
    if (done) error("synccheck: a barrier after some threads have ended", waiting->where);
    machine.executed["bar.sync"]++, machine.epoch++;
    for (Thread& thread : machine.threads)
      if (thread.state == State::AT_BARRIER) thread.state = State::READY;
  }
}

inline void launch(Dim grid, u32 threads, u32 shared_bytes, const std::function<void()>& body) {
  machine.grid = grid, machine.block = {threads, 1, 1}, machine.body = &body;
  machine.threads_per_block = threads, machine.warps = (threads + 31) / 32;
  machine.threads.resize(threads);
  machine.accesses.assign(machine.warps, {});
  machine.shared_bytes = shared_bytes;
  machine.memory.resize(shared_bytes + 1024);
  machine.shared =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(machine.memory.data()) + 1023) & ~uintptr_t(1023));
  machine.words.assign(shared_bytes / 4 + 1, Word());
  const u32 blocks = grid.x * grid.y * grid.z;
  for (u32 i = 0; i < blocks; i++) {
    machine.flat_block = machine.schedule == Schedule::BACKWARD ? blocks - 1 - i : i;
    machine.block_index = {machine.flat_block % grid.x, machine.flat_block / grid.x % grid.y,
                           machine.flat_block / (grid.x * grid.y)};
    run_block();
  }
}

}  // namespace emu
