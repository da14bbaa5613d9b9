// policy_terms_kernel for bfloat16.
#include "policy/terms_launch.h"

template int ral::cuda::policy_terms<ral::cuda::Bf16, 64>(const PolicyTermsParams&, void*);
template int ral::cuda::policy_terms<ral::cuda::Bf16, 128>(const PolicyTermsParams&, void*);
