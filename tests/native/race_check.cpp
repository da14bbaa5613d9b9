// Runs forwards and backwards of the CPU backend on several threads, for sanitizers to watch
// (test_races.py builds it), and compares the result with one thread's. Its argument names a
// variant. Every tensor is an allocation of its own, so that AddressSanitizer sees its end.
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

int32_t isa = 0;

// The elements of a tensor: float, or the bits of bfloat16.
template <class T>
struct Elements : std::vector<T> {
  static constexpr int32_t kDtype = sizeof(T) == 4 ? RAL_FLOAT32 : RAL_BFLOAT16;

  explicit Elements(int64_t count) : std::vector<T>(count) {}
  Elements(int64_t count, uint32_t seed) : std::vector<T>(count) {
    const std::vector<float> x = noise(count, seed);
    for (int64_t i = 0; i < count; ++i)
      memcpy(&(*this)[i], reinterpret_cast<const char*>(&x[i]) + 4 - sizeof(T), sizeof(T));
  }
  ral_tensor of(int64_t heads, int64_t seqlen) {
    return {this->data(), heads * seqlen * kDim, seqlen * kDim, kDim};
  }
};

template <class T>
struct Result {
  Elements<T> out, dq, dk, dv;
  std::vector<float> marginals, lse, dspan_bias;
};

template <class T>
Result<T> run(int64_t seqlen_q, int64_t seqlen_k, bool causal, int threads) {
  const int64_t queries = kBatch * kHeads * seqlen_q * kDim;
  const int64_t keys = kBatch * kKvHeads * seqlen_k * kDim;
  Elements<T> q(queries, 1), k(keys, 2), v(keys, 3), dout(queries, 4);
  std::vector<float> dmarginals = noise(kBatch * kHeads * seqlen_q * kSpans, 5);
  std::vector<float> dlse = noise(kBatch * kHeads * seqlen_q, 6);
  std::vector<float> bias = noise(dmarginals.size(), 7);
  std::vector<int32_t> ids(seqlen_k);
  for (int64_t i = 0; i < seqlen_k; ++i)
    ids[i] = static_cast<int32_t>(i * (kSpans + 1) / seqlen_k) - 1;

  Result<T> r{
      Elements<T>(queries), Elements<T>(queries), Elements<T>(keys), Elements<T>(keys), {}, {}, {}};
  r.marginals.resize(dmarginals.size());
  r.lse.resize(dlse.size());
  r.dspan_bias.resize(bias.size());

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
  p.q = q.of(kHeads, seqlen_q);
  p.k = k.of(kKvHeads, seqlen_k);
  p.v = v.of(kKvHeads, seqlen_k);
  p.span_ids = ids.data();
  p.span_bias = {bias.data(), kHeads * seqlen_q * kSpans, seqlen_q * kSpans, kSpans, 1};
  p.scale = 0.5f;
  p.dtype = Elements<T>::kDtype;
  p.isa = isa;
  p.num_threads = threads;
  const ral_attention_outputs outputs{r.out.of(kHeads, seqlen_q), r.marginals.data(), r.lse.data()};
  const ral_attention_gradients gradients{
      dout.of(kHeads, seqlen_q), dmarginals.data(),           dlse.data(),
      r.dq.of(kHeads, seqlen_q), r.dk.of(kKvHeads, seqlen_k), r.dv.of(kKvHeads, seqlen_k),
      r.dspan_bias.data()};
  if (ral_cpu_attention_fwd(&p, &outputs) != RAL_OK ||
      ral_cpu_attention_bwd(&p, &outputs, &gradients) != RAL_OK) {
    fprintf(stderr, "race_check: the library returned an error\n");
    exit(1);
  }
  return r;
}

template <class T>
struct DivergenceResult {
  Elements<T> dq, dk, loss_dq, loss_dk;
  std::vector<float> value, loss_value;
};

struct Sequence {
  int32_t rows, keys;
};

