// Union-find, and the sorting of variables and clauses by component.
#include "packs.hpp"

#include <algorithm>
#include <numeric>

namespace clue::logic {
namespace {

constexpr std::size_t kPack = 512;

}  // namespace

Components::Components(std::int32_t n) : parent_(static_cast<std::size_t>(n)) {
  std::iota(parent_.begin(), parent_.end(), 0);
}

std::int32_t Components::root(std::int32_t v) {
  while (parent_[v] != v) v = parent_[v] = parent_[parent_[v]];
  return v;
}

void Components::join(std::int32_t a, std::int32_t b) {
  a = root(a);
  b = root(b);
  parent_[std::max(a, b)] = std::min(a, b);  // a component is named by its lowest variable
}

std::vector<Pack> Components::packs(std::vector<std::int32_t> variables,
                                    const std::vector<std::int32_t>& clause_variable) {
  for (const std::int32_t v : variables) parent_[v] = root(v);
  std::stable_sort(variables.begin(), variables.end(),
                   [&](std::int32_t a, std::int32_t b) { return parent_[a] < parent_[b]; });
  std::vector<std::int32_t> pack_of(parent_.size(), -1);  // by the root of a component
  std::vector<Pack> found;
  for (auto first = variables.begin(); first != variables.end(); ++count_) {
    const std::int32_t component = parent_[*first];
    const auto last = std::find_if(first, variables.end(), [&](std::int32_t v) { return parent_[v] != component; });
    if (found.empty() || found.back().members.size() >= kPack) found.emplace_back();
    pack_of[component] = static_cast<std::int32_t>(found.size()) - 1;
    found.back().members.insert(found.back().members.end(), first, last);
    first = last;
  }
  for (Pack& pack : found) std::sort(pack.members.begin(), pack.members.end());
  for (std::size_t c = 0; c < clause_variable.size(); ++c)
    found[pack_of[parent_[clause_variable[c]]]].clauses.push_back(static_cast<std::int32_t>(c));
  std::stable_sort(found.begin(), found.end(),
                   [](const Pack& a, const Pack& b) { return a.members.size() < b.members.size(); });
  return found;
}

}  // namespace clue::logic
