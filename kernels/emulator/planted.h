// The bugs that tests plant to see them caught. Each is a condition in the kernels' sources, false in a device build.
#pragma once

#define QC_BUGS(X)              \
  X(ACTIVATIONS_UNSWIZZLED)     \
  X(WEIGHTS_UNSWIZZLED)         \
  X(WEIGHTS_OVERRUN)            \
  X(WRONG_EXPERT)               \
  X(ROWS_OVERRUN)               \
  X(DEPTH_OVERRUN)              \
  X(COLUMNS_OVERRUN)            \
  X(SHORT_WAIT)                 \
  X(NO_BARRIER_IN_LOOP)         \
  X(NO_LAST_WAIT)               \
  X(NO_BARRIER_BEFORE_EXCHANGE) \
  X(DIVERGENT_BARRIER)          \
  X(PADDING_WRITTEN)            \
  X(SLICES_COLLIDE)             \
  X(STALE_SCALES)               \
  X(WRONG_LANE)                 \
  X(WRONG_NIBBLE)               \
  X(NO_MINIMUM)                 \
  X(ELEMENTS_OVERRUN)           \
  X(FIRST_SLICE_LOST)           \
  X(SIGN_LOST)                  \
  X(RUNS_SWAPPED)               \
  X(HIGH_BITS_LOST)

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
