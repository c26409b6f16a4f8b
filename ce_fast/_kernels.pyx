# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Jobs for the C kernels: no arithmetic here, only pointers, strides and `prange` over blocks of rows.

Every array is checked by the caller (`ce_fast.backends.compiled`): aligned, in native byte order, of the stated
shape, and kept alive during the call.
"""
from cython.parallel cimport prange, threadid
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fabs
from libc.stdint cimport INT64_MAX, INT64_MIN, int32_t, int64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

cimport numpy as cnp

import numpy as np

from ce_fast.backends import RULES

cnp.import_array()

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "sums.h" nogil:
    ctypedef enum ce_dtype:
        CE_FLOAT64, CE_FLOAT32, CE_FLOAT16, CE_BFLOAT16
        CE_INT8, CE_UINT8, CE_INT16, CE_UINT16, CE_INT32, CE_UINT32, CE_INT64, CE_UINT64
    ctypedef enum ce_emit:
        CE_NOTHING, CE_GRADIENT, CE_LOG_SOFTMAX
    ctypedef enum ce_rule:
        pass
    ctypedef enum ce_phase:
        CE_BEGIN, CE_STATISTICS, CE_FINISH, CE_WRITE
    enum:
        CE_OUTSIDE
        CE_SUM_NOT_ONE
    ctypedef struct ce_temperature:
        pass
    ctypedef struct ce_array:
        char *data
        ce_dtype dtype
        int64_t class_stride
        int64_t *outer_stride
    ctypedef struct ce_sum:
        double high, low
    ctypedef struct ce_tally:
        ce_sum loss, weight
        int64_t counted, bad
    ctypedef struct ce_job:
        int64_t n_rows, n_classes, part_classes
        int n_outer
        int64_t *outer_shape
        ce_array logits, soft, out, hess
        ce_emit emit
        const void *target
        ce_dtype target_type
        int64_t ignore_index
        const double *weight
        const double *sample_weight
        const double *upstream
        const int64_t *left_out
        int64_t n_left_out
        ce_rule rule
        ce_temperature temperature, cap
        int log_probs
        double parameter, on, off, z_loss, softcap, scale, hess_scale, floor
        void *loss
        void *lse
    ctypedef struct ce_measures:
        double *lse
        double *log_prob
        double *max
        double *entropy
        double *sum_sq_prob
        double *brier
        int64_t *argmax
        int64_t *rank
        const double *target_logit
    ctypedef struct ce_element_job:
        int64_t n_last
        int n_outer
        int64_t *outer_shape
        ce_array logits, target, weight, pos_weight, sample_weight, upstream, loss, out, hess
        ce_rule rule
        double gamma, alpha, on, off, scale, hess_scale, floor
    ctypedef void (*ce_rows_fn)(const ce_job *, int64_t, int64_t, void *, ce_tally *)
    ctypedef size_t (*ce_scratch_fn)(const ce_job *)
    ctypedef void (*ce_measures_fn)(const ce_job *, const ce_measures *, int64_t, int64_t, ce_tally *)
    ctypedef void (*ce_parts_fn)(const ce_job *, ce_phase, int64_t, void *, ce_tally *)
    ctypedef double (*ce_elements_fn)(const ce_element_job *, int64_t, int64_t, int *)
    ctypedef struct ce_labels:
        const char *data
        ce_dtype dtype
        int64_t stride
    ctypedef struct ce_probability_job:
        int64_t n_classes
        const char *data
        ce_dtype dtype
        int64_t row_stride, class_stride
        ce_labels labels
        int64_t low
        double eps, tolerance
        const double *weight
        char *picked
    ctypedef double (*ce_probabilities_fn)(const ce_probability_job *, int64_t, int64_t, double *, char *, int *)
    ctypedef void (*ce_label_range_fn)(const ce_labels *, int64_t, int64_t, int64_t *, int64_t *)
    ctypedef struct ce_table:
        const char *name
        ce_rows_fn rows_float64, rows_float32
        ce_scratch_fn scratch_float64, scratch_float32
        ce_measures_fn measures_float64, measures_float32
        ce_parts_fn parts_float64, parts_float32
        ce_scratch_fn parts_scratch_float64, parts_scratch_float32
        ce_elements_fn elements_float64, elements_float32
        ce_probabilities_fn probabilities_float64, probabilities_float32
        ce_label_range_fn label_range
    int ce_isa_count()
    const ce_table *ce_isa(int i)
    int ce_max_threads()
    int ce_openmp()
    void *ce_take_block(size_t size)
    void ce_give_block(void *data, size_t size)
    int64_t ce_number_strings(
        const char *data, int64_t stride, int64_t width, int64_t n, int32_t *slots, int64_t n_slots, int32_t *number,
        int64_t *first,
    )
    double ce_sum_in_order(const double *values, int64_t n)
    void ce_sum_weights(ce_job *)
    ce_temperature ce_make_temperature(double value)
    ce_tally ce_scan_targets(const ce_job *)
    ce_tally ce_add_up(const ce_tally *blocks, int64_t n)
    double ce_total(const ce_sum *)

DTYPES = {
    "float64": CE_FLOAT64, "float32": CE_FLOAT32, "float16": CE_FLOAT16, "bfloat16": CE_BFLOAT16,
    "int8": CE_INT8, "uint8": CE_UINT8, "int16": CE_INT16, "uint16": CE_UINT16, "bool": CE_UINT8,
    "int32": CE_INT32, "uint32": CE_UINT32, "int64": CE_INT64, "uint64": CE_UINT64,
}
EMIT = {None: CE_NOTHING, "gradient": CE_GRADIENT, "log_softmax": CE_LOG_SOFTMAX}
ISAS = tuple([ce_isa(i).name.decode() for i in range(ce_isa_count())])  # worst first


def openmp_version():
    """The `_OPENMP` date of the build, 0 without OpenMP."""
    return ce_openmp()


def max_threads():
    """OpenMP's limit for the calling thread (OMP_NUM_THREADS, threadpoolctl); 1 without OpenMP."""
    return ce_max_threads()


