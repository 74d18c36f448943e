#include "server.h"

#include "races.h"
#include "simt.h"

namespace simt {
namespace {

void read_bytes(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);
}

void write_bytes(const void* from, size_t bytes) {
  if (bytes > 0 && std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(1);
}

int64_t read_integer() {
  int64_t value;
  read_bytes(&value, sizeof(value));
  return value;
}

void write_integer(int64_t value) { write_bytes(&value, sizeof(value)); }

Request read_request() {
  Request request;
  request.name.resize(static_cast<size_t>(read_integer()));
  read_bytes(request.name.data(), request.name.size());
  set_seed(static_cast<uint64_t>(read_integer()));
  request.sizes.resize(static_cast<size_t>(read_integer()));
  for (int64_t& size : request.sizes) {
    size = read_integer();
    request.buffers.push_back(std::make_unique<char[]>(static_cast<size_t>(size)));
    read_bytes(request.buffers.back().get(), static_cast<size_t>(size));
  }
  request.integers.resize(static_cast<size_t>(read_integer()));
  read_bytes(request.integers.data(), request.integers.size() * sizeof(int64_t));
  request.reals.resize(static_cast<size_t>(read_integer()));
  read_bytes(request.reals.data(), request.reals.size() * sizeof(double));
  return request;
}

void reply(const Request& request, const char* error) {
  const std::string message = error == nullptr ? "" : error;
  write_integer(static_cast<int64_t>(message.size()));
  write_bytes(message.data(), message.size());
  for (size_t i = 0; i < request.buffers.size(); ++i) {
    write_bytes(request.buffers[i].get(), static_cast<size_t>(request.sizes[i]));
  }
  std::fflush(stdout);
}

}  // namespace
}  // namespace simt

int main() {
  simt::Functions functions;
  simt::add_functions(functions);
  for (;;) {
    simt::Request request = simt::read_request();
    for (size_t i = 0; i < request.buffers.size(); ++i) {
      simt::watch(request.buffers[i].get(), static_cast<size_t>(request.sizes[i]), true);
    }
    const auto found = functions.find(request.name);
    simt::reply(request, found == functions.end() ? "no such function" : found->second(request));
    for (size_t i = 0; i < request.buffers.size(); ++i) {
      simt::watch(request.buffers[i].get(), static_cast<size_t>(request.sizes[i]), false);
    }
  }
}
