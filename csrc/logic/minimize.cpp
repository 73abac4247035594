// OLL, core-guided MaxSAT, one level after the other.
//
// 1. Assume every soft literal of the current stratum (largest weights first). If the solver finds a model, the next
//    stratum follows; after the last one the level is closed.
// 2. Otherwise it returns a core: soft literals that cannot all hold. Minimise it, take its least weight w off each
//    member and add w to the lower bound. A totalizer counts how many members fail; "at most one" becomes a new soft
//    literal of weight w. When that one is in a later core, "at most two" takes over, and so on: outputs are made on
//    demand. A count proven too small at once ("core exhaustion") raises the bound without another core.
// 3. The best model so far, which may come from minimising a core too, bounds the cost from above; soft literals dearer
//    than the gap between the bounds become hard, and where there is no gap the level is closed. Local search improves
//    it once, when a search turns out to be hard (descent.cpp).
// 4. A closed level's soft literals that still carry weight hold in every optimum and only there, so making them hard
//    clauses fixes the level's cost for all later levels.
//
// Source: Andres, Kaufmann, Matheis, Schaub (ICLP 2012); Martins, Joshi, Manquinho, Lynce (CP 2014) for the incremental
// totalizers; Ignatiev, Morgado, Marques-Silva (JSAT 2019) for stratification, hardening, exhaustion and minimisation.
#include "minimize.hpp"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "descent.hpp"
#include "record.hpp"
#include "totalizers.hpp"

namespace clue::logic {
namespace {

// Decisions, beside one per variable, of a search without local search before it.
constexpr int kEasy = 5000;

// Freeing a solver's clauses takes this share of the time that adding them took.
constexpr double kFreeing = 0.3;

class Minimizer {
 public:
  Minimizer(const Formula& formula, std::vector<std::uint8_t> start, Limits& limits, const OnBounds& on_bounds,
            Recorder* recorder)
      : formula_(&formula),
        limits_(limits),
        on_bounds_(on_bounds),
        solver_(limits),
        recorder_(recorder),
        n_original_(formula.n_variables),
        n_variables_(formula.n_variables),
        totalizers_(solver_, n_variables_, limits, recorder_),
        model_(std::move(start)),
        known_(!model_.empty()) {
    if (recorder_) solver_.record(*recorder_);
    model_.resize(static_cast<std::size_t>(n_original_) + 1);
    solver_.reserve(n_original_);
    // Cut short by a limit, it is a formula that no search is made on.
    const auto began = std::chrono::steady_clock::now();
    unsigned n = 0;
    for (auto first = formula.clauses.begin(); first != formula.clauses.end() && !limits.tick();) {
      const auto last = std::find(first, formula.clauses.end(), 0);
      solver_.clause({first, last});
      first = last + 1;
      if (++n % (1 << 16) == 0) limits.keep_back(kFreeing * (std::chrono::steady_clock::now() - began));
    }
  }
  ~Minimizer() { limits_.keep_back({}); }
  Minimizer(const Minimizer&) = delete;
  Minimizer& operator=(const Minimizer&) = delete;

  void phase(int literal) { solver_.phase(literal); }
  void freeze(int literal) { solver_.freeze(literal); }

  // Replaces the starting model by one that follows the phases.
  Verdict search() {
    const Verdict verdict = solver_.solve({});
    if (verdict == Verdict::Unsatisfiable && known_) throw std::logic_error("the formula has no model");
    if (verdict == Verdict::Satisfiable) take_solution();
    return verdict;
  }

  // Closes the next level. False when a limit ended the search; `bound` is then still a lower bound.
  bool close(const Level& level, std::int64_t& bound) {
    level_ = &level;
    bound_ = cost_ = 0;
    for (const Soft& soft : level)
      if (!holds(soft.literal)) cost_ += soft.weight;
    bool closed = false;
    try {
      closed = close_level();
    } catch (const Expired&) {
    }
    bound = bound_;
    on_bounds_ = nullptr;  // they are those of the first level
    formula_ = nullptr;
    return closed;
  }

  // Makes the model the best one in lexicographic order of these literals. False when a limit ended the search.
  bool prefer(const std::vector<int>& literals) {
    if (std::all_of(literals.begin(), literals.end(), [&](int literal) { return holds(literal); })) return true;
    const Verdict verdict = solver_.solve_in_order(literals, model_);
    if (verdict == Verdict::Unsatisfiable) throw std::logic_error("the formula has no model");
    return verdict == Verdict::Satisfiable;
  }

