// Output by output: what a counter has to say beyond what it was asked so far is never made.
#include "totalizers.hpp"

#include <algorithm>

namespace clue::logic {

int Totalizers::add(std::span<const int> inputs) {
  if (limits_.tick()) throw Expired();
  const int id = static_cast<int>(nodes_.size());
  nodes_.push_back({-1, -1, static_cast<int>(inputs.size()), {}});
  if (inputs.size() == 1) {
    nodes_[id].outputs.push_back(inputs[0]);
  } else {
    const auto half = inputs.size() / 2;
    const int left = add(inputs.first(half)), right = add(inputs.subspan(half));
    nodes_[id].left = left;
    nodes_[id].right = right;
  }
  return id;
}

int Totalizers::output(int id, int count) {
  extend(id, count);
  return nodes_[id].outputs[count - 1];
}

void Totalizers::extend(int id, int count) {
  count = std::min(count, nodes_[id].size);
  if (static_cast<int>(nodes_[id].outputs.size()) >= count) return;
  const int left = nodes_[id].left, right = nodes_[id].right;
  extend(left, count);
  extend(right, count);
  const auto &a = nodes_[left].outputs, &b = nodes_[right].outputs;
  auto& outputs = nodes_[id].outputs;
  for (int total = static_cast<int>(outputs.size()) + 1; total <= count; ++total) {
    const int made = ++n_variables_;
    if (recorder_) recorder_->output(made, id, total);
    const int least = std::max(0, total - nodes_[right].size), most = std::min(total, nodes_[left].size);
    for (int i = least; i <= most; ++i) {
      clause_.clear();
      if (i > 0) clause_.push_back(-a[i - 1]);
      if (total > i) clause_.push_back(-b[total - i - 1]);
      clause_.push_back(made);
      if (limits_.tick()) throw Expired();
      if (recorder_) recorder_->next_counts(made, i);
      solver_.clause(clause_);
    }
    if (total > 1) {
      const int ordered[] = {-made, outputs.back()};
      if (recorder_) recorder_->next_orders(made);
      solver_.clause(ordered);
    }
    outputs.push_back(made);
  }
}

}  // namespace clue::logic
