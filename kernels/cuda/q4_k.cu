#include "superblocks.cuh"
QC_GEMMS(Q4K, q4_k)
