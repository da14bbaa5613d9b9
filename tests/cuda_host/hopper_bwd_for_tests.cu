// The launches of the backward for Hopper, whose instructions host_hopper.h imitates.
#define RAL_CUDA_SM90
#include "attention/bwd_dkdv_sm90.cu"
#include "attention/bwd_dq_sm90.cu"
#include "attention/bwd_sm90.cu"
