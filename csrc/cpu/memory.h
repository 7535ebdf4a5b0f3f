// Memory that starts at a cache line and is kept from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace segmenter {

class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
    other.bytes_ = 0;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  // Room for `count` values; what it held is lost when it must grow, and new memory is 0, so that
  // rows which nobody fills are numbers. std::bad_alloc where there is no more.
  template <typename T>
  T* room(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(kLine, bytes);
      if (!data_) throw std::bad_alloc();
      std::memset(data_, 0, bytes);
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kLine = 64;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace segmenter