_codes = {}  # of dtypes: the name of one costs a microsecond


cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t)
        void *(*calloc)(void *, size_t, size_t)
        void *(*realloc)(void *, void *, size_t)
        void (*free)(void *, void *, size_t)
    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator
    object PyDataMem_SetHandler(object)


cdef void *take(void *ctx, size_t size) noexcept:
    return ce_take_block(size)


cdef void give(void *ctx, void *data, size_t size) noexcept:
    ce_give_block(data, size)


cdef void *take_zeros(void *ctx, size_t n, size_t size) noexcept:
    cdef void *data = NULL if size and n > <size_t>-1 // size else ce_take_block(n * size)
    return NULL if data == NULL else memset(data, 0, n * size)


cdef void *move(void *ctx, void *data, size_t size) noexcept:
    return realloc(data, size)


cdef PyDataMem_Handler _kept_memory
memcpy(_kept_memory.name, b"ce_fast", 8)
_kept_memory.version = 1
_kept_memory.allocator = [NULL, take, take_zeros, move, give]
_handler = PyCapsule_New(&_kept_memory, "mem_handler", NULL)
SMALL = 32768  # logits; SERIAL_LOGITS of threads.py, and of one block
LARGE = 1 << 20  # bytes; below it malloc itself keeps what was freed


def empty_like(cnp.ndarray array, dtype):
    """`np.empty_like`; large arrays in memory that a freed one left (csrc/memory.c)."""
    if array.nbytes < LARGE:
        return np.empty_like(array, dtype, subok=False)
    before = PyDataMem_SetHandler(_handler)
    try:
        return np.empty_like(array, dtype, subok=False)
    finally:
        PyDataMem_SetHandler(before)


