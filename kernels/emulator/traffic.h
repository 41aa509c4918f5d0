// Traffic counters: lanes' accesses are gathered into warps' requests and counted in sectors and wavefronts.
#pragma once
#include <algorithm>
#include <tuple>

#include "machine.h"

namespace emu {

inline u32 site_id(Where where) {
  auto& files = machine.files;
  size_t index = 0;
  while (index < files.size() && files[index] != where.file) index++;
  if (index == files.size()) files.push_back(where.file);
  return static_cast<u32>(where.line + 65536 * index);
}

inline void log_access(bool global, bool store, uint64_t address, u32 size, Where where) {
  if (!machine.count_traffic) return;
  const u32 site = site_id(where);
  machine.accesses[current->warp].push_back(
      {site, 0, static_cast<uint8_t>(current->lane), static_cast<uint8_t>(size), global, store, address});
}

// Shared memory serves 128 bytes at a time: 32 lanes of 4 bytes, 16 of 8, or 8 of 16. Each such phase takes as many
// wavefronts as the most different words that it wants of one bank.
inline void count_shared(Site& site, const uint64_t* addresses, int lanes, u32 size) {
  const int lanes_per_phase = 128 / std::max(size, 4u);
  const u32 words_per_lane = std::max(1u, size / 4);
  std::vector<u64> distinct;
  for (int first = 0; first < lanes; first += lanes_per_phase) {
    std::vector<u64> banks[32];
    size_t worst = 1;
    for (int lane = first; lane < std::min(lanes, first + lanes_per_phase); lane++)
      for (u32 i = 0; i < words_per_lane; i++) {
        const u64 word = addresses[lane] / 4 + i;
        auto& bank = banks[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word), distinct.push_back(word);
        worst = std::max(worst, bank.size());
      }
    site.units += worst, site.phases++;
  }
  std::sort(distinct.begin(), distinct.end());
  const size_t words = std::unique(distinct.begin(), distinct.end()) - distinct.begin();
  site.ideal += std::max<size_t>(1, (words + 31) / 32);
}

inline void count_global(Site& site, const uint64_t* addresses, int lanes, u32 size) {
  std::vector<u64> sectors, bytes;
  for (int lane = 0; lane < lanes; lane++)
    for (u32 i = 0; i < size; i += 2)
      sectors.push_back((addresses[lane] + i) / 32), bytes.push_back((addresses[lane] + i) / 2);
  std::sort(sectors.begin(), sectors.end());
  std::sort(bytes.begin(), bytes.end());
  site.units += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  site.ideal += ((std::unique(bytes.begin(), bytes.end()) - bytes.begin()) * 2 + 31) / 32;
}

// Makes requests of what a warp's lanes did since they last met: an instruction's nth executions belong together.
inline void flush_accesses(u32 warp) {
  auto& log = machine.accesses[warp];
  if (log.empty()) return;
  std::map<std::pair<u32, bool>, u32> seen;
  int lane = -1;
  for (Access& access : log) {  // a lane runs until the warp meets, so its accesses are neighbours
    if (access.lane != lane) seen.clear(), lane = access.lane;
    access.occurrence = seen[{access.site, access.global}]++;
  }
  const auto key = [](const Access& a) { return std::tuple(a.site, a.occurrence, a.global, a.store); };
  std::stable_sort(log.begin(), log.end(), [&](const Access& a, const Access& b) {
    return std::tuple_cat(key(a), std::tuple(a.lane)) < std::tuple_cat(key(b), std::tuple(b.lane));
  });
  for (size_t first = 0, next; first < log.size(); first = next) {
    uint64_t addresses[32];
    int lanes = 0;
    for (next = first; next < log.size() && lanes < 32 && key(log[next]) == key(log[first]); next++)
      addresses[lanes++] = log[next].address;
    const Access& access = log[first];
    const char* kind =
        access.global ? (access.store ? "st.global" : "ld.global") : (access.store ? "st.shared" : "ld.shared");
    Site& site = machine.sites[{kind, access.site}];
    site.requests++, site.lanes += lanes;
    if (access.global)
      count_global(site, addresses, lanes, access.size);
    else
      count_shared(site, addresses, lanes, access.size);
  }
  log.clear();
}

}  // namespace emu
