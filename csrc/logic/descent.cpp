// Dynamic local search with clause weights (SATLike; Lei, Cai, IJCAI 2018), soft literals being clauses of one literal.
//
// 1. A variable's score is the weight that flipping it would gain: clauses it makes true less those it alone keeps
// true.
// 2. While some variable gains, flip one of the best; hard clauses may become false on the way.
// 3. At a local minimum the clauses that are false grow heavier, a soft one up to a limit, and the best variable of a
//    false clause is flipped, whatever it costs.
// 4. A model of all hard clauses that is better than the best is kept.
#include "descent.hpp"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace clue::logic {
namespace {

constexpr std::int64_t kWork = 20'000'000;  // visits of literals: about a tenth of a second
constexpr std::size_t kMostLiterals = 5'000'000;
constexpr int kSamples = 50;                // variables that gain, of which the best is flipped
constexpr std::int64_t kUnit = 8;           // a soft clause of average weight grows by this, a hard one by thrice
constexpr std::int64_t kMostGrowths = 400;  // of a soft clause

// A set of small integers that can be sampled.
class Pool {
 public:
  explicit Pool(std::size_t n) : place_(n, -1) {}
  void insert(int item) {
    if (place_[item] >= 0) return;
    place_[item] = static_cast<int>(items_.size());
    items_.push_back(item);
  }
  void erase(int item) {
    const int place = place_[item];
    if (place < 0) return;
    place_[items_.back()] = place;
    items_[place] = items_.back();
    items_.pop_back();
    place_[item] = -1;
  }
  const std::vector<int>& items() const { return items_; }

 private:
  std::vector<int> items_, place_;
};

class Descent {
 public:
  Descent(const Formula& formula, const Level& level, const std::vector<std::uint8_t>& model)
      : value_(model), score_(model.size()), flipped_(model.size()), gaining_(model.size()) {
    std::vector<int> clause;
    for (const int literal : formula.clauses) {
      if (literal != 0) {
        clause.push_back(literal);
        continue;
      }
      std::sort(clause.begin(), clause.end(),
                [](int a, int b) { return std::pair(std::abs(a), a) < std::pair(std::abs(b), b); });
      clause.erase(std::unique(clause.begin(), clause.end()), clause.end());
      const auto opposite = [](int a, int b) { return a == -b; };
      if (std::adjacent_find(clause.begin(), clause.end(), opposite) == clause.end()) add(clause, 0);
      clause.clear();
    }
    n_hard_ = first_.size();
    for (const Soft& soft : level) add({soft.literal}, soft.weight);
    prepare();
  }

  bool search(std::vector<std::uint8_t>& best, Limits& limits) {
    std::int64_t least = cost_;
    bool found = false;
    while (work_ < kWork && least > 0 && !limits.tick()) {
      flip(gaining_.items().empty() ? escape() : best_of_sample());
      if (!false_hard_.items().empty() || cost_ >= least) continue;
      least = cost_;
      best = value_;
      found = true;
    }
    return found;
  }

 private:
  void add(const std::vector<int>& clause, std::int64_t cost) {
    first_.push_back(static_cast<int>(literals_.size()));
    literals_.insert(literals_.end(), clause.begin(), clause.end());
    cost_of_.push_back(cost);
  }

  void prepare() {
    const std::size_t n = first_.size();
    first_.push_back(static_cast<int>(literals_.size()));
    true_.assign(n, 0);
    one_.assign(n, 0);
    weight_.assign(n, 3 * kUnit);
    growth_.assign(n, 3 * kUnit);
    limit_.assign(n, 0);
    false_hard_ = false_soft_ = Pool(n);
    std::int64_t mean = 1;
    for (std::size_t c = n_hard_; c < n; ++c) mean += cost_of_[c] / static_cast<std::int64_t>(n - n_hard_);
    for (std::size_t c = n_hard_; c < n; ++c) {
      const double share = static_cast<double>(cost_of_[c]) / static_cast<double>(mean);
      growth_[c] = static_cast<std::int64_t>(std::clamp(share, 1.0 / kUnit, 1000.0) * kUnit);
      weight_[c] = growth_[c];
      limit_[c] = kMostGrowths * growth_[c];
    }
    first_use_.assign(value_.size() + 1, 0);
    for (const int literal : literals_) ++first_use_[static_cast<std::size_t>(std::abs(literal)) + 1];
    for (std::size_t v = 1; v < first_use_.size(); ++v) first_use_[v] += first_use_[v - 1];
    uses_.resize(literals_.size());
    std::vector<int> next(first_use_.begin(), first_use_.end() - 1);
    for (std::size_t c = 0; c < n; ++c)
      for (int i = first_[c]; i < first_[c + 1]; ++i) {
        const int v = std::abs(literals_[i]);
        uses_[next[v]++] = {static_cast<int>(c), literals_[i] > 0};
        if (value_[v] == (literals_[i] > 0)) {
          ++true_[c];
          one_[c] ^= v;
        }
      }
    for (std::size_t c = 0; c < n; ++c) {
      if (true_[c] == 0) {
        became_false(static_cast<int>(c));
        gain_all(static_cast<int>(c), weight_[c]);
      }
      if (true_[c] == 1) gain(one_[c], -weight_[c]);
    }
  }

