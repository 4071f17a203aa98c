/* Under failing_malloc.c: whichever large allocation fails, alone or with all after it, the call says
 * WST_OUT_OF_MEMORY or gives the right picture, and the next one works. */
#include <limits.h>
#include <stdlib.h>

#include "check.h"

void failing_malloc_arm(long n, long more);
long failing_malloc_seen(void);

static const char *png;

/* Opens, generates, writes and reads; `*model` is kept for the next time. */
static wst_status run(const char *folder, wst_model **model, wst_image **image) {
    wst_generate_options *o = NULL;
    wst_error *error = NULL;
    wst_status status = *model ? WST_OK : open_in_type(folder, model, &error);
    if (status == WST_OK) status = wst_generate_options_new(*model, &o, &error);
    if (status == WST_OK) status = wst_generate_options_set_size(o, 128, 128, &error);
    if (status == WST_OK) status = wst_generate_options_add_prompt(o, "a red apple", NULL, &error);
    if (status == WST_OK) status = wst_generate_options_set_stage_c(o, 1, 2.0f, &error);
    if (status == WST_OK) status = wst_generate_options_set_stage_b(o, 1, 2.0f, &error);
    if (status == WST_OK) status = wst_generate(*model, o, image, 1, &error);
    if (status == WST_OK) {
        /* Through a file and back. */
        wst_image *read = NULL;
        status = wst_image_write_png(*image, png, &error);
        if (status == WST_OK) status = wst_image_read(png, &read, &error);
        wst_image_free(status == WST_OK ? *image : NULL);
        if (status == WST_OK) *image = read;
    }
    if (status == WST_OUT_OF_MEMORY && error && !strstr(wst_error_message(error), "out of memory")) ++failed;
    wst_error_free(error);
    wst_generate_options_free(o);
    return status;
}

int main(int argc, char **argv) {
    if (argc < 3) return 2; /* MODEL PNG [RUNS] */
    png = argv[2];
    long runs = argc > 3 ? atol(argv[3]) : 1000000;
    wst_model *model = NULL;
    wst_image *right = NULL, *image = NULL;
    failing_malloc_arm(0, -1);
    CHECK(run(argv[1], &model, &right) == WST_OK);
    long count = failing_malloc_seen();
    wst_model_free(model);
    CHECK(count > 0);
    /* All of them if there are few, else spread over the run. */
    long step = count > runs ? (count + runs - 1) / runs : 1;
    long survived = 0;
    for (long turn = 0; turn <= (count - 1) / step * 2 + 1; ++turn) {
        long n = 1 + turn / 2 * step;
        model = NULL;
        image = NULL;
        failing_malloc_arm(n, turn % 2 ? LONG_MAX : 0);
        wst_status status = run(argv[1], &model, &image);
        int reached = failing_malloc_seen() >= n;
        failing_malloc_arm(-1, 0);
        if (status == WST_OK) {
            /* The pool gave back what it held, and the second try worked. */
            ++survived;
            CHECK(same_image(right, image));
        } else {
            CHECK(reached && status == WST_OUT_OF_MEMORY);
        }
        wst_image_free(image);
        image = NULL;
        CHECK(run(argv[1], &model, &image) == WST_OK);
        CHECK(same_image(right, image));
        wst_image_free(image);
        wst_model_free(model);
    }
    printf("memory: %ld large allocations, every %ld. failed, %ld runs survived\n", count, step, survived);
    wst_image_free(right);
    return summary("memory");
}
