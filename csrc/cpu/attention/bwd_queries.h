// The column blocks of the attention backward. Queries and the gradients that arrive at them are
// packed once for all key blocks. The key blocks add to the sums of dQ and dspan_bias in turn.
#pragma once

#include "attention/block.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, int V, int64_t kPanels>
class BackwardQueries {
 public:
  static constexpr int64_t kWidth = V * kLanes;
  static constexpr int64_t kColumns = kWidth * kPanels;
  static constexpr int64_t kColumnSteps = kColumns / Compute::kPair;  // elements along the queries
  static constexpr int64_t kBiasColumns = 2 * kColumns;
  using Block = ColumnBlock<kColumns, kWidth>;

  // One column block, as a key block sees it.
  struct View {
    const Block& block;
    const uint32_t* q_columns;
    const uint32_t* q_rows;
    const uint32_t* dout_columns;
    const uint32_t* dout_rows;
    float* dq;   // [D][kColumns], unscaled
    float* lse;  // +inf where a query sees no key, so that its P is 0
    float* delta;
    float* dmarginals;  // [S][kColumns] or null; so are the next two
    float* bias;
    float* dbias;  // [S + 1][kBiasColumns]: of each bias_row() the sums of dS, then those of P
  };

  BackwardQueries(const Problem& problem, const ral_attention_outputs& outputs,
                  const ral_attention_gradients& gradients, int64_t block_groups)
      : problem_(problem),
        params_(problem.params),
        outputs_(outputs),
        gradients_(gradients),
        block_groups_(block_groups),
        has_dout_(gradients.dout.data != nullptr),
        padded_v_(round_up(params_.head_dim_v, kPanel)),
        padded_spans_(round_up(params_.num_spans, kLanes)) {}

  int64_t bias_size() const {
    return gradients_.dspan_bias ? (padded_spans_ + 1) * kBiasColumns : 0;
  }
  // Where the sums of a span are. Keys in no span count in the sum over a whole row.
  int64_t bias_row(int32_t span) const { return span >= 0 ? span : params_.num_spans; }

  // Room that prepare() and finish() need, in 32-bit elements.
  int64_t stage_size() const {
    const int64_t padded_k = round_up(params_.head_dim, kPanel);
    const int64_t longest = padded_k > padded_v_ ? padded_k : padded_v_;
    return (kWidth > 2 ? kWidth : 2) * longest + kColumns * kLanes;
  }

  void reserve(Arena& arena) {
    const int64_t blocks = problem_.total_blocks * params_.num_kv_heads;
    const int64_t k_steps = steps_of<Compute>(params_.head_dim);
    const int64_t v_steps = steps_of<Compute>(params_.head_dim_v);
    const int64_t span_rows = padded_spans_ * kColumns;
    layout_.q_columns = layout_.add(kColumns * round_up(k_steps, kLanes));
    layout_.q_rows = layout_.add(kColumnSteps * round_up(params_.head_dim, kPanel));
    layout_.dout_columns = layout_.add(has_dout_ ? kColumns * round_up(v_steps, kLanes) : 0);
    layout_.dout_rows = layout_.add(has_dout_ ? kColumnSteps * padded_v_ : 0);
    layout_.dq = layout_.add(round_up(params_.head_dim, kFeaturePadding) * kColumns);
    layout_.lse = layout_.add(kColumns);
    layout_.delta = layout_.add(kColumns);
    layout_.dmarginals = layout_.add(gradients_.dmarginals ? span_rows : 0);
    layout_.bias = layout_.add(params_.span_bias.data ? span_rows : 0);
    layout_.dbias = layout_.add(bias_size());
    data_offset_ = arena.reserve(blocks * layout_.size, sizeof(uint32_t));
    blocks_offset_ = arena.reserve(blocks, sizeof(Block));
    turns_offset_ = arena.reserve(blocks, sizeof(int64_t));
  }

