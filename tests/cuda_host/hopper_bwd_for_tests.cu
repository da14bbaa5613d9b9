// The launches of the backward for Hopper, whose instructions host_hopper.h imitates.
#define RAL_CUDA_SM90
#include "attention_bwd_sm90.cu"
