// Forward of the `attention` op: out, lse and span marginals, equations (1)-(7) of the op's README.
//
// A task is one column block. It walks the keys in blocks of Compute::kForwardKeys: first P^T for
// the whole block, tile by tile, each tile exponentiated while it is still in registers; then O^T
// += V^T P^T. The stabiliser of a query is a whole power of two near, not at, its running maximum:
// it moves only when a score exceeds it by 2^kSlack, and then everything is rescaled exactly.
#pragma once

#include <math.h>

#include "attention_block.h"

namespace ral {
namespace RAL_ISA {

constexpr float kSlack = 8.f;  // P reaches at most 2^8, far from overflow in any sum

template <class Compute, int V, int64_t kPanels>
class AttentionForward {
 public:
  static constexpr int64_t kWidth = V * kLanes;
  static constexpr int64_t kColumns = kWidth * kPanels;
  static constexpr int64_t kGroupsPerBlock = Compute::kForwardKeys / kTileRows;
  static constexpr int64_t kStepsPerGroup = kTileRows / Compute::kPair;
  using Block = ColumnBlock<kColumns, kWidth>;

  AttentionForward(const ral_attention_params& params, const ral_attention_outputs& outputs)
      : problem_(params, kColumns, kGroupsPerBlock), params_(params), outputs_(outputs) {}

  int run() {
    if (!problem_.split()) return RAL_OUT_OF_MEMORY;
    if (problem_.total_blocks == 0 || params_.num_heads == 0) return RAL_OK;
    qk_steps_ = steps_of<Compute>(params_.head_dim);
    padded_qk_steps_ = round_up(qk_steps_, kLanes);
    v_groups_ = round_up(params_.head_dim_v, kTileRows) / kTileRows;
    padded_v_ = round_up(params_.head_dim_v, kLanes);
    padded_spans_ = round_up(params_.num_spans, kLanes);
    const int64_t groups = problem_.total_groups * params_.num_kv_heads;
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
    layout.probs = layout.add(kGroupsPerBlock * kStepsPerGroup * kColumns);
    layout.out = layout.add(padded_v_ * kColumns);
    layout.span_sums = layout.add(outputs_.marginals ? padded_spans_ * kColumns : 0);
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

 private:
  struct ScratchLayout : Layout {
    int64_t stage, queries, probs, out, span_sums, bias;
  };

  // The running softmax of one column block.
  struct State {
    alignas(64) float stabiliser[kColumns];  // base 2, a whole number
    alignas(64) float sum[kColumns];         // row sum over finished runs of one span
    alignas(64) float run[kColumns];         // row sum since the span last changed
    // Row sum of P as it meets V. Dividing O by it keeps the weights' sum at 1 where they are
    // rounded: a query with one dominant key gets that key's value exactly, as its dO.O in the
    // backward needs.
    alignas(64) float rounded_sum[kColumns];
    int32_t run_span[kPanels];
    bool out_started[kPanels];
    const int32_t* span_ids;  // null when nobody asked for marginals of this block
    const int32_t* group_spans;
    uint32_t* queries;
    uint32_t* probs;
    float* out;
    float* span_sums;
    float* bias;
  };

  static void pack_task(void* self, int64_t task, int worker) {
    static_cast<AttentionForward*>(self)->pack(task, worker);
  }
  static void block_task(void* self, int64_t task, int worker) {
    static_cast<AttentionForward*>(self)->attend(task, worker);
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
      pack_a_rows<Compute>(problem_.key_rows(params_.k, s, kv_head), group, params_.head_dim, stage,
                           packed_k_ + i * kTileRows * qk_steps_);
      const Rows values = problem_.key_rows(params_.v, s, kv_head);
      uint32_t* packed_v = values_of(s, kv_head);
      for (int64_t step = group * kStepsPerGroup; step < (group + 1) * kStepsPerGroup; ++step) {
        pack_a_columns<Compute>(values, step, params_.head_dim_v, s.num_groups * kStepsPerGroup,
                                stage, packed_v);
      }
    }
  }

  uint32_t* values_of(const Sequence& s, int64_t kv_head) const {
    return packed_v_ + problem_.groups_before(s, kv_head) * kStepsPerGroup * v_groups_ * kTileRows;
  }

