// Memory for intermediate results, kept from call to call: fresh pages cost more than filling them does.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace qconv {

// Uninitialized memory at a cache line's start, from what earlier buffers gave back where that suits.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : block_(take((bytes + 4095) / 4096 * 4096)) {}
  Buffer(Buffer&& other) noexcept : block_(other.block_) { other.block_ = {}; }
  Buffer(const Buffer&) = delete;
  ~Buffer() { give_back(block_); }

  template <class Element>
  Element* as() const {
    return static_cast<Element*>(block_.at);
  }

 private:
  static constexpr size_t kKept = size_t(1) << 26;

  struct Block {
    void* at = nullptr;
    size_t bytes = 0;
  };

  struct Shelf {
    std::mutex lock;
    std::vector<Block> blocks;
    size_t bytes = 0;
  };

  static Shelf& shelf() {
    static auto* kept = new Shelf;  // never destroyed: threads may outlive static objects
    return *kept;
  }

  static Block take(size_t bytes) {
    Shelf& s = shelf();
    {
      const std::lock_guard<std::mutex> guard(s.lock);
      size_t best = s.blocks.size();
      for (size_t i = 0; i < s.blocks.size(); ++i) {
        const bool suits = s.blocks[i].bytes >= bytes && s.blocks[i].bytes / 4 <= bytes;
        if (suits && (best == s.blocks.size() || s.blocks[i].bytes < s.blocks[best].bytes)) best = i;
      }
      if (best < s.blocks.size()) {
        const Block found = s.blocks[best];
        s.blocks.erase(s.blocks.begin() + std::ptrdiff_t(best));
        s.bytes -= found.bytes;
        return found;
      }
    }
    void* const at = std::aligned_alloc(4096, bytes);
    if (!at) std::abort();
    return {at, bytes};
  }

  static void give_back(Block block) {
    if (!block.at) return;
    Shelf& s = shelf();
    std::vector<Block> dropped;
    {
      const std::lock_guard<std::mutex> guard(s.lock);
      s.blocks.push_back(block);
      s.bytes += block.bytes;
      while (s.bytes > kKept) {  // the oldest first
        s.bytes -= s.blocks.front().bytes;
        dropped.push_back(s.blocks.front());
        s.blocks.erase(s.blocks.begin());
      }
    }
    for (const Block& each : dropped) std::free(each.at);
  }

  Block block_;
};

}  // namespace qconv
