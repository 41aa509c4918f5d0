// Work split over a few threads that live as long as the work.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace qconv {

// Calls `work(first, last)` for parts of [0, count), whose bounds are multiples of `grain`. A part for which the system
// gives no thread is done by the caller.
template <class Work>
void in_parallel(int64_t count, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t parts = std::min<int64_t>(threads, grains);
  const auto bound = [=](int64_t part) { return std::min(count, grains * part / parts * grain); };
  std::vector<std::thread> others;
  others.reserve(size_t(std::max<int64_t>(parts, 1)));
  for (int64_t part = 1; part < parts; ++part) {
    try {
      others.emplace_back([&, part] { work(bound(part), bound(part + 1)); });
    } catch (const std::system_error&) {
      work(bound(part), bound(part + 1));
    }
  }
  if (parts > 0) work(0, bound(1));
  for (auto& other : others) other.join();
}

}  // namespace qconv