  void attend(int64_t task, int worker) {
    const Sequence& s = problem_.find(task, &Sequence::first_block, &Sequence::num_blocks);
    const int64_t kv_head = (task - s.first_block * params_.num_kv_heads) / s.num_blocks;
    // Last queries first: under a causal mask they see most keys, and the tail of the loop stays
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
    state.span_sums = reinterpret_cast<float*>(scratch + layout_.span_sums);
    state.bias =
        params_.span_bias.data ? reinterpret_cast<float*>(scratch + layout_.bias) : nullptr;
    state.span_ids =
        outputs_.marginals && has_marginal_rows(block) ? problem_.span_ids(s) : nullptr;
    state.group_spans = state.span_ids ? problem_.group_spans(s) : nullptr;
    pack_b_columns<Compute, Block, kWidth>(problem_, s, params_.q, block, nullptr, params_.head_dim,
                                           stage, state.queries);
    if (state.bias) {
      load_span_rows<Block, kColumns>(problem_, s, block, params_.span_bias,
                                      reinterpret_cast<float*>(stage), state.bias);
    }
    if (state.span_ids) memset(state.span_sums, 0, padded_spans_ * kColumns * sizeof(float));
    for (int64_t c = 0; c < kColumns; ++c) {
      state.stabiliser[c] = kEmptyRow;
      state.sum[c] = state.run[c] = state.rounded_sum[c] = 0.f;
    }
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      state.run_span[panel] = -1;
      state.out_started[panel] = false;
    }

    const ScoreTransform<V> transform(problem_, s);
    const uint32_t* keys = packed_k_ + problem_.groups_before(s, kv_head) * kTileRows * qk_steps_;
    const uint32_t* values = values_of(s, kv_head);
    const GroupRange visible =
        groups_of_keys(block.block_first, block.block_last, GroupRange{0, s.num_groups});
    for (int64_t begin = visible.begin; begin < visible.end; begin += kGroupsPerBlock) {
      const int64_t end =
          begin + kGroupsPerBlock < visible.end ? begin + kGroupsPerBlock : visible.end;
      for (int64_t panel = 0; panel < kPanels; ++panel) {
        const GroupRange range =
            groups_of_keys(block.some_first[panel], block.some_last[panel], GroupRange{begin, end});
        if (range.begin == range.end) continue;
        for (int64_t group = range.begin; group < range.end; ++group) {
          probabilities(transform, s, block, panel, group, range.begin, keys, state);
        }
        accumulate_out(s, panel, range, values, state);
      }
    }
    finish(s, block, state, reinterpret_cast<float*>(stage));
  }

  bool has_marginal_rows(const Block& block) const {
    return block.column[0].token < params_.row_stop &&
           block.column[block.count - 1].token >= params_.row_start;
  }