  // After the first level: its softs that still carry weight are hard by then, so every model is an optimum. Each call
  // asks for a model that shows some literal with a value not seen yet; when there is none, all are settled at once.
  std::vector<std::uint8_t> survey(const std::vector<int>& asked) {
    std::vector<std::uint8_t> seen(asked.size());  // bit 0: false in some optimum, bit 1: true in some
    for (std::size_t i = 0; i < asked.size(); ++i) seen[i] = holds(asked[i]) ? 2 : 1;
    for (;;) {
      trial_.clear();
      for (std::size_t i = 0; i < asked.size(); ++i)
        if (seen[i] != 3) trial_.push_back(seen[i] == 1 ? asked[i] : -asked[i]);
      if (trial_.empty()) break;
      for (const int literal : trial_) solver_.phase(literal);
      solver_.constrain(trial_);
      const Verdict verdict = solver_.solve({});
      if (verdict == Verdict::Unknown) return {};
      if (verdict == Verdict::Unsatisfiable) break;
      for (std::size_t i = 0; i < asked.size(); ++i)
        seen[i] = static_cast<std::uint8_t>(seen[i] | (solver_.value(asked[i]) ? 2 : 1));
    }
    for (const int literal : asked) solver_.unphase(std::abs(literal));
    for (std::uint8_t& one : seen) one = one == 3 ? 1 : one == 2 ? 2 : 0;
    return seen;
  }

  std::vector<std::uint8_t> take_model() { return known_ ? std::move(model_) : std::vector<std::uint8_t>(); }
  std::int64_t cores() const { return cores_; }
  std::int64_t solves() const { return solver_.solves(); }

 private:
  struct State {
    int literal;
    std::int64_t weight;
    int totalizer, count;  // literal says "fewer than `count` inputs are true"; totalizer is -1 for an original soft
    bool waiting;          // left out until the current round of disjoint cores is over
  };

  bool close_level() {
    softs_.clear();
    position_.clear();
    tell();
    if (cost_ > 0) {
      solver_.propagate();  // what earlier levels settled needs no search
      for (const Soft& soft : *level_) {
        if (limits_.tick()) return false;
        const int value = solver_.fixed(soft.literal);
        if (value < 0) {
          bound_ += soft.weight;
          if (recorder_ && !record_fixed(soft)) return false;
        }
        if (value == 0) add_soft(soft.literal, soft.weight, -1, 0);
      }
      if (bound_ > 0) tell();
      if (formula_ != nullptr && !try_guesses()) return false;
      std::int64_t stratum = 0;
      for (const State& soft : softs_) stratum = std::max(stratum, soft.weight);
      while (stratum > 0 && bound_ < cost_) {
        if (!close_stratum(stratum)) return false;
        std::int64_t next = 0;
        for (const State& soft : softs_)
          if (soft.weight < stratum) next = std::max(next, soft.weight);
        // Halving keeps the number of strata logarithmic however many distinct weights there are.
        stratum = next > stratum / 2 ? std::max<std::int64_t>(stratum / 2, 1) : next;
      }
      stop_recording();
      for (const State& soft : softs_)
        if (soft.weight > 0) harden(soft.literal);
    } else {
      stop_recording();
      for (const Soft& soft : *level_) harden(soft.literal);
    }
    return true;
  }

  // The bounds have moved.
  void tell() {
    if (on_bounds_ && !limits_.interrupted() && !on_bounds_(bound_, cost_)) limits_.interrupt();
  }

  bool holds(int literal) const { return model_[static_cast<std::size_t>(std::abs(literal))] == (literal > 0); }

  // What is recorded is the bound of the first level.
  void stop_recording() {
    if (std::exchange(recorder_, nullptr)) solver_.stop_recording();
  }

  // A soft literal that the root refutes is a core of its own; assuming it makes the solver say why. False when a limit
  // ended the search.
  bool record_fixed(const Soft& soft) {
    const int assumed[] = {soft.literal}, refuted[] = {-soft.literal};
    if (solver_.solve(assumed) != Verdict::Unsatisfiable) return false;
    recorder_->core(refuted, soft.weight);
    return true;
  }

  // The clause that comes next is the core that the solver found last.
  void record(std::span<const int> clause, std::int64_t weight) {
    recorder_->core(clause, weight);
    recorder_->next_is_core();
  }

  void harden(int literal) {
    const int unit[] = {literal};
    solver_.clause(unit);
  }

