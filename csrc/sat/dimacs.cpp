// One pass over the characters, no copies. A token is whatever stands between blanks; a line matters in three places
// only: comments, the header, and where an error is.
#include "dimacs.hpp"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <limits>

namespace clue::sat {
namespace {

bool blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\v' || c == '\f'; }

class Scanner {
 public:
  Scanner(std::string_view text, logic::Limits& limits)
      : at_(text.data()), end_(text.data() + text.size()), limits_(limits) {}

  [[noreturn]] void fail(const std::string& what) const { fail(line_, what); }
  [[noreturn]] static void fail(std::int64_t line, const std::string& what) {
    throw FormatError("line " + std::to_string(line) + ": " + what);
  }

  std::int64_t line() const { return line_; }

  // Skips blanks and comment lines. False at the end of the text.
  bool skip() {
    for (;;) {
      if (limits_.tick()) throw Stopped();
      while (at_ != end_ && blank(*at_)) newline(*at_++);
      if (at_ == end_) return false;
      if (*at_ != 'c' || !first_) return true;
      while (at_ != end_ && *at_ != '\n') ++at_;
    }
  }

  // The next token; skip() has returned true.
  std::string_view token() {
    const char* const start = at_;
    while (at_ != end_ && !blank(*at_)) ++at_;
    first_ = false;
    return {start, static_cast<std::size_t>(at_ - start)};
  }

  char peek() const { return *at_; }

  // Whether the line has another token.
  bool more_on_line() {
    while (at_ != end_ && *at_ != '\n' && blank(*at_)) ++at_;
    return at_ != end_ && *at_ != '\n';
  }

  template <typename T>
  T number(std::string_view token, const char* what) const {
    T value{};
    const char* const last = token.data() + token.size();
    const auto [stop, error] = std::from_chars(token.data(), last, value);
    if (error == std::errc::result_out_of_range && stop == last)
      fail(std::string(what) + " " + shown(token) + " is too large");
    if (error != std::errc() || stop != last) fail(std::string("expected ") + what + ", got " + shown(token));
    return value;
  }

  // A literal or 0. The common case is read digit by digit.
  std::int32_t literal() {
    const char* const start = at_;
    const bool negative = at_ != end_ && *at_ == '-';
    if (negative) ++at_;
    std::int64_t value = 0;
    const char* const digits = at_;
    while (at_ != end_ && *at_ >= '0' && *at_ <= '9' && value <= std::numeric_limits<std::int32_t>::max())
      value = 10 * value + (*at_++ - '0');
    if (at_ == digits || (at_ != end_ && !blank(*at_)) || value > std::numeric_limits<std::int32_t>::max() ||
        (negative && value == 0)) {
      at_ = start;
      const std::string_view all = token();
      const bool integer =
          all.size() > (all[0] == '-') && all.find_first_not_of("0123456789", all[0] == '-') == std::string_view::npos;
      if (integer && value > std::numeric_limits<std::int32_t>::max())
        fail("literal " + shown(all) + " is too large: variables go up to 2147483647");
      fail("expected a literal, got " + shown(all));
    }
    first_ = false;
    return static_cast<std::int32_t>(negative ? -value : value);
  }

  // A token as a message can hold it.
  static std::string shown(std::string_view token) {
    std::string text = "'";
    for (const char c : token.substr(0, 30)) {
      if (c >= ' ' && c <= '~') {
        text += c;
      } else {
        constexpr char hex[] = "0123456789abcdef";
        text += "\\x";
        text += hex[static_cast<unsigned char>(c) >> 4];
        text += hex[static_cast<unsigned char>(c) & 15];
      }
    }
    return text + (token.size() > 30 ? "...'" : "'");
  }

 private:
  void newline(char c) {
    if (c != '\n') return;
    ++line_;
    first_ = true;
  }

