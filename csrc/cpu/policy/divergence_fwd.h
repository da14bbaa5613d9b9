// `divergence`: value and gradients in one sweep over each row. Equations:
// ral_kernels/ops/divergence/README.md.
#pragma once

#include "core/threads.h"
#include "policy/divergence_terms.h"

namespace ral {
namespace RAL_ISA {

class DivergenceForward {
 public:
  explicit DivergenceForward(const ral_divergence_params& params) : params_(params) {}

  int run() {
    if (params_.num_rows == 0) return RAL_OK;
    // Enough elements per task to be worth waking a thread.
    rows_per_task_ = 1 + 16384 / (params_.length + 1);
    parallel_for(params_.num_threads, (params_.num_rows + rows_per_task_ - 1) / rows_per_task_,
                 rows_task, this);
    return RAL_OK;
  }

 private:
  static void rows_task(void* self, int64_t task, int) {
    static_cast<DivergenceForward*>(self)->run_rows(task);
  }

  void run_rows(int64_t task) const {
    const int64_t begin = task * rows_per_task_;
    for (int64_t row = begin; row < begin + rows_per_task_ && row < params_.num_rows; ++row) {
      run_row(row);
    }
  }

  // The first `count` elements of a vector, then 0, which adds nothing to any divergence.
  static Vec load_some(const float* x, int64_t count) {
    if (count >= kLanes) return load(x);
    alignas(64) float padded[kLanes] = {};
    memcpy(padded, x, count * sizeof(float));
    return load(padded);
  }
  static void store_some(float* x, int64_t count, Vec v) {
    if (count >= kLanes) return store(x, v);
    memcpy(x, &v, count * sizeof(float));
  }

  void run_row(int64_t row) const {
    const float* p = params_.p + row * params_.length;
    const float* r = params_.r + row * params_.length;
    float* dp = params_.dp ? params_.dp + row * params_.length : nullptr;
    float* dr = params_.dr ? params_.dr + row * params_.length : nullptr;
    double total = 0.0;  // of partial sums, because the shares of a long row are small
    constexpr int64_t kPart = 64 * kLanes;
    for (int64_t part = 0; part < params_.length; part += kPart) {
      Vec sum{};
      for (int64_t i = part; i < part + kPart && i < params_.length; i += kLanes) {
        const int64_t count = params_.length - i;
        const Vec a = load_some(p + i, count), b = load_some(r + i, count);
        const DivergenceTerm term = term_of(a, b);
        sum += term.value;
        if (dp) store_some(dp + i, count, term.gradient);
        if (dr) store_some(dr + i, count, gradient_r(a, b));
      }
      for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sum[lane]);
    }
    params_.value[row] = static_cast<float>(total);
    if (params_.value[row] == __builtin_inff()) {
      if (dp) memset(dp, 0, params_.length * sizeof(float));
      if (dr) memset(dr, 0, params_.length * sizeof(float));
    }
  }

  // The terms of the definition, which does not ask for distributions of equal sum.
  DivergenceTerm term_of(Vec p, Vec r) const {
    if (params_.kind == RAL_KL) return {literal_kl_term(p, r), gradient_of_first(p, r)};
    if (params_.kind == RAL_REVERSE_KL) return {literal_kl_term(r, p), gradient_of_second(r, p)};
    if (params_.kind == RAL_CROSS_ENTROPY) {
      return {cross_entropy_term(p, r), gradient_of_second(r, p)};
    }
    return divergence_term<RAL_JSD>(p, r);
  }
  Vec gradient_r(Vec p, Vec r) const {
    if (params_.kind == RAL_KL) return gradient_of_second(p, r);
    if (params_.kind == RAL_REVERSE_KL) return gradient_of_first(r, p);
    if (params_.kind == RAL_CROSS_ENTROPY) {
      return select((p > 0.f) & (r > 0.f), -log(p), Vec{});
    }
    return divergence_term<RAL_JSD>(r, p).gradient;
  }

  // Those of a log(a / b): (9) by a, and (10) by b.
  static Vec gradient_of_first(Vec a, Vec b) {
    return select((a > 0.f) & (b > 0.f), log_quotient(a, b) + 1.f, Vec{});
  }
  static Vec gradient_of_second(Vec a, Vec b) {
    return select(b > 0.f, max(broadcast(kLowestReverseKlGradient), -a / b), Vec{});
  }

  const ral_divergence_params& params_;
  int64_t rows_per_task_ = 1;
};

}  // namespace RAL_ISA
}  // namespace ral