  // The solver's model becomes this one's.
  void take_solution() {
    for (int v = 1; v <= n_original_; ++v) model_[static_cast<std::size_t>(v)] = solver_.value(v);
    known_ = true;
  }

  // A search that ends satisfiable may have found a better model.
  Verdict run(std::span<const int> assumptions, int decisions = -1) {
    const Verdict verdict = solver_.solve(assumptions, decisions);
    if (verdict != Verdict::Satisfiable) return verdict;
    std::int64_t cost = 0;
    for (const Soft& soft : *level_)
      if (!solver_.value(soft.literal)) cost += soft.weight;
    if (cost < cost_) {
      take_solution();
      cost_ = cost;
      tell();
    }
    return verdict;
  }

  void add_soft(int literal, std::int64_t weight, int totalizer, int count) {
    const auto key = static_cast<std::size_t>(2 * std::abs(literal) + (literal < 0));
    if (position_.size() <= key) position_.resize(std::max(key + 1, 2 * position_.size()), 0);
    if (position_[key] == 0) {
      softs_.push_back({literal, 0, totalizer, count, false});
      position_[key] = static_cast<int>(softs_.size());
    }
    State& soft = softs_[static_cast<std::size_t>(position_[key] - 1)];
    soft.weight += weight;
    soft.waiting = totalizer >= 0;
  }

  bool carries_weight(int literal) const {
    const auto key = static_cast<std::size_t>(2 * std::abs(literal) + (literal < 0));
    return key < position_.size() && position_[key] > 0 &&
           softs_[static_cast<std::size_t>(position_[key] - 1)].weight > 0;
  }

  State& soft_of(int literal) {
    const auto key = static_cast<std::size_t>(2 * std::abs(literal) + (literal < 0));
    return softs_[static_cast<std::size_t>(position_[key] - 1)];
  }

  // Relaxes the guesses that are cores. False when a limit ended the search.
  bool try_guesses() {
    for (const std::vector<int>& guess : formula_->guesses) {
      if (bound_ == cost_) break;
      if (std::any_of(guess.begin(), guess.end(), [&](int literal) { return !carries_weight(literal); })) continue;
      const Verdict verdict = run(guess, static_cast<int>(guess.size()) + 200);
      if (limits_.expired()) return false;
      if (verdict != Verdict::Unsatisfiable) continue;
      core_.clear();
      for (const int literal : guess)
        if (solver_.failed(literal)) core_.push_back(literal);
      if (core_.empty()) throw std::logic_error("the formula has no model");
      relax();
    }
    return true;
  }

  // Rounds of disjoint cores until all softs of weight >= stratum hold together, or the bounds meet.
  bool close_stratum(std::int64_t stratum) {
    for (;;) {
      assumptions_.clear();
      for (State& soft : softs_) {
        soft.waiting = false;
        if (soft.weight >= stratum) assumptions_.push_back(soft.literal);
      }
      bool found = false;
      for (;;) {
        Verdict verdict = formula_ == nullptr ? Verdict::Unknown : run(assumptions_, kEasy + n_original_);
        if (verdict == Verdict::Unknown) {
          descend_once();
          if (bound_ == cost_) return true;
          verdict = run(assumptions_);
        }
        if (verdict == Verdict::Unknown) return false;
        if (verdict == Verdict::Satisfiable) break;
        found = true;
        core_.clear();
        for (const int literal : assumptions_)
          if (solver_.failed(literal)) core_.push_back(literal);
        if (core_.empty()) throw std::logic_error("the formula has no model");
        shrink();
        relax();
        if (bound_ == cost_) return true;
        std::erase_if(assumptions_, [&](int literal) { return soft_of(literal).waiting; });
      }
      if (!found || bound_ == cost_) return true;
      harden_dear();
    }
  }

  // A search is hard: perhaps a better model is not. Later levels have more clauses than the formula's.
  void descend_once() {
    if (formula_ != nullptr && !limits_.expired() && descend(*formula_, *level_, model_, limits_)) {
      cost_ = 0;
      for (const Soft& soft : *level_)
        if (!holds(soft.literal)) cost_ += soft.weight;
      tell();
    }
    formula_ = nullptr;
  }

  // Softs that weigh more than the gap between the model and the bound hold in every optimum.
  void harden_dear() {
    for (State& soft : softs_)
      if (soft.weight > cost_ - bound_) {
        if (recorder_) recorder_->next_is_hard(soft.literal);
        harden(soft.literal);
        soft.weight = 0;
      }
  }

