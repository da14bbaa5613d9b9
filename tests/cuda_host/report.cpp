#include "report.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "block.h"

namespace ral {
namespace cuda {
namespace host {
namespace {

constexpr int kLineBits = 20;

std::vector<const char*> files = {nullptr};

}  // namespace

std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

uint32_t number_of(Site site) {
  static const char* last_file = nullptr;
  static uint32_t last_number = 0;
  if (site.file != last_file) {
    size_t i = 0;
    while (i < files.size() && files[i] != site.file) ++i;
    if (i == files.size()) files.push_back(site.file);
    last_file = site.file;
    last_number = uint32_t(i) << kLineBits;
  }
  return last_number | uint32_t(site.line);
}

std::string to_text(uint32_t site) {
  const char* const file = files[site >> kLineBits];
  if (file == nullptr) return "nowhere";
  const char* const slash = strrchr(file, '/');
  return format("%s:%d", slash ? slash + 1 : file, int(site & ((1u << kLineBits) - 1)));
}

int64_t* Report::count_of(const Violation& violation) {
  ++count_;
  ++kinds_[violation.kind];
  const auto key = std::make_tuple(std::string(block().info->name), std::string(violation.kind),
                                   violation.site, violation.other_site, violation.detail);
  const auto found = counts_.find(key);
  if (found != counts_.end()) return &found->second;
  return lines_.size() < kLines ? &counts_[key] : nullptr;
}

void Report::clear() {
  lines_.clear();
  counts_.clear();
  kinds_.clear();
  count_ = 0;
}

std::string Report::text() const {
  std::string text;
  for (const Line& line : lines_) {
    text += line.text;
    if (*line.count > 1) text += format("; %lld like it", static_cast<long long>(*line.count));
    text += "\n";
  }
  if (count_ == 0) return text;
  text += format("%lld in all:", static_cast<long long>(count_));
  for (const auto& kind : kinds_)
    text += format(" %s %lld,", kind.first.c_str(), static_cast<long long>(kind.second));
  text.back() = '\n';
  return text;
}

Report& report() {
  static Report instance;
  return instance;
}

}  // namespace host
}  // namespace cuda
}  // namespace ral