  void bind(const Arena& arena) {
    data_ = arena.at<uint32_t>(data_offset_);
    blocks_ = arena.at<Block>(blocks_offset_);
    turns_ = arena.at<int64_t>(turns_offset_);
  }

  // Packs the queries of one column block and the gradients that arrive at them, and computes
  // delta.
  void prepare(int64_t index, uint32_t* stage) {
    const Sequence& s = problem_.find(index, &Sequence::first_block, &Sequence::num_blocks);
    const int64_t kv_head = (index - s.first_block * params_.num_kv_heads) / s.num_blocks;
    Block& block = blocks_[index];
    block.build(problem_, s, kv_head, index - problem_.blocks_before(s, kv_head));
    const View v = view(index);
    float* float_stage = reinterpret_cast<float*>(stage);

    bool live[kColumns];  // queries that see a key; gradients that arrive at others do not count
    for (int64_t c = 0; c < kColumns; ++c) {
      float lse = -__builtin_inff();
      if (c < block.count) {
        lse = outputs_.lse[(s.batch * params_.num_heads + block.column[c].head) * params_.seqlen_q +
                           block.column[c].token];
      }
      live[c] = lse != -__builtin_inff();
      v.lse[c] = live[c] ? lse : __builtin_inff();
    }
    compute_delta(s, block, live, float_stage, v.delta);
    uint32_t* data = data_ + index * layout_.size;
    pack_b_columns<Compute, Block, kWidth>(problem_, s, params_.q, block, live, params_.head_dim,
                                           stage, data + layout_.q_columns);
    pack_b_rows(s, params_.q, block, live, params_.head_dim, stage, data + layout_.q_rows);
    if (has_dout_) {
      pack_b_columns<Compute, Block, kWidth>(problem_, s, gradients_.dout, block, live,
                                             params_.head_dim_v, stage,
                                             data + layout_.dout_columns);
      pack_b_rows(s, gradients_.dout, block, live, params_.head_dim_v, stage,
                  data + layout_.dout_rows);
    }
    if (v.bias) {
      load_span_rows<Block, kColumns>(problem_, s, block, params_.span_bias, float_stage, v.bias);
    }
    if (v.dmarginals) load_dmarginals(s, block, live, v);
    if (v.dbias) memset(v.dbias, 0, bias_size() * sizeof(float));

    const GroupRange visible =
        groups_of_keys(block.block_first, block.block_last, GroupRange{0, s.num_groups});
    turns_[index] = visible.begin / block_groups_;
    if (visible.begin == visible.end) {  // no key block visits it
      memset(v.dq, 0, params_.head_dim * kColumns * sizeof(float));
      finish(s, v);
    }
  }

  View view(int64_t index) const {
    uint32_t* data = data_ + index * layout_.size;
    const auto floats = [data](int64_t offset) { return reinterpret_cast<float*>(data + offset); };
    return View{blocks_[index],
                data + layout_.q_columns,
                data + layout_.q_rows,
                data + layout_.dout_columns,
                data + layout_.dout_rows,
                floats(layout_.dq),
                floats(layout_.lse),
                floats(layout_.delta),
                gradients_.dmarginals ? floats(layout_.dmarginals) : nullptr,
                params_.span_bias.data ? floats(layout_.bias) : nullptr,
                gradients_.dspan_bias ? floats(layout_.dbias) : nullptr};
  }

  // The key block whose turn it is to add to the block's sums.
  int64_t* turn(int64_t index) const { return turns_ + index; }

  // Writes dq, and dspan_bias if it is wanted.
  void finish(const Sequence& s, const View& v) const {
    alignas(64) float factor[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) factor[c] = params_.scale;
    write_columns<kColumns>(
        v.dq, params_.head_dim, factor, v.block.count, params_.dtype,
        [&](int64_t c) { return column_row(problem_, s, gradients_.dq, v.block, c); });
    if (!v.dbias) return;
    settle_bias(s, v);
    for (int64_t c = 0; c < kColumns; ++c) factor[c] = 1.f;
    write_columns<kColumns>(
        v.dbias, params_.num_spans, factor, v.block.count, RAL_FLOAT32, [&](int64_t c) {
          const typename Block::Column& column = v.block.column[c];
          const int64_t row =
              (s.batch * params_.num_heads + column.head) * params_.seqlen_q + column.token;
          return gradients_.dspan_bias + row * params_.num_spans;
        });
  }

