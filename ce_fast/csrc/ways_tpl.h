/* Which way rows go: as lanes, along the rows or class-major, or one by one. Included once for each REAL and each ISA. */
#ifndef CE_WAYS
#define CE_WAYS
/* Crossovers, of forward and gradient together, one thread, AVX-512: transposed or as they lie, 96 classes of float 0.50 and
   1.04 ns a logit or 0.57 and 0.92; of double, 40: 1.23 and 2.24 or 1.20 and 1.78. In lanes or one by one, 2048 classes 0.26
   and 0.56 or 0.33 and 0.67, 4000: 0.27 and 0.58 or 0.28 and 0.50. */
#define CE_FEW (REAL_IS_FLOAT ? 96 : 32) /* classes of a row that is transposed */
#define CE_SHORT 3072                    /* classes of a row that goes along with others */
#define CE_SCRATCH (1 << 14)             /* bytes of short rows at a time, in L1 */
#define CE_WAITS 2048                    /* bytes of a row whose gradient waits for the next rows */
typedef enum { CE_ONE_BY_ONE, CE_CLASS_MAJOR, CE_ALONG_ROWS } ce_way;
#endif
#include "lanes_tpl.h"
#include "short_tpl.h"
#include "tiles_tpl.h"

/* lanes take class indices, with nothing asked of single classes but the same smoothing of a cross-entropy */
static ce_way NAME(way)(const ce_job *job)
{
    const ce_array *x = &job->logits;
    if (!job->target || job->soft.data || job->left_out || job->lse || !job->n_outer)
        return CE_ONE_BY_ONE;
    if (job->hess.data && job->n_classes > CE_FEW)
        return CE_ONE_BY_ONE;
    if (job->off != 0 && (job->weight || job->rule != CE_CROSS_ENTROPY))
        return CE_ONE_BY_ONE;
    if (job->softcap != 0 || job->emit == CE_LOG_SOFTMAX || job->rule > CE_GENERALIZED)
        return CE_ONE_BY_ONE;
    int64_t along = x->class_stride < 0 ? -x->class_stride : x->class_stride;
    int64_t across = x->outer_stride[job->n_outer - 1];
    /* smoothed gradients have the same bits in any layout: those of many classes all go along the rows */
    if (job->n_classes <= CE_FEW || (job->off == 0 && along > (across < 0 ? -across : across)))
        return CE_CLASS_MAJOR;
    return job->n_classes <= CE_SHORT ? CE_ALONG_ROWS : CE_ONE_BY_ONE;
}

/* how many rows at a time */
static int NAME(batch)(const ce_job *job, ce_way way)
{
    if (way != CE_ALONG_ROWS)
        return ROWS;
    int64_t rows = CE_SCRATCH / (NAME(pitch)(job) * (int64_t)sizeof(REAL)) & -LANES;
    return rows < LANES ? LANES : rows > ROWS ? ROWS : (int)rows;
}

/* Where the gradients of rows are put together: of short ones behind the rows, so that they can wait there while the next
   rows are computed (8 % less time for 100 classes of double, 3 % for 300 of float; 5 % more for 1000). */
static int64_t NAME(pack_offset)(const ce_job *job, ce_way way)
{
    int waits = way == CE_ALONG_ROWS && job->n_classes * (int64_t)sizeof(REAL) <= CE_WAITS;
    return waits ? NAME(batch)(job, way) * NAME(pitch)(job) : 0;
}

/* rows one by one need a reference for each tile */
static size_t NAME(references_size)(const ce_job *job)
{
    size_t n_tiles = (size_t)((job->n_classes + CE_TILE - 1) / CE_TILE);
    return (n_tiles * sizeof(ce_reference) + 63) & ~(size_t)63;
}

/* those, and lanes */
static size_t NAME(scratch)(const ce_job *job)
{
    ce_way way = NAME(way)(job);
    int64_t classes = job->n_classes < CE_CLASSES ? job->n_classes : CE_CLASSES, elements = 0;
    if (way != CE_ONE_BY_ONE)
        elements = way == CE_CLASS_MAJOR ? classes * (PITCH + ROWS) : NAME(batch)(job, way) * NAME(pitch)(job);
    elements += NAME(pack_offset)(job, way);
    size_t lanes = sizeof(NAME(lanes)) + (size_t)elements * sizeof(REAL);
    return NAME(references_size)(job) + ((lanes + 63) & ~(size_t)63);
}

