// Where a kernel is launched. Free of CUDA's headers, so that the bindings compile without them.
#pragma once

#include <cstdint>

namespace segmenter {
namespace cuda {

struct Queue {
  int device;
  uintptr_t stream;  // a cudaStream_t of that device; 0 is its default stream
};

}  // namespace cuda
}  // namespace segmenter
