// The statistics of a policy for Hopper, whose instructions host_hopper.h imitates.
#define RAL_CUDA_SM90
#include "policy/statistics_sm90.cu"
