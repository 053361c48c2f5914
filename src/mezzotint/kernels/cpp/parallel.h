// Rows divided among threads. Results cannot depend on the division: every kernel treats its rows one by one.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "levels.h"

namespace mezzotint {

// `floats` uninitialised floats that start on a cache line.
class Scratch {
  public:
    explicit Scratch(std::int64_t floats)
        : memory_(static_cast<float*>(::operator new(bytes(floats), std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* get() const { return memory_; }

  private:
    static std::size_t bytes(std::int64_t floats) { return sizeof(float) * static_cast<std::size_t>(std::max<std::int64_t>(floats, 1)); }
    float* memory_;
};

// Calls work(Rows, part) on up to `threads` threads; `cost` is roughly the nanoseconds a row takes. A thread costs tens
// of microseconds to start, so short work stays on the caller's.
template <typename Work>
void over_rows(std::int64_t rows, int threads, double cost, const Work& work) {
    const double worth = std::min(static_cast<double>(rows) * cost / 50e3, static_cast<double>(threads));
    const std::int64_t parts = std::clamp<std::int64_t>(static_cast<std::int64_t>(worth), 1, std::max<std::int64_t>(rows, 1));
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(parts));
    auto part = [&](std::int64_t i) {
        try {
            work(Rows{rows * i / parts, rows * (i + 1) / parts}, static_cast<std::size_t>(i));
        } catch (...) {
            failures[static_cast<std::size_t>(i)] = std::current_exception();  // rethrown below, on the caller's thread
        }
    };
    std::vector<std::thread> pool;
    for (std::int64_t i = 1; i < parts; ++i) pool.emplace_back(part, i);
    part(0);
    for (std::thread& thread : pool) thread.join();
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace mezzotint
