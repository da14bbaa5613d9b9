// How a call is cut into sequences, column blocks and key groups, and how a tile of raw products
// becomes scores. The forward and the backward share this.
//
// Scores are computed transposed: rows are keys, columns are queries. A vector holds one key's
// scores for kLanes queries. So row maxima, row sums, span sums, span biases and visible ranges are
// plain vertical operations. A span boundary between two keys costs nothing.
//
// The queries of all heads that share one kv head form one list. It goes token by token and head by
// head (index = token * heads_per_group + head). A column block is a run of that list. Its queries
// sit at nearly the same position, so little work is wasted on a causal diagonal. One pass over K
// and V serves every head of the group.
#pragma once

#include <stdlib.h>

#include "core/microkernel.h"
#include "core/threads.h"
#include "ral/attention.h"
#include "ral/attention_math.h"

namespace ral {
namespace RAL_ISA {

struct Sequence {
  int64_t batch, q_begin, seqlen_q, k_begin, seqlen_k;
  int64_t first_group;      // key groups of all sequences before this one
  int64_t first_block;      // column blocks, likewise
  int64_t first_key_block;  // key blocks, likewise
  int64_t num_groups, num_blocks, num_key_blocks;
};

// A call, cut into blocks. Column blocks hold `block_columns` queries, key blocks hold
// `block_groups` key groups.
class Problem {
 public:
  Problem(const ral_attention_params& params, int64_t block_columns, int64_t block_groups)
      : params(params),
        block_columns(block_columns),
        block_groups(block_groups),
        heads_per_group(params.num_kv_heads ? params.num_heads / params.num_kv_heads : 0) {}
  ~Problem() {
    free(sequences);
    free(group_spans_);
    free(run_ends_);
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  bool split() {
    num_sequences = params.num_sequences;
    sequences = static_cast<Sequence*>(malloc((num_sequences + 1) * sizeof(Sequence)));
    if (!sequences) return false;
    for (int64_t i = 0; i < num_sequences; ++i) {
      Sequence& s = sequences[i];
      if (params.cu_seqlens_q) {
        s.batch = 0;
        s.q_begin = params.cu_seqlens_q[i];
        s.seqlen_q = params.cu_seqlens_q[i + 1] - s.q_begin;
        s.k_begin = params.cu_seqlens_k[i];
        s.seqlen_k = params.cu_seqlens_k[i + 1] - s.k_begin;
      } else {
        s = Sequence{i, 0, params.seqlen_q, 0, params.seqlen_k, 0, 0, 0, 0, 0, 0};
      }
      s.num_groups = (s.seqlen_k + kTileRows - 1) / kTileRows;
      s.num_blocks = (s.seqlen_q * heads_per_group + block_columns - 1) / block_columns;
      s.num_key_blocks = (s.num_groups + block_groups - 1) / block_groups;
      s.first_group = total_groups;
      s.first_block = total_blocks;
      s.first_key_block = total_key_blocks;
      total_groups += s.num_groups;
      total_blocks += s.num_blocks;
      total_key_blocks += s.num_key_blocks;
    }
    return !params.span_ids || classify_groups();
  }

  // The span of all keys of a group, or kMixed if a boundary runs through the group.
  const int32_t* group_spans(const Sequence& s) const { return group_spans_ + s.first_group; }

  // For each key, padding included: kContinues if the next key of its group has the same span, else
  // its span. Span sums are updated where a span's keys end.
  const int32_t* run_ends(const Sequence& s) const { return run_ends_ + s.first_group * kTileRows; }

  // The sequence that holds unit `index`. Units of the kind `first` and `count` are counted over
  // all sequences and kv heads.
  const Sequence& find(int64_t index, int64_t Sequence::* first, int64_t Sequence::* count) const {
    int64_t low = 0, high = num_sequences - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const Sequence& s = sequences[middle];
      if (index < (s.*first + s.*count) * params.num_kv_heads) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return sequences[low];
  }

  // Index of the first key group (column block) of one kv head, over all sequences and heads.
  int64_t groups_before(const Sequence& s, int64_t kv_head) const {
    return s.first_group * params.num_kv_heads + kv_head * s.num_groups;
  }
  int64_t blocks_before(const Sequence& s, int64_t kv_head) const {
    return s.first_block * params.num_kv_heads + kv_head * s.num_blocks;
  }

  bool is_padding(const Sequence& s, int64_t key) const {
    return params.key_padding_mask &&
           !params.key_padding_mask[s.batch * params.key_padding_mask_stride_b + s.k_begin + key];
  }
  const int32_t* span_ids(const Sequence& s) const {
    return params.span_ids + s.batch * params.span_ids_stride_b + s.k_begin;
  }
  Rows rows(const ral_tensor& tensor, const Sequence& s, int64_t head, int64_t begin,
            int64_t count) const {
    const int64_t size = element_size(params.dtype);
    const int64_t offset =
        s.batch * tensor.stride_b + head * tensor.stride_h + begin * tensor.stride_t;
    return Rows{params.dtype, static_cast<const char*>(tensor.data) + offset * size,
                tensor.stride_t * size, count};
  }
  Rows key_rows(const ral_tensor& tensor, const Sequence& s, int64_t kv_head) const {
    return rows(tensor, s, kv_head, s.k_begin, s.seqlen_k);
  }
  // Those of them that are not padding.
  Rows real_key_rows(const ral_tensor& tensor, const Sequence& s, int64_t kv_head) const {
    Rows rows = key_rows(tensor, s, kv_head);
    if (params.key_padding_mask) {
      rows.real = params.key_padding_mask + s.batch * params.key_padding_mask_stride_b + s.k_begin;
    }
    return rows;
  }

  static constexpr int32_t kMixed = -2;
  static constexpr int32_t kContinues = -2;

  const ral_attention_params& params;
  const int64_t block_columns;
  const int64_t block_groups;
  const int64_t heads_per_group;
  Sequence* sequences = nullptr;
  int64_t num_sequences = 0, total_groups = 0, total_blocks = 0, total_key_blocks = 0;

 private:
  bool classify_groups() {
    group_spans_ = static_cast<int32_t*>(malloc((total_groups + 1) * sizeof(int32_t)));
    run_ends_ = static_cast<int32_t*>(malloc((total_groups + 1) * kTileRows * sizeof(int32_t)));
    if (!group_spans_ || !run_ends_) return false;
    for (int64_t i = 0; i < num_sequences; ++i) {
      const Sequence& s = sequences[i];
      const int32_t* ids = span_ids(s);
      for (int64_t group = 0; group < s.num_groups; ++group) {
        const int64_t begin = group * kTileRows;
        int32_t* ends = run_ends_ + s.first_group * kTileRows + begin;
        int32_t span = ids[begin];
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t key = begin + r;
          ends[r] = kContinues;
          if (key >= s.seqlen_k) continue;
          if (ids[key] != ids[begin]) span = kMixed;
          const bool last = r == kTileRows - 1 || key == s.seqlen_k - 1;
          if (last || ids[key + 1] != ids[key]) ends[r] = ids[key];
        }
        group_spans_[s.first_group + group] = span;
      }
    }
    return true;
  }

