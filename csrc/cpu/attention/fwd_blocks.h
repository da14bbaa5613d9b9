// What the forwards of the `attention` op share: packing, the running softmax of each column block,
// and its end. Equations (1) to (7) of ral_kernels/ops/attention/README.md.
//
// The stabiliser of a query is a whole power of two near its running maximum. It moves only when a
// score exceeds it by kSlack octaves. Everything is then rescaled exactly.
#pragma once

#include <math.h>

#include "attention/block.h"

namespace ral {
namespace RAL_ISA {

constexpr float kSlack = 8.f;  // P is at most 2^8, far from overflow in any sum
// From here on in base 2 float32 has no fractions, and an FMA's exact product is far from it.
constexpr float kCoarseScore = 16777216.f;
// Sums of O over this many blocks of keys are added up on their own: a plain sum over 32k keys has
// twice the error (float32).
constexpr int64_t kFoldedBlocks = 16;

// Scores of some keys and queries, before `factor` brings them to base 2.
template <int V>
struct Tile {
  Vec scores[kTileRows][V];
  float factor;
};

// A task is one column block. The derived class `Forward` takes it through the keys in walk(),
// which leaves O^T and the sums. It keeps P^T of kKeptBlocks blocks of keys. Without kPacks it
// reads K and V in place, and queries are rows of float32.
template <class Forward, class Compute, int V, int64_t kPanels, int kKeptBlocks, bool kPacks = true>
class ForwardBlocks {
 public:
  static constexpr int64_t kWidth = V * kLanes;
  static constexpr int64_t kColumns = kWidth * kPanels;
  static constexpr int64_t kGroupsPerBlock = Compute::kForwardKeys / kTileRows;
  static constexpr int64_t kStepsPerGroup = kTileRows / Compute::kPair;
  using Block = ColumnBlock<kColumns, kWidth>;

  ForwardBlocks(const ral_attention_params& params, const ral_attention_outputs& outputs)
      : problem_(params, kColumns, kGroupsPerBlock), params_(params), outputs_(outputs) {}

