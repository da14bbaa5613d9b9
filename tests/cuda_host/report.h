// Violations of the rules, as text: one example of each kind at each place, and how many there
// were.
#pragma once

#include <stdint.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "harness.h"

namespace ral {
namespace cuda {
namespace host {

__attribute__((format(printf, 1, 2))) std::string format(const char* text, ...);

// Places in the sources as numbers, which take less room; 0 is nowhere.
uint32_t number_of(Site site);
std::string to_text(uint32_t site);
inline std::string to_text(Site site) {
  return to_text(number_of(site));
}

// What makes two violations the same to a reader: all but the thread, the block and the address.
struct Violation {
  const char* kind;
  uint32_t site, other_site;
  int detail;
};

class Report {
 public:
  // `text` makes the line, which costs more than all the rest and is wanted once.
  template <typename Text>
  void add(const Violation& violation, Text text) {
    if (int64_t* const count = count_of(violation)) {
      if (*count == 0) lines_.push_back({violation.kind + std::string(": ") + text(), count});
      ++*count;
    }
  }
  void clear();
  int64_t count() const { return count_; }
  std::string text() const;

 private:
  static constexpr size_t kLines = 20;
  struct Line {
    std::string text;
    const int64_t* count;
  };

  // Null for a violation that gets no line any more.
  int64_t* count_of(const Violation& violation);

  // With the kernel's name; as text, as equal literals may have different addresses.
  std::map<std::tuple<std::string, std::string, uint32_t, uint32_t, int>, int64_t> counts_;
  std::map<std::string, int64_t> kinds_;
  std::vector<Line> lines_;
  int64_t count_ = 0;
};

Report& report();

}  // namespace host
}  // namespace cuda
}  // namespace ral
