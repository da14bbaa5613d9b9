// What the backwards of the `attention` op share: the walk over keys and queries to dq, dk, dv and
// dspan_bias. Equations (8) to (16) of ral_kernels/ops/attention/README.md.
//
// A task is one key block. It walks over the column blocks that see it, last queries first. For
// each it recomputes P^T, forms dS^T, and adds to its own dK and dV. dQ belongs to the column
// block, and all key blocks add to it. Each waits until its predecessor has added, so the order of
// the sum is fixed and the result repeats bit for bit.
//
// Workers claim tasks in ascending order, and a task waits only for lower ones. So there is no
// deadlock, whatever the number of threads. A tile takes five matrix products; the order costs no
// recomputation.
#pragma once

#include "attention/bwd_queries.h"
#include "core/kernels.h"

namespace ral {
namespace RAL_ISA {

// The derived class `Backward` forms the products: differentiate(), accumulate_keys() and
// accumulate_queries().
template <class Backward, class Compute, int V, int64_t kPanels>
class BackwardKeys {
 public:
  using Queries = BackwardQueries<Compute, V, kPanels>;
  using View = typename Queries::View;
  static constexpr int64_t kWidth = Queries::kWidth;
  static constexpr int64_t kColumns = Queries::kColumns;
  static constexpr int64_t kBiasColumns = Queries::kBiasColumns;
  static constexpr int64_t kColumnSteps = Queries::kColumnSteps;
  static constexpr int64_t kGroupsPerBlock = Compute::kBackwardKeys / kTileRows;
  static constexpr int64_t kKeysPerBlock = kGroupsPerBlock * kTileRows;
  static constexpr int64_t kStepsPerGroup = kTileRows / Compute::kPair;

  BackwardKeys(const ral_attention_params& params, const ral_attention_outputs& outputs,
               const ral_attention_gradients& gradients)
      : problem_(params, kColumns, kGroupsPerBlock),
        params_(params),
        gradients_(gradients),
        queries_(problem_, outputs, gradients, kGroupsPerBlock) {}

  int run() {
    if (!problem_.split()) return RAL_OUT_OF_MEMORY;
    const int64_t kv_heads = params_.num_kv_heads;
    const int64_t head_dim = params_.head_dim, head_dim_v = params_.head_dim_v;
    has_dout_ = gradients_.dout.data != nullptr;
    qk_steps_ = steps_of<Compute>(head_dim);
    v_steps_ = steps_of<Compute>(head_dim_v);
    k_feature_groups_ = round_up(head_dim, kTileRows) / kTileRows;
    padded_k_ = round_up(head_dim, kPanel);
    padded_v_ = round_up(head_dim_v, kPanel);
    const int64_t groups = problem_.total_groups * kv_heads;
    const int64_t blocks = problem_.total_blocks * kv_heads;
    const int threads = params_.num_threads;

    Arena arena;
    const size_t key_rows = arena.reserve(groups * kTileRows * qk_steps_, 4);
    const size_t key_columns =
        arena.reserve(groups * kStepsPerGroup * k_feature_groups_ * kTileRows, 4);
    const size_t value_rows = arena.reserve(has_dout_ ? groups * kTileRows * v_steps_ : 0, 4);

    queries_.reserve(arena);

    const int64_t longest = padded_k_ > padded_v_ ? padded_k_ : padded_v_;
    const int64_t pack_size = kTileRows * (longest + kTileRows);
    scratch_layout_.stage =
        scratch_layout_.add(queries_.stage_size() > pack_size ? queries_.stage_size() : pack_size);
    scratch_layout_.dk = scratch_layout_.add(kKeysPerBlock * padded_k_);
    scratch_layout_.dv = scratch_layout_.add(kKeysPerBlock * padded_v_);
    scratch_layout_.p_rows = scratch_layout_.add(kKeysPerBlock * kColumnSteps);
    scratch_layout_.ds_rows = scratch_layout_.add(kKeysPerBlock * kColumnSteps);
    // With one number per element both forms of dS are the same.
    scratch_layout_.ds_pairs = Compute::kPair == 1
                                   ? scratch_layout_.ds_rows
                                   : scratch_layout_.add(kKeysPerBlock / Compute::kPair * kColumns);
    scratch_layout_.few_queries = scratch_layout_.add(
        has_few_queries(params_) ? kFewQueries * round_up(head_dim, kLanes) : 0);
    scratch_layout_.dbias = scratch_layout_.add(queries_.bias_size());
    const size_t scratch = arena.reserve(scratch_layout_.size * threads, 4);
    if (!arena.allocate()) return RAL_OUT_OF_MEMORY;
    key_rows_ = arena.at<uint32_t>(key_rows);
    key_columns_ = arena.at<uint32_t>(key_columns);
    value_rows_ = arena.at<uint32_t>(value_rows);
    queries_.bind(arena);
    scratch_ = arena.at<uint32_t>(scratch);
    if (gradients_.dspan_bias) {
      for (int worker = 0; worker < threads; ++worker) {
        memset(scratch_of(worker) + scratch_layout_.dbias, 0, queries_.bias_size() * sizeof(float));
      }
    }

    parallel_for(threads, (groups + kGroupsPerBlock - 1) / kGroupsPerBlock, pack_task, this);
    parallel_for(threads, blocks, prepare_task, this);
    parallel_for(threads, problem_.total_key_blocks * kv_heads, key_block_task, this);
    return RAL_OK;
  }