cdef int code_of(cnp.ndarray array) except -1:
    if array is None:
        return 0
    dtype = array.dtype
    if dtype not in _codes:
        _codes[dtype] = DTYPES[dtype.name]
    return _codes[dtype]


cdef inline void *data_of(cnp.ndarray array):
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef int set_array(ce_array *view, cnp.ndarray array) except -1:
    """A view of `array`, shape (outer..., n_classes); absent if None."""
    cdef int d, last
    if array is None:
        return 0
    last = cnp.PyArray_NDIM(array) - 1
    view.data = <char *>cnp.PyArray_DATA(array)
    view.dtype = <ce_dtype>code_of(array)
    view.class_stride = cnp.PyArray_STRIDE(array, last)
    for d in range(last):
        view.outer_stride[d] = cnp.PyArray_STRIDE(array, d)
    return 0


cdef int set_rows(ce_job *job, rows) except -1:
    cdef cnp.ndarray target = rows.target
    job.target = data_of(target)
    job.target_type = <ce_dtype>code_of(target)
    job.ignore_index = rows.ignore_index
    job.weight = <const double *>data_of(rows.weight)
    job.sample_weight = <const double *>data_of(rows.sample_weight)
    return 0


cdef tuple counts_of(ce_tally *tally):
    return tally.bad, tally.counted, ce_total(&tally.weight)


def scan_targets(rows, int64_t n_rows, int64_t n_classes):
    """(first bad position or -1, number of rows that count, sum of their weights)."""
    cdef ce_job job
    cdef ce_tally tally
    memset(&job, 0, sizeof(job))
    job.n_rows, job.n_classes = n_rows, n_classes
    set_rows(&job, rows)
    with nogil:
        tally = ce_scan_targets(&job)
    return counts_of(&tally)


cdef int set_job(ce_job *view, job) except -1:
    cdef cnp.ndarray logits = job.logits, left_out = job.left_out
    cdef int d
    memset(view, 0, sizeof(view[0]))
    view.n_outer = cnp.PyArray_NDIM(logits) - 1
    view.n_classes = cnp.PyArray_DIM(logits, view.n_outer)
    for d in range(view.n_outer):
        view.outer_shape[d] = cnp.PyArray_DIM(logits, d)
    set_array(&view.logits, logits)
    set_array(&view.soft, job.soft)
    set_array(&view.out, job.out)
    set_array(&view.hess, job.hess)
    set_rows(view, job.rows)
    view.emit = <ce_emit><int>EMIT[job.emit]
    view.upstream = <const double *>data_of(job.upstream)
    if left_out is not None:
        view.left_out, view.n_left_out = <const int64_t *>data_of(left_out), cnp.PyArray_DIM(left_out, 1)
    view.rule, view.parameter = <ce_rule><int>RULES.index(job.rule), job.parameter
    view.on, view.off, view.z_loss = job.on, job.off, job.z_loss
    view.temperature = ce_make_temperature(job.temperature)
    view.softcap = job.softcap or 0.0
    view.cap = ce_make_temperature(view.softcap / 2 if view.softcap else 1.0)
    view.log_probs = job.log_probs
    view.scale, view.hess_scale, view.floor = job.scale, job.hess_scale, job.floor
    view.loss, view.lse = data_of(job.loss), data_of(job.lse)
    return 0


cdef void each_part(ce_parts_fn parts, const ce_job *job, ce_phase phase, int64_t first, int64_t last, int n_threads,
                    void *scratch, ce_tally *tally) noexcept nogil:
    """static: a thread writes the gradient of those parts whose exponentials are in its cache."""
    cdef int64_t u
    if n_threads == 1:
        for u in range(first, last):
            parts(job, phase, u, scratch, tally)
    else:
        for u in prange(first, last, schedule="static", num_threads=n_threads):
            parts(job, phase, u, scratch, tally)