 private:
  // Sums of dS become rows of dspan_bias, equation (16), in place.
  void settle_bias(const Sequence& s, const View& v) const {
    for (int64_t first = 0; first < kColumns; first += kLanes) {
      alignas(64) float dlse[kLanes] = {};
      for (int64_t i = 0; gradients_.dlse && i < kLanes && first + i < v.block.count; ++i) {
        if (v.lse[first + i] == __builtin_inff()) continue;
        const typename Block::Column& column = v.block.column[first + i];
        dlse[i] = gradients_.dlse[(s.batch * params_.num_heads + column.head) * params_.seqlen_q +
                                  column.token];
      }
      Vec excess = -load(dlse);
      for (int64_t row = 0; row <= params_.num_spans; ++row) {
        excess += load(v.dbias + row * kBiasColumns + first);
      }
      for (int64_t span = 0; span < params_.num_spans; ++span) {
        const float* sums = v.dbias + span * kBiasColumns + first;
        store(v.dbias + span * kColumns + first, load(sums) - load(sums + kColumns) * excess);
      }
    }
  }

  // delta = dO.O - dLSE, equation (10) without the marginals; 0 in columns that are not live.
  void compute_delta(const Sequence& s, const Block& block, const bool* live, float* stage,
                     float* delta) const {
    for (int64_t first = 0; first < kColumns; first += kLanes) {
      Vec product[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool counts = has_dout_ && live[first + i];
        if (gradients_.dmarginals && live[first + i]) prefetch_marginals(s, block, first + i);
        product[i] = counts ? dot(s, block, first + i, stage) : Vec{};
      }
      store(delta + first, sum_of_each(product));
    }
    if (!gradients_.dlse) return;
    for (int64_t c = 0; c < block.count; ++c) {
      const int64_t row = s.batch * params_.num_heads + block.column[c].head;
      if (live[c]) delta[c] -= gradients_.dlse[row * params_.seqlen_q + block.column[c].token];
    }
  }

  // dO.O of one column, before the sum over lanes.
  Vec dot(const Sequence& s, const Block& block, int64_t c, float* stage) const {
    float* other = stage + padded_v_;
    convert_to_float(params_.dtype, column_row(problem_, s, gradients_.dout, block, c),
                     params_.head_dim_v, stage);
    convert_to_float(params_.dtype, column_row(problem_, s, outputs_.out, block, c),
                     params_.head_dim_v, other);
    Vec sum{};
    int64_t d = 0;
    for (; d + kLanes <= params_.head_dim_v; d += kLanes) sum += load(stage + d) * load(other + d);
    const int64_t left = params_.head_dim_v - d;
    if (left > 0) sum += load_first(stage + d, left) * load_first(other + d, left);
    return sum;
  }

  // Sums each x[i] over its lanes.
  static Vec sum_of_each(Vec (&x)[kLanes]) {
    transpose(x);
    Vec sum = x[0];
    RAL_UNROLL for (int i = 1; i < kLanes; ++i)
      sum += x[i];
    return sum;
  }