  const char* at_;
  const char* const end_;
  logic::Limits& limits_;
  std::int64_t line_ = 1;
  bool first_ = true;  // no token of this line has been read
};

struct Header {
  std::int64_t line = 0, clauses = 0;
  int variables = 0;
  bool has_top = false;
  std::uint64_t top = 0;
};

Header header(Scanner& scan, const char* format) {
  Header found;
  found.line = scan.line();
  const auto next = [&](const char* what) {
    if (!scan.more_on_line()) scan.fail(std::string("the header lacks ") + what);
    return scan.token();
  };
  if (const auto p = scan.token(); p != "p") scan.fail("expected the header 'p', got " + Scanner::shown(p));
  if (const auto name = next("its format"); name != format)
    scan.fail(std::string("expected 'p ") + format + "', got the format " + Scanner::shown(name));
  const auto count = [&](const char* what) {
    const auto value = scan.number<std::int64_t>(next(what), what);
    if (value < 0) scan.fail(std::string(what) + " " + std::to_string(value) + " is negative");
    return value;
  };
  const std::int64_t variables = count("the number of variables");
  if (variables > std::numeric_limits<std::int32_t>::max())
    scan.fail("the number of variables " + std::to_string(variables) + " is too large: they go up to 2147483647");
  found.variables = static_cast<int>(variables);
  found.clauses = count("the number of clauses");
  return found;
}

// Reads one clause up to and with its 0.
void clause(Scanner& scan, Clauses& clauses, int n_variables, int& largest) {
  while (scan.skip()) {
    const std::int32_t literal = scan.literal();
    clauses.push_back(literal);
    if (literal == 0) return;
    largest = std::max(largest, std::abs(literal));
    if (largest > n_variables)
      scan.fail("variable " + std::to_string(largest) + " is above the header's " + std::to_string(n_variables));
  }
  scan.fail("the file ends within a clause: its 0 is missing");
}

void check_count(const Header& head, std::int64_t found) {
  if (found != head.clauses)
    Scanner::fail(head.line, "the header says " + std::to_string(head.clauses) + " clauses, the file has " +
                                 std::to_string(found));
}

void append(std::string& text, std::int64_t value, char after) {
  char digits[24];
  char* const end = std::to_chars(digits, digits + sizeof digits - 1, value).ptr;
  *end = after;
  text.append(digits, static_cast<std::size_t>(end - digits) + 1);
}

// Writes the clause that starts at `first` and returns where the next one starts.
const std::int32_t* append_clause(std::string& text, const std::int32_t* first) {
  for (; *first != 0; ++first) append(text, *first, ' ');
  text += "0\n";
  return first + 1;
}

std::int64_t count(std::span<const std::int32_t> clauses) { return std::count(clauses.begin(), clauses.end(), 0); }

}  // namespace

Cnf read_cnf(std::string_view text, logic::Limits& limits) {
  Scanner scan(text, limits);
  if (!scan.skip()) scan.fail("there is no header 'p cnf VARIABLES CLAUSES'");
  const Header head = header(scan, "cnf");
  if (scan.more_on_line()) scan.fail("the header has more than variables and clauses: " + Scanner::shown(scan.token()));
  Cnf cnf;
  cnf.n_variables = head.variables;
  cnf.clauses.reserve(text.size() / 4);
  std::int64_t clauses = 0;
  int largest = 0;
  for (; scan.skip() && scan.peek() != '%'; ++clauses) {  // '%' ends the files of SATLIB
    if (clauses == head.clauses) scan.fail("there are more clauses than the header's " + std::to_string(clauses));
    clause(scan, cnf.clauses, head.variables, largest);
  }
  check_count(head, clauses);
  return cnf;
}

Wcnf read_wcnf(std::string_view text, logic::Limits& limits) {
  Scanner scan(text, limits);
  Wcnf wcnf;
  bool more = scan.skip();
  Header head;
  head.variables = std::numeric_limits<std::int32_t>::max();
  if (more && scan.peek() == 'p') {
    wcnf.header = true;
    head = header(scan, "wcnf");
    if (scan.more_on_line()) {
      head.has_top = true;
      head.top = scan.number<std::uint64_t>(scan.token(), "the weight of hard clauses");
      if (head.top == 0) scan.fail("the weight of hard clauses is 0");
      if (scan.more_on_line())
        scan.fail("the header has more than variables, clauses and top: " + Scanner::shown(scan.token()));
    }
  }
  std::int64_t clauses = 0, sum = 0;
  int largest = 0;
  for (more = scan.skip(); more; more = scan.skip(), ++clauses) {
    if (wcnf.header && clauses == head.clauses)
      scan.fail("there are more clauses than the header's " + std::to_string(clauses));
    const std::string_view token = scan.token();
    bool hard = token == "h" && !wcnf.header;
    std::uint64_t weight = 0;
    if (!hard) {
      weight = scan.number<std::uint64_t>(token, wcnf.header ? "a weight" : "a weight or 'h'");
      hard = head.has_top && weight >= head.top;
    }
    if (!hard) {
      if (weight > static_cast<std::uint64_t>(kMostWeight - sum))
        scan.fail("the weights of the soft clauses add up to more than 2^60");
      sum += static_cast<std::int64_t>(weight);
      wcnf.weights.push_back(static_cast<std::int64_t>(weight));
    }
    clause(scan, hard ? wcnf.hard : wcnf.soft, head.variables, largest);
  }
  if (wcnf.header) check_count(head, clauses);
  wcnf.n_variables = wcnf.header ? head.variables : largest;
  return wcnf;
}

std::string write_cnf(int n_variables, std::span<const std::int32_t> clauses) {
  largest_variable(clauses, "clauses");
  std::string text = "p cnf " + std::to_string(n_variables) + " " + std::to_string(count(clauses)) + "\n";
  for (const std::int32_t* at = clauses.data(); at != clauses.data() + clauses.size();) at = append_clause(text, at);
  return text;
}

std::string write_wcnf(int n_variables, std::span<const std::int32_t> hard, std::span<const std::int32_t> soft,
                       std::span<const std::int64_t> weights, bool header) {
  largest_variable(hard, "hard");
  check_soft(soft, weights);
  std::string text;
  std::int64_t top = 1;
  for (const std::int64_t weight : weights) top += weight;
  if (header)
    text = "p wcnf " + std::to_string(n_variables) + " " + std::to_string(count(hard) + count(soft)) + " " +
           std::to_string(top) + "\n";
  for (const std::int32_t* at = hard.data(); at != hard.data() + hard.size();) {
    if (header)
      append(text, top, ' ');
    else
      text += "h ";
    at = append_clause(text, at);
  }
  const std::int32_t* at = soft.data();
  for (const std::int64_t weight : weights) {
    append(text, weight, ' ');
    at = append_clause(text, at);
  }
  return text;
}

int check_soft(std::span<const std::int32_t> soft, std::span<const std::int64_t> weights) {
  const int largest = largest_variable(soft, "soft");
  const std::int64_t clauses = count(soft);
  if (clauses != static_cast<std::int64_t>(weights.size()))
    throw std::invalid_argument("weights: expected one for each of " + std::to_string(clauses) + " soft clauses, got " +
                                std::to_string(weights.size()));
  std::int64_t sum = 0;
  for (const std::int64_t weight : weights) {
    if (weight < 0 || weight > kMostWeight - sum)
      throw std::invalid_argument("weights: expected numbers >= 0 with a sum of at most 2^60, got " +
                                  std::to_string(weight));
    sum += weight;
  }
  return largest;
}

int largest_variable(std::span<const std::int32_t> clauses, const char* name) {
  std::int32_t lowest = 0, highest = 0;
  for (const std::int32_t literal : clauses) {
    lowest = std::min(lowest, literal);
    highest = std::max(highest, literal);
  }
  if (lowest == std::numeric_limits<std::int32_t>::min())
    throw std::invalid_argument(std::string(name) + ": expected literals of at most 2147483647, got -2147483648");
  if (!clauses.empty() && clauses.back() != 0)
    throw std::invalid_argument(std::string(name) + ": expected a 0 after every clause, the last one has none");
  return std::max(highest, -lowest);
}

}  // namespace clue::sat
