/* Nothing on standard output and error, whatever happens: run.sh looks at both. The exit status is the result. */
#include "check.h"

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    wst_model *model = NULL;
    wst_image *image = NULL;
    wst_generate_options *o = NULL;
    wst_job *job = NULL;
    int32_t done = 0;
    int bad = wst_model_open("/nowhere", NULL, &model, NULL) != WST_IO;
    bad += open_in_type(argv[1], &model, NULL) != WST_OK;
    bad += wst_generate_options_new(model, &o, NULL) != WST_OK;
    bad += wst_generate_options_set_size(o, 128, 128, NULL) != WST_OK;
    bad += wst_generate_options_add_prompt(o, "apple", NULL, NULL) != WST_OK;
    bad += wst_generate_options_set_stage_c(o, 2, 1.0f, NULL) != WST_OK;
    bad += wst_generate_options_set_stage_b(o, 1, 1.0f, NULL) != WST_OK;
    bad += wst_generate(model, o, &image, 1, NULL) != WST_OK;
    wst_image_free(image);
    bad += wst_generate_options_set(o, "test.panic", "generate", NULL) != WST_OK;
    bad += wst_job_start(model, o, &job, NULL) != WST_OK;
    bad += wst_job_wait(job, -1, &done, NULL) != WST_OK;
    bad += wst_job_images(job, &image, 1, NULL) != WST_INTERNAL;
    wst_job_free(job);
    bad += wst_generate_options_set(o, "test.panic", "thread", NULL) != WST_INTERNAL;
    wst_generate_options_free(o);
    wst_model_options *m = wst_model_options_new();
    bad += wst_model_options_set(m, "test.panic", "caller", NULL) != WST_INTERNAL;
    wst_model_options_free(m);
    wst_model_free(model);
    (void)passed;
    (void)failed;
    return bad;
}
