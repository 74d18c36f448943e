// The parts of the program of checks.cpp.
#pragma once

#include <cuda_runtime.h>

#include "server.h"

namespace simt {

void add_group_checks(Functions& functions);
void add_warp_checks(Functions& functions);

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace simt