  // Drops members the core does not need, as far as a small search budget shows it. Members already found necessary
  // stand behind position i.
  void shrink() {
    const int decisions = static_cast<int>(core_.size()) + 200;
    int trials = 200;
    for (std::size_t i = core_.size(); i-- > 0 && core_.size() > 1 && trials-- > 0;) {
      trial_ = core_;
      trial_.erase(trial_.begin() + static_cast<std::ptrdiff_t>(i));
      if (run(trial_, decisions) != Verdict::Unsatisfiable) continue;
      core_.clear();
      std::size_t before = 0;
      for (std::size_t j = 0; j < trial_.size(); ++j) {
        if (!solver_.failed(trial_[j])) continue;
        core_.push_back(trial_[j]);
        before += j < i;
      }
      i = before;
    }
  }

  void relax() {
    ++cores_;
    std::int64_t least = soft_of(core_.front()).weight;
    for (const int literal : core_) least = std::min(least, soft_of(literal).weight);
    bound_ += least;
    tell();
    trial_.clear();
    for (const int literal : core_) trial_.push_back(-literal);
    if (recorder_) record(trial_, least);
    solver_.clause(trial_);
    for (const int literal : core_) {
      State& soft = soft_of(literal);
      soft.weight -= least;
      soft.waiting = true;
      const int totalizer = soft.totalizer, next = soft.count + 1;
      if (totalizer >= 0 && next <= totalizers_.size(totalizer))
        add_soft(-totalizers_.output(totalizer, next), least, totalizer, next);
    }
    if (trial_.size() < 2) return;
    const std::vector<int> inputs = trial_;
    const int totalizer = totalizers_.add(inputs), size = totalizers_.size(totalizer);
    for (int count = 2; count <= size; ++count) {
      const int at_most[] = {-totalizers_.output(totalizer, count)};
      if (run(at_most, size + 200) != Verdict::Unsatisfiable) {
        add_soft(at_most[0], least, totalizer, count);
        break;
      }
      bound_ += least;  // at least `count` members fail, whatever the others do
      const int reached[] = {-at_most[0]};
      if (recorder_) record(reached, least);
      solver_.clause(reached);
      tell();
    }
  }

  const Formula* formula_;  // null after the first level, and once local search has been tried
  Limits& limits_;
  OnBounds on_bounds_;  // null after the first level
  Solver solver_;
  Recorder* recorder_;  // null where nothing is recorded
  const int n_original_;
  int n_variables_;
  Totalizers totalizers_;
  std::vector<std::uint8_t> model_;
  bool known_;                         // model_ is a model
  const Level* level_ = nullptr;       // as it was given
  std::int64_t bound_ = 0, cost_ = 0;  // of the level: what it costs at least, and with the model
  std::vector<State> softs_;
  std::vector<int> position_;  // of a literal in softs_, plus one; 0 where it is none
  std::vector<int> assumptions_, core_, trial_;
  std::int64_t cores_ = 0;
};

}  // namespace

Optimum minimize(const Formula& formula, const std::vector<Level>& levels, const std::vector<int>& preference,
                 std::vector<std::uint8_t> start, Limits& limits, const OnBounds& on_bounds, Recorder* recorder,
                 const std::vector<int>& asked) {
  Minimizer minimizer(formula, std::move(start), limits, on_bounds, recorder);
  // Earlier levels have the last word on a variable's phase.
  for (const int literal : preference) {
    minimizer.phase(literal);
    minimizer.freeze(literal);
  }
  for (std::size_t i = levels.size(); i-- > 0;)
    for (const Soft& soft : levels[i]) minimizer.phase(soft.literal);

  Optimum optimum;
  const Verdict first = minimizer.search();
  optimum.satisfiable = first != Verdict::Unsatisfiable;
  bool going = first == Verdict::Satisfiable;
  for (std::size_t i = 0; going && i < levels.size(); ++i) {
    std::int64_t bound = 0;
    going = minimizer.close(levels[i], bound);
    if (i == 0) optimum.lower_bound = bound;
    if (going) ++optimum.levels_closed;
    if (going && i == 0 && !asked.empty()) {
      optimum.surveyed = minimizer.survey(asked);
      going = !optimum.surveyed.empty();
    }
  }
  if (going && minimizer.prefer(preference)) ++optimum.levels_closed;
  optimum.model = minimizer.take_model();
  optimum.cores = minimizer.cores();
  optimum.solves = minimizer.solves();
  return optimum;
}

}  // namespace clue::logic
