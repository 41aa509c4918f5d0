#include "bytes.cuh"
QC_GEMMS(Q8_0, q8_0)