  int run() {
    if (!problem_.split()) return RAL_OUT_OF_MEMORY;
    if (problem_.total_blocks == 0 || params_.num_heads == 0) return RAL_OK;
    qk_steps_ = steps_of<Compute>(params_.head_dim);
    padded_qk_steps_ = round_up(qk_steps_, kLanes);
    v_groups_ = round_up(params_.head_dim_v, kTileRows) / kTileRows;
    padded_v_ = round_up(params_.head_dim_v, kFeaturePadding);
    padded_spans_ = round_up(params_.num_spans, kLanes);
    const int64_t groups = kPacks ? problem_.total_groups * params_.num_kv_heads : 0;
    const int threads = params_.num_threads;

    Arena arena;
    const size_t packed_k = arena.reserve(groups * kTileRows * qk_steps_, 4);
    const size_t packed_v = arena.reserve(groups * kStepsPerGroup * v_groups_ * kTileRows, 4);
    const int64_t row =
        params_.head_dim > params_.head_dim_v ? params_.head_dim : params_.head_dim_v;
    const int64_t stage_rows = kWidth > kTileRows ? kWidth : kTileRows;
    ScratchLayout layout{};
    layout.stage = layout.add(stage_rows * round_up(row + kTileRows, kLanes) + kColumns * kLanes);
    layout.queries = layout.add(kPanels * padded_qk_steps_ * kWidth);
    layout.probs = layout.add(kKeptBlocks * kGroupsPerBlock * kStepsPerGroup * kColumns);
    layout.out = layout.add(padded_v_ * kColumns);
    const bool folds = params_.seqlen_k > kFoldedBlocks * Compute::kForwardKeys;
    layout.folded_out = layout.add(folds ? padded_v_ * kColumns : 0);
    layout.sums = layout.add((outputs_.marginals ? padded_spans_ + 1 : 1) * kColumns);
    layout.bias = layout.add(params_.span_bias.data ? padded_spans_ * kColumns : 0);
    const size_t scratch = arena.reserve(layout.size * threads, 4);
    if (!arena.allocate()) return RAL_OUT_OF_MEMORY;
    layout_ = layout;
    packed_k_ = arena.at<uint32_t>(packed_k);
    packed_v_ = arena.at<uint32_t>(packed_v);
    scratch_ = arena.at<uint32_t>(scratch);

    const int64_t pack_tasks = (groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
    parallel_for(threads, pack_tasks, pack_task, this);
    parallel_for(threads, problem_.total_blocks * params_.num_kv_heads, block_task, this);
    return RAL_OK;
  }

 protected:
  Forward& self() { return static_cast<Forward&>(*this); }

  // The running softmax of one column block.
  struct State {
    alignas(64) float stabiliser[kColumns];  // base 2, a whole number
    alignas(64) float top[kColumns];         // the highest score, natural
    // Row sum of the rounded P that is multiplied with V. Dividing O by it keeps the sum of the
    // weights at 1. A query with one dominant key then gets that key's value exactly, as dO.O in
    // the backward needs.
    alignas(64) float rounded_sum[kColumns];
    // Row sums are row_sum + lost + row 0 of `sums`. A row of tiles moves from row 0 to row_sum,
    // and what that rounds off to `lost`.
    alignas(64) float row_sum[kColumns];
    alignas(64) float lost[kColumns];
    alignas(64) float part[kWidth];  // of a row sum, since the span last changed
    bool started[kPanels];           // whether the panel has met a tile of scores
    int64_t out_rows[kPanels];       // rows of O^T that hold something
    int64_t out_blocks[kPanels];     // blocks of keys in O^T
    int64_t folded_rows[kPanels];    // rows of folded_out that hold something
    const int32_t* run_ends;         // null if no marginals of this block are wanted
    const int32_t* span_ids;         // so is this
    // Sums of P over the keys of each span. Row s + 1 belongs to span s, row 0 to all keys.
    // Without marginals row 0 is the only one.
    float* sums;
    int64_t sum_rows;
    uint32_t* queries;
    uint32_t* probs;
    float* out;
    float* folded_out;  // the part of O^T that is not in `out`
    float* bias;
    float* rows;  // room for a float32 row of V per query
  };

  const uint32_t* keys_of(const Sequence& s, int64_t kv_head) const {
    return packed_k_ + problem_.groups_before(s, kv_head) * kTileRows * qk_steps_;
  }
  struct ScratchLayout : Layout {
    int64_t stage, queries, probs, out, folded_out, sums, bias;
  };

  static void pack_task(void* self, int64_t task, int worker) {
    static_cast<ForwardBlocks*>(self)->pack(task, worker);
  }
  static void block_task(void* self, int64_t task, int worker) {
    static_cast<ForwardBlocks*>(self)->attend(task, worker);
  }

  // Packs K and V of some key groups, counted over all sequences and kv heads.
  void pack(int64_t task, int worker) {
    uint32_t* stage = scratch_ + worker * layout_.size + layout_.stage;
    const int64_t end = problem_.total_groups * params_.num_kv_heads;
    for (int64_t i = task * kGroupsPerBlock; i < end && i < (task + 1) * kGroupsPerBlock; ++i) {
      const Sequence& s = problem_.find(i, &Sequence::first_group, &Sequence::num_groups);
      const int64_t kv_head = (i - s.first_group * params_.num_kv_heads) / s.num_groups;
      const int64_t before = problem_.groups_before(s, kv_head);
      const int64_t group = i - before;
      pack_a_rows<Compute>(problem_.real_key_rows(params_.k, s, kv_head), group, params_.head_dim,
                           stage, packed_k_ + i * kTileRows * qk_steps_);
      const Rows values = problem_.real_key_rows(params_.v, s, kv_head);
      uint32_t* packed_v = values_of(s, kv_head);
      const FeatureRows layout = value_layout(s);
      pack_a_columns<Compute>(values, group, params_.head_dim_v, layout, stage, packed_v);
    }
  }

  FeatureRows value_layout(const Sequence& s) const {
    return FeatureRows::of<Compute>(params_.head_dim_v, s.num_groups, kGroupsPerBlock);
  }
  uint32_t* values_of(const Sequence& s, int64_t kv_head) const {
    return packed_v_ + problem_.groups_before(s, kv_head) * kStepsPerGroup * v_groups_ * kTileRows;
  }

  void attend(int64_t task, int worker) {
    const Sequence& s = problem_.find(task, &Sequence::first_block, &Sequence::num_blocks);
    const int64_t kv_head = (task - s.first_block * params_.num_kv_heads) / s.num_blocks;
    // Last queries first: under a causal mask they see the most keys, so the tail of the loop stays
    // short.
    const int64_t index = s.num_blocks - 1 - (task - problem_.blocks_before(s, kv_head));
    Block block;
    block.build(problem_, s, kv_head, index);

    uint32_t* scratch = scratch_ + worker * layout_.size;
    uint32_t* stage = scratch + layout_.stage;
    State state;
    state.queries = scratch + layout_.queries;
    state.probs = scratch + layout_.probs;
    state.out = reinterpret_cast<float*>(scratch + layout_.out);
    state.folded_out = reinterpret_cast<float*>(scratch + layout_.folded_out);
    state.sums = reinterpret_cast<float*>(scratch + layout_.sums);
    state.bias =
        params_.span_bias.data ? reinterpret_cast<float*>(scratch + layout_.bias) : nullptr;
    state.rows = reinterpret_cast<float*>(stage);
    state.run_ends =
        outputs_.marginals && has_marginal_rows(block) ? problem_.run_ends(s) : nullptr;
    state.span_ids = state.run_ends ? problem_.span_ids(s) : nullptr;
    if constexpr (kPacks) {
      pack_b_columns<Compute, Block, kWidth>(problem_, s, params_.q, block, nullptr,
                                             params_.head_dim, stage, state.queries);
    } else {
      const int64_t ld = round_up(params_.head_dim, kLanes);
      memset(state.queries, 0, round_up(block.count, kLanes / 2) * ld * sizeof(float));
      for (int64_t c = 0; c < block.count; ++c) {
        convert_to_float(params_.dtype, column_row(problem_, s, params_.q, block, c),
                         params_.head_dim, reinterpret_cast<float*>(state.queries) + c * ld);
      }
    }
    if (state.bias) {
      load_span_rows<Block, kColumns>(problem_, s, block, params_.span_bias,
                                      reinterpret_cast<float*>(stage), state.bias);
    }
    state.sum_rows = state.run_ends ? params_.num_spans + 1 : 1;
    memset(state.sums, 0, state.sum_rows * kColumns * sizeof(float));
    for (int64_t c = 0; c < kColumns; ++c) {
      state.stabiliser[c] = kEmptyRow;
      state.top[c] = -__builtin_inff();
      state.rounded_sum[c] = state.row_sum[c] = state.lost[c] = 0.f;
    }
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      state.started[panel] = false;
      state.out_rows[panel] = state.out_blocks[panel] = state.folded_rows[panel] = 0;
    }
    memset(state.part, 0, sizeof state.part);

    const ScoreTransform<V> transform(problem_, s);
    const GroupRange visible =
        groups_of_keys(block.block_first, block.block_last, GroupRange{0, s.num_groups});
    const typename Compute::Scope scope;
    self().walk(s, kv_head, block, transform, visible, state);
    finish(s, block, state);
  }

