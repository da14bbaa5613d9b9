// Runs forwards and backwards of the CPU backend on several threads, for ThreadSanitizer to
// watch (test_races.py builds it with -fsanitize=thread), and compares the result with one
// thread's.
//
// Small sizes with many key blocks per column block, so that the ordered sum of dQ is contended.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ral/attention.h"
#include "ral/policy.h"

extern "C" int32_t ral_cpu_attention_fwd(const ral_attention_params*, const ral_attention_outputs*);
extern "C" int32_t ral_cpu_attention_bwd(const ral_attention_params*, const ral_attention_outputs*,
                                         const ral_attention_gradients*);
extern "C" int32_t ral_cpu_policy_divergence_fwd(const ral_policy_divergence_params*);
extern "C" int32_t ral_cpu_policy_divergence_bwd(const ral_policy_divergence_params*);
extern "C" int32_t ral_cpu_policy_loss(const ral_policy_divergence_params*);
extern "C" const char* ral_cpu_isa_name(int32_t);

namespace {

constexpr int64_t kBatch = 1, kHeads = 4, kKvHeads = 2, kDim = 16, kSpans = 5;

std::vector<float> noise(int64_t count, uint32_t seed) {
  std::vector<float> x(count);
  for (float& value : x) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / (1 << 23) - 1.f;
  }
  return x;
}

struct Result {
  std::vector<float> out, marginals, lse, dq, dk, dv, dspan_bias;
};

Result run(int64_t seqlen_q, int64_t seqlen_k, bool causal, int threads) {
  std::vector<float> q = noise(kBatch * kHeads * seqlen_q * kDim, 1);
  std::vector<float> k = noise(kBatch * kKvHeads * seqlen_k * kDim, 2);
  std::vector<float> v = noise(kBatch * kKvHeads * seqlen_k * kDim, 3);
  std::vector<float> dout = noise(q.size(), 4);
  std::vector<float> dmarginals = noise(kBatch * kHeads * seqlen_q * kSpans, 5);
  std::vector<float> dlse = noise(kBatch * kHeads * seqlen_q, 6);
  std::vector<float> bias = noise(dmarginals.size(), 7);
  std::vector<int32_t> ids(seqlen_k);
  for (int64_t i = 0; i < seqlen_k; ++i)
    ids[i] = static_cast<int32_t>(i * (kSpans + 1) / seqlen_k) - 1;

  Result r;
  r.out.resize(q.size());
  r.marginals.resize(dmarginals.size());
  r.lse.resize(dlse.size());
  r.dq.resize(q.size());
  r.dk.resize(k.size());
  r.dv.resize(v.size());
  r.dspan_bias.resize(bias.size());

  const auto tensor = [](std::vector<float>& x, int64_t heads, int64_t seqlen) {
    return ral_tensor{x.data(), heads * seqlen * kDim, seqlen * kDim, kDim};
  };
  ral_attention_params p;
  memset(&p, 0, sizeof p);
  p.batch_size = p.num_sequences = kBatch;
  p.num_heads = kHeads;
  p.num_kv_heads = kKvHeads;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.head_dim = p.head_dim_v = kDim;
  p.num_spans = kSpans;
  p.row_stop = seqlen_q;
  p.window_left = -1;
  p.window_right = causal ? 0 : -1;
  p.q = tensor(q, kHeads, seqlen_q);
  p.k = tensor(k, kKvHeads, seqlen_k);
  p.v = tensor(v, kKvHeads, seqlen_k);
  p.span_ids = ids.data();
  p.span_bias = {bias.data(), kHeads * seqlen_q * kSpans, seqlen_q * kSpans, kSpans, 1};
  p.scale = 0.5f;
  p.dtype = RAL_FLOAT32;
  while (strcmp(ral_cpu_isa_name(p.isa), "portable") != 0) ++p.isa;
  p.num_threads = threads;
  const ral_attention_outputs outputs{tensor(r.out, kHeads, seqlen_q), r.marginals.data(),
                                      r.lse.data()};
  const ral_attention_gradients gradients{tensor(dout, kHeads, seqlen_q),
                                          dmarginals.data(),
                                          dlse.data(),
                                          tensor(r.dq, kHeads, seqlen_q),
                                          tensor(r.dk, kKvHeads, seqlen_k),
                                          tensor(r.dv, kKvHeads, seqlen_k),
                                          r.dspan_bias.data()};
  if (ral_cpu_attention_fwd(&p, &outputs) != RAL_OK ||
      ral_cpu_attention_bwd(&p, &outputs, &gradients) != RAL_OK) {
    fprintf(stderr, "race_check: the library returned an error\n");
    exit(1);
  }
  return r;
}

struct DivergenceResult {
  std::vector<float> value, dq, dk, loss_value, loss_dq, loss_dk;
};

