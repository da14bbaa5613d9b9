// policy_terms_kernel for float16.
#include "policy/terms_launch.h"

template int ral::cuda::policy_terms<ral::cuda::Fp16, 64>(const PolicyTermsParams&, void*);
template int ral::cuda::policy_terms<ral::cuda::Fp16, 128>(const PolicyTermsParams&, void*);
