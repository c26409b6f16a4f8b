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
    ce_temperature t = {value, 1.44269504088896340736 / value, 0, 0, 0};
    memcpy(&t.ln2_high, &bits, sizeof bits);
    t.ln2_low = (product - t.ln2_high) + rest;
    t.log2e_low = t.log2e * (fma(-t.log2e, t.ln2_high, 1) - t.log2e * t.ln2_low); /* what 1 / (value ln 2) rounds */
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

/* those read next come into the cache meanwhile */
#define CE_READ_TARGETS(TYPE)                                             \
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(TYPE))           \
        __builtin_prefetch((const TYPE *)target + first + n + i);         \
    for (int64_t i = 0; i < n; i++)                                       \
        out[i] = (int64_t)((const TYPE *)target)[first + i];              \
    return;

/* targets [first, first + n) as int64; what is too large for it is neither a class nor an ignore_index */
void ce_read_targets(const void *target, ce_dtype type, int64_t first, int64_t n, int64_t *out)
{
    switch (type) {
    case CE_INT64: CE_READ_TARGETS(int64_t)
    case CE_INT32: CE_READ_TARGETS(int32_t)
    case CE_UINT8: CE_READ_TARGETS(uint8_t)
    default:
        for (int64_t i = 0; i < n; i++)
            out[i] = ce_target_at(target, type, first + i);
    }
}

/* blocks in order: the same bits whichever thread ran them */
ce_tally ce_add_up(const ce_tally *blocks, int64_t n)
{
    ce_tally all = {{0, 0}, {0, 0}, 0, -1};
    for (int64_t b = 0; b < n; b++) {
        ce_add(&all.loss, ce_total(&blocks[b].loss));
        ce_add(&all.weight, ce_total(&blocks[b].weight));
        all.counted += blocks[b].counted;
        all.bad = all.bad < 0 ? blocks[b].bad : all.bad;
    }
    return all;
}

/* how many rows count, or -1 if a target that counts is no class; for rows without weights */
static int64_t count_targets(const ce_job *job)
{
    enum { PIECE = 512 };
    int64_t target[PIECE], counted = 0, bad = 0;
    for (int64_t first = 0; first < job->n_rows; first += PIECE) {
        int64_t n = job->n_rows - first < PIECE ? job->n_rows - first : PIECE;
        ce_read_targets(job->target, job->target_type, first, n, target);
        for (int64_t i = 0; i < n; i++) {
            int64_t counts = target[i] != job->ignore_index;
            counted += counts;
            bad |= counts & ((uint64_t)target[i] >= (uint64_t)job->n_classes);
        }
    }
    return bad ? -1 : counted;
}

/* the tally of all rows, but for their losses; stops at the first target that counts and is no class */
ce_tally ce_scan_targets(const ce_job *job)
{
    ce_tally tally = {{0, 0}, {0, 0}, 0, -1};
    if (job->target && !job->weight && !job->sample_weight && (tally.counted = count_targets(job)) >= 0) {
        tally.weight.high = (double)tally.counted;
        return tally;
    }
    tally.counted = 0;
    for (int64_t i = 0; i < job->n_rows && tally.bad < 0; i++) {
        int64_t t = job->target ? ce_target_at(job->target, job->target_type, i) : 0;
        ce_tally_row(job, i, t, job->sample_weight ? job->sample_weight[i] : 1, &tally);
    }
    return tally;
}
