// The ops of a policy that core/kernels.h lists, for two compute types and tiles of V vectors of
// query columns.
#pragma once

#include "policy/bwd.h"
#include "policy/loss.h"

namespace ral {
namespace RAL_ISA {

template <class Compute, class Reference, int V>
struct PolicyKernels {
  static int fwd(const ral_policy_params& x, int64_t sub_blocks) {
    PolicyForward<Compute, Reference, V> forward(x.common, x.policy, nullptr, sub_blocks);
    forward.p = x.p;
    return forward.run();
  }

  static int bwd(const ral_policy_params& x, int64_t sub_blocks) {
    PolicyGradientSource source;
    source.dp = x.dp;
    const PolicyGradients gradients{x.dq, x.dk, x.dspan_bias, x.dhead_weights};
    return PolicyBackward<Compute, Reference, V>(x.common, x.policy, nullptr, source, gradients,
                                                 sub_blocks)
        .run();
  }

  static int divergence_fwd(const ral_policy_divergence_params& x, int64_t sub_blocks) {
    PolicyForward<Compute, Reference, V> forward(x.common, x.policy, &x.reference, sub_blocks);
    forward.target = target_of(x);
    forward.kind = x.kind;
    forward.value = x.value;
    forward.u = x.u;
    forward.w = x.w;
    return forward.run();
  }

  static int divergence_bwd(const ral_policy_divergence_params& x, int64_t sub_blocks) {
    PolicyGradientSource source;
    source.kind = x.kind;
    source.target = target_of(x);
    source.dvalue = x.dvalue;
    source.u = x.u;
    source.w = x.w;
    const PolicyGradients gradients{x.dq, x.dk, nullptr, x.dhead_weights};
    return PolicyBackward<Compute, Reference, V>(x.common, x.policy, &x.reference, source,
                                                 gradients, sub_blocks)
        .run();
  }

  static const ral_policy_target* target_of(const ral_policy_divergence_params& x) {
    return x.target.values ? &x.target : nullptr;
  }

  static int loss(const ral_policy_divergence_params& x, int64_t sub_blocks) {
    PolicyGradientSource source;
    source.kind = x.kind;
    source.target = target_of(x);
    source.dvalue = x.dvalue;
    const PolicyGradients gradients{x.dq, x.dk, nullptr, x.dhead_weights};
    return PolicyLoss<Compute, Reference, V>(x.common, x.policy, x.reference, source, x.value,
                                             gradients, x.reference_normalised != 0, sub_blocks)
        .run();
  }
};

}  // namespace RAL_ISA
}  // namespace ral
