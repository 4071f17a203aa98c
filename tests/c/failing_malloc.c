/* LD_PRELOAD: the n-th allocation of at least WST_FAIL_BYTES (default 64 KiB) fails, and `more` after it; then all is
 * well again. The program arms it with failing_malloc_arm(n, more) and learns with failing_malloc_seen() how many
 * there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static atomic_long first = -1, last, seen;
static atomic_size_t threshold;

void failing_malloc_arm(long n, long more);
long failing_malloc_seen(void);

/* n = 0: count only. */
void failing_malloc_arm(long n, long more) {
    const char *text = getenv("WST_FAIL_BYTES");
    atomic_store(&threshold, text ? strtoul(text, NULL, 10) : (size_t)64 << 10);
    atomic_store(&seen, 0);
    atomic_store(&last, n > 0 && more > LONG_MAX - n ? LONG_MAX : n + more);
    atomic_store(&first, n);
}

long failing_malloc_seen(void) {
    return atomic_load(&seen);
}

static int fails(size_t bytes) {
    if (atomic_load(&first) < 0 || bytes < atomic_load(&threshold)) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number < atomic_load(&first) || number > atomic_load(&last)) return 0;
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t bytes) {
    return fails(bytes) ? NULL : __libc_malloc(bytes);
}
void *calloc(size_t n, size_t bytes) {
    size_t all;
    if (__builtin_mul_overflow(n, bytes, &all) || fails(all)) return NULL;
    return __libc_calloc(n, bytes);
}
void *realloc(void *old, size_t bytes) {
    return fails(bytes) ? NULL : __libc_realloc(old, bytes);
}
void *aligned_alloc(size_t alignment, size_t bytes) {
    return fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
}
void *memalign(size_t alignment, size_t bytes) {
    return fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
}
int posix_memalign(void **out, size_t alignment, size_t bytes) {
    if (fails(bytes)) return ENOMEM;
    void *made = __libc_memalign(alignment, bytes);
    if (!made) return ENOMEM;
    *out = made;
    return 0;
}