cdef int run_parts(ce_parts_fn parts, ce_job *job, int64_t part_rows, int n_threads, size_t size,
                   ce_tally *tally) except -1:
    """Few rows of many classes, their parts in parallel."""
    cdef int64_t n_parts = (job.n_classes + job.part_classes - 1) // job.part_classes, i = 0, end
    cdef char *scratch = <char *>malloc(size)
    if scratch == NULL:
        raise MemoryError(f"no memory for {size} bytes of partial sums")
    tally.bad = -1
    with nogil:
        while i < job.n_rows:
            end = min(i + part_rows, job.n_rows)
            each_part(parts, job, CE_BEGIN, i, end, 1, scratch, tally)
            each_part(parts, job, CE_STATISTICS, i * n_parts, end * n_parts, n_threads, scratch, tally)
            each_part(parts, job, CE_FINISH, i, end, 1, scratch, tally)
            if job.emit == CE_GRADIENT:
                each_part(parts, job, CE_WRITE, i * n_parts, end * n_parts, n_threads, scratch, tally)
            i = end
    free(scratch)
    return 0


def run_rows(int isa, plan, job):
    """Run one job on rows; returns (the sum of the losses, *what `scan_targets` does), the same bits for any number of
    threads."""
    cdef ce_job view
    cdef ce_tally tally
    cdef int64_t n_rows = plan.n_rows, block_rows = plan.block_rows
    cdef int64_t b, n_blocks = (n_rows + block_rows - 1) // block_rows
    cdef int n_threads = plan.n_threads, chunk_blocks = plan.chunk_blocks
    cdef bint wide = plan.compute_dtype.itemsize == 8
    cdef ce_rows_fn rows = ce_isa(isa).rows_float64 if wide else ce_isa(isa).rows_float32
    cdef size_t scratch_size
    cdef ce_tally *blocks
    cdef char *scratch

    set_job(&view, job)
    view.n_rows, view.part_classes = n_rows, plan.part_classes
    if view.off != 0 and view.target != NULL:  # smoothed class indices alone read it
        with nogil:
            ce_sum_weights(&view)
    scratch_size = (ce_isa(isa).parts_scratch_float64 if wide else ce_isa(isa).parts_scratch_float32)(&view)
    if scratch_size:
        memset(&tally, 0, sizeof(tally))
        run_parts(ce_isa(isa).parts_float64 if wide else ce_isa(isa).parts_float32, &view,
                  plan.part_rows if view.emit == CE_GRADIENT else n_rows, n_threads, scratch_size, &tally)
        return (ce_total(&tally.loss), *counts_of(&tally))
    n_threads = max(1, min(<int64_t>n_threads, n_blocks))  # a plan of parts may have more
    scratch_size = (ce_isa(isa).scratch_float64 if wide else ce_isa(isa).scratch_float32)(&view)
    blocks = <ce_tally *>calloc(n_blocks + 1, sizeof(ce_tally))
    scratch = <char *>aligned_alloc(64, n_threads * scratch_size)
    if blocks == NULL or scratch == NULL:
        free(blocks)
        free(scratch)
        raise MemoryError(f"no memory for {n_blocks} partial sums and {n_threads * scratch_size} bytes of scratch")
    with nogil:
        for b in range(n_blocks):
            blocks[b].bad = -1
        if n_threads == 1:
            for b in range(n_blocks):
                rows(&view, b * block_rows, min((b + 1) * block_rows, n_rows), scratch, &blocks[b])
        else:
            for b in prange(n_blocks, schedule="dynamic", chunksize=chunk_blocks, num_threads=n_threads):
                rows(&view, b * block_rows, min((b + 1) * block_rows, n_rows), scratch + threadid() * scratch_size,
                     &blocks[b])
        tally = ce_add_up(blocks, n_blocks)
    free(blocks)
    free(scratch)
    return (ce_total(&tally.loss), *counts_of(&tally))


