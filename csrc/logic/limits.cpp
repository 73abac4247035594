// The clock is read on every look, the caller asked every 50 ms only: that may take a lock.
#include "limits.hpp"

#include <utility>

namespace clue::logic {

Limits::Limits(double time_limit, std::function<bool()> interrupted)
    : poll_(std::move(interrupted)), next_poll_(Clock::now()), deadline_(next_poll_), limited_(time_limit > 0) {
  if (limited_) deadline_ += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(time_limit));
}

void Limits::keep_back(std::chrono::duration<double> time) {
  kept_back_ = std::chrono::duration_cast<Clock::duration>(time);
}

bool Limits::expired() {
  if (expired_) return true;
  const auto now = Clock::now();
  if (limited_ && now + kept_back_ >= deadline_) return expired_ = true;
  if (now >= next_poll_) {
    next_poll_ = now + std::chrono::milliseconds(50);
    if (poll_()) interrupt();
  }
  return expired_;
}

}  // namespace clue::logic
