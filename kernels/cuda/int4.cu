#include "int4.cuh"
QC_GEMMS(Int4, int4)