  void gain(int v, std::int64_t weight) {
    score_[v] += weight;
    if (score_[v] > 0)
      gaining_.insert(v);
    else
      gaining_.erase(v);
  }

  void gain_all(int c, std::int64_t weight) {
    for (int i = first_[c]; i < first_[c + 1]; ++i) gain(std::abs(literals_[i]), weight);
    work_ += first_[c + 1] - first_[c];
  }

  void became_false(int c) {
    if (static_cast<std::size_t>(c) < n_hard_) {
      false_hard_.insert(c);
    } else {
      false_soft_.insert(c);
      cost_ += cost_of_[c];
    }
  }

  void became_true(int c) {
    if (static_cast<std::size_t>(c) < n_hard_) {
      false_hard_.erase(c);
    } else {
      false_soft_.erase(c);
      cost_ -= cost_of_[c];
    }
  }

  void flip(int v) {
    value_[v] ^= 1;
    for (int i = first_use_[v]; i < first_use_[v + 1]; ++i) {
      const auto [c, positive] = uses_[i];
      const std::int64_t weight = weight_[c];
      if (value_[v] == positive) {
        if (true_[c] == 0) {
          became_true(c);
          gain_all(c, -weight);
          gain(v, -weight);
        } else if (true_[c] == 1) {
          gain(one_[c], weight);
        }
        ++true_[c];
        one_[c] ^= v;
      } else {
        --true_[c];
        one_[c] ^= v;
        if (true_[c] == 0) {
          became_false(c);
          gain_all(c, weight);
          gain(v, weight);
        } else if (true_[c] == 1) {
          gain(one_[c], -weight);
        }
      }
    }
    work_ += first_use_[v + 1] - first_use_[v] + 1;
    flipped_[v] = ++flips_;
  }

  // The higher score, then the one that was flipped longer ago.
  bool better(int a, int b) const { return score_[a] != score_[b] ? score_[a] > score_[b] : flipped_[a] < flipped_[b]; }

  int best_of_sample() {
    const std::vector<int>& items = gaining_.items();
    int best = items[random(items.size())];
    for (int i = 1; i < kSamples; ++i)
      if (const int v = items[random(items.size())]; better(v, best)) best = v;
    work_ += kSamples;
    return best;
  }

  int escape() {
    for (const Pool* pool : {&false_hard_, &false_soft_})
      for (const int c : pool->items()) {
        if (limit_[c] > 0 && weight_[c] >= limit_[c]) continue;
        weight_[c] += growth_[c];
        gain_all(c, growth_[c]);
      }
    const std::vector<int>& pool = (false_hard_.items().empty() ? false_soft_ : false_hard_).items();
    const int c = pool[random(pool.size())];
    int best = std::abs(literals_[first_[c]]);
    for (int i = first_[c] + 1; i < first_[c + 1]; ++i)
      if (const int v = std::abs(literals_[i]); better(v, best)) best = v;
    return best;
  }

  // xorshift64*
  std::size_t random(std::size_t n) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<std::size_t>((state_ * 0x2545f4914f6cdd1dULL) >> 33) % n;
  }

  struct Use {
    int clause;
    bool positive;
  };

  std::vector<std::uint8_t> value_;
  std::vector<std::int64_t> score_;    // by variable
  std::vector<std::int64_t> flipped_;  // by variable: the number of its last flip
  std::vector<int> literals_, first_;  // clause c is literals_[first_[c], first_[c + 1]); hard ones first
  std::vector<std::int64_t> cost_of_, weight_, growth_, limit_;  // by clause
  std::vector<int> true_, one_;  // by clause: literals that are true, and their variables, xor
  std::vector<int> first_use_;   // by variable, in uses_
  std::vector<Use> uses_;
  std::size_t n_hard_ = 0;
  Pool gaining_, false_hard_{0}, false_soft_{0};
  std::int64_t cost_ = 0, work_ = 0, flips_ = 0;
  std::uint64_t state_ = 0x9e3779b97f4a7c15ULL;
};

}  // namespace

bool descend(const Formula& formula, const Level& level, std::vector<std::uint8_t>& model, Limits& limits) {
  if (formula.clauses.size() > kMostLiterals) return false;
  return Descent(formula, level, model).search(model, limits);
}

}  // namespace clue::logic
