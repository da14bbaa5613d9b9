// What the dispatcher and the variants of the `attention` op agree on.
#pragma once

#include "ral/attention.h"

namespace ral {

struct AttentionKernels {
  int (*forward)(const ral_attention_params&, const ral_attention_outputs&);
  int (*backward)(const ral_attention_params&, const ral_attention_outputs&,
                  const ral_attention_gradients&);
};

namespace portable {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512_bf16 {
extern const AttentionKernels kAttentionKernels;
}

}  // namespace ral