def measure(int isa, plan, job, values, target_logit):
    """Fill `values` (n_rows,) of the rows that count; returns the first bad position or -1."""
    cdef ce_job view
    cdef ce_measures out
    cdef int64_t n_rows = plan.n_rows, block_rows = plan.block_rows
    cdef int64_t b, n_blocks = (n_rows + block_rows - 1) // block_rows
    cdef int n_threads = max(1, min(<int64_t>plan.n_threads, n_blocks)), chunk_blocks = plan.chunk_blocks
    cdef bint wide = plan.compute_dtype.itemsize == 8
    cdef ce_measures_fn measures = ce_isa(isa).measures_float64 if wide else ce_isa(isa).measures_float32
    cdef ce_tally *blocks
    cdef ce_tally tally

    set_job(&view, job)
    view.n_rows = n_rows
    out.lse, out.log_prob = <double *>data_of(values.lse), <double *>data_of(values.log_prob)
    out.max, out.entropy = <double *>data_of(values.max), <double *>data_of(values.entropy)
    out.sum_sq_prob, out.brier = <double *>data_of(values.sum_sq_prob), <double *>data_of(values.brier)
    out.argmax, out.rank = <int64_t *>data_of(values.argmax), <int64_t *>data_of(values.rank)
    out.target_logit = <const double *>data_of(target_logit)
    blocks = <ce_tally *>calloc(n_blocks + 1, sizeof(ce_tally))
    if blocks == NULL:
        raise MemoryError(f"no memory for {n_blocks} partial sums")
    with nogil:
        for b in range(n_blocks):
            blocks[b].bad = -1
        if n_threads == 1:
            for b in range(n_blocks):
                measures(&view, &out, b * block_rows, min((b + 1) * block_rows, n_rows), &blocks[b])
        else:
            for b in prange(n_blocks, schedule="dynamic", chunksize=chunk_blocks, num_threads=n_threads):
                measures(&view, &out, b * block_rows, min((b + 1) * block_rows, n_rows), &blocks[b])
        tally = ce_add_up(blocks, n_blocks)
    free(blocks)
    return tally.bad


def small_call(int isa, cnp.ndarray logits, cnp.ndarray target, int64_t ignore_index, bint gradient):
    """(mean cross-entropy, its gradient or None) of a small call that is right in every way, or None for any other.

    In C from the checks to the result, on one thread: a call on (32, 10) takes 2 us, the general way 20. Its bits are
    those of the general way.
    """
    cdef int kind = cnp.PyArray_TYPE(logits), index = cnp.PyArray_TYPE(target), target_type
    cdef cnp.npy_intp n
    if kind not in (cnp.NPY_FLOAT64, cnp.NPY_FLOAT32) or index not in (cnp.NPY_INT64, cnp.NPY_INT32):
        return None
    if cnp.PyArray_NDIM(logits) != 2 or cnp.PyArray_NDIM(target) != 1:
        return None
    if not cnp.PyArray_ISCARRAY_RO(logits) or not cnp.PyArray_ISCARRAY_RO(target):  # aligned, in native byte order
        return None
    n = cnp.PyArray_DIM(logits, 0)
    if cnp.PyArray_DIM(target, 0) != n:
        return None
    target_type = CE_INT64 if index == cnp.NPY_INT64 else CE_INT32
    return _small_call(isa, <char *>cnp.PyArray_DATA(logits), kind, n, cnp.PyArray_DIM(logits, 1),
                       cnp.PyArray_DATA(target), target_type, ignore_index, gradient)


