#include "superblocks.cuh"
QC_GEMMS(Q6K, q6_k)
