/* The smallest test harness: CHECK counts, summary() prints and gives the exit status. */
#ifndef CHECK_H
#define CHECK_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wuerstchen.h"

static int passed, failed;

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (condition) {                                                                     \
            ++passed;                                                                        \
        } else {                                                                             \
            ++failed;                                                                        \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);          \
        }                                                                                    \
    } while (0)

/* A call must fail with `status`, and its message must contain `words`. */
#define FAILS(status_, words, call)                                                          \
    do {                                                                                     \
        wst_error *error = NULL;                                                             \
        wst_status got = (call);                                                             \
        const char *message = wst_error_message(error);                                      \
        if (got == (status_) && error && wst_error_status(error) == got && strstr(message, words)) { \
            ++passed;                                                                        \
        } else {                                                                             \
            ++failed;                                                                        \
            fprintf(stderr, "%s:%d: %s: %s \"%s\", wanted %s \"%s\"\n", __FILE__, __LINE__, #call, \
                    wst_status_name(got), message, wst_status_name(status_), words);         \
        }                                                                                    \
        wst_error_free(error);                                                               \
    } while (0)

#define INVALID(words, call) FAILS(WST_INVALID_ARGUMENT, words, call)

/* A call must succeed. */
#define OK(call)                                                                             \
    do {                                                                                     \
        wst_error *error = NULL;                                                             \
        wst_status got = (call);                                                             \
        if (got == WST_OK && !error) {                                                       \
            ++passed;                                                                        \
        } else {                                                                             \
            ++failed;                                                                        \
            fprintf(stderr, "%s:%d: %s: %s \"%s\"\n", __FILE__, __LINE__, #call, wst_status_name(got), \
                    wst_error_message(error));                                               \
        }                                                                                    \
        wst_error_free(error);                                                               \
    } while (0)

/* Opens a model that computes in the type that the environment names in COMPUTE_DTYPE, if it does. */
static inline wst_status open_in_type(const char *folder, wst_model **model, wst_error **error) {
    const char *type = getenv("COMPUTE_DTYPE");
    if (!type) return wst_model_open(folder, NULL, model, error);
    wst_model_options *options = wst_model_options_new();
    if (!options) return WST_OUT_OF_MEMORY;
    wst_status status = wst_model_options_set(options, "compute_dtype", type, error);
    if (status == WST_OK) status = wst_model_open(folder, options, model, error);
    wst_model_options_free(options);
    return status;
}

static inline int summary(const char *name) {
    printf("%s: %d passed, %d failed\n", name, passed, failed);
    return failed != 0;
}

/* Few steps and pixels: the tests look at the interface, not at the picture. */
static inline wst_generate_options *quick_options(const wst_model *model, uint64_t seed) {
    wst_generate_options *options = NULL;
    OK(wst_generate_options_new(model, &options, &error));
    OK(wst_generate_options_set_size(options, 128, 128, &error));
    OK(wst_generate_options_add_prompt(options, "a red apple", NULL, &error));
    OK(wst_generate_options_set_stage_c(options, 3, 2.0f, &error));
    OK(wst_generate_options_set_stage_b(options, 2, 1.0f, &error));
    OK(wst_generate_options_set_seed(options, seed, &error));
    return options;
}

static inline int same_image(const wst_image *a, const wst_image *b) {
    size_t bytes = (size_t)3 * wst_image_width(a) * wst_image_height(a);
    return a && b && wst_image_width(a) == wst_image_width(b) && wst_image_height(a) == wst_image_height(b)
           && memcmp(wst_image_data(a), wst_image_data(b), bytes) == 0;
}
#endif