def small_call_at(int isa, size_t logits, bint wide, int64_t n_rows, int64_t n_classes, size_t target,
                  int64_t ignore_index, bint gradient):
    """`small_call` of contiguous logits, float64 if `wide`, else float32, and int64 targets at these addresses; the
    mean is an array of their dtype."""
    cdef int kind = cnp.NPY_FLOAT64 if wide else cnp.NPY_FLOAT32
    cdef cnp.ndarray mean
    if target % 8 or logits % (8 if wide else 4):
        return None
    done = _small_call(isa, <char *>logits, kind, n_rows, n_classes, <void *>target, CE_INT64, ignore_index, gradient)
    if done is None:
        return None
    mean = cnp.PyArray_EMPTY(0, NULL, kind, 0)
    if wide:
        (<double *>cnp.PyArray_DATA(mean))[0] = done[0]
    else:
        (<float *>cnp.PyArray_DATA(mean))[0] = <float><double>done[0]
    return mean, done[1]


cdef _small_call(int isa, char *x, int kind, int64_t n, int64_t k, void *target, int target_type,
                 int64_t ignore_index, bint gradient):
    cdef ce_job view
    cdef ce_tally tally = [[0, 0], [0, 0], 0, -1]
    cdef bint wide = kind == cnp.NPY_FLOAT64
    cdef int64_t i, size = 8 if wide else 4
    cdef double first, last, total = 0
    cdef cnp.npy_intp shape[2]
    cdef void *scratch
    cdef cnp.ndarray grad = None
    if n == 0 or k < 2 or n * k >= SMALL:
        return None
    first = (<double *>x)[0] if wide else (<float *>x)[0]
    last = (<double *>x)[n * k - 1] if wide else (<float *>x)[n * k - 1]
    if 0 <= first <= 1 and 0 <= last <= 1:
        for i in range(k):
            total += (<double *>x)[i] if wide else (<float *>x)[i]
        if fabs(total - 1) <= 2e-3:  # they may be probabilities
            return None
    memset(&view, 0, sizeof(view))
    view.n_rows, view.n_classes, view.n_outer = n, k, 1
    view.outer_shape[0] = n
    view.logits.data, view.logits.dtype = x, CE_FLOAT64 if wide else CE_FLOAT32
    view.logits.class_stride, view.logits.outer_stride[0] = size, size * k
    view.target, view.target_type, view.ignore_index = target, <ce_dtype>target_type, ignore_index
    view.on, view.temperature, view.cap = 1.0, ce_make_temperature(1.0), ce_make_temperature(1.0)
    if gradient:
        tally = ce_scan_targets(&view)
        if tally.bad >= 0 or tally.counted == 0:
            return None
        shape[0], shape[1] = n, k
        grad = cnp.PyArray_EMPTY(2, shape, kind, 0)
        view.emit, view.scale, view.out = CE_GRADIENT, 1.0 / tally.counted, view.logits
        view.out.data = <char *>cnp.PyArray_DATA(grad)
        tally = [[0, 0], [0, 0], 0, -1]
    scratch = aligned_alloc(64, (ce_isa(isa).scratch_float64 if wide else ce_isa(isa).scratch_float32)(&view))
    if scratch == NULL:
        raise MemoryError("no memory for the scratch of a small call")
    (ce_isa(isa).rows_float64 if wide else ce_isa(isa).rows_float32)(&view, 0, n, scratch, &tally)
    free(scratch)
    if tally.bad >= 0 or tally.counted == 0:
        return None
    return ce_total(&tally.loss) / tally.counted, grad


cdef int set_element_job(ce_element_job *view, job) except -1:
    cdef cnp.ndarray logits = job.logits
    cdef int d
    memset(view, 0, sizeof(view[0]))
    view.n_outer = cnp.PyArray_NDIM(logits) - 1
    view.n_last = cnp.PyArray_DIM(logits, view.n_outer)
    for d in range(view.n_outer):
        view.outer_shape[d] = cnp.PyArray_DIM(logits, d)
    set_array(&view.logits, logits)
    set_array(&view.target, job.target)
    set_array(&view.weight, job.weight)
    set_array(&view.pos_weight, job.pos_weight)
    set_array(&view.sample_weight, job.sample_weight)
    set_array(&view.upstream, job.upstream)
    set_array(&view.loss, job.loss)
    set_array(&view.out, job.out)
    set_array(&view.hess, job.hess)
    view.rule = <ce_rule><int>RULES.index(job.rule)
    view.gamma, view.alpha = job.gamma, -1.0 if job.alpha is None else job.alpha
    view.on, view.off = job.on, job.off
    view.scale, view.hess_scale, view.floor = job.scale, job.hess_scale, job.floor
    return 0


