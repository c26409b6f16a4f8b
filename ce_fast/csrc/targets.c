/* What is done once a row or once a call, and not once a logit: class indices, counting, adding up, constants. */
#include <string.h>
#include "sums.h"

/* value ln 2 = ln2_high + ln2_low, from ln 2 to 106 bits; ln2_high is its first 32 */
ce_temperature ce_make_temperature(double value)
{
    const double ln2 = 0x1.62e42fefa39efp-1, tail = 0x1.abc9e3b39803fp-56;
    double product = value * ln2, rest = fma(value, ln2, -product) + value * tail;
    uint64_t bits;
    memcpy(&bits, &product, sizeof bits);
    bits &= ~(uint64_t)0x1fffff;
    ce_temperature t = {value, 1.44269504088896340736 / value, 0, 0};
    memcpy(&t.ln2_high, &bits, sizeof bits);
    t.ln2_low = (product - t.ln2_high) + rest;
    return t;
}

int64_t ce_target_at(const void *target, ce_dtype type, int64_t i)
{
    switch (type) {
    case CE_INT8: return ((const int8_t *)target)[i];
    case CE_UINT8: return ((const uint8_t *)target)[i];
    case CE_INT16: return ((const int16_t *)target)[i];
    case CE_UINT16: return ((const uint16_t *)target)[i];
    case CE_INT32: return ((const int32_t *)target)[i];
    case CE_UINT32: return ((const uint32_t *)target)[i];
    case CE_INT64: return ((const int64_t *)target)[i];
    case CE_UINT64: {
        uint64_t v = ((const uint64_t *)target)[i];
        return v > INT64_MAX ? INT64_MAX : (int64_t)v; /* too large to be a class or an ignore_index */
    }
    default: return -1; /* no index */
    }
}

/* Numbers n strings, each `width` bytes, in the order of their first appearance, and says at first[k] where number k
   came first. slots: a hash table of n_slots zeros, a power of two. Returns how many numbers there are, or -1 when they
   fill half of the slots, and that is what `first` has room for. */
int64_t ce_number_strings(const char *data, int64_t stride, int64_t width, int64_t n, int32_t *slots, int64_t n_slots,
                          int32_t *number, int64_t *first)
{
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        const char *at = data + i * stride;
        uint64_t hash = 0, word;
        int64_t k = 0;
        for (; k + 8 <= width; k += 8) {
            memcpy(&word, at + k, 8);
            hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
            hash ^= hash >> 32;
        }
        if (k < width) { /* a string is of whole words of 4 bytes */
            uint32_t rest;
            memcpy(&rest, at + k, 4);
            hash = (hash ^ rest) * 0x9e3779b97f4a7c15u;
            hash ^= hash >> 32;
        }
        int64_t slot = (int64_t)hash & (n_slots - 1);
        while (slots[slot] && memcmp(data + first[slots[slot] - 1] * stride, at, (size_t)width) != 0)
            slot = (slot + 1) & (n_slots - 1);
        if (!slots[slot]) {
            if (2 * found == n_slots)
                return -1;
            first[found++] = i;
            slots[slot] = (int32_t)found;
        }
        number[i] = slots[slot] - 1;
    }
    return found;
}

double ce_sum_in_order(const double *values, int64_t n)
{
    ce_sum sum = {0, 0};
    for (int64_t i = 0; i < n; i++)
        ce_add(&sum, values[i]);
    return ce_total(&sum);
}

void ce_sum_weights(ce_job *job)
{
    ce_sum sum = {job->weight ? 0 : (double)job->n_classes, 0};
    for (int64_t k = 0; job->weight && k < job->n_classes; k++)
        ce_add(&sum, job->weight[k]);
    job->weight_total = sum;
}

/* The position of the first target that counts and is no class, or -1. Rows of sample weight 0 are not read.
   *n_counted: rows that count; *weight_sum: sum over them of s_i w_t, with w_t = 1 for class probabilities. */
int64_t ce_scan_targets(const ce_job *job, int64_t *n_counted, double *weight_sum)
{
    int64_t counted = 0;
    ce_sum sum = {0, 0};
    for (int64_t i = 0; i < job->n_rows; i++) {
        double s = job->sample_weight ? job->sample_weight[i] : 1;
        if (s == 0)
            continue;
        if (job->target) {
            int64_t t = ce_target_at(job->target, job->target_type, i);
            if (t == job->ignore_index)
                continue;
            if (t < 0 || t >= job->n_classes)
                return i;
            s *= job->weight ? job->weight[t] : 1;
        }
        counted++;
        ce_add(&sum, s);
    }
    *n_counted = counted;
    *weight_sum = ce_total(&sum);
    return -1;
}
