// What the launchers share: CUDA's errors as exceptions, the current device. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "queue.h"

namespace segmenter {
namespace cuda {

// std::runtime_error with CUDA's own words unless `status` is success.
inline void check(cudaError_t status, const char* where) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(where) + ": CUDA says \"" + cudaGetErrorString(status) +
                           "\" (" + cudaGetErrorName(status) + ")");
}

// Makes a device current, and afterwards again the one that was.
class OnDevice {
 public:
  OnDevice(int device, const char* where) : device_(device) {
    check(cudaGetDevice(&before_), where);
    if (before_ != device_) check(cudaSetDevice(device_), where);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_;
};

inline int device_attribute(cudaDeviceAttr attribute, int device, const char* where) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), where);
  return value;
}

// Beyond this much, shared memory has to be asked for.
constexpr int64_t kSharedMemoryForAll = 48 << 10;

template <typename Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes, const char* where) {
  if (bytes <= kSharedMemoryForAll) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        where);
}

inline cudaStream_t stream_of(const Queue& queue) {
  return reinterpret_cast<cudaStream_t>(queue.stream);
}

}  // namespace cuda
}  // namespace segmenter
