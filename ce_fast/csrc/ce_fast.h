/* What the Python side and the kernels agree on: one job, one table of functions. */
#ifndef CE_FAST_H
#define CE_FAST_H

#include <stdint.h>

#define CE_INLINE static inline __attribute__((always_inline))

#define CE_MAX_OUTER 63 /* NumPy's limit of 64 dimensions, less the class axis */

typedef enum { CE_FLOAT64, CE_FLOAT32, CE_FLOAT16, CE_BFLOAT16 } ce_dtype;
typedef enum { CE_INT8, CE_UINT8, CE_INT16, CE_UINT16, CE_INT32, CE_UINT32, CE_INT64, CE_UINT64 } ce_index_type;
typedef enum { CE_NOTHING, CE_GRADIENT, CE_LOG_SOFTMAX } ce_emit;

typedef struct {
    double high, low; /* a sum, and what its roundings lost (sums.h) */
} ce_sum;

typedef struct {                        /* an array of shape (outer..., n_classes), any strides */
    char *data;                         /* first element; NULL: absent */
    ce_dtype dtype;
    int64_t class_stride;               /* bytes */
    int64_t outer_stride[CE_MAX_OUTER]; /* bytes */
} ce_array;

typedef struct {
    int64_t n_rows, n_classes;
    int n_outer; /* the rows are the C-order index over outer_shape */
    int64_t outer_shape[CE_MAX_OUTER];

    ce_array logits; /* in */
    ce_array soft;   /* in, class probabilities, or absent */
    ce_array out;    /* out: gradient or log-softmax; may be logits itself */
    ce_emit emit;    /* what goes to out */

    const void *target; /* in (n_rows), class indices already checked, or NULL */
    ce_index_type target_type;
    int64_t ignore_index;
    const double *weight;        /* in (n_classes), or NULL: ones */
    ce_sum weight_total;         /* sum_k w_k, to more than double precision; set by ce_sum_weights */
    const double *sample_weight; /* in (n_rows), or NULL: ones */
    const double *upstream;      /* in (n_rows), or NULL: ones */

    double on, off; /* mass of class k: w_k * (on * q_k + off), q one-hot for index targets */
    double z_loss;
    double scale; /* factor of the gradient: 1 / denominator of the mean */

    void *loss; /* out (n_rows) in the compute dtype, or NULL */
    void *lse;  /* out (n_rows) in the compute dtype, or NULL */
} ce_job;

typedef struct { /* the reference that a stored exponential was taken against: base + n ln 2 */
    double base;
    int64_t n;
} ce_reference;

enum { CE_TILE = 1024 }; /* elements: 2 KiB of float, 4 KiB of double, stays in L1 with its mass tile */

/* Runs rows [first, last), returns the sum of their losses in row order.
   tiles: scratch of ceil(n_classes / CE_TILE) references, used when out is a gradient. */
typedef double (*ce_rows_fn)(const ce_job *job, int64_t first, int64_t last, ce_reference *tiles);

typedef struct {
    const char *name;
    ce_rows_fn rows_float64, rows_float32; /* by compute dtype */
} ce_table;

/* dispatch.c */
int ce_isa_count(void);               /* how many of them this CPU can run, worst first */
const ce_table *ce_isa(int i);        /* 0 <= i < ce_isa_count() */
int ce_max_threads(void);             /* OpenMP's limit for the calling thread; 1 without OpenMP */
int ce_openmp(void);                  /* _OPENMP, or 0 */

/* targets.c */
void ce_sum_weights(ce_job *job);
double ce_sum_in_order(const double *values, int64_t n);
int64_t ce_target_at(const void *target, ce_index_type type, int64_t i);
int64_t ce_scan_targets(const ce_job *job, int64_t *n_counted, double *weight_sum);

#endif