  // B operand contracted over queries: [panel of features][kColumnSteps][kPanel].
  void pack_b_rows(const Sequence& s, const ral_tensor& tensor, const Block& block,
                   const bool* live, int64_t features, uint32_t* stage, uint32_t* dst) const {
    const int64_t padded = round_up(features, kPanel);
    uint32_t* zero = stage + padded;  // a row of zeros in the tensor's own type
    memset(zero, 0, padded * sizeof(uint32_t));
    memset(stage, 0, padded * sizeof(uint32_t));
    const auto row = [&](int64_t c) {
      return live[c] ? column_row(problem_, s, tensor, block, c)
                     : reinterpret_cast<const char*>(zero);
    };
    for (int64_t step = 0; step < kColumnSteps; ++step) {
      const int64_t c = step * Compute::kPair;
      Compute::load_row_pair(params_.dtype, row(c), row(c + Compute::kPair - 1), features, stage);
      for (int64_t panel = 0; panel < padded / kPanel; ++panel) {
        memcpy(dst + (panel * kColumnSteps + step) * kPanel, stage + panel * kPanel,
               kPanel * sizeof(uint32_t));
      }
    }
  }

  // Offset of the marginals of column `c`; -1 if it has none.
  int64_t marginals_offset(const Sequence& s, const Block& block, int64_t c) const {
    const int64_t num_rows = params_.row_stop - params_.row_start;
    const int64_t row = block.column[c].token - params_.row_start;
    if (row < 0 || row >= num_rows) return -1;
    const int64_t head_row = s.batch * params_.num_heads + block.column[c].head;
    return (head_row * num_rows + row) * params_.num_spans;
  }

  // Rows of m and dM are short and far apart, so their first lines are prefetched while O and dO
  // are read.
  void prefetch_marginals(const Sequence& s, const Block& block, int64_t c) const {
    const int64_t offset = marginals_offset(s, block, c);
    const int64_t spans = params_.num_spans < 128 ? params_.num_spans : 128;
    for (int64_t i = 0; offset >= 0 && i < spans; i += 16) {
      __builtin_prefetch(outputs_.marginals + offset + i, 0, 2);
      __builtin_prefetch(gradients_.dmarginals + offset + i, 0, 2);
    }
  }

  // dM of the block as [S][kColumns], and delta += sum_s dM_s m_s, the rest of equation (10).
  void load_dmarginals(const Sequence& s, const Block& block, const bool* live,
                       const View& v) const {
    const int64_t spans = params_.num_spans;
    for (int64_t first = 0; first < kColumns; first += kLanes) {
      int64_t offset[kLanes];  // of the columns' rows; -1 = none
      for (int64_t i = 0; i < kLanes; ++i) {
        offset[i] = live[first + i] ? marginals_offset(s, block, first + i) : -1;
      }
      Vec product[kLanes] = {};
      for (int64_t begin = 0; begin < spans; begin += kLanes) {
        Vec dm[kLanes];
        RAL_UNROLL for (int i = 0; i < kLanes; ++i) {
          dm[i] = Vec{};
          if (offset[i] < 0) continue;
          const int64_t at = offset[i] + begin;
          dm[i] = load_first(gradients_.dmarginals + at, spans - begin);
          product[i] += dm[i] * load_first(outputs_.marginals + at, spans - begin);
        }
        transpose(dm);
        RAL_UNROLL for (int i = 0; i < kLanes; ++i)
          store(v.dmarginals + (begin + i) * kColumns + first, dm[i]);
      }
      store(v.delta + first, load(v.delta + first) + sum_of_each(product));
    }
  }

  struct Offsets : Layout {
    int64_t q_columns, q_rows, dout_columns, dout_rows, dq, lse, delta, dmarginals, bias, dbias;
  };

  const Problem& problem_;
  const ral_attention_params& params_;
  const ral_attention_outputs& outputs_;
  const ral_attention_gradients& gradients_;
  const int64_t block_groups_;
  const bool has_dout_;
  const int64_t padded_v_, padded_spans_;
  Offsets layout_{};
  size_t data_offset_ = 0, blocks_offset_ = 0, turns_offset_ = 0;
  uint32_t* data_ = nullptr;
  Block* blocks_ = nullptr;
  int64_t* turns_ = nullptr;
};

}  // namespace RAL_ISA
}  // namespace ral