  bool has_marginal_rows(const Block& block) const {
    return block.column[0].token < params_.row_stop &&
           block.column[block.count - 1].token >= params_.row_start;
  }

  // Raises the stabiliser to the power of two above `top` where that is higher, and rescales all
  // sums under the old one. `factors` receives by how much. Powers of two are exact, for bfloat16 P
  // too.
  RAL_NOINLINE void raise_stabiliser(const Vec (&top)[V], int64_t panel, int64_t groups_done,
                                     State& state, Vec (&factors)[V]) const {
    for (int v = 0; v < V; ++v) {
      const int64_t c = panel * kWidth + v * kLanes;
      const Vec old = load(state.stabiliser + c);
      const Vec raised = max(old, -floor(-top[v]));
      const Vec factor = exp2(old - raised);
      factors[v] = factor;
      store(state.stabiliser + c, raised);
      const auto rescale = [factor](float* x) { store(x, load(x) * factor); };
      rescale(state.rounded_sum + c);
      rescale(state.row_sum + c);
      rescale(state.lost + c);
      rescale(state.part + v * kLanes);
      for (int64_t row = 0; state.started[panel] && row < state.sum_rows; ++row) {
        rescale(state.sums + row * kColumns + c);
      }
      for (int64_t d = 0; d < state.out_rows[panel]; ++d) rescale(state.out + d * kColumns + c);
      for (int64_t d = 0; d < state.folded_rows[panel]; ++d) {
        rescale(state.folded_out + d * kColumns + c);
      }
      for (int64_t step = 0; step < groups_done * kStepsPerGroup; ++step) {
        Compute::rescale(state.probs + step * kColumns + c, factor);
      }
    }
  }

  // Moves O^T of a panel to folded_out.
  void fold_out(int64_t panel, State& state) const {
    add_out(panel, state.out, state.out_rows[panel], state.folded_out, state.folded_rows[panel]);
    state.out_rows[panel] = state.out_blocks[panel] = 0;
  }

  // Adds `rows` rows of a panel to those of `to`, which holds `to_rows`: as many, or none.
  static void add_out(int64_t panel, const float* from, int64_t rows, float* to, int64_t& to_rows) {
    for (int64_t d = 0; d < rows; ++d) {
      const int64_t first = d * kColumns + panel * kWidth;
      for (int64_t c = first; c < first + kWidth; c += kLanes) {
        store(to + c, to_rows > 0 ? load(to + c) + load(from + c) : load(from + c));
      }
    }
    if (rows > 0) to_rows = rows;
  }

  // Moves row 0 of the sums to the row sums, and what that rounds off to `lost`.
  RAL_INLINE void fold_sums(int64_t panel, State& state) const {
    RAL_UNROLL for (int v = 0; v < V; ++v) {
      const int64_t c = panel * kWidth + v * kLanes;
      const Vec before = load(state.row_sum + c), added = load(state.sums + c);
      const Vec after = before + added, share = after - before;
      store(state.lost + c, load(state.lost + c) + ((before - (after - share)) + (added - share)));
      store(state.row_sum + c, after);
      store(state.sums + c, Vec{});
    }
  }