  int32_t* group_spans_ = nullptr;
  int32_t* run_ends_ = nullptr;
};

// The queries of one column block and the keys that they see.
template <int64_t kColumns, int64_t kPanelWidth>
struct ColumnBlock {
  static constexpr int64_t kPanels = kColumns / kPanelWidth;

  struct Column {
    int64_t head;
    int64_t token;  // from the start of the batch entry; packed: of all sequences
  };
  alignas(64) int32_t first_key[kColumns];  // inclusive range that each query sees
  alignas(64) int32_t last_key[kColumns];
  Column column[kColumns];
  int64_t count;  // queries; the columns after them are padding
  // Per panel: keys that some query sees, and keys that every query sees.
  int64_t some_first[kPanels], some_last[kPanels], all_first[kPanels], all_last[kPanels];
  int64_t block_first, block_last;  // keys that some query of the block sees

  void build(const Problem& problem, const Sequence& s, int64_t kv_head, int64_t block) {
    const ral_attention_params& p = problem.params;
    const int64_t first = block * kColumns;
    const int64_t total = s.seqlen_q * problem.heads_per_group;
    count = total - first < kColumns ? total - first : kColumns;
    int64_t token = first / problem.heads_per_group;
    int64_t member = first % problem.heads_per_group;
    block_first = s.seqlen_k;
    block_last = -1;
    for (int64_t panel = 0; panel < kPanels; ++panel) {
      some_first[panel] = s.seqlen_k;
      some_last[panel] = -1;
      all_first[panel] = 0;
      all_last[panel] = s.seqlen_k - 1;
      for (int64_t c = panel * kPanelWidth; c < (panel + 1) * kPanelWidth; ++c) {
        // Padding sees every key, so that it never makes a tile take the masked path.
        if (c >= count) {
          first_key[c] = 0;
          last_key[c] = static_cast<int32_t>(s.seqlen_k - 1);
          continue;
        }
        const KeyRange range = visible_keys(token, s.seqlen_q, s.seqlen_k, p.window_left,
                                            p.window_right, p.top_left != 0);
        column[c] = Column{kv_head * problem.heads_per_group + member, s.q_begin + token};
        // Past the ends no comparison needs the exact value; the clipped one cannot overflow int32.
        first_key[c] = static_cast<int32_t>(range.first < s.seqlen_k ? range.first : s.seqlen_k);
        last_key[c] = static_cast<int32_t>(range.last > -1 ? range.last : -1);
        if (first_key[c] <= last_key[c]) {
          if (range.first < some_first[panel]) some_first[panel] = range.first;
          if (range.last > some_last[panel]) some_last[panel] = range.last;
        }
        if (first_key[c] > all_first[panel]) all_first[panel] = first_key[c];
        if (last_key[c] < all_last[panel]) all_last[panel] = last_key[c];
        if (++member == problem.heads_per_group) {
          member = 0;
          ++token;
        }
      }
      if (some_first[panel] < block_first) block_first = some_first[panel];
      if (some_last[panel] > block_last) block_last = some_last[panel];
    }
  }
};

// Offsets of arrays that share one allocation, in 32-bit elements.
struct Layout {
  int64_t size = 0;
  int64_t add(int64_t count) {
    const int64_t offset = size;
    size += round_up(count, 16);
    return offset;
  }
};

// Half-open range of key groups.
struct GroupRange {
  int64_t begin, end;
};
inline GroupRange groups_of_keys(int64_t first, int64_t last, GroupRange within) {
  if (first > last) return GroupRange{within.begin, within.begin};
  GroupRange range{first / kTileRows, last / kTileRows + 1};
  if (range.begin < within.begin) range.begin = within.begin;
  if (range.end > within.end) range.end = within.end;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// Row of `tensor` that belongs to column `c` of the block.
template <class Block>
char* column_row(const Problem& problem, const Sequence& s, const ral_tensor& tensor,
                 const Block& block, int64_t c) {
  const int64_t offset = s.batch * tensor.stride_b + block.column[c].head * tensor.stride_h +
                         block.column[c].token * tensor.stride_t;
  return static_cast<char*>(tensor.data) + offset * element_size(problem.params.dtype);
}

// B operand from the block's queries, contracted over features: [panel][padded steps][kPanelWidth].
// `stage` holds one panel of rows. Columns that `live` rules out are zero.
template <class Compute, class Block, int64_t kPanelWidth>
void pack_b_columns(const Problem& problem, const Sequence& s, const ral_tensor& tensor,
                    const Block& block, const bool* live, int64_t features, uint32_t* stage,
                    uint32_t* dst) {
  const int64_t steps = steps_of<Compute>(features);
  const int64_t padded = round_up(steps, kLanes);
  for (int64_t panel = 0; panel < Block::kPanels; ++panel) {
    for (int64_t i = 0; i < kPanelWidth; ++i) {
      const int64_t c = panel * kPanelWidth + i;
      uint32_t* row = stage + i * padded;
      if (c < block.count && (!live || live[c])) {
        Compute::load_row(problem.params.dtype, column_row(problem, s, tensor, block, c), features,
                          row);
        memset(row + steps, 0, (padded - steps) * sizeof(uint32_t));
      } else {
        memset(row, 0, padded * sizeof(uint32_t));
      }
    }
    transpose_block(stage, padded, dst + panel * padded * kPanelWidth, kPanelWidth, kPanelWidth,
                    padded);
  }
}

// dst[s][c] = bias[column c, span s]. Spans are padded to kLanes; padding columns are 0.
template <class Block, int64_t kColumns>
void load_span_rows(const Problem& problem, const Sequence& s, const Block& block,
                    const ral_broadcast& bias, float* stage, float* dst) {
  const int64_t num_spans = problem.params.num_spans;
  for (int64_t begin = 0; begin < num_spans; begin += kLanes) {
    const int64_t width = num_spans - begin < kLanes ? num_spans - begin : kLanes;
    memset(stage, 0, kColumns * kLanes * sizeof(float));
    for (int64_t c = 0; c < block.count; ++c) {
      const float* row = static_cast<const float*>(bias.data) + s.batch * bias.stride_b +
                         block.column[c].head * bias.stride_h +
                         block.column[c].token * bias.stride_t + begin * bias.stride_s;
      for (int64_t i = 0; i < width; ++i) stage[c * kLanes + i] = row[i * bias.stride_s];
    }
    transpose_block(stage, kLanes, dst + begin * kColumns, kColumns, kColumns, kLanes);
  }
}

// The way back: row_of(c)[i] = x[i][c] * factor[c] for columns c < count, rounded to `dtype`.
// row_of(c) is null where nothing is to be written. x and factor are read up to whole vectors.
template <int64_t kColumns, class RowOf>
void write_columns(const float* x, int64_t features, const float* factor, int64_t count,
                   int32_t dtype, const RowOf& row_of) {
  const int64_t size = element_size(dtype);
  for (int64_t first = 0; first < count; first += kLanes) {
    char* row[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      row[i] = first + i < count ? reinterpret_cast<char*>(row_of(first + i)) : nullptr;
    }
    for (int64_t begin = 0; begin < features; begin += kLanes) {
      Vec tile[kLanes];
      RAL_UNROLL for (int i = 0; i < kLanes; ++i)
        tile[i] = load(x + (begin + i) * kColumns + first) * load(factor + first);
      transpose(tile);
      RAL_UNROLL for (int i = 0; i < kLanes; ++i) {
        if (row[i]) store_first(dtype, row[i] + begin * size, tile[i], features - begin);
      }
    }
  }
}

// Turns tiles of raw products q.k into scores, in natural units. Tiles need this where they meet a
// softcap, span bias, attention mask, padding, or the edge of a window or of the sequence.
template <int V>
class ScoreTransform {
 public:
  ScoreTransform(const Problem& problem, const Sequence& s)
      : problem_(problem),
        sequence_(s),
        span_ids_(problem.params.span_ids ? problem.span_ids(s) : nullptr),
        always_(problem.params.softcap > 0 || problem.params.span_bias.data ||
                problem.params.attn_mask.data) {}

  // Whether the tile of key group `group` may skip apply().
  template <class Block>
  RAL_INLINE bool is_plain(const Block& block, int64_t panel, int64_t group) const {
    const int64_t key = group * kTileRows;
    if (always_ || key < block.all_first[panel] || key + kTileRows - 1 > block.all_last[panel])
      return false;
    if (problem_.params.key_padding_mask) {
      for (int r = 0; r < kTileRows; ++r) {
        if (problem_.is_padding(sequence_, key + r)) return false;
      }
    }
    return true;
  }

  // acc: products in, which `scale` makes scores; scores out; -inf where a query does not see a
  // key. bias: span bias [S][kColumns] or null. slope: receives d score / d (scaled product),
  // [6][V], if softcap is on; may be null.
  template <class Block>
  RAL_NOINLINE void apply(Vec (&acc)[kTileRows][V], const Block& block, int64_t panel,
                          int64_t group, float scale, const float* bias, int64_t bias_stride,
                          Vec* slope) const {
    const ral_attention_params& p = problem_.params;
    const int64_t column = panel * V * kLanes;
    float mask[kTileRows][V * kLanes];
    if (p.attn_mask.data) load_mask(block, column, group, mask);
    for (int r = 0; r < kTileRows; ++r) {
      const int32_t key = static_cast<int32_t>(group * kTileRows + r);
      const bool hidden = key >= sequence_.seqlen_k || problem_.is_padding(sequence_, key);
      const int32_t span = bias && !hidden ? span_ids_[key] : -1;
      for (int v = 0; v < V; ++v) {
        const int64_t c = column + v * kLanes;
        Vec x = acc[r][v] * scale;
        if (p.softcap > 0) {
          const Vec t = tanh(x / p.softcap);
          x = t * p.softcap;
          if (slope) slope[r * V + v] = 1.f - t * t;
        }
        if (span >= 0) x = x + load(bias + span * bias_stride + c);
        if (p.attn_mask.data) x = x + load(mask[r] + v * kLanes);
        // -inf hides a key. finfo.min is a score like others and stays finite.
        const IntVec finite = x > broadcast(-__builtin_inff());
        x = select(finite & (x < kLowestScore), broadcast(kLowestScore), x);
        const IntVec seen = (load(block.first_key + c) <= key) & (load(block.last_key + c) >= key);
        const Vec minus_inf = broadcast(-__builtin_inff());
        acc[r][v] = hidden ? minus_inf : select(seen, x, minus_inf);
      }
    }
  }

 private:
  template <class Block>
  void load_mask(const Block& block, int64_t column, int64_t group,
                 float (&mask)[kTileRows][V * kLanes]) const {
    const ral_attention_params& p = problem_.params;
    const ral_broadcast& m = p.attn_mask;
    const int64_t size = p.attn_mask_dtype == RAL_BOOL ? 1 : element_size(p.attn_mask_dtype);
    const int64_t key = group * kTileRows;
    const int64_t keys =
        sequence_.seqlen_k - key < kTileRows ? sequence_.seqlen_k - key : kTileRows;
    memset(mask, 0, sizeof mask);
    for (int64_t i = 0; i < V * kLanes && column + i < block.count; ++i) {
      const auto& c = block.column[column + i];
      const int64_t offset = sequence_.batch * m.stride_b + c.head * m.stride_h +
                             c.token * m.stride_t + (sequence_.k_begin + key) * m.stride_s;
      const char* data = static_cast<const char*>(m.data) + offset * size;
      for (int64_t r = 0; r < keys; ++r, data += m.stride_s * size) {
        float x;
        if (p.attn_mask_dtype == RAL_BOOL) {
          x = *data ? 0.f : -__builtin_inff();
        } else {
          convert_to_float(p.attn_mask_dtype, data, 1, &x);
          if (x == -__builtin_inff()) {
            mask[r][i] = x;
            continue;
          }
          if (x < kLowestScore) x = kLowestScore;
        }
        mask[r][i] = x;
      }
    }
  }

  const Problem& problem_;
  const Sequence& sequence_;
  const int32_t* span_ids_;
  const bool always_;
};

}  // namespace RAL_ISA
}  // namespace ral