/* The address of the next tile's logits, to be fetched meanwhile. Any address will do, so not all layouts need be right. */
static const char *NAME(ahead)(const ce_job *job, int64_t next)
{
    return next < job->n_rows ? job->logits.data + NAME(offset)(job, &job->logits, next) : NULL;
}

/* the logits of the tile, if they lie as one would, so that none needs to be copied */
static const REAL *NAME(tile_in_place)(const ce_job *job, const NAME(lanes) *l)
{
    const ce_array *x = &job->logits;
    int64_t last = job->outer_shape[job->n_outer - 1], size = sizeof(REAL);
    int whole = l->all && l->first % last + l->padded <= last;
    if (!whole || x->dtype != REAL_DTYPE || x->outer_stride[job->n_outer - 1] != size || x->class_stride % size != 0)
        return NULL;
    return (const REAL *)(x->data + NAME(offset)(job, x, l->first));
}

/* exp(z - m) and its sums, class-major, in tiles of CE_CLASSES; 0 if a lane is out of the ordinary */
static int NAME(sum_tiles)(const ce_job *job, NAME(lanes) *l, int store)
{
    int smoothed = job->off != 0;
    int64_t along = job->logits.class_stride, across = job->logits.outer_stride[job->n_outer - 1], size = sizeof(REAL);
    const REAL *in_place = NAME(tile_in_place)(job, l);
    const char *ahead = NAME(ahead)(job, l->first + ROWS);
    if (across > along) /* rows one after another: the next tile is one piece */
        along = across / job->n_classes * ROWS;
    for (int p = 0; p < l->padded; p++)
        l->rest[p] = l->lost[p] = l->x_t[p] = 0;
    for (int p = 0; p < l->padded && smoothed; p++)
        l->moment[p] = l->moment_lost[p] = 0;
    for (int64_t k = 0; k < job->n_classes; k += CE_CLASSES) {
        int64_t n = job->n_classes - k < CE_CLASSES ? job->n_classes - k : CE_CLASSES;
        const REAL *x = in_place ? in_place + k * (job->logits.class_stride / size) : l->x;
        int64_t pitch = in_place ? job->logits.class_stride / size : PITCH;
        /* in place a few classes, which are in L1 when they are read again: [8, 21, 512, 512] took 13 ms with a copy, now 10;
           all of a copy, whose logits exponentials replace; with smoothing all, which its pivot is the largest of (they are
           CE_FEW, one tile) */
        int few = in_place && !l->look && !smoothed && n > CE_CLASS_RUN;
        int64_t first = k > 0 ? 0 : few ? CE_CLASS_RUN : n;
        if (!in_place)
            NAME(load_lanes)(job, k, n, l);
        int ordinary;
        if (smoothed)
            ordinary = store ? NAME(add_exp)(job, k, n, l, x, pitch, ahead, along, first, 1, 1)
                             : NAME(add_exp)(job, k, n, l, x, pitch, ahead, along, first, 0, 1);
        else
            ordinary = store ? NAME(add_exp)(job, k, n, l, x, pitch, ahead, along, first, 1, 0)
                             : NAME(add_exp)(job, k, n, l, x, pitch, ahead, along, first, 0, 0);
        if (!ordinary)
            return 0;
    }
    return 1;
}

static void NAME(write_tiles)(const ce_job *job, NAME(lanes) *l)
{
    for (int64_t k = 0; k < job->n_classes; k += CE_CLASSES) {
        int64_t n = job->n_classes - k < CE_CLASSES ? job->n_classes - k : CE_CLASSES;
        if (job->n_classes > CE_CLASSES) { /* else they are there from the first pass */
            NAME(load_lanes)(job, k, n, l);
            NAME(add_exp)(job, k, n, l, l->x, PITCH, (const char *)l->x, 0, 0, 1, 0);
        }
        NAME(scale_lanes)(job, k, n, l);
        NAME(each_class)(job, &job->out, k, n, l, 1);
    }
}

