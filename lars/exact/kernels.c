/* Loops that take one pass over memory where torch takes several: the order-free sum (reduction.py) and the images of a
   pass (base.py). Multiplication by a power of two, rounding to the nearest even integer, addition of integers and
   reading a table have one result each, so every compiler and every instruction set gives the bits of the plain path. */

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

/* uint8 images of 3 bytes a pixel to shades[channel][byte]; `planes`: channel by channel, else in the order of `bytes`. */
void lars_pixels(const uint8_t *bytes, const float *shades, float *pixels, int64_t images, int64_t size, int32_t planes)
{
    const int64_t step = planes ? 1 : 3, plane = planes ? size : 1;
    for (int64_t n = 0; n < images; n++, bytes += 3 * size, pixels += 3 * size)
        for (int64_t i = 0; i < size; i++) {
            pixels[i * step] = shades[bytes[3 * i]];
            pixels[i * step + plane] = shades[256 + bytes[3 * i + 1]];
            pixels[i * step + 2 * plane] = shades[512 + bytes[3 * i + 2]];
        }
}
