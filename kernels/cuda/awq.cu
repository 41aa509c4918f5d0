#include "int4.cuh"
QC_GEMMS(Awq, awq)
