/* A prompt becomes a PNG file.
 *
 *     cargo build --release
 *     cc -Iinclude examples/c/minimal.c -Ltarget/release -lwuerstchen -o minimal
 *     ln -sf libwuerstchen.so target/release/libwuerstchen.so.0
 *     LD_LIBRARY_PATH=target/release ./minimal examples/models/emoji-v1 "a red apple" apple.png
 */
#include <stdio.h>
#include <stdlib.h>

#include "wuerstchen.h"

/* Every call that can fail ends here if it does. */
static int failed(const char *what, wst_error *error) {
    fprintf(stderr, "%s: %s: %s\n", what, wst_status_name(wst_error_status(error)), wst_error_message(error));
    wst_error_free(error);
    return EXIT_FAILURE;
}

static void show(const wst_progress *progress, void *user_data) {
    (void)user_data;
    fprintf(stderr, "\rstage %c: step %u of %u, %.1f s ", "ABC"[progress->stage], (unsigned)progress->step,
            (unsigned)progress->steps, progress->seconds);
}

/* The calls, one after the other; what they make is freed by main, whatever happened. */
static int make(const char *folder, const char *prompt, const char *path, wst_model **model,
                wst_generate_options **options, wst_image **image) {
    wst_error *error = NULL;
    if (wst_model_open(folder, NULL, model, &error) != WST_OK) return failed("opening the model", error);
    if (wst_generate_options_new(*model, options, &error) != WST_OK) return failed("making options", error);
    if (wst_generate_options_add_prompt(*options, prompt, NULL, &error) != WST_OK) return failed("the prompt", error);
    if (wst_generate_options_set_seed(*options, 7, &error) != WST_OK) return failed("the seed", error);
    if (wst_generate_options_set_progress(*options, show, NULL, &error) != WST_OK) return failed("progress", error);
    if (wst_generate(*model, *options, image, 1, &error) != WST_OK) return failed("generating", error);
    if (wst_image_write_png(*image, path, &error) != WST_OK) return failed("writing the picture", error);
    fprintf(stderr, "\n%s: %u x %u pixels\n", path, (unsigned)wst_image_width(*image),
            (unsigned)wst_image_height(*image));
    return EXIT_SUCCESS;
}

int main(int argc, char **argv) {
    wst_model *model = NULL;
    wst_generate_options *options = NULL;
    wst_image *image = NULL;
    int status;
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL_FOLDER PROMPT PICTURE.png\n", argv[0]);
        return EXIT_FAILURE;
    }
    status = make(argv[1], argv[2], argv[3], &model, &options, &image);
    wst_image_free(image);
    wst_generate_options_free(options);
    wst_model_free(model);
    return status;
}
