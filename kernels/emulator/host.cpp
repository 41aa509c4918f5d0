// The emulator as a shared library, for ctypes. QC_SOURCE names the .cu file to run.
// g++ -std=c++20 -O2 -march=x86-64-v3 -fPIC -shared -DQC_SOURCE='"../cuda/awq.cu"' host.cpp
#include QC_SOURCE

#include <sstream>

using emu::machine;

namespace {

std::string text;  // keeps what was last returned

std::string quoted(const std::string& value) { return '"' + value + '"'; }

template <class Range, class Print>
void list(std::ostream& out, const Range& range, Print print) {
  const char* separator = "";
  for (const auto& element : range) out << separator, print(element), separator = ", ";
}

emu::Bug bug_of(const std::string& name) {
#define QC_BUG_IS(bug) \
  if (name == #bug) return emu::Bug::bug;
  QC_BUGS(QC_BUG_IS)
#undef QC_BUG_IS
  return emu::Bug::NONE;
}

}  // namespace

extern "C" {

// Forgets all buffers and results. schedule: 0 forward, 1 backward, 2 random with `seed`.
// Returns 1 if there is no bug of that name.
int emulator_reset(int schedule, u64 seed, int count_traffic, int check, const char* bug) {
  machine.buffers.clear(), machine.sites.clear(), machine.executed.clear(), machine.errors.clear();
  machine.error_count = 0, machine.last_buffer = 0;
  machine.schedule = static_cast<emu::Schedule>(schedule);
  machine.random = 88172645463325252ull ^ (seed * 0x9E3779B97F4A7C15ull);
  machine.count_traffic = count_traffic, machine.check = check;
  emu::planted = bug_of(bug);
  return *bug && emu::planted == emu::Bug::NONE;
}

// Makes memory known as one allocation; every access outside of all of them is an error.
void emulator_buffer(const char* name, void* base, u64 bytes, int writable) {
  machine.buffers.push_back({name, reinterpret_cast<uint64_t>(base), bytes, writable != 0,
                             std::vector<uint64_t>(bytes / 32 / 64 + 2),
                             std::vector<u32>(writable ? bytes / 4 + 1 : 0)});
}

// Returns the number of errors, or -1 if there is no such kernel or its arguments are of another size.
long long emulator_launch(const char* name, u32 x, u32 y, u32 z, const void* args, u32 argument_bytes) {
  const auto found = emu::kernels().find(name);
  if (found == emu::kernels().end() || found->second.argument_bytes != argument_bytes) return -1;
  const emu::Kernel& kernel = found->second;
  emu::launch({x, y, z}, kernel.threads, kernel.shared_bytes, [&] { kernel.run(args); });
  return static_cast<long long>(machine.error_count);
}

// JSON: name -> [threads, bytes of shared memory, bytes of arguments].
const char* emulator_kernels() {
  std::ostringstream out;
  out << '{';
  list(out, emu::kernels(), [&](const auto& kernel) {
    out << quoted(kernel.first) << ": [" << kernel.second.threads << ", " << kernel.second.shared_bytes << ", "
        << kernel.second.argument_bytes << ']';
  });
  out << '}';
  text = out.str();
  return text.c_str();
}

// JSON: error_count, errors, executed, sites [kind, file, line, requests, lanes, units, ideal, phases], touched bytes
// by buffer.
const char* emulator_report() {
  std::ostringstream out;
  out << "{\"error_count\": " << machine.error_count << ", \"errors\": [";
  list(out, machine.errors, [&](const std::string& error) { out << quoted(error); });
  out << "], \"executed\": {";
  list(out, machine.executed, [&](const auto& count) { out << quoted(count.first) << ": " << count.second; });
  out << "}, \"sites\": [";
  list(out, machine.sites, [&](const auto& entry) {
    const u32 id = entry.first.second;
    const emu::Site& site = entry.second;
    out << '[' << quoted(entry.first.first) << ", " << quoted(emu::base_name(machine.files[id / 65536])) << ", "
        << id % 65536 << ", " << site.requests << ", " << site.lanes << ", " << site.units << ", " << site.ideal << ", "
        << site.phases << ']';
  });
  out << "], \"touched\": {";
  list(out, machine.buffers, [&](const emu::Buffer& buffer) {
    u64 sectors = 0;
    for (const uint64_t bits : buffer.touched) sectors += __builtin_popcountll(bits);
    out << quoted(buffer.name) << ": " << sectors * 32;
  });
  out << "}}";
  text = out.str();
  return text.c_str();
}
}