 protected:
  alignas(64) static constexpr float kNoGradient[kWidth] = {};  // dM of keys in no span

  struct ScratchLayout : Layout {
    int64_t stage, dk, dv, p_rows, ds_rows, ds_pairs, few_queries, dbias;
  };

  Backward& self() { return static_cast<Backward&>(*this); }

  static void pack_task(void* self, int64_t task, int worker) {
    static_cast<BackwardKeys*>(self)->pack(task, worker);
  }
  static void prepare_task(void* self, int64_t task, int worker) {
    static_cast<BackwardKeys*>(self)->prepare(task, worker);
  }
  static void key_block_task(void* self, int64_t task, int worker) {
    static_cast<BackwardKeys*>(self)->run_key_block(task, worker);
  }

  void prepare(int64_t block, int worker) {
    queries_.prepare(block, scratch_of(worker) + scratch_layout_.stage);
  }

  uint32_t* scratch_of(int worker) const { return scratch_ + worker * scratch_layout_.size; }

  // Packs K by rows and by columns, and V by rows, of some key groups.
  void pack(int64_t task, int worker) {
    uint32_t* stage = scratch_of(worker) + scratch_layout_.stage;
    const int64_t end = problem_.total_groups * params_.num_kv_heads;
    for (int64_t i = task * kGroupsPerBlock; i < end && i < (task + 1) * kGroupsPerBlock; ++i) {
      const Sequence& s = problem_.find(i, &Sequence::first_group, &Sequence::num_groups);
      const int64_t kv_head = (i - s.first_group * params_.num_kv_heads) / s.num_groups;
      const int64_t group = i - problem_.groups_before(s, kv_head);
      const Rows keys = problem_.real_key_rows(params_.k, s, kv_head);
      pack_a_rows<Compute>(keys, group, params_.head_dim, stage,
                           key_rows_ + i * kTileRows * qk_steps_);
      uint32_t* columns = key_columns_of(s, kv_head);
      const FeatureRows layout = key_layout(s);
      pack_a_columns<Compute>(keys, group, params_.head_dim, layout, stage, columns);
      if (has_dout_) {
        pack_a_rows<Compute>(problem_.real_key_rows(params_.v, s, kv_head), group,
                             params_.head_dim_v, stage, value_rows_ + i * kTileRows * v_steps_);
      }
    }
  }

  FeatureRows key_layout(const Sequence& s) const {
    return FeatureRows::of<Compute>(params_.head_dim, s.num_groups, kGroupsPerBlock);
  }
  uint32_t* key_columns_of(const Sequence& s, int64_t kv_head) const {
    return key_columns_ +
           problem_.groups_before(s, kv_head) * kStepsPerGroup * k_feature_groups_ * kTileRows;
  }

  void run_key_block(int64_t task, int worker) {
    const Sequence& s = problem_.find(task, &Sequence::first_key_block, &Sequence::num_key_blocks);
    const int64_t before = s.first_key_block * params_.num_kv_heads;
    const int64_t kv_head = (task - before) / s.num_key_blocks;
    const int64_t key_block = task - before - kv_head * s.num_key_blocks;
    GroupRange keys{key_block * kGroupsPerBlock, (key_block + 1) * kGroupsPerBlock};
    if (keys.end > s.num_groups) keys.end = s.num_groups;

    uint32_t* scratch = scratch_of(worker);
    float* dk = reinterpret_cast<float*>(scratch + scratch_layout_.dk);
    float* dv = reinterpret_cast<float*>(scratch + scratch_layout_.dv);
    memset(dk, 0, kKeysPerBlock * padded_k_ * sizeof(float));
    memset(dv, 0, kKeysPerBlock * padded_v_ * sizeof(float));
    const typename Compute::Scope scope;
    const ScoreTransform<V> transform(problem_, s);
    const int64_t first_block = problem_.blocks_before(s, kv_head);
    // Last queries first: under a causal mask all key blocks can start there at once.
    for (int64_t i = s.num_blocks - 1; i >= 0; --i) {
      const View v = queries_.view(first_block + i);
      const GroupRange seen = groups_of_keys(v.block.block_first, v.block.block_last, keys);
      if (seen.begin == seen.end) continue;
      self().differentiate(transform, s, v, kv_head, seen, scratch);
      if (has_dout_) {
        self().accumulate_keys(seen, keys.begin, v.dout_rows, scratch + scratch_layout_.p_rows,
                               params_.head_dim_v, padded_v_, dv);
      }
      self().accumulate_keys(seen, keys.begin, v.q_rows, scratch + scratch_layout_.ds_rows,
                             params_.head_dim, padded_k_, dk);
      add_to_queries(s, v, kv_head, key_block, seen, queries_.turn(first_block + i), scratch);
    }
    finish_keys(s, kv_head, keys, gradients_.dk, params_.head_dim, padded_k_, params_.scale, dk);
    finish_keys(s, kv_head, keys, gradients_.dv, params_.head_dim_v, padded_v_, 1.f, dv);
  }

