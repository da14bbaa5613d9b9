// Packed calls of `policy` and `policy_divergence`. Each sequence runs as a call of its own, on
// pointers into the tensors of all. So time and scratch grow with the sum of rows x keys.
//
// Sequences that weigh much are split among all threads one after the other, as a padded call is.
// The others get one thread each, the heaviest first. What a kernel writes does not depend on its
// number of threads, so neither does the result of a packed call.
#pragma once

#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/threads.h"
#include "ral/policy.h"

namespace ral {

// Rows per thread below which a sequence is not split: two blocks of 16.
constexpr int64_t kSplitRows = 32;

struct PackedSequence {
  int64_t number;  // -1: of none
  int64_t first_row, num_rows, first_key, num_keys, query_start;
  // Keys + 1, because rows without keys are written too.
  int64_t work() const { return num_rows * (num_keys + 1); }
};

template <class T>
T* shifted(T* data, int64_t elements) {
  return data ? data + elements : nullptr;
}
inline void shift_tokens(ral_tensor& x, int64_t tokens, int64_t element_size) {
  x.data = shifted(static_cast<char*>(x.data), tokens * x.stride_t * element_size);
}
inline int64_t size_of_dtype(int32_t dtype) {
  return dtype == RAL_FLOAT32 ? 4 : 2;
}

inline void narrow(ral_policy_common& x, const PackedSequence& s, int num_threads) {
  x.num_rows = s.num_rows;
  x.seqlen_k = s.num_keys;
  x.query_start = s.query_start;
  x.span_ids = shifted(x.span_ids, s.first_key);
  x.scope = shifted(x.scope, s.first_key);
  x.cu_seqlens_q = x.cu_seqlens_k = x.query_starts = nullptr;
  x.num_threads = num_threads;
}

// Rows of no sequence have no head weights.
template <class T>
T* of_sequence(T* head_weights, int64_t num_heads, const PackedSequence& s) {
  return s.number < 0 ? nullptr : shifted(head_weights, s.number * num_heads);
}

inline void narrow(ral_policy_side& x, const PackedSequence& s) {
  shift_tokens(x.q, s.first_row, size_of_dtype(x.dtype));
  shift_tokens(x.k, s.first_key, size_of_dtype(x.dtype));
  x.span_bias.data =
      shifted(static_cast<const float*>(x.span_bias.data), s.first_row * x.span_bias.stride_t);
  x.head_weights = of_sequence(x.head_weights, x.num_heads, s);
  x.norm = shifted(x.norm, s.first_row);
  x.z = shifted(x.z, s.first_row);
}

inline void narrow(ral_policy_target& x, const PackedSequence& s) {
  x.index = shifted(x.index, s.first_row);
  x.first_key = s.first_key;
}

template <class Params>
void narrow_gradients(Params& x, const PackedSequence& s) {
  shift_tokens(x.dq, s.first_row, size_of_dtype(x.policy.dtype));
  shift_tokens(x.dk, s.first_key, size_of_dtype(x.policy.dtype));
  x.dhead_weights = of_sequence(x.dhead_weights, x.policy.num_heads, s);
}

inline ral_policy_params call_of(ral_policy_params x, const PackedSequence& s, int num_threads) {
  const int64_t outcomes = s.first_row * x.common.row_length;
  x.p = shifted(x.p, outcomes);
  x.dp = shifted(x.dp, outcomes);
  x.dspan_bias = shifted(x.dspan_bias, s.first_row * x.common.num_spans);
  narrow(x.common, s, num_threads);
  narrow(x.policy, s);
  narrow_gradients(x, s);
  return x;
}

inline ral_policy_divergence_params call_of(ral_policy_divergence_params x, const PackedSequence& s,
                                            int num_threads) {
  x.value = shifted(x.value, s.first_row);
  x.u = shifted(x.u, s.first_row);
  x.w = shifted(x.w, s.first_row);
  x.dvalue = shifted(x.dvalue, s.first_row);
  narrow(x.common, s, num_threads);
  narrow(x.policy, s);
  narrow(x.reference, s);
  narrow(x.target, s);
  narrow_gradients(x, s);
  return x;
}

// Params of an entry point that is packed, and the kernel that runs one sequence.
template <class Params>
class PackedCall {
 public:
  PackedCall(const Params& params, int (*kernel)(const Params&))
      : params_(params), kernel_(kernel) {}

