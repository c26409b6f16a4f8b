/* What the Python side and the kernels agree on: one job, one table of functions. */
#ifndef CE_FAST_H
#define CE_FAST_H

#include <stddef.h>
#include <stdint.h>

#define CE_INLINE static inline __attribute__((always_inline))

#define CE_MAX_OUTER 63 /* NumPy's limit of 64 dimensions, less the class axis */

typedef enum {
    CE_FLOAT64, CE_FLOAT32, CE_FLOAT16, CE_BFLOAT16,
    CE_INT8, CE_UINT8, CE_INT16, CE_UINT16, CE_INT32, CE_UINT32, CE_INT64, CE_UINT64
} ce_dtype;
typedef enum { CE_NOTHING, CE_GRADIENT, CE_LOG_SOFTMAX } ce_emit;
typedef enum { /* in the order of RULES in backends/__init__.py */
    CE_CROSS_ENTROPY, CE_FOCAL, CE_POLY, CE_GENERALIZED, CE_KL_FORWARD, CE_KL_REVERSE,
    CE_BINARY, CE_BINARY_PROBABILITY, CE_BINARY_FOCAL
} ce_rule;

typedef struct {
    double high, low; /* a sum, and what its roundings lost (sums.h) */
} ce_sum;

typedef struct { /* ln 2 in units of the logits, z = x / value, and its inverse; ln2_high times any |k| < 2^20 is exact */
    double value, log2e, log2e_low, ln2_high, ln2_low;
} ce_temperature;

typedef struct {                        /* an array of shape (outer..., n_classes), any strides */
    char *data;                         /* first element; NULL: absent */
    ce_dtype dtype;
    int64_t class_stride;               /* bytes */
    int64_t outer_stride[CE_MAX_OUTER]; /* bytes */
} ce_array;

typedef struct {
    int64_t n_rows, n_classes;
    int64_t part_classes; /* of a part, whole tiles: few rows are cut into such (parts_tpl.h); 0: they are not */
    int n_outer; /* the rows are the C-order index over outer_shape */
    int64_t outer_shape[CE_MAX_OUTER];

    ce_array logits; /* in */
    ce_array soft;   /* in, class probabilities, or the other distribution's logits, or absent */
    ce_array out;    /* out: gradient or log-softmax; may be logits itself */
    ce_array hess;   /* out: diagonal Hessian, or absent */
    ce_emit emit;    /* what goes to out */

    const void *target; /* in (n_rows), class indices already checked, or NULL */
    ce_dtype target_type;
    int64_t ignore_index;
    const double *weight;        /* in (n_classes), or NULL: ones */
    ce_sum weight_total;         /* sum_k w_k, to more than double precision; set by ce_sum_weights */
    const double *sample_weight; /* in (n_rows), or NULL: ones */
    const double *upstream;      /* in (n_rows), or NULL: ones */
    const int64_t *left_out;     /* in (n_rows, n_left_out), classes in rising order that are not there, or NULL */
    int64_t n_left_out;

    ce_rule rule;
    double parameter; /* gamma, epsilon or q of the rule */
    double on, off;   /* mass of class k: w_k * (on * q_k + off), q one-hot for index targets */
    double z_loss;
    ce_temperature temperature;
    double softcap;             /* z = softcap tanh(x / softcap) / temperature; 0: none */
    ce_temperature cap;         /* softcap / 2, so that exp(-2 |x| / softcap) is the exp of every other logit */
    int log_probs;              /* logits and soft are log-probabilities already (divergences) */
    double scale;               /* factor of the gradient: 1 / (denominator of the mean * temperature) */
    double hess_scale, floor;   /* factor of the Hessian, and its least value in a row that counts */

    void *loss; /* out (n_rows) in the compute dtype, or NULL */
    void *lse;  /* out (n_rows) in the compute dtype, or NULL */
} ce_job;

typedef struct { /* out (n_rows) each, in double precision whatever the logits are */
    double *lse, *log_prob, *max, *entropy, *sum_sq_prob, *brier;
    int64_t *argmax, *rank;
    const double *target_logit; /* in (n_rows), for some of a row's classes: the target may be in others; or NULL */
} ce_measures;

typedef struct { /* elements: every array has the shape (outer..., n_last), zero strides where it is broadcast */
    int64_t n_last;
    int n_outer;
    int64_t outer_shape[CE_MAX_OUTER];
    ce_array logits, target;               /* in; target of any dtype */
    ce_array weight, pos_weight;           /* in, float64, or absent: ones */
    ce_array sample_weight, upstream;      /* in, float64, or absent: ones */
    ce_array loss, out, hess;              /* out, or absent */
    ce_rule rule;
    double gamma, alpha; /* alpha at target 1, 1 - alpha at 0; below 0: no such weights */
    double on, off;      /* y' = on y + off */
    double scale, hess_scale, floor;
} ce_element_job;

typedef struct { /* integers or bools (as CE_UINT8) */
    const char *data;
    ce_dtype dtype;
    int64_t stride; /* bytes */
} ce_labels;