  static uint32_t* rows_tile(int64_t base, int64_t row_group, int64_t panel, uint32_t* scratch) {
    return scratch + base + row_group * kTileRows * kColumnSteps + panel * kWidth / Compute::kPair;
  }

  // Prefetches dM of a tile before its products are formed. It comes from beyond L2, and dS would
  // wait for it.
  RAL_INLINE void prefetch_dmarginals(const Sequence& s, const View& view, int64_t group,
                                      int64_t column) const {
    const int64_t last =
        (group + 1) * kTileRows < s.seqlen_k ? (group + 1) * kTileRows : s.seqlen_k;
    const int32_t* ids = problem_.span_ids(s);
    const int32_t spans[] = {ids[group * kTileRows], ids[last - 1]};
    for (const int32_t span : spans) {
      if (span < 0) continue;
      const float* dm = view.dmarginals + span * kColumns + column;
      RAL_UNROLL for (int v = 0; v < V; ++v)
        __builtin_prefetch(dm + v * kLanes);
    }
  }

  // dQ^T += K^T dS^T, in this key block's turn. The last key block writes dq and dspan_bias.
  void add_to_queries(const Sequence& s, const View& v, int64_t kv_head, int64_t key_block,
                      GroupRange seen, int64_t* turn, uint32_t* scratch) {
    for (int64_t i = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != key_block; ++i) spin_pause(i);
    const GroupRange all =
        groups_of_keys(v.block.block_first, v.block.block_last, GroupRange{0, s.num_groups});
    const bool first = key_block == all.begin / kGroupsPerBlock;
    self().accumulate_queries(s, v, kv_head, seen, !first, scratch);
    if (v.dbias) flush_dbias(s, v, seen, scratch);
    if (key_block == (all.end - 1) / kGroupsPerBlock) {
      queries_.finish(s, v);
    }
    __atomic_store_n(turn, key_block + 1, __ATOMIC_RELEASE);
  }

  // Adds this worker's span sums of dS and P to the block's, and clears them.
  void flush_dbias(const Sequence& s, const View& v, GroupRange seen, uint32_t* scratch) const {
    const int32_t* ids = problem_.span_ids(s);
    float* local = reinterpret_cast<float*>(scratch + scratch_layout_.dbias);
    int64_t previous = -1;
    for (int64_t key = seen.begin * kTileRows; key < seen.end * kTileRows && key < s.seqlen_k;
         ++key) {
      const int64_t row = queries_.bias_row(ids[key]);
      if (row == previous) continue;
      previous = row;
      for (int64_t c = row * kBiasColumns; c < (row + 1) * kBiasColumns; c += kLanes) {
        store(v.dbias + c, load(v.dbias + c) + load(local + c));
        store(local + c, Vec{});
      }
    }
  }

  void finish_keys(const Sequence& s, int64_t kv_head, GroupRange keys, const ral_tensor& gradient,
                   int64_t features, int64_t padded, float scale, float* rows) const {
    const Rows target = problem_.key_rows(gradient, s, kv_head);
    for (int64_t key = keys.begin * kTileRows; key < keys.end * kTileRows && key < s.seqlen_k;
         ++key) {
      float* row = rows + (key - keys.begin * kTileRows) * padded;
      for (int64_t d = 0; d < features; ++d) row[d] *= scale;
      convert_from_float(params_.dtype, row, features, const_cast<char*>(target.row(key)));
    }
  }

  Problem problem_;
  const ral_attention_params& params_;
  const ral_attention_gradients& gradients_;
  Queries queries_;
  bool has_dout_ = false;
  int64_t qk_steps_ = 0, v_steps_ = 0, k_feature_groups_ = 0, padded_k_ = 0, padded_v_ = 0;
  ScratchLayout scratch_layout_{};
  uint32_t* key_rows_ = nullptr;
  uint32_t* key_columns_ = nullptr;
  uint32_t* value_rows_ = nullptr;
  uint32_t* scratch_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
