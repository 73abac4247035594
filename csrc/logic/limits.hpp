// What a long call shares with its caller: when to stop early, and the bounds known so far.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace clue::logic {

// When to stop early. Shared by all that one call does.
class Limits {
 public:
  // `time_limit` in seconds from now, 0 is none; `interrupted` is polled about every 50 ms.
  Limits(double time_limit, std::function<bool()> interrupted);

  bool expired();                                                        // the time is up, or it was interrupted
  bool tick() { return (++ticks_ & 1023) == 0 ? expired() : expired_; }  // the same, for every round of a long loop
  void interrupt() { expired_ = interrupted_ = true; }
  void keep_back(std::chrono::duration<double> time);  // of the time limit, for what has to be done after it
  bool interrupted() const { return interrupted_; }    // it was Ctrl-C, not the clock

 private:
  using Clock = std::chrono::steady_clock;
  std::function<bool()> poll_;
  Clock::time_point next_poll_, deadline_;
  Clock::duration kept_back_{};
  bool limited_, expired_ = false, interrupted_ = false;
  unsigned ticks_ = 0;
};

// Thrown where an interrupted call has nothing to return.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Told the bounds when they are first known and whenever one of the two improves: nothing costs less than
// `lower_bound`, and the best answer so far costs at most `cost`. False ends the search as an interruption does. It
// must not throw.
using OnBounds = std::function<bool(std::int64_t lower_bound, std::int64_t cost)>;

}  // namespace clue::logic