  // Normalises and writes out, lse and marginals of the block.
  void finish(const Sequence& s, const Block& block, State& state) const {
    alignas(64) float sum[kColumns];
    alignas(64) float top_weight[kColumns];   // P of the highest score
    alignas(64) float inverse[kColumns];      // of the row sum, for marginals
    alignas(64) float inverse_out[kColumns];  // of the sum of the weights that O was formed with
    // Hidden from the compiler, which would else share products and form no FMA where
    // exponentiate() has one.
    const Vec to_log2 = rounded(broadcast(kLog2e));
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      store(sum + c, load(state.sums + c) + load(state.lost + c) + load(state.row_sum + c));
      const Vec top = load(state.top + c), m = load(state.stabiliser + c);
      const IntVec is_coarse = max(top, -top) > kCoarseScore * kLn2;
      const Vec coarse = rounded(top * kLog2e) - m;
      store(top_weight + c, exp2_bounded(select(is_coarse, coarse, top * to_log2 - m)));
    }
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      add_out(panel, state.folded_out, state.folded_rows[panel], state.out, state.out_rows[panel]);
      for (int64_t d = state.out_rows[panel]; d < params_.head_dim_v; ++d) {
        memset(state.out + d * kColumns + panel * kWidth, 0, kWidth * sizeof(float));
      }
    }
    for (int64_t c = 0; c < kColumns; ++c) {
      const bool empty = sum[c] == 0.f;
      inverse[c] = empty ? 0.f : 1.f / sum[c];
      inverse_out[c] = empty                     ? 0.f
                       : Compute::kRoundsWeights ? 1.f / state.rounded_sum[c]
                                                 : inverse[c];
    }
    for (int64_t c = 0; c < block.count; ++c) {
      const typename Block::Column& column = block.column[c];
      float lse = (state.stabiliser[c] + log2f(sum[c])) * kLn2;
      // From the highest score on: where one key has all the weight, lse is its score to the bit,
      // and the backward forms a weight of exactly 1.
      if (!Compute::kTilesInMemory) lse = state.top[c] + logf(sum[c] / top_weight[c]);
      outputs_.lse[(s.batch * params_.num_heads + column.head) * params_.seqlen_q + column.token] =
          sum[c] == 0.f ? -__builtin_inff() : lse;
    }
    write_columns<kColumns>(
        state.out, params_.head_dim_v, inverse_out, block.count, params_.dtype,
        [&](int64_t c) { return column_row(problem_, s, outputs_.out, block, c); });
    if (!state.run_ends) return;
    write_columns<kColumns>(state.sums + kColumns, params_.num_spans, inverse, block.count,
                            RAL_FLOAT32, [&](int64_t c) { return marginals_row(s, block, c); });
  }

  // Row of the marginals that belongs to column `c`; null if it has none.
  float* marginals_row(const Sequence& s, const Block& block, int64_t c) const {
    const int64_t num_rows = params_.row_stop - params_.row_start;
    const int64_t row = block.column[c].token - params_.row_start;
    if (row < 0 || row >= num_rows) return nullptr;
    const int64_t head_row = s.batch * params_.num_heads + block.column[c].head;
    return outputs_.marginals + (head_row * num_rows + row) * params_.num_spans;
  }

  // Prefetches what finish() will write of some columns. Their rows are short, far apart and last
  // used long ago. If they were fetched all at once at the end, they would wait for memory.
  void prefetch_outputs(const Sequence& s, const Block& block, bool marginals, int64_t first,
                        int64_t last) const {
    constexpr int64_t kLine = 64;
    const int64_t bytes = params_.head_dim_v * element_size(params_.dtype);
    const int64_t spans = params_.num_spans < 128 ? params_.num_spans : 128;
    for (int64_t c = first; c < last && c < block.count; ++c) {
      const char* out = column_row(problem_, s, outputs_.out, block, c);
      for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(out + i, 1, 2);
      const float* row = marginals ? marginals_row(s, block, c) : nullptr;
      for (int64_t i = 0; row && i < spans; i += 16) __builtin_prefetch(row + i, 1, 2);
    }
  }

  Problem problem_;
  const ral_attention_params& params_;
  const ral_attention_outputs& outputs_;
  int64_t qk_steps_ = 0, padded_qk_steps_ = 0, v_groups_ = 0, padded_v_ = 0, padded_spans_ = 0;
  ScratchLayout layout_{};
  uint32_t* packed_k_ = nullptr;
  uint32_t* packed_v_ = nullptr;
  uint32_t* scratch_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
