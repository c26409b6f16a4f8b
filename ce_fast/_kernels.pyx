# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=True
"""Jobs for the C kernels: no arithmetic here, only pointers, strides and `prange` over blocks of rows.

Every array is checked by the caller (`ce_fast.backends.compiled`): aligned, in native byte order, of the stated
shape, and kept alive during the call.
"""
from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

cimport numpy as cnp

cnp.import_array()

cdef extern from "ce_fast.h" nogil:
    ctypedef enum ce_dtype:
        CE_FLOAT64, CE_FLOAT32, CE_FLOAT16, CE_BFLOAT16
    ctypedef enum ce_index_type:
        CE_INT8, CE_UINT8, CE_INT16, CE_UINT16, CE_INT32, CE_UINT32, CE_INT64, CE_UINT64
    ctypedef enum ce_emit:
        CE_NOTHING, CE_GRADIENT, CE_LOG_SOFTMAX
    enum:
        CE_TILE
    ctypedef struct ce_array:
        char *data
        ce_dtype dtype
        int64_t class_stride
        int64_t *outer_stride
    ctypedef struct ce_reference:
        pass
    ctypedef struct ce_job:
        int64_t n_rows, n_classes
        int n_outer
        int64_t *outer_shape
        ce_array logits, soft, out
        ce_emit emit
        const void *target
        ce_index_type target_type
        int64_t ignore_index
        const double *weight
        const double *sample_weight
        const double *upstream
        double on, off, z_loss, scale
        void *loss
        void *lse
    ctypedef double (*ce_rows_fn)(const ce_job *, int64_t, int64_t, ce_reference *)
    ctypedef struct ce_table:
        const char *name
        ce_rows_fn rows_float64, rows_float32
    int ce_isa_count()
    const ce_table *ce_isa(int i)
    int ce_max_threads()
    int ce_openmp()
    double ce_sum_in_order(const double *values, int64_t n)
    void ce_sum_weights(ce_job *)
    int64_t ce_scan_targets(const ce_job *, int64_t *n_counted, double *weight_sum)

DTYPES = {"float64": CE_FLOAT64, "float32": CE_FLOAT32, "float16": CE_FLOAT16, "bfloat16": CE_BFLOAT16}
INDEX_TYPES = {
    "int8": CE_INT8, "uint8": CE_UINT8, "int16": CE_INT16, "uint16": CE_UINT16,
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


cdef inline void *data_of(cnp.ndarray array):
    return NULL if array is None else cnp.PyArray_DATA(array)


cdef void set_array(ce_array *view, cnp.ndarray array, int dtype):
    """A view of `array`, shape (outer..., n_classes); absent if None."""
    cdef int d, last
    if array is None:
        return
    last = cnp.PyArray_NDIM(array) - 1
    view.data = <char *>cnp.PyArray_DATA(array)
    view.dtype = <ce_dtype>dtype
    view.class_stride = cnp.PyArray_STRIDE(array, last)
    for d in range(last):
        view.outer_stride[d] = cnp.PyArray_STRIDE(array, d)


cdef void set_rows(ce_job *job, cnp.ndarray target, int target_type, int64_t ignore_index,
                   cnp.ndarray weight, cnp.ndarray sample_weight):
    job.target = data_of(target)
    job.target_type = <ce_index_type>target_type
    job.ignore_index = ignore_index
    job.weight = <const double *>data_of(weight)
    job.sample_weight = <const double *>data_of(sample_weight)


def scan_targets(cnp.ndarray target, int target_type, int64_t ignore_index, int64_t n_rows, int64_t n_classes,
                 cnp.ndarray weight, cnp.ndarray sample_weight):
    """(first bad position or -1, number of rows that count, sum of their weights)."""
    cdef ce_job job
    cdef int64_t counted = 0, bad
    cdef double weight_sum = 0
    memset(&job, 0, sizeof(job))
    job.n_rows, job.n_classes = n_rows, n_classes
    set_rows(&job, target, target_type, ignore_index, weight, sample_weight)
    with nogil:
        bad = ce_scan_targets(&job, &counted, &weight_sum)
    return bad, counted, weight_sum


def run_rows(int isa, bint compute_float64, int64_t n_rows, int64_t block_rows, int chunk_blocks, int n_threads,
             cnp.ndarray logits, int logits_dtype, cnp.ndarray soft, int soft_dtype, cnp.ndarray out, int emit,
             cnp.ndarray target, int target_type, int64_t ignore_index,
             cnp.ndarray weight, cnp.ndarray sample_weight, cnp.ndarray upstream,
             double on, double off, double z_loss, double scale, cnp.ndarray loss, cnp.ndarray lse):
    """Run one job on rows; returns the sum of the losses, the same bits for any number of threads."""
    cdef ce_job job
    cdef int d, n_outer = cnp.PyArray_NDIM(logits) - 1
    cdef int64_t b, first, last, n_blocks = (n_rows + block_rows - 1) // block_rows
    cdef int64_t n_tiles = 0
    cdef ce_rows_fn rows = ce_isa(isa).rows_float64 if compute_float64 else ce_isa(isa).rows_float32
    cdef double *sums
    cdef ce_reference *tiles
    cdef double total = 0

    memset(&job, 0, sizeof(job))
    job.n_rows, job.n_classes, job.n_outer = n_rows, cnp.PyArray_DIM(logits, n_outer), n_outer
    for d in range(n_outer):
        job.outer_shape[d] = cnp.PyArray_DIM(logits, d)
    set_array(&job.logits, logits, logits_dtype)
    set_array(&job.soft, soft, soft_dtype)
    set_array(&job.out, out, logits_dtype)
    job.emit = <ce_emit>emit
    set_rows(&job, target, target_type, ignore_index, weight, sample_weight)
    job.upstream = <const double *>data_of(upstream)
    job.on, job.off, job.z_loss, job.scale = on, off, z_loss, scale
    job.loss, job.lse = data_of(loss), data_of(lse)

    if job.emit == CE_GRADIENT:
        n_tiles = (job.n_classes + CE_TILE - 1) // CE_TILE
    sums = <double *>calloc(n_blocks + 1, sizeof(double))
    tiles = <ce_reference *>malloc((n_threads * n_tiles + 1) * sizeof(ce_reference))
    if sums == NULL or tiles == NULL:
        free(sums)
        free(tiles)
        raise MemoryError(f"no memory for {n_blocks} partial sums and {n_threads * n_tiles} tile references")
    with nogil:
        if job.off != 0 and job.target != NULL:  # smoothed class indices alone read it
            ce_sum_weights(&job)
        if n_threads == 1:
            for b in range(n_blocks):
                first = b * block_rows
                last = min(first + block_rows, n_rows)
                sums[b] = rows(&job, first, last, tiles)
        else:
            for b in prange(n_blocks, schedule="dynamic", chunksize=chunk_blocks, num_threads=n_threads):
                first = b * block_rows
                last = min(first + block_rows, n_rows)
                sums[b] = rows(&job, first, last, tiles + threadid() * n_tiles)
        total = ce_sum_in_order(sums, n_blocks)
    free(sums)
    free(tiles)
    return total