  // P^T of one tile, written as the B operand of O^T += V^T P^T.
  RAL_INLINE void probabilities(const ScoreTransform<V>& transform, const Sequence& s,
                                const Block& block, int64_t panel, int64_t group,
                                int64_t first_group, const uint32_t* keys, State& state) const {
    Vec p[kTileRows][V];
    clear(p);
    multiply_tile<Compute, AOperand::kPacked, kTileRows, V>(
        p, keys + group * kTileRows * qk_steps_, 0,
        state.queries + panel * padded_qk_steps_ * kWidth, kWidth, qk_steps_);
    float factor = params_.scale * kLog2e;
    if (__builtin_expect(!transform.is_plain(block, panel, group), 0)) {
      transform.apply(p, block, panel, group, state.bias, kColumns, nullptr);
      // Rounded here: with a fused multiply the stabiliser of a row of finfo.min would be far from
      // it.
      for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < V; ++v) p[r][v] = p[r][v] * kLog2e;
      }
      factor = 1.f;
    }
    float* stabiliser = state.stabiliser + panel * kWidth;
    bool exceeded = false;
    RAL_UNROLL for (int v = 0; v < V; ++v) {
      const Vec top = max(max(max(p[0][v], p[1][v]), max(p[2][v], p[3][v])), max(p[4][v], p[5][v]));
      exceeded |= any_greater(top * factor, load(stabiliser + v * kLanes) + kSlack);
    }
    if (__builtin_expect(exceeded, 0)) {
      Vec top[V];
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        top[v] =
            max(max(max(p[0][v], p[1][v]), max(p[2][v], p[3][v])), max(p[4][v], p[5][v])) * factor;
      }
      raise_stabiliser(top, panel, group - first_group, state);
    }
    RAL_UNROLL for (int v = 0; v < V; ++v) {
      const Vec m = load(stabiliser + v * kLanes);
      RAL_UNROLL for (int r = 0; r < kTileRows; ++r)
        p[r][v] = exp2(p[r][v] * factor - m);
    }
    uint32_t* probs =
        state.probs + (group - first_group) * kStepsPerGroup * kColumns + panel * kWidth;
    Compute::template store_row_pairs<V>(p, probs, kColumns, state.rounded_sum + panel * kWidth);
    add_to_sums(p, s, panel, group, state);
  }

  RAL_INLINE void add_to_sums(const Vec (&p)[kTileRows][V], const Sequence& s, int64_t panel,
                              int64_t group, State& state) const {
    float* run = state.run + panel * kWidth;
    const int32_t span = state.span_ids ? state.group_spans[group] : state.run_span[panel];
    if (__builtin_expect(span != Problem::kMixed, 1)) {
      if (span != state.run_span[panel]) finish_run(panel, span, state);
      RAL_UNROLL for (int v = 0; v < V; ++v) {
        const Vec total = ((p[0][v] + p[1][v]) + (p[2][v] + p[3][v])) + (p[4][v] + p[5][v]);
        store(run + v * kLanes, load(run + v * kLanes) + total);
      }
      return;
    }
    const int64_t key = group * kTileRows;
    Vec part[V] = {};  // of the run, not yet added
    RAL_UNROLL for (int r = 0; r < kTileRows; ++r) {
      // Past the end p is 0, and goes to the run that is there.
      if (key + r < s.seqlen_k && state.span_ids[key + r] != state.run_span[panel]) {
        RAL_UNROLL for (int v = 0; v < V; ++v) {
          store(run + v * kLanes, load(run + v * kLanes) + part[v]);
          part[v] = Vec{};
        }
        finish_run(panel, state.span_ids[key + r], state);
      }
      RAL_UNROLL for (int v = 0; v < V; ++v)
        part[v] += p[r][v];
    }
    RAL_UNROLL for (int v = 0; v < V; ++v)
      store(run + v * kLanes, load(run + v * kLanes) + part[v]);
  }

  // A run of keys of one span ends: its sum goes to the span and to the row, equation (7).
  RAL_NOINLINE static void finish_run(int64_t panel, int32_t next_span, State& state) {
    float* run = state.run + panel * kWidth;
    float* sum = state.sum + panel * kWidth;
    float* span = state.run_span[panel] >= 0 && state.span_ids
                      ? state.span_sums + state.run_span[panel] * kColumns + panel * kWidth
                      : nullptr;
    for (int v = 0; v < V; ++v) {
      const Vec x = load(run + v * kLanes);
      store(sum + v * kLanes, load(sum + v * kLanes) + x);
      if (span) store(span + v * kLanes, load(span + v * kLanes) + x);
      store(run + v * kLanes, Vec{});
    }
    state.run_span[panel] = next_span;
  }

  // Moves the stabiliser to the power of two above `top` where that is higher, and rescales all
  // that was summed under the old one. Powers of two: exact, for bfloat16 P too.
  RAL_NOINLINE void raise_stabiliser(const Vec (&top)[V], int64_t panel, int64_t groups_done,
                                     State& state) const {
    for (int v = 0; v < V; ++v) {
      const int64_t c = panel * kWidth + v * kLanes;
      const Vec old = load(state.stabiliser + c);
      const Vec raised = max(old, -floor(-top[v]));
      const Vec factor = exp2(old - raised);
      store(state.stabiliser + c, raised);
      store(state.sum + c, load(state.sum + c) * factor);
      store(state.run + c, load(state.run + c) * factor);
      store(state.rounded_sum + c, load(state.rounded_sum + c) * factor);
      if (state.span_ids) {
        for (int64_t span = 0; span < params_.num_spans; ++span) {
          float* x = state.span_sums + span * kColumns + c;
          store(x, load(x) * factor);
        }
      }
      if (state.out_started[panel]) {
        for (int64_t d = 0; d < params_.head_dim_v; ++d) {
          float* x = state.out + d * kColumns + c;
          store(x, load(x) * factor);
        }
      }
      for (int64_t step = 0; step < groups_done * kStepsPerGroup; ++step) {
        Compute::rescale(state.probs + step * kColumns + c, factor);
      }
    }
  }

  // O^T += V^T P^T for the keys of `range`.
  void accumulate_out(const Sequence& s, int64_t panel, GroupRange range, const uint32_t* values,
                      State& state) const {
    const int64_t total_steps = s.num_groups * kStepsPerGroup;
    for (int64_t g = 0; g < v_groups_; ++g) {
      const int64_t d = g * kTileRows;
      const Product product{values + (g * total_steps + range.begin * kStepsPerGroup) * kTileRows,
                            0, state.probs + panel * kWidth, kColumns,
                            (range.end - range.begin) * kStepsPerGroup};
      accumulate_rows<Compute, AOperand::kPacked, V>(
          params_.head_dim_v - d < kTileRows ? params_.head_dim_v - d : kTileRows,
          state.out + d * kColumns + panel * kWidth, kColumns, state.out_started[panel], product);
    }
    state.out_started[panel] = true;
  }

  // Normalises and writes out, lse and marginals of the block.
  void finish(const Sequence& s, const Block& block, State& state, float* stage) const {
    alignas(64) float inverse[kColumns];      // of the row sum, for marginals
    alignas(64) float inverse_out[kColumns];  // of the sum of the weights that O was made with
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      finish_run(panel, -1, state);
      if (state.out_started[panel]) continue;
      for (int64_t d = 0; d < params_.head_dim_v; ++d) {
        memset(state.out + d * kColumns + panel * kWidth, 0, kWidth * sizeof(float));
      }
    }
    for (int64_t c = 0; c < block.count; ++c) {
      const typename Block::Column& column = block.column[c];
      if (state.span_ids) prefetch_marginals(s, block, c);
      const bool empty = state.sum[c] == 0.f;
      inverse[c] = empty ? 0.f : 1.f / state.sum[c];
      inverse_out[c] = empty                     ? 0.f
                       : Compute::kRoundsWeights ? 1.f / state.rounded_sum[c]
                                                 : inverse[c];
      outputs_.lse[(s.batch * params_.num_heads + column.head) * params_.seqlen_q + column.token] =
          empty ? -__builtin_inff() : (state.stabiliser[c] + log2f(state.sum[c])) * kLn2;
    }
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      const int64_t first = panel * kWidth;
      transpose_block(state.out + first, kColumns, stage, padded_v_, padded_v_, kWidth);
      for (int64_t c = first; c < block.count && c < first + kWidth; ++c) {
        float* row = stage + (c - first) * padded_v_;
        for (int64_t d = 0; d < padded_v_; ++d) row[d] *= inverse_out[c];
        convert_from_float(params_.dtype, row, params_.head_dim_v,
                           column_row(problem_, s, outputs_.out, block, c));
      }
    }
    if (state.span_ids) write_marginals(s, block, state.span_sums, inverse);
  }

  // Row of the marginals that belongs to column `c`; null if it has none.
  float* marginals_row(const Sequence& s, const Block& block, int64_t c) const {
    const int64_t num_rows = params_.row_stop - params_.row_start;
    const int64_t row = block.column[c].token - params_.row_start;
    if (row < 0 || row >= num_rows) return nullptr;
    const int64_t head_row = s.batch * params_.num_heads + block.column[c].head;
    return outputs_.marginals + (head_row * num_rows + row) * params_.num_spans;
  }

  // A row of marginals is short and far from the next: its lines are asked for while O is written.
  void prefetch_marginals(const Sequence& s, const Block& block, int64_t c) const {
    const float* row = marginals_row(s, block, c);
    const int64_t spans = params_.num_spans < 128 ? params_.num_spans : 128;
    for (int64_t i = 0; row && i < spans; i += 16) __builtin_prefetch(row + i, 1, 2);
  }

  void write_marginals(const Sequence& s, const Block& block, const float* span_sums,
                       const float* inverse) const {
    for (int64_t first = 0; first < block.count; first += kLanes) {
      float* row[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        row[i] = first + i < block.count ? marginals_row(s, block, first + i) : nullptr;
      }
      for (int64_t begin = 0; begin < params_.num_spans; begin += kLanes) {
        const int64_t left = params_.num_spans - begin;
        Vec m[kLanes];
        RAL_UNROLL for (int i = 0; i < kLanes; ++i) {
          m[i] = load(span_sums + (begin + i) * kColumns + first) * load(inverse + first);
        }
        transpose(m);
        RAL_UNROLL for (int i = 0; i < kLanes; ++i) {
          if (row[i]) store_first(row[i] + begin, m[i], left);
        }
      }
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
