// Python's view of the SAT solver and of the readers and writers of formula files. Public names, documentation and
// everything that need not be native are in clue.sat; here are arrays, the GIL and Ctrl-C.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/running.hpp"
#include "certificate.hpp"
#include "logic/circuit.hpp"
#include "sat/check.hpp"
#include "sat/dimacs.hpp"
#include "sat/maxsat.hpp"
#include "sat/options.hpp"
#include "sat/solver.hpp"

namespace py = pybind11;
namespace sat = clue::sat;

namespace {

using Literals = py::array_t<std::int32_t, py::array::c_style>;
using Weights = py::array_t<std::int64_t, py::array::c_style>;

template <typename T>
std::span<const T> view(const py::array_t<T, py::array::c_style>& array, const char* name) {
  if (array.ndim() != 1) throw py::value_error(std::string(name) + ": expected one dimension");
  return {array.data(), static_cast<std::size_t>(array.size())};
}

// The array owns the vector: nothing is copied.
template <typename T>
py::array_t<T> array(std::vector<T> values) {
  auto* const kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::object verdict(sat::Verdict found) {
  if (found == sat::Verdict::Unknown) return py::none();
  return py::bool_(found == sat::Verdict::Satisfiable);
}

std::int32_t as_literal(PyObject* item) {
  int overflow = 0;
  const long value = PyLong_AsLongAndOverflow(item, &overflow);  // takes what has __index__ only
  if (value == -1 && overflow == 0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (overflow != 0 || value > std::numeric_limits<std::int32_t>::max() ||
      value < -std::numeric_limits<std::int32_t>::max())
    throw py::value_error("expected literals of at most 2147483647, got " +
                          std::string(py::str(py::handle(item))).substr(0, 30));
  return static_cast<std::int32_t>(value);
}

void append_literals(const py::handle& clause, std::vector<std::int32_t>& found) {
  if (PyList_Check(clause.ptr()) || PyTuple_Check(clause.ptr())) {  // the common case, without an iterator
    PyObject* const fast = clause.ptr();
    for (py::ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); ++i)
      found.push_back(as_literal(PySequence_Fast_GET_ITEM(fast, i)));
    return;
  }
  for (const py::handle& item : clause) found.push_back(as_literal(item.ptr()));
}

// A Python iterable of integers as literals; zeros are refused.
std::vector<std::int32_t> literals_of(const py::object& clause, const std::string& name) {
  std::vector<std::int32_t> found;
  try {
    append_literals(clause, found);
  } catch (const py::value_error& error) {
    throw py::value_error(name + ": " + error.what());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    throw py::type_error(name + ": expected integers, got " + std::string(py::repr(clause)).substr(0, 60));
  }
  for (const std::int32_t literal : found)
    if (literal == 0) throw py::value_error(name + ": expected literals, got 0");
  return found;
}

// Clauses given as an iterable of iterables, in one array with zeros.
std::vector<std::int32_t> clauses_of(const py::object& clauses) {
  std::vector<std::int32_t> found;
  std::size_t number = 0;
  for (const py::handle& clause : clauses) {
    const std::size_t start = found.size();
    const auto where = [&] { return "clauses[" + std::to_string(number) + "]: "; };
    try {
      append_literals(clause, found);
    } catch (const py::value_error& error) {
      throw py::value_error(where() + error.what());
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      throw py::type_error(where() + "expected integers, got " + std::string(py::repr(clause)).substr(0, 60));
    }
    for (std::size_t i = start; i < found.size(); ++i)
      if (found[i] == 0) throw py::value_error(where() + "expected literals, got 0");
    found.push_back(0);
    ++number;
  }
  return found;
}

// A solver as Python holds it: one thread at a time, terminate() excepted.
//
// CaDiCaL has phases that do not look at their terminator, and on a million clauses they last for seconds. A large
// formula is therefore solved in a thread of its own while the caller's looks for signals and at the clock: it returns
// on time, and the call left behind winds down before the solver is used again.
class Session {
 public:
  Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  ~Session() {
    if (left_ == nullptr) return;
    solver_->terminate();
    // An unfinished proof removes its file when the solver goes, which must not be cut short by the process's end.
    if (solver_->writes_proof()) {
      const py::gil_scoped_release released;
      left_->wait();
    }
  }

  sat::Solver& idle() {
    if (busy_) throw std::logic_error("the solver is running in another thread: only terminate() may be called");
    if (left_ != nullptr) {
      busy_ = true;
      do {
        stop_ = false;  // terminate() has nothing to add: the call is ending
      } while (!wait(*left_, kForever) && PyErr_Occurred() == nullptr);
      busy_ = false;
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      left_ = nullptr;
      solver_->forget();
    }
    return *solver_;
  }

  bool terminate() {
    if (!busy_) return false;
    stop_ = true;
    solver_->terminate();
    return true;
  }

  // `call` must own what it uses: it may outlive this.
  template <typename Call>
  py::object run(double seconds, Call call) {
    sat::Solver& solver = idle();
    solver.begin();
    stop_ = false;
    if (solver.size() < kLarge) return run_here(call);
    auto work = std::make_shared<Work>();
    std::thread([work, call, owned = solver_] {
      sat::Verdict found = sat::Verdict::Unknown;
      std::exception_ptr error;
      try {
        found = call(*owned, [] { return false; });
      } catch (...) {
        error = std::current_exception();
      }
      work->finish(found, error);
    }).detach();
    busy_ = true;
    const bool over = wait(*work, seconds > 0 ? Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                                   std::chrono::duration<double>(seconds))
                                              : kForever);
    busy_ = false;
    if (!over) {
      left_ = work;
      if (PyErr_Occurred() != nullptr) throw py::error_already_set();
      return py::none();
    }
    if (work->error) std::rethrow_exception(work->error);
    return verdict(work->found);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr Clock::time_point kForever = Clock::time_point::max();
  static constexpr std::chrono::milliseconds kPoll{50};
  static constexpr std::int64_t kLarge = 50'000;  // literals; below, the unwatched phases are short

  struct Work {
    void finish(sat::Verdict verdict, std::exception_ptr thrown) {
      const std::lock_guard<std::mutex> lock(mutex);
      found = verdict;
      error = std::move(thrown);
      done = true;
      changed.notify_all();
    }
    void wait() {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [this] { return done; });
    }
    bool wait_for(std::chrono::milliseconds time) {
      std::unique_lock<std::mutex> lock(mutex);
      return changed.wait_for(lock, time, [this] { return done; });
    }

    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    sat::Verdict found = sat::Verdict::Unknown;
    std::exception_ptr error;
  };

  // True when the work is done. False after the deadline, after terminate(), and, with a Python error set, after a
  // signal whose handler raised; each gives the solver one more poll to stop by itself.
  bool wait(Work& work, Clock::time_point deadline) {
    for (bool last = false;;) {
      bool done;
      {
        const py::gil_scoped_release released;
        done = work.wait_for(kPoll);
      }
      if (done) return true;
      if (last) return false;
      if (PyErr_CheckSignals() != 0) {
        solver_->terminate();
        return false;
      }
      last = stop_ || Clock::now() >= deadline;
      if (last) solver_->terminate();
    }
  }

  template <typename Call>
  py::object run_here(Call call) {
    busy_ = true;
    sat::Verdict found;
    try {
      const py::gil_scoped_release released;
      found = call(*solver_, clue::signalled);
    } catch (...) {
      busy_ = false;
      throw;
    }
    busy_ = false;
    if (solver_->was_interrupted()) throw py::error_already_set();  // what the signal handler raised
    return verdict(found);
  }

  std::shared_ptr<sat::Solver> solver_ = std::make_shared<sat::Solver>();
  std::shared_ptr<Work> left_;        // a call that was left behind
  bool busy_ = false, stop_ = false;  // read and written with the GIL held
};

// Reads a formula with the GIL released; Ctrl-C is answered meanwhile.
template <typename Formula>
Formula read(const py::bytes& text, Formula (*reader)(std::string_view, clue::logic::Limits&)) {
  const std::string_view view_of = text;
  clue::logic::Limits limits(0, clue::signalled);
  try {
    const py::gil_scoped_release released;
    return reader(view_of, limits);
  } catch (const sat::Stopped&) {
    throw py::error_already_set();  // what the signal handler raised
  }
}

// Sets the errors that pybind11 does not know.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const sat::FileError& failed) {
    errno = failed.code;
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, failed.path.c_str());
  } catch (const sat::FormatError& failed) {
    PyErr_SetString(PyExc_ValueError, failed.what());
  }
}

}  // namespace

