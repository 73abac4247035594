// Whether a question makes sense.
#include "circuit.hpp"

#include <limits>
#include <utility>

namespace clue::logic {
namespace {

std::string text(const std::string& part) { return part; }
std::string text(std::int64_t part) { return std::to_string(part); }

// The message is made of its parts only if it is needed: the checks of all edges must cost next to nothing.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument((text(parts) + ...));
}

}  // namespace

void require_valid(const Question& q) {
  const auto n = static_cast<std::size_t>(q.n_nodes);
  require(q.n_nodes >= 2, "n_nodes: expected at least 2, got ", q.n_nodes);
  require(q.n_nodes <= (1 << 29), "n_nodes: expected at most 2^29, got ", q.n_nodes);
  const auto length = [&](const char* name, std::size_t size) {
    require(size == n, name, ": expected length ", n, ", got ", size);
  };
  length("editable", q.editable.size());
  length("weights", q.weight.size());
  length("risk", q.risk.size());
  length("reach", q.reach.size());
  // Sums over all nodes, twice, must stay far from overflow.
  const std::int64_t most = std::numeric_limits<std::int64_t>::max() / (4 * static_cast<std::int64_t>(q.n_nodes));
  const auto range = [&](const char* name, std::span<const std::int64_t> values) {
    for (const std::int64_t value : values)
      require(0 <= value && value <= most, name, ": expected 0..", most, ", got ", value);
  };
  for (const auto& [name, pins] : {std::pair{"retain_pin", q.retain_pin}, std::pair{"forget_pin", q.forget_pin}}) {
    require(pins.empty() || pins.size() == n, name, ": expected length ", n, ", got ", pins.size());
    for (const std::int8_t pin : pins) require(-1 <= pin && pin <= 1, name, ": expected -1..1, got ", pin);
  }
  range("weights", q.weight);
  range("risk", q.risk);
  range("reach", q.reach);
  for (const bool retain : {false, true}) {
    const std::string side = retain ? "retain" : "forget";
    const auto& circuits = retain ? q.retain : q.forget;
    require(!circuits.empty(), side, ": expected at least one circuit, got none");
    require(circuits.size() < (1U << 24), side, ": expected fewer than 2^24 circuits");
    std::size_t edges = 0;
    for (std::size_t c = 0; c < circuits.size(); ++c) {
      const Circuit& circuit = circuits[c];
      const std::string name = side + "[" + std::to_string(c) + "]";
      require(circuit.src.size() == circuit.dst.size() && circuit.src.size() == circuit.gate.size(), name,
              ": expected src, dst and gate of equal length");
      edges += circuit.src.size();
      bool reached = false;
      for (std::size_t e = 0; e < circuit.src.size(); ++e) {
        const std::int32_t u = circuit.src[e], v = circuit.dst[e];
        require(u >= 0 && v >= 0 && u < q.n_nodes && v < q.n_nodes, name, ": expected node ids in 0..", q.n_nodes - 1,
                ", got edge ", u, " -> ", v);
        require(u < v, name, ": expected src < dst, got edge ", u, " -> ", v);
        require(circuit.gate[e] <= static_cast<std::uint8_t>(Gate::Adder), name, ": expected gates 0..2, got ",
                circuit.gate[e]);
        reached = reached || v == q.n_nodes - 1;
      }
      require(reached, name, ": expected an edge into the output, got none");
    }
    require(edges < (1U << 30), side, ": expected fewer than 2^30 edges, got ", edges);
  }
}

}  // namespace clue::logic
