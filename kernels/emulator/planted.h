// The bugs that tests plant to see them caught. Each is a condition in the kernels' sources, false in a device build.
#pragma once

#define QC_BUGS(X)              \
  X(ACTIVATIONS_UNSWIZZLED)     \
  X(COLUMNS_OVERRUN)            \
  X(COPIES_LEFT)                \
  X(DEPTH_OVERRUN)              \
  X(DIVERGENT_BARRIER)          \
  X(EARLY_COPY)                 \
  X(ELEMENTS_OVERRUN)           \
  X(FIRST_SLICE_LOST)           \
  X(HIGH_BITS_LOST)             \
  X(NO_BARRIER_BEFORE_EXCHANGE) \
  X(NO_BARRIER_IN_LOOP)         \
  X(NO_MINIMUM)                 \
  X(PADDING_WRITTEN)            \
  X(PARAMETERS_HALF_COPIED)     \
  X(RING_UNWRAPPED)             \
  X(ROTATION_LOST)              \
  X(ROWS_OVERRUN)               \
  X(RUNS_SWAPPED)               \
  X(SHORT_WAIT)                 \
  X(SIGN_LOST)                  \
  X(SLAB_TWICE)                 \
  X(SLICES_COLLIDE)             \
  X(SLICES_OVERLAP)             \
  X(STALE_FACTORS)              \
  X(STALE_SCALES)               \
  X(WEIGHTS_OVERRUN)            \
  X(WEIGHTS_UNSWIZZLED)         \
  X(WRONG_EXPERT)               \
  X(WRONG_LANE)                 \
  X(WRONG_NIBBLE)               \
  X(ZERO_OFFSET_LOST)           \
  X(ZERO_POINTS_SWAPPED)

namespace emu {
enum class Bug {
  NONE,
#define QC_BUG_NAME(name) name,
  QC_BUGS(QC_BUG_NAME)
#undef QC_BUG_NAME
};
inline Bug planted = Bug::NONE;
}  // namespace emu

#define QC_PLANTED(bug) (emu::planted == emu::Bug::bug)
