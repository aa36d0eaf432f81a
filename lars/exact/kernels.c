/* The loops of the order-free sum (reduction.py), each in one pass over memory. Multiplication by a power of two,
   rounding to the nearest even integer and addition of integers have one result each, so every compiler and every
   instruction set gives the bits of the plain path. */

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FOR_EACH_CPU
#endif

/* total[i] = or += round(gradient[i] * scale); returns 1 if some |gradient[i]| is not below `limit`, as NaN is not. */
FOR_EACH_CPU int32_t lars_add_pass(const float *gradient, int64_t *total, int64_t n, float scale, float limit,
                                   int32_t store)
{
    int32_t beyond = 0;
    if (store)
        for (int64_t i = 0; i < n; i++) {
            beyond |= !(fabsf(gradient[i]) < limit);
            total[i] = llrintf(gradient[i] * scale);
        }
    else
        for (int64_t i = 0; i < n; i++) {
            beyond |= !(fabsf(gradient[i]) < limit);
            total[i] += llrintf(gradient[i] * scale);
        }
    return beyond;
}

/* mean[i] = total[i] * factor, computed in double. */
FOR_EACH_CPU void lars_mean(const int64_t *total, float *mean, int64_t n, double factor)
{
    for (int64_t i = 0; i < n; i++)
        mean[i] = (float)((double)total[i] * factor);
}
