// Python's view of the logic core: argument checking, the GIL and Ctrl-C live here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cadical.hpp>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/running.hpp"
#include "certificate.hpp"
#include "logic/check.hpp"
#include "logic/checksum.hpp"
#include "logic/circuit.hpp"
#include "logic/surgery.hpp"

namespace py = pybind11;
namespace logic = clue::logic;

namespace {

// Keeps the arrays of one call alive while the GIL is released.
class Arrays {
 public:
  template <typename T>
  std::span<const T> view(const py::handle& object, const std::string& name) {
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object) ||
        py::reinterpret_borrow<py::array>(object).ndim() != 1)
      throw py::type_error(name + ": expected a contiguous 1-d array of " + std::string(py::str(py::dtype::of<T>())) +
                           ", got " + std::string(py::str(py::type::of(object))));
    const auto array = py::reinterpret_borrow<py::array_t<T, py::array::c_style>>(object);
    kept_.push_back(array);
    return {array.data(), static_cast<std::size_t>(array.size())};
  }

 private:
  std::vector<py::object> kept_;
};

std::vector<logic::Circuit> circuits(Arrays& arrays, const py::list& list, const std::string& name) {
  std::vector<logic::Circuit> found;
  for (const py::handle& item : list) {
    const std::string at = name + "[" + std::to_string(found.size()) + "]";
    if (!py::isinstance<py::tuple>(item) || py::len(item) != 3)
      throw py::type_error(at + ": expected a tuple (src, dst, gate), got " + std::string(py::str(py::type::of(item))));
    const auto edges = py::reinterpret_borrow<py::tuple>(item);
    found.push_back({arrays.view<std::int32_t>(edges[0], at + ".src"), arrays.view<std::int32_t>(edges[1], at + ".dst"),
                     arrays.view<std::uint8_t>(edges[2], at + ".gate")});
  }
  return found;
}

template <typename T>
py::array_t<T> array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

double seconds(double time_limit) {
  if (!(time_limit >= 0 && time_limit < 1e9))
    throw py::value_error("time_limit: expected seconds in [0, 1e9), got " + std::to_string(time_limit));
  return time_limit;
}

logic::Question make_question(Arrays& arrays, std::int32_t n_nodes, const py::object& editable, const py::list& forget,
                              const py::list& retain, const py::object& weights, const std::string& semantics) {
  logic::Question question;
  question.n_nodes = n_nodes;
  question.editable = arrays.view<std::uint8_t>(editable, "editable");
  question.forget = circuits(arrays, forget, "forget");
  question.retain = circuits(arrays, retain, "retain");
  question.weight = arrays.view<std::int64_t>(weights, "weights");
  if (semantics != "support" && semantics != "authors")
    throw py::value_error("semantics: expected 'support' or 'authors', got '" + semantics + "'");
  question.semantics = semantics == "support" ? logic::Semantics::Support : logic::Semantics::Authors;
  return question;
}

// Calls with the GIL released and raises what a signal handler raised.
template <typename Call>
auto call_interruptible(Call call) {
  try {
    const py::gil_scoped_release released;
    return call(clue::signalled);
  } catch (const logic::Interrupted&) {
    throw py::error_already_set();  // what PyErr_CheckSignals raised, usually KeyboardInterrupt
  } catch (const logic::TimeUp& error) {
    throw py::value_error(error.what());
  }
}

py::dict assign(std::int32_t n_nodes, const py::object& editable, const py::list& forget, const py::list& retain,
                const py::object& weights, const py::object& risk, const py::object& reach,
                const std::string& semantics, double time_limit, const py::object& on_bounds,
                const std::optional<py::bytes>& digest, const py::object& retain_pin, const py::object& forget_pin,
                bool survey) {
  Arrays arrays;
  logic::Question question = make_question(arrays, n_nodes, editable, forget, retain, weights, semantics);
  question.risk = arrays.view<std::int64_t>(risk, "risk");
  question.reach = arrays.view<std::int64_t>(reach, "reach");
  question.time_limit = seconds(time_limit);
  if (!retain_pin.is_none()) question.retain_pin = arrays.view<std::int8_t>(retain_pin, "retain_pin");
  if (!forget_pin.is_none()) question.forget_pin = arrays.view<std::int8_t>(forget_pin, "forget_pin");
  question.survey = survey;
  logic::Digest of_question{};
  if (digest) of_question = digest_of(*digest);

  const logic::OnBounds told = clue::on_bounds_of(on_bounds);
  const logic::Answer answer = call_interruptible([&](const auto& interrupted) {
    return logic::assign(question, interrupted, told, digest ? &of_question : nullptr);
  });
  const py::object interrupted = clue::raised(answer.interrupted);  // first, since it is a pending error until then
  using namespace py::literals;
  return py::dict("retain_works"_a = array(answer.retain_works), "forget_works"_a = array(answer.forget_works),
                  "conflict"_a = array(answer.conflict), "forced"_a = array(answer.forced), "cost"_a = answer.cost,
                  "lower_bound"_a = answer.lower_bound, "optimal"_a = answer.optimal, "unique"_a = answer.unique,
                  "feasible"_a = answer.feasible, "backbone"_a = array(answer.backbone),
                  "variables"_a = answer.variables, "clauses"_a = answer.clauses, "components"_a = answer.components,
                  "cores"_a = answer.cores, "solves"_a = answer.solves, "interrupted"_a = interrupted,
                  "certificate"_a = py::bytes(answer.certificate));
}