  int run() {
    int64_t left = split();
    const int threads = params_.common.num_threads;
    std::stable_sort(
        sequences_.begin(), sequences_.end(),
        [](const PackedSequence& a, const PackedSequence& b) { return a.work() > b.work(); });
    std::vector<PackedSequence> light;
    for (const PackedSequence& s : sequences_) {
      // Half a thread's share of what is left: the light ones then fill all threads evenly.
      if (s.num_rows >= kSplitRows * threads && 2 * s.work() * threads > left) {
        left -= s.work();
        run_one(s, threads);
      } else {
        light.push_back(s);
      }
    }
    sequences_.swap(light);
    parallel_for(threads, static_cast<int64_t>(sequences_.size()), run_light, this);
    return status_;
  }

 private:
  // Lists what a kernel must run, and returns its work. Keys that no row sees get dk = 0.
  int64_t split() {
    const ral_policy_common& c = params_.common;
    const int64_t n = c.num_sequences;
    int64_t work = 0;
    if (params_.dhead_weights) {  // of sequences without rows
      memset(params_.dhead_weights, 0, n * params_.policy.num_heads * sizeof(float));
    }
    const auto add = [&](const PackedSequence& s) {
      if (s.num_rows == 0) return clear_keys(s.first_key, s.num_keys);
      sequences_.push_back(s);
      work += s.work();
    };
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = c.cu_seqlens_q[i], key = c.cu_seqlens_k[i];
      add({i, row, c.cu_seqlens_q[i + 1] - row, key, c.cu_seqlens_k[i + 1] - key,
           c.query_starts[i]});
    }
    // After the last offset: rows without keys, and keys without rows.
    add({-1, c.cu_seqlens_q[n], c.num_rows - c.cu_seqlens_q[n], c.cu_seqlens_k[n], 0, 0});
    clear_keys(c.cu_seqlens_k[n], c.seqlen_k - c.cu_seqlens_k[n]);
    return work;
  }

  void clear_keys(int64_t first, int64_t count) const {
    const ral_tensor& dk = params_.dk;
    if (!dk.data) return;  // a forward
    const int64_t size = size_of_dtype(params_.policy.dtype);
    for (int64_t h = 0; h < params_.policy.num_kv_heads; ++h) {
      char* head = static_cast<char*>(dk.data) + h * dk.stride_h * size;
      for (int64_t key = first; key < first + count; ++key) {
        memset(head + key * dk.stride_t * size, 0, params_.policy.head_dim * size);
      }
    }
  }

  void run_one(const PackedSequence& s, int num_threads) {
    const int status = kernel_(call_of(params_, s, num_threads));
    if (status != RAL_OK) status_ = status;
  }
  static void run_light(void* self, int64_t task, int) {
    PackedCall* call = static_cast<PackedCall*>(self);
    call->run_one(call->sequences_[task], 1);
  }

  const Params& params_;
  int (*const kernel_)(const Params&);
  std::vector<PackedSequence> sequences_;
  std::atomic<int> status_{RAL_OK};
};

// Runs `kernel` on a call, or on each sequence of a packed one.
template <class Params>
int run_policy(const Params& params, int (*kernel)(const Params&)) {
  return params.common.cu_seqlens_q ? PackedCall<Params>(params, kernel).run() : kernel(params);
}

// Likewise. With a target there is no reference policy: its place has the policy's sizes, of which
// kernels keep nothing but z.
inline int run_policy(const ral_policy_divergence_params& params,
                      int (*kernel)(const ral_policy_divergence_params&)) {
  ral_policy_divergence_params x = params;
  if (x.target.values) {
    x.reference = x.policy;
    x.reference.norm = nullptr;
    x.reference.z = params.reference.z;
  }
  return run_policy<ral_policy_divergence_params>(x, kernel);
}

}  // namespace ral
