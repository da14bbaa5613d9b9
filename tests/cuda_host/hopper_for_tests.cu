// The launch for Hopper, whose instructions host_hopper.h imitates.
#define RAL_CUDA_SM90
#include "attention/fwd_sm90.cu"