py::dict operate(std::int32_t n_nodes, const py::object& editable, const py::list& forget, const py::list& retain,
                 const py::object& weights, const py::object& risk, const py::object& reach, const py::object& pin,
                 const py::object& limits, bool least, double time_limit) {
  Arrays arrays;
  logic::Operation operation;
  operation.question = make_question(arrays, n_nodes, editable, forget, retain, weights, "support");
  operation.question.risk = arrays.view<std::int64_t>(risk, "risk");
  operation.question.reach = arrays.view<std::int64_t>(reach, "reach");
  operation.question.time_limit = seconds(time_limit);
  if (!pin.is_none()) operation.question.forget_pin = arrays.view<std::int8_t>(pin, "pin");
  operation.limits = arrays.view<std::int32_t>(limits, "limits");
  for (const std::int32_t literal : operation.limits)
    if (literal == std::numeric_limits<std::int32_t>::min())
      throw py::value_error("limits: expected literals, got " + std::to_string(literal));
  if (!operation.limits.empty() && operation.limits.back() != 0) throw py::value_error("limits: the last 0 is missing");
  operation.least = least;
  const logic::Edits edits =
      call_interruptible([&](const auto& interrupted) { return logic::operate(operation, interrupted); });
  const py::object interrupted = clue::raised(edits.interrupted);
  using namespace py::literals;
  return py::dict("feasible"_a = edits.feasible, "edited"_a = array(edits.edited), "conflict"_a = array(edits.conflict),
                  "forced"_a = array(edits.forced), "forget_works"_a = array(edits.forget_works),
                  "retain_works"_a = array(edits.retain_works), "lower_bound"_a = edits.lower_bound,
                  "levels_closed"_a = edits.levels_closed, "variables"_a = edits.variables, "clauses"_a = edits.clauses,
                  "components"_a = edits.components, "cores"_a = edits.cores, "solves"_a = edits.solves,
                  "interrupted"_a = interrupted);
}

py::dict check_circuits(std::int32_t n_nodes, const py::object& editable, const py::list& forget,
                        const py::list& retain, const py::object& weights, const std::string& semantics,
                        const py::bytes& digest, const py::bytes& certificate) {
  Arrays arrays;
  logic::Question question = make_question(arrays, n_nodes, editable, forget, retain, weights, semantics);
  const std::vector<std::int64_t> none(static_cast<std::size_t>(question.weight.size()));
  question.risk = question.reach = none;  // the order among the least costly is not what is proven
  const logic::Digest of_question = digest_of(digest);
  const std::string_view bytes = certificate;
  return what_was_checked([&] {
    return call_interruptible(
        [&](const auto& interrupted) { return logic::check(question, of_question, bytes, interrupted); });
  });
}

py::bytes checksum(const py::buffer& values) {
  const py::buffer_info info = values.request();
  if (info.ndim != 1 || (info.size > 1 && info.strides[0] != info.itemsize))
    throw py::value_error("values: expected one contiguous dimension");
  const auto sums =
      logic::checksum({static_cast<const char*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize)});
  std::string found;
  for (const std::uint64_t sum : sums)
    for (int byte = 0; byte < 8; ++byte) found += static_cast<char>(sum >> 8 * byte & 0xff);
  return found;
}

}  // namespace

void register_logic(py::module_& module) {
  module.def("checksum", &checksum, py::arg("values"), "32 bytes that tell arrays apart; see csrc/logic/checksum.hpp.");
  module.def("cadical_version", [] { return CaDiCaL::Solver::version(); }, "Version of the CaDiCaL linked in.");
  module.def("assign", &assign, py::arg("n_nodes"), py::arg("editable"), py::arg("forget"), py::arg("retain"),
             py::arg("weights"), py::arg("risk"), py::arg("reach"), py::arg("semantics"), py::arg("time_limit"),
             py::arg("on_bounds") = py::none(), py::arg("digest") = py::none(), py::arg("retain_pin") = py::none(),
             py::arg("forget_pin") = py::none(), py::arg("survey") = false,
             "Roles of all nodes from the circuits of both sides; see clue.logic.assign.");
  module.def("check_circuits", &check_circuits, py::arg("n_nodes"), py::arg("editable"), py::arg("forget"),
             py::arg("retain"), py::arg("weights"), py::arg("semantics"), py::arg("digest"), py::arg("certificate"),
             "Checks the certificate of an answer of assign; see clue.logic.check_certificate.");
  module.def("operate", &operate, py::arg("n_nodes"), py::arg("editable"), py::arg("forget"), py::arg("retain"),
             py::arg("weights"), py::arg("risk"), py::arg("reach"), py::arg("pin"), py::arg("limits"), py::arg("least"),
             py::arg("time_limit"), "The least edit that kills the forget outputs; see clue.logic.operate.");
}