DivergenceResult compare(int64_t rows, int64_t seqlen_k, int threads) {
  std::vector<float> q = noise(kBatch * kHeads * rows * kDim, 1), r = noise(q.size(), 2);
  std::vector<float> k = noise(kBatch * kKvHeads * seqlen_k * kDim, 3), s = noise(k.size(), 4);
  std::vector<float> dvalue = noise(kBatch * rows, 5);
  std::vector<float> norm(2 * kHeads * rows), other_norm(2 * kHeads * rows), z(rows), other_z(rows);
  std::vector<float> u(kHeads * rows), w(kHeads * rows);
  DivergenceResult result;
  result.value.resize(rows);
  result.dq.resize(q.size());
  result.dk.resize(k.size());

  const auto tensor = [](std::vector<float>& x, int64_t heads, int64_t seqlen) {
    return ral_tensor{x.data(), heads * seqlen * kDim, seqlen * kDim, kDim};
  };
  ral_policy_divergence_params p;
  memset(&p, 0, sizeof p);
  p.common.batch_size = kBatch;
  p.common.num_rows = rows;
  p.common.seqlen_k = seqlen_k;
  p.common.query_start = seqlen_k - rows;
  p.common.exclude_self = 1;
  while (strcmp(ral_cpu_isa_name(p.common.isa), "portable") != 0) ++p.common.isa;
  p.common.num_threads = threads;
  p.policy.num_heads = kHeads;
  p.policy.num_kv_heads = kKvHeads;
  p.policy.head_dim = kDim;
  p.policy.window_left = -1;
  p.policy.scale = 0.5f;
  p.policy.dtype = RAL_FLOAT32;
  p.reference = p.policy;
  p.policy.q = tensor(q, kHeads, rows);
  p.policy.k = tensor(k, kKvHeads, seqlen_k);
  p.policy.norm = norm.data();
  p.policy.z = z.data();
  p.reference.q = tensor(r, kHeads, rows);
  p.reference.k = tensor(s, kKvHeads, seqlen_k);
  p.reference.norm = other_norm.data();
  p.reference.z = other_z.data();
  p.value = result.value.data();
  p.u = u.data();
  p.w = w.data();
  p.dvalue = dvalue.data();
  p.dq = tensor(result.dq, kHeads, rows);
  p.dk = tensor(result.dk, kKvHeads, seqlen_k);
  if (ral_cpu_policy_divergence_fwd(&p) != RAL_OK || ral_cpu_policy_divergence_bwd(&p) != RAL_OK) {
    fprintf(stderr, "race_check: the library returned an error\n");
    exit(1);
  }
  result.loss_value.resize(rows);
  result.loss_dq.resize(q.size());
  result.loss_dk.resize(k.size());
  p.value = result.loss_value.data();
  p.dq = tensor(result.loss_dq, kHeads, rows);
  p.dk = tensor(result.loss_dk, kKvHeads, seqlen_k);
  if (ral_cpu_policy_loss(&p) != RAL_OK) {
    fprintf(stderr, "race_check: the library returned an error\n");
    exit(1);
  }
  return result;
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

int main() {
  const int64_t lengths[][2] = {{150, 700}, {400, 400}, {1, 300}};
  for (const auto& length : lengths) {
    for (int causal = 0; causal < 2; ++causal) {
      const Result alone = run(length[0], length[1], causal, 1);
      for (int threads = 2; threads <= 5; threads += 3) {
        const Result shared = run(length[0], length[1], causal, threads);
        if (!equal(alone.out, shared.out) || !equal(alone.marginals, shared.marginals) ||
            !equal(alone.lse, shared.lse) || !equal(alone.dq, shared.dq) ||
            !equal(alone.dk, shared.dk) || !equal(alone.dv, shared.dv) ||
            !equal(alone.dspan_bias, shared.dspan_bias)) {
          fprintf(stderr, "race_check: T=%ld N=%ld causal=%d: %d threads differ from 1\n",
                  (long)length[0], (long)length[1], causal, threads);
          return 1;
        }
      }
    }
  }
  for (int64_t seqlen_k : {100, 500}) {
    const DivergenceResult alone = compare(70, seqlen_k, 1);
    for (int threads = 2; threads <= 5; threads += 3) {
      const DivergenceResult shared = compare(70, seqlen_k, threads);
      if (!equal(alone.value, shared.value) || !equal(alone.dq, shared.dq) ||
          !equal(alone.dk, shared.dk) || !equal(alone.loss_value, shared.loss_value) ||
          !equal(alone.loss_dq, shared.loss_dq) || !equal(alone.loss_dk, shared.loss_dk)) {
        fprintf(stderr, "race_check: divergence, N=%ld: %d threads differ from 1\n", (long)seqlen_k,
                threads);
        return 1;
      }
    }
  }
  puts("race_check: ok");
  return 0;
}