void register_sat(py::module_& module) {
  using namespace py::literals;
  py::register_local_exception_translator(translate);

  py::class_<Session>(module, "SatSolver", "CaDiCaL with every call checked; see clue.sat.Solver.")
      .def(py::init<>())
      .def("set_option", [](Session& s, const std::string& name, std::int64_t v) { s.idle().set_option(name, v); })
      .def("option", [](Session& s, const std::string& name) { return s.idle().option(name); })
      .def("write_proof",
           [](Session& s, const py::bytes& path, const std::string& format, bool binary) {
             if (format != "drat" && format != "lrat")
               throw py::value_error("format: expected 'drat' or 'lrat', got '" + format + "'");
             s.idle().write_proof(path, format == "drat" ? sat::ProofFormat::Drat : sat::ProofFormat::Lrat, binary);
           })
      .def("close_proof", [](Session& s) { s.idle().close_proof(); })
      .def("discard_proof", [](Session& s) { s.idle().discard_proof(); })
      .def("variables", [](Session& s) { return s.idle().variables(); })
      .def("reserve", [](Session& s, int variables) { s.idle().reserve(variables); })
      .def("add_array", [](Session& s, const Literals& clauses) { s.idle().add(view(clauses, "clauses")); })
      .def("add_clauses", [](Session& s, const py::object& clauses) { s.idle().add(clauses_of(clauses)); })
      .def("add_clause",
           [](Session& s, const py::object& clause) {
             std::vector<std::int32_t> literals = literals_of(clause, "clause");
             literals.push_back(0);
             s.idle().add(literals);
           })
      .def("constrain", [](Session& s, const py::object& clause) { s.idle().constrain(literals_of(clause, "clause")); })
      .def("solve",
           [](Session& s, const py::object& assumptions, double seconds, int conflicts, int decisions) {
             const std::vector<std::int32_t> assumed = literals_of(assumptions, "assumptions");
             const sat::SearchLimits limits{seconds, conflicts, decisions};
             return s.run(seconds, [assumed, limits](sat::Solver& solver, const std::function<bool()>& interrupted) {
               return solver.solve(assumed, limits, interrupted);
             });
           })
      .def("simplify",
           [](Session& s, int rounds, double seconds) {
             return s.run(seconds, [rounds, seconds](sat::Solver& solver, const std::function<bool()>& interrupted) {
               return solver.simplify(rounds, {seconds}, interrupted);
             });
           })
      .def("terminate", &Session::terminate)
      .def("propagate",
           [](Session& s, const py::object& assumptions) -> py::object {
             auto found = s.idle().propagate(literals_of(assumptions, "assumptions"));
             if (!found) return py::none();
             return array(std::move(*found));
           })
      .def("model", [](Session& s) { return array(s.idle().model()); })
      .def("value", [](Session& s, std::int32_t literal) { return s.idle().value(literal); })
      .def("core", [](Session& s) { return array(s.idle().core()); })
      .def("constraint_failed", [](Session& s) { return s.idle().constraint_failed(); })
      .def("phase", [](Session& s, std::int32_t literal, bool forced) { s.idle().phase(literal, forced); })
      .def("freeze", [](Session& s, std::int32_t literal, bool frozen) { s.idle().freeze(literal, frozen); })
      .def("fixed",
           [](Session& s, std::int32_t literal) -> py::object {
             const int value = s.idle().fixed(literal);
             if (value == 0) return py::none();
             return py::bool_(value > 0);
           })
      .def("statistics", [](Session& s) {
        py::dict found;
        for (const auto& [name, value] : s.idle().statistics()) found[name] = value;
        return found;
      });

  module.def("sat_options", [] {
    py::list found;
    for (const sat::Option& option : sat::options())
      found.append(py::make_tuple(option.name, option.value, option.low, option.high, option.use));
    return found;
  });

  module.def("flatten", [](const py::object& clauses) { return array(clauses_of(clauses)); });
  module.def("read_cnf", [](const py::bytes& text) {
    auto cnf = read(text, sat::read_cnf);
    return py::make_tuple(cnf.n_variables, array(std::move(cnf.clauses)));
  });
  module.def("read_wcnf", [](const py::bytes& text) {
    auto wcnf = read(text, sat::read_wcnf);
    return py::make_tuple(wcnf.n_variables, array(std::move(wcnf.hard)), array(std::move(wcnf.soft)),
                          array(std::move(wcnf.weights)), wcnf.header);
  });
  module.def("write_cnf", [](int n_variables, const Literals& clauses) {
    return py::bytes(sat::write_cnf(n_variables, view(clauses, "clauses")));
  });
  module.def("write_wcnf",
             [](int n_variables, const Literals& hard, const Literals& soft, const Weights& weights, bool header) {
               return py::bytes(sat::write_wcnf(n_variables, view(hard, "hard"), view(soft, "soft"),
                                                view(weights, "weights"), header));
             });
  module.def("largest_variable", [](const Literals& clauses, const std::string& name) {
    return sat::largest_variable(view(clauses, name.c_str()), name.c_str());
  });
  module.def("check_soft", [](const Literals& soft, const Weights& weights) {
    return sat::check_soft(view(soft, "soft"), view(weights, "weights"));
  });

  module.def("minimize", [](int n_variables, const Literals& hard, const Literals& soft, const Weights& weights,
                            double seconds, const py::object& on_bounds, const std::optional<py::bytes>& digest) {
    const auto h = view(hard, "hard"), s = view(soft, "soft");
    const auto w = view(weights, "weights");
    const clue::logic::OnBounds told = clue::on_bounds_of(on_bounds);
    clue::logic::Limits limits(seconds, clue::signalled);
    clue::logic::Digest of_formula{};
    if (digest) of_formula = digest_of(*digest);
    sat::Minimum found;
    {
      const py::gil_scoped_release released;
      found = sat::minimize(n_variables, h, s, w, limits, told, digest ? &of_formula : nullptr);
    }
    const py::object interrupted = clue::raised(limits.interrupted());
    return py::dict("model"_a = array(std::move(found.model)), "satisfiable"_a = found.satisfiable,
                    "optimal"_a = found.optimal, "cost"_a = found.cost, "lower_bound"_a = found.lower_bound,
                    "cores"_a = found.cores, "solves"_a = found.solves, "interrupted"_a = interrupted,
                    "certificate"_a = py::bytes(found.certificate));
  });
  module.def("check_formula", [](int n_variables, const Literals& hard, const Literals& soft, const Weights& weights,
                                 const py::bytes& digest, const py::bytes& certificate) {
    const auto h = view(hard, "hard"), s = view(soft, "soft");
    const auto w = view(weights, "weights");
    const clue::logic::Digest of_formula = digest_of(digest);
    const std::string_view bytes = certificate;
    return what_was_checked([&] {
      try {
        const py::gil_scoped_release released;
        return sat::check(n_variables, h, s, w, of_formula, bytes, clue::signalled);
      } catch (const clue::logic::Interrupted&) {
        throw py::error_already_set();
      }
    });
  });
}