// Packed, if there is more than one sequence.
template <class T>
DivergenceResult<T> compare(const std::vector<Sequence>& sequences, int threads) {
  std::vector<int32_t> cu_seqlens_q{0}, cu_seqlens_k{0}, starts;
  int64_t max_rows = 0, max_keys = 0;
  for (const Sequence& s : sequences) {
    cu_seqlens_q.push_back(cu_seqlens_q.back() + s.rows);
    cu_seqlens_k.push_back(cu_seqlens_k.back() + s.keys);
    starts.push_back(s.keys - s.rows);
    if (s.rows > max_rows) max_rows = s.rows;
    if (s.keys > max_keys) max_keys = s.keys;
  }
  const int64_t rows = cu_seqlens_q.back(), seqlen_k = cu_seqlens_k.back();
  const int64_t queries = kBatch * kHeads * rows * kDim, keys = kBatch * kKvHeads * seqlen_k * kDim;
  Elements<T> q(queries, 1), r(queries, 2), k(keys, 3), s(keys, 4);
  std::vector<float> dvalue = noise(kBatch * rows, 5);
  std::vector<float> norm(2 * kHeads * rows), other_norm(2 * kHeads * rows), z(rows), other_z(rows);
  std::vector<float> u(kHeads * rows), w(kHeads * rows);
  DivergenceResult<T> result{
      Elements<T>(queries), Elements<T>(keys), Elements<T>(queries), Elements<T>(keys), {}, {}};
  result.value.resize(rows);

  ral_policy_divergence_params p;
  memset(&p, 0, sizeof p);
  p.common.batch_size = kBatch;
  p.common.num_rows = rows;
  p.common.seqlen_k = seqlen_k;
  p.common.total_rows = rows;
  if (sequences.size() == 1) {
    p.common.query_start = starts[0];
    p.common.row_length = seqlen_k;
  } else {
    p.common.row_length = p.common.max_keys = max_keys;
    p.common.max_rows = max_rows;
    p.common.num_sequences = static_cast<int64_t>(sequences.size());
    p.common.cu_seqlens_q = cu_seqlens_q.data();
    p.common.cu_seqlens_k = cu_seqlens_k.data();
    p.common.query_starts = starts.data();
  }
  p.common.exclude_self = 1;
  p.common.isa = isa;
  p.common.num_threads = threads;
  p.policy.num_heads = kHeads;
  p.policy.num_kv_heads = kKvHeads;
  p.policy.head_dim = kDim;
  p.policy.window_left = -1;
  p.policy.scale = 0.5f;
  p.policy.dtype = Elements<T>::kDtype;
  p.reference = p.policy;
  p.policy.q = q.of(kHeads, rows);
  p.policy.k = k.of(kKvHeads, seqlen_k);
  p.policy.norm = norm.data();
  p.policy.z = z.data();
  p.reference.q = r.of(kHeads, rows);
  p.reference.k = s.of(kKvHeads, seqlen_k);
  p.reference.norm = other_norm.data();
  p.reference.z = other_z.data();
  p.value = result.value.data();
  p.u = u.data();
  p.w = w.data();
  p.dvalue = dvalue.data();
  p.dq = result.dq.of(kHeads, rows);
  p.dk = result.dk.of(kKvHeads, seqlen_k);
  if (ral_cpu_policy_divergence_fwd(&p) != RAL_OK || ral_cpu_policy_divergence_bwd(&p) != RAL_OK) {
    fprintf(stderr, "race_check: the library returned an error\n");
    exit(1);
  }
  result.loss_value.resize(rows);
  p.value = result.loss_value.data();
  p.dq = result.loss_dq.of(kHeads, rows);
  p.dk = result.loss_dk.of(kKvHeads, seqlen_k);
  if (ral_cpu_policy_loss(&p) != RAL_OK) {
    fprintf(stderr, "race_check: the library returned an error\n");
    exit(1);
  }
  return result;
}

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T>
int check() {
  const int64_t lengths[][2] = {{150, 700}, {400, 400}, {1, 300}};
  for (const auto& length : lengths) {
    for (int causal = 0; causal < 2; ++causal) {
      const Result<T> alone = run<T>(length[0], length[1], causal, 1);
      for (int threads = 2; threads <= 5; threads += 3) {
        const Result<T> shared = run<T>(length[0], length[1], causal, threads);
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
  const std::vector<Sequence> calls[] = {
      {{70, 100}},
      {{70, 500}},
      // the first is split, and the others get one thread each
      {{170, 400}, {0, 9}, {1, 1}, {17, 40}, {3, 0}, {9, 33}, {16, 48}, {20, 7}}};
  for (const std::vector<Sequence>& sequences : calls) {
    const DivergenceResult<T> alone = compare<T>(sequences, 1);
    for (int threads = 2; threads <= 5; threads += 3) {
      const DivergenceResult<T> shared = compare<T>(sequences, threads);
      if (!equal(alone.value, shared.value) || !equal(alone.dq, shared.dq) ||
          !equal(alone.dk, shared.dk) || !equal(alone.loss_value, shared.loss_value) ||
          !equal(alone.loss_dq, shared.loss_dq) || !equal(alone.loss_dk, shared.loss_dk)) {
        fprintf(stderr, "race_check: divergence of %d sequences, N=%d: %d threads differ from 1\n",
                static_cast<int>(sequences.size()), sequences[0].keys, threads);
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const char* wanted = argc > 1 ? argv[1] : "portable";
  while (ral_cpu_isa_name(isa) && strcmp(ral_cpu_isa_name(isa), wanted) != 0) ++isa;
  if (check<float>() != 0 || check<uint16_t>() != 0) return 1;
  puts("race_check: ok");
  return 0;
}
