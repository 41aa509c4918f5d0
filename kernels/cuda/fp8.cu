#include "bytes.cuh"
QC_GEMMS(Fp8, fp8)