def run_elements(int isa, plan, job):
    """Run one job on elements; returns (the sum of the losses, whether a target that counts is outside [0, 1])."""
    cdef ce_element_job view
    cdef int64_t n = plan.n_rows, block = plan.block_rows, b, n_blocks = (n + block - 1) // block
    cdef int n_threads = plan.n_threads, chunk_blocks = plan.chunk_blocks, bad = 0
    cdef bint wide = plan.compute_dtype.itemsize == 8
    cdef ce_elements_fn elements = ce_isa(isa).elements_float64 if wide else ce_isa(isa).elements_float32
    cdef double *sums
    cdef int *flags
    cdef double total = 0

    set_element_job(&view, job)
    sums = <double *>calloc(n_blocks + 1, sizeof(double))
    flags = <int *>calloc(n_blocks + 1, sizeof(int))
    if sums == NULL or flags == NULL:
        free(sums)
        free(flags)
        raise MemoryError(f"no memory for {n_blocks} partial sums")
    with nogil:
        if n_threads == 1:
            for b in range(n_blocks):
                sums[b] = elements(&view, b * block, min((b + 1) * block, n), &flags[b])
        else:
            for b in prange(n_blocks, schedule="dynamic", chunksize=chunk_blocks, num_threads=n_threads):
                sums[b] = elements(&view, b * block, min((b + 1) * block, n), &flags[b])
        total = ce_sum_in_order(sums, n_blocks)
        for b in range(n_blocks):
            bad = bad | flags[b]
    free(sums)
    free(flags)
    return total, bool(bad)


cdef int set_labels(ce_labels *view, cnp.ndarray labels) except -1:
    view.data = <const char *>cnp.PyArray_DATA(labels)
    view.dtype = <ce_dtype>code_of(labels)
    view.stride = cnp.PyArray_STRIDE(labels, 0)
    return 0


def label_range(int isa, cnp.ndarray labels, int n_threads):
    """(least, greatest) of one dimension of labels, at least one for each thread."""
    cdef ce_labels view
    cdef int64_t n = cnp.PyArray_DIM(labels, 0), share = n // n_threads, least = INT64_MAX, most = INT64_MIN, t
    cdef int64_t *ends = <int64_t *>malloc(2 * n_threads * sizeof(int64_t))
    cdef ce_label_range_fn scan = ce_isa(isa).label_range
    if ends == NULL:
        raise MemoryError(f"no memory for the least and greatest labels of {n_threads} threads")
    set_labels(&view, labels)
    with nogil:
        if n_threads == 1:
            scan(&view, 0, n, &ends[0], &ends[1])
        else:
            for t in prange(n_threads, schedule="static", num_threads=n_threads):
                scan(&view, t * share, n if t == n_threads - 1 else (t + 1) * share, &ends[2 * t], &ends[2 * t + 1])
        for t in range(n_threads):
            least, most = min(least, ends[2 * t]), max(most, ends[2 * t + 1])
    free(ends)
    return least, most


