/* The kernels of one instruction set: every template for float and for double, then their table.
   The including file has set CE_ISA, CE_HAVE_FMA and the compiler's target. */
#include <float.h>

/* double first: tiles of float take the few numbers of a row in it */
#define REAL double
#define REAL_IS_FLOAT 0
#define REAL_DTYPE CE_FLOAT64
#define REAL_MIN DBL_MIN
#define REAL_MAX DBL_MAX
#define UINT uint64_t
#define SINT int64_t
#define NAME(name) ce_##name##_float64
#include "rows_tpl.h"
#include "measure_tpl.h"
#include "parts_tpl.h"
#include "ways_tpl.h"
#include "elements_tpl.h"
#include "probabilities_tpl.h"
#undef REAL
#undef REAL_IS_FLOAT
#undef REAL_DTYPE
#undef REAL_MIN
#undef REAL_MAX
#undef UINT
#undef SINT
#undef NAME

#define REAL float
#define REAL_IS_FLOAT 1
#define REAL_DTYPE CE_FLOAT32
#define REAL_MIN FLT_MIN
#define REAL_MAX FLT_MAX
#define UINT uint32_t
#define SINT int32_t
#define NAME(name) ce_##name##_float32
#include "rows_tpl.h"
#include "measure_tpl.h"
#include "parts_tpl.h"
#include "ways_tpl.h"
#include "elements_tpl.h"
#include "probabilities_tpl.h"

#define CE_TEXT_(x) #x
#define CE_TEXT(x) CE_TEXT_(x)
#define CE_TABLE_(isa) ce_table_##isa
#define CE_TABLE(isa) CE_TABLE_(isa)
const ce_table CE_TABLE(CE_ISA) = {
    .name = CE_TEXT(CE_ISA),
    .rows_float64 = ce_rows_float64,
    .rows_float32 = ce_rows_float32,
    .scratch_float64 = ce_scratch_float64,
    .scratch_float32 = ce_scratch_float32,
    .measures_float64 = ce_measures_float64,
    .measures_float32 = ce_measures_float32,
    .parts_float64 = ce_parts_float64,
    .parts_float32 = ce_parts_float32,
    .parts_scratch_float64 = ce_parts_scratch_float64,
    .parts_scratch_float32 = ce_parts_scratch_float32,
    .elements_float64 = ce_elements_float64,
    .elements_float32 = ce_elements_float32,
    .probabilities_float64 = ce_probabilities_float64,
    .probabilities_float32 = ce_probabilities_float32,
    .label_range = ce_label_range,
};
