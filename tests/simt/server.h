// The test program's loop: Python sends a function's name, buffers and numbers, the program runs it
// and sends the buffers back (host.py is the other end). Each buffer is an allocation of its exact
// size, so that the address sanitizer guards both its ends. All integers are little-endian int64.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace simt {

struct Request {
  std::string name;
  std::vector<std::unique_ptr<char[]>> buffers;
  std::vector<int64_t> sizes;
  std::vector<int64_t> integers;
  std::vector<double> reals;
  size_t next_integer = 0, next_real = 0;

  int64_t integer() { return integers.at(next_integer++); }
  double real() { return reals.at(next_real++); }
  // A pointer into a buffer: its index (negative: null) and the offset in bytes.
  void* pointer() {
    const int64_t index = integer();
    const int64_t offset = integer();
    return index < 0 ? nullptr : buffers.at(static_cast<size_t>(index)).get() + offset;
  }
};

// Returns null, or an error message to send instead of the buffers.
using Function = std::function<const char*(Request&)>;
using Functions = std::map<std::string, Function>;

// Each program defines it: the functions that can be called in it.
void add_functions(Functions& functions);

}  // namespace simt