def run_probabilities(int isa, plan, job):
    """Run one job on probabilities; returns (the sum of the losses, outside, sums_to_one, every column has a label)."""
    cdef ce_probability_job view
    cdef cnp.ndarray proba = job.proba
    cdef int64_t n = plan.n_rows, block = plan.block_rows, b, n_blocks = (n + block - 1) // block
    cdef int64_t n_classes = cnp.PyArray_DIM(proba, 1) if cnp.PyArray_NDIM(proba) == 2 else 0, k, t, missing = 0
    cdef int n_threads = max(1, min(<int64_t>plan.n_threads, n_blocks)), chunk_blocks = plan.chunk_blocks, found = 0
    cdef bint wide = plan.compute_dtype.itemsize == 8
    cdef ce_probabilities_fn rows = ce_isa(isa).probabilities_float64 if wide else ce_isa(isa).probabilities_float32
    # of each thread; no two of them share a cache line
    cdef int64_t per_loss = min(n, block) + 8 if job.picked is None else 0
    cdef int64_t per_seen = (n_classes + 127) // 64 * 64
    cdef double *losses = <double *>malloc(n_threads * per_loss * sizeof(double) + 1)
    cdef char *seen = <char *>calloc(n_threads, per_seen)
    cdef double *sums = <double *>calloc(n_blocks + 1, sizeof(double))
    cdef int *flags = <int *>calloc(n_blocks + 1, sizeof(int))
    cdef double total = 0

    try:
        if losses == NULL or seen == NULL or sums == NULL or flags == NULL:
            raise MemoryError(f"no memory for {n_blocks} partial sums and the losses of {n_threads} blocks of rows")
        memset(&view, 0, sizeof(view))
        view.n_classes = n_classes
        view.data = <const char *>cnp.PyArray_DATA(proba)
        view.dtype = <ce_dtype>code_of(proba)
        view.row_stride = cnp.PyArray_STRIDE(proba, 0)
        view.class_stride = cnp.PyArray_STRIDE(proba, 1) if n_classes else 0
        set_labels(&view.labels, job.labels)
        view.low, view.eps, view.tolerance = job.low, job.eps, job.tolerance
        view.weight = <const double *>data_of(job.weight)
        view.picked = <char *>data_of(job.picked)
        with nogil:
            if n_threads == 1:
                for b in range(n_blocks):
                    sums[b] = rows(&view, b * block, min((b + 1) * block, n), losses, seen, &flags[b])
            else:
                for b in prange(n_blocks, schedule="dynamic", chunksize=chunk_blocks, num_threads=n_threads):
                    sums[b] = rows(
                        &view, b * block, min((b + 1) * block, n), losses + threadid() * per_loss,
                        seen + threadid() * per_seen, &flags[b],
                    )
            total = ce_sum_in_order(sums, n_blocks)
            for b in range(n_blocks):
                found = found | flags[b]
            for k in range(n_classes):
                for t in range(1, n_threads):
                    seen[k] = seen[k] | seen[t * per_seen + k]
                missing = missing + (seen[k] == 0)
    finally:
        free(losses)
        free(seen)
        free(sums)
        free(flags)
    return total, bool(found & CE_OUTSIDE), not found & CE_SUM_NOT_ONE, missing == 0


def number_strings(cnp.ndarray strings, cnp.ndarray number, cnp.ndarray first, cnp.ndarray slots):
    """Write to `number` (n,) which string of `first` each is; returns how many there are, -1 for too many.

    strings: (n,) of dtype U. slots: zeros, int32, a power of two of them; first: int64, half as many.
    """
    cdef const char *data = <const char *>cnp.PyArray_DATA(strings)
    cdef int64_t n = cnp.PyArray_DIM(strings, 0), stride = cnp.PyArray_STRIDE(strings, 0)
    cdef int64_t width = cnp.PyArray_ITEMSIZE(strings), n_slots = cnp.PyArray_DIM(slots, 0), found
    cdef int32_t *places = <int32_t *>cnp.PyArray_DATA(slots)
    cdef int32_t *numbers = <int32_t *>cnp.PyArray_DATA(number)
    cdef int64_t *firsts = <int64_t *>cnp.PyArray_DATA(first)
    with nogil:
        found = ce_number_strings(data, stride, width, n, places, n_slots, numbers, firsts)
    return found