/* The Hessian, in a pass of its own with exp taken again: 50,000 rows of 7 take 0.9 ms with their gradient, one by one 45. */
static void NAME(write_hess_lanes)(const ce_job *job, NAME(lanes) *l)
{
    for (int p = 0; p < l->padded; p++)
        l->scale[p] = job->hess_scale;
    for (int p = 0; p < l->n && job->upstream; p++)
        l->scale[p] *= l->t[p] < 0 ? 0 : job->upstream[l->first + p];
    NAME(load_lanes)(job, 0, job->n_classes, l);
    NAME(add_exp)(job, 0, job->n_classes, l, l->x, PITCH, (const char *)l->x, 0, 0, 1, 0);
    NAME(hess_lanes)(job, l);
    NAME(each_class)(job, &job->hess, 0, job->n_classes, l, 1);
}

/* Rows [first, first + n), n <= batch; 0 if one of them is out of the ordinary, and nothing has been written. */
static int NAME(run_lanes)(const ce_job *job, ce_way way, int64_t first, int n, NAME(lanes) *l, ce_tally *tally)
{
    int gradient = job->emit == CE_GRADIENT, plain = job->rule == CE_CROSS_ENTROPY && job->z_loss == 0;
    int pair = job->n_classes == 2 && job->temperature.value == 1 && plain && job->off == 0 && !job->hess.data;
    l->first = first;
    l->n = n;
    l->only_sum = REAL_IS_FLOAT && plain && !pair && !job->loss && !job->weight && !job->sample_weight;
    l->padded = (n + LANES - 1) & -LANES;
    NAME(load_targets)(job, l, tally);
    if (pair) {
        const char *ahead = NAME(ahead)(job, first + 4 * ROWS);
        for (int line = 0; line < 2 * ROWS * (int)sizeof(REAL); line += 64)
            __builtin_prefetch(ahead + line);
        NAME(each_class)(job, &job->logits, 0, 2, l, 0);
        if (!(gradient ? NAME(pair_stats)(l, 1) : NAME(pair_stats)(l, 0)))
            return 0;
    } else {
        int ordinary = way == CE_ALONG_ROWS ? NAME(sum_rows)(job, l)
                                            : NAME(sum_tiles)(job, l, gradient && job->n_classes <= CE_CLASSES);
        if (!ordinary || !NAME(target_nll)(job, l) || (job->off != 0 && !NAME(sum_others)(job, l)))
            return 0;
        if (gradient || !plain)
            NAME(target_slopes)(job, l);
    }
    NAME(rule_of_lanes)(job, l);
    ce_add(&tally->loss, NAME(over_lanes)(l->loss, l->padded));
    for (int p = 0; p < n && job->loss; p++)
        ((REAL *)job->loss)[first + p] = (REAL)l->loss[p];
    for (int p = 0; p < l->padded && gradient; p++)
        l->scale[p] = job->scale;
    for (int p = 0; p < n && gradient && job->upstream; p++)
        l->scale[p] *= l->t[p] < 0 ? 0 : job->upstream[first + p]; /* which may be NaN where a row does not count */
    if (gradient && pair) {
        NAME(pair_gradient)(l);
        NAME(each_class)(job, &job->out, 0, 2, l, 1);
    } else if (gradient && way == CE_ALONG_ROWS) {
        NAME(write_rows)(job, l);
    } else if (gradient) {
        NAME(write_tiles)(job, l);
    }
    if (job->hess.data)
        NAME(write_hess_lanes)(job, l);
    return 1;
}

static void NAME(rows)(const ce_job *job, int64_t first, int64_t last, void *scratch, ce_tally *tally)
{
    ce_way way = NAME(way)(job);
    int batch = NAME(batch)(job, way), look = 0;
    NAME(lanes) *l = (void *)((char *)scratch + NAME(references_size)(job));
    l->pack = l->x + NAME(pack_offset)(job, way);
    l->waiting.left = 0;
    for (int64_t i = first; i < last;) {
        ce_tally again = {{0, 0}, {0, 0}, 0, -1}, *of_row = way == CE_ONE_BY_ONE ? tally : &again;
        int64_t end = way == CE_ONE_BY_ONE || last - i < batch ? last : i + batch;
        if (way != CE_ONE_BY_ONE) {
            l->look = look;
            int ordinary = NAME(run_lanes)(job, way, i, (int)(end - i), l, tally);
            look = l->look;
            i = ordinary ? end : i;
        }
        for (; i < end; i++)
            ce_add(&tally->loss, NAME(run_row)(job, i, scratch, of_row));
    }
    ce_stream_rest(&l->waiting);
    ce_flush();
}
#undef ROWS
#undef LANES
#undef PITCH