enum { CE_OUTSIDE = 1, CE_SUM_NOT_ONE = 2 }; /* what may be wrong with probabilities: not in [0, 1] (or NaN) */

typedef struct {
    int64_t n_classes; /* columns; 0: one probability a row, that of the second of two labels */
    const char *data;  /* in, probabilities */
    ce_dtype dtype;
    int64_t row_stride, class_stride; /* bytes */
    ce_labels labels;                 /* in (n_rows) */
    int64_t low;                      /* the label of the first column; the next columns have the next numbers */
    double eps, tolerance;            /* probabilities are clipped to [eps, 1 - eps]; of a row's sum from 1 */
    const double *weight;             /* in (n_rows), or NULL: ones */
    char *picked; /* out (n_rows) of dtype: the probabilities clipped, or NULL: the sum of -log of them is wanted */
} ce_probability_job;

typedef struct { /* the reference that a stored exponential was taken against: base + n ln 2 */
    double base;
    int64_t n;
} ce_reference;

enum { CE_TILE = 1024 }; /* elements: 2 KiB of float, 4 KiB of double, stays in L1 with its mass tile */

typedef struct { /* of some rows */
    ce_sum loss, weight; /* sums of the losses, and of s_i w_t over the rows that count */
    int64_t counted;     /* how many count */
    int64_t bad;         /* the first row whose target is no class, or -1; such rows are not read */
} ce_tally;

/* Runs rows [first, last) and adds them up in order. scratch: as many bytes as asked for, at a multiple of 64. */
typedef void (*ce_rows_fn)(const ce_job *job, int64_t first, int64_t last, void *scratch, ce_tally *tally);
typedef size_t (*ce_scratch_fn)(const ce_job *job);

/* Measures of rows [first, last); those that do not count are left as they are. */
typedef void (*ce_measures_fn)(const ce_job *job, const ce_measures *out, int64_t first, int64_t last, ce_tally *tally);

/* One phase of one unit: a row in CE_BEGIN and CE_FINISH, one after another; a part of a row, counted along the rows, in
   CE_STATISTICS and, with a gradient, CE_WRITE, in any order. scratch: as many bytes as asked for, shared; of a job that
   does not go by parts, none are. */
typedef enum { CE_BEGIN, CE_STATISTICS, CE_FINISH, CE_WRITE } ce_phase;
typedef void (*ce_parts_fn)(const ce_job *job, ce_phase phase, int64_t unit, void *scratch, ce_tally *tally);

/* Elements [first, last) in C order; *bad becomes 1 if a target that counts lies outside [0, 1]. */
typedef double (*ce_elements_fn)(const ce_element_job *job, int64_t first, int64_t last, int *bad);

/* Rows [first, last); loss: scratch of as many. seen[k] becomes 1 for the columns k that some label has, *flags what is
   wrong. Returns the weighted sum of the losses, 0 where probabilities are picked. */
typedef double (*ce_probabilities_fn)(const ce_probability_job *job, int64_t first, int64_t last, double *loss,
                                      char *seen, int *flags);
typedef void (*ce_label_range_fn)(const ce_labels *labels, int64_t first, int64_t last, int64_t *least, int64_t *most);

typedef struct {
    const char *name;
    ce_rows_fn rows_float64, rows_float32; /* by compute dtype */
    ce_scratch_fn scratch_float64, scratch_float32;
    ce_measures_fn measures_float64, measures_float32;
    ce_parts_fn parts_float64, parts_float32;
    ce_scratch_fn parts_scratch_float64, parts_scratch_float32;
    ce_elements_fn elements_float64, elements_float32;
    ce_probabilities_fn probabilities_float64, probabilities_float32;
    ce_label_range_fn label_range;
} ce_table;

/* dispatch.c */
int ce_isa_count(void);               /* how many of them this CPU can run, worst first */
const ce_table *ce_isa(int i);        /* 0 <= i < ce_isa_count() */
int ce_max_threads(void);             /* OpenMP's limit for the calling thread; 1 without OpenMP */
int ce_openmp(void);                  /* _OPENMP, or 0 */

/* memory.c */
void *ce_take_block(size_t size);             /* aligned to 64, or NULL */
void ce_give_block(void *data, size_t size);  /* of ce_take_block */

/* targets.c */
void ce_sum_weights(ce_job *job);
ce_temperature ce_make_temperature(double value);
double ce_sum_in_order(const double *values, int64_t n);
ce_tally ce_add_up(const ce_tally *blocks, int64_t n);
void ce_read_targets(const void *target, ce_dtype type, int64_t first, int64_t n, int64_t *out);
int64_t ce_number_strings(const char *data, int64_t stride, int64_t width, int64_t n, int32_t *slots, int64_t n_slots,
                          int32_t *number, int64_t *first);
int64_t ce_target_at(const void *target, ce_dtype type, int64_t i);
ce_tally ce_scan_targets(const ce_job *job);

#endif
