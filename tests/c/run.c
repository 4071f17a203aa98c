/* Generating: progress, cancelling, jobs, threads, frees in any order, panics. */
#define _POSIX_C_SOURCE 200809L
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include "check.h"

enum { THREADS = 8 };

typedef struct {
    wst_cancel *cancel;
    wst_generate_options *options;
    wst_job *job;
    pthread_t caller;
    int calls, previews, foreign, busy;
    uint32_t cancel_at;
} heard_t;

static void on_progress(const wst_progress *p, void *user_data) {
    heard_t *heard = user_data;
    ++heard->calls;
    if (p->struct_size < sizeof *p || p->step > p->steps) heard->calls = -1000000;
    if (p->preview && wst_image_width(p->preview) > 0 && wst_image_data(p->preview)) ++heard->previews;
    if (!pthread_equal(pthread_self(), heard->caller)) ++heard->foreign;
    if (heard->options) heard->busy += wst_generate_options_set_seed(heard->options, 5, NULL) == WST_BUSY;
    if (heard->cancel_at && p->stage == WST_STAGE_C && p->step == heard->cancel_at) wst_cancel_request(heard->cancel);
}

static void progress_and_cancel(const wst_model *model) {
    heard_t heard = {.cancel = wst_cancel_new(), .caller = pthread_self()};
    wst_generate_options *o = quick_options(model, 7);
    wst_image *plain = NULL, *image = NULL;
    OK(wst_generate(model, o, &plain, 1, &error));
    heard.options = o;
    OK(wst_generate_options_set_progress(o, on_progress, &heard, &error));
    OK(wst_generate_options_set_preview(o, 1, &error));
    OK(wst_generate_options_set_cancel(o, heard.cancel, &error));
    OK(wst_generate(model, o, &image, 1, &error));
    CHECK(heard.calls >= 5 && heard.previews > 0 && heard.foreign == 0);
    CHECK(heard.busy == heard.calls); /* options in use are exclusive */
    CHECK(same_image(plain, image));
    wst_image_free(image);
    /* Mid-run. */
    heard.cancel_at = 1;
    image = (wst_image *)(uintptr_t)0x10;
    FAILS(WST_CANCELLED, "cancelled", wst_generate(model, o, &image, 1, &error));
    CHECK(image == NULL);
    /* Sticky: before the start too, and still after. */
    heard.cancel_at = 0;
    heard.calls = 0;
    FAILS(WST_CANCELLED, "cancelled", wst_generate(model, o, &image, 1, &error));
    CHECK(heard.calls == 0);
    wst_cancel_reset(heard.cancel);
    OK(wst_generate(model, o, &image, 1, &error));
    CHECK(same_image(plain, image));
    wst_image_free(image);
    /* The options keep the token. */
    wst_cancel_request(heard.cancel);
    wst_cancel_free(heard.cancel);
    FAILS(WST_CANCELLED, "cancelled", wst_generate(model, o, &image, 1, &error));
    wst_image_free(plain);
    wst_generate_options_free(o);
}

static void pause_ms(long ms) {
    struct timespec time = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&time, NULL);
}

static void job_callback(const wst_progress *p, void *user_data) {
    heard_t *heard = user_data;
    int32_t done;
    (void)p;
    ++heard->calls;
    if (!heard->job) return;
    heard->busy += wst_job_wait(heard->job, -1, &done, NULL) == WST_BUSY;
}

static void jobs(const wst_model *model) {
    wst_generate_options *o = quick_options(model, 7);
    wst_image *plain = NULL, *image = NULL;
    OK(wst_generate(model, o, &plain, 1, &error));
    OK(wst_generate_options_set_preview(o, 1, &error));
    wst_job *job = NULL;
    OK(wst_job_start(model, o, &job, &error));
    wst_progress p = {.struct_size = sizeof p};
    int32_t done = 0;
    double seconds = 0;
    for (int i = 0; i < 60000 && !done; ++i) {
        if (wst_job_poll(job, &p, &done, NULL) != WST_OK) ++failed;
        if (p.seconds < seconds || p.step > p.steps) ++failed;
        if (p.preview && wst_image_width(p.preview) == 0) ++failed;
        seconds = p.seconds;
        pause_ms(1);
    }
    CHECK(done == 1);
    p.struct_size = 0;
    INVALID("struct_size", wst_job_poll(job, &p, &done, &error));
    CHECK(done == 0);
    INVALID("timeout_seconds", wst_job_wait(job, NAN, &done, &error));
    OK(wst_job_wait(job, INFINITY, &done, &error));
    OK(wst_job_wait(job, 1e300, &done, &error));
    OK(wst_job_wait(job, 0, &done, &error));
    CHECK(done == 1);
    INVALID("image_count: expected 1", wst_job_images(job, &image, 0, &error));
    OK(wst_job_images(job, &image, 1, &error));
    CHECK(same_image(plain, image));
    wst_image_free(image);
    wst_job_cancel(job); /* too late: the images stay */
    OK(wst_job_images(job, &image, 1, &error));
    wst_image_free(image);
    wst_job_free(job);

    /* A long one: busy, cancelled, and its callback cannot wait for itself. */
    heard_t heard = {0};
    OK(wst_generate_options_set_stage_c(o, 500, 2.0f, &error));
    OK(wst_generate_options_set_progress(o, job_callback, &heard, &error));
    OK(wst_job_start(model, o, &job, &error));
    FAILS(WST_BUSY, "", wst_job_images(job, &image, 1, &error));
    CHECK(image == NULL);
    OK(wst_job_wait(job, 0.001, &done, &error));
    CHECK(done == 0);
    OK(wst_generate_options_set_seed(o, 8, &error)); /* the job has its own copy */
    __atomic_store_n(&heard.job, job, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 60000 && __atomic_load_n(&heard.busy, __ATOMIC_SEQ_CST) == 0; ++i) pause_ms(1);
    wst_job_cancel(job);
    OK(wst_job_wait(job, -1, &done, &error));
    CHECK(done == 1 && heard.calls > 0);
    FAILS(WST_CANCELLED, "cancelled", wst_job_images(job, &image, 1, &error));
    CHECK(heard.busy > 0);
    wst_job_free(job);
    wst_image_free(plain);
    wst_generate_options_free(o);
}

/* Frees in the most awkward order: everything but the job goes first. */
static void orders(const char *folder) {
    wst_model *model = NULL;
    OK(wst_model_open(folder, NULL, &model, &error));
    wst_generate_options *o = quick_options(model, 1);
    wst_job *job = NULL;
    wst_image *image = NULL;
    int32_t done = 0;
    OK(wst_job_start(model, o, &job, &error));
    wst_model_free(model);
    OK(wst_generate_options_set_seed(o, 3, &error)); /* options keep the model alive */
    wst_generate_options_free(o);
    OK(wst_job_wait(job, -1, &done, &error));
    OK(wst_job_images(job, &image, 1, &error));
    wst_job_free(job);
    CHECK(wst_image_width(image) > 0);
    wst_image_free(image);
}

/* Jobs are started, cancelled and freed at random moments. */
static void random_jobs(const wst_model *model, int count) {
    wst_generate_options *o = quick_options(model, 1);
    unsigned state = 1;
    int bad = 0;
    for (int i = 0; i < count; ++i) {
        wst_job *job = NULL;
        int32_t done;
        bad += wst_job_start(model, o, &job, NULL) != WST_OK;
        state = state * 1103515245u + 12345u;
        unsigned choice = state >> 16;
        if (choice % 3 == 0) {
            struct timespec time = {0, (long)(choice % 2000) * 1000L};
            nanosleep(&time, NULL);
        }
        if (choice % 5 == 0) bad += wst_job_wait(job, choice % 7 * 0.0005, &done, NULL) != WST_OK;
        if (choice % 2 == 0) wst_job_cancel(job);
        if (choice % 11 == 0) {
            wst_image *image = NULL;
            wst_status status = wst_job_images(job, &image, 1, NULL);
            bad += status != WST_OK && status != WST_BUSY && status != WST_CANCELLED;
            bad += (status == WST_OK) != (image != NULL);
            wst_image_free(image);
        }
        wst_job_free(job);
    }
    CHECK(bad == 0);
    wst_generate_options_free(o);
}

typedef struct {
    const wst_model *model;
    const wst_generate_options *shared;
    wst_image *expected, *got[2];
    wst_status status[2];
} thread_t;

static void *one_thread(void *argument) {
    thread_t *t = argument;
    for (int i = 0; i < 2; ++i) t->status[i] = wst_generate(t->model, t->shared, &t->got[i], 1, NULL);
    return NULL;
}

static void threads(const wst_model *model) {
    wst_generate_options *options[THREADS];
    thread_t args[THREADS];
    pthread_t ids[THREADS];
    for (int i = 0; i < THREADS; ++i) {
        options[i] = i % 2 ? options[i - 1] : quick_options(model, (uint64_t)i); /* shared in pairs */
        args[i] = (thread_t){.model = model, .shared = options[i]};
        OK(wst_generate(model, options[i], &args[i].expected, 1, &error));
    }
    for (int i = 0; i < THREADS; ++i) CHECK(pthread_create(&ids[i], NULL, one_thread, &args[i]) == 0);
    for (int i = 0; i < THREADS; ++i) {
        pthread_join(ids[i], NULL);
        for (int k = 0; k < 2; ++k) {
            CHECK(args[i].status[k] == WST_OK && same_image(args[i].expected, args[i].got[k]));
            wst_image_free(args[i].got[k]);
        }
        wst_image_free(args[i].expected);
        if (i % 2 == 0) continue;
        wst_generate_options_free(options[i]);
    }
}

typedef struct {
    const char *folder;
    const wst_image *plain;
    int rounding_before, rounding_after, same;
    wst_status status;
} odd_t;

/* A host thread with a small stack that rounds upwards: threads inherit the mode unless they reset it. */
static void *odd_thread(void *argument) {
    odd_t *odd = argument;
    wst_model *model = NULL;
    wst_generate_options *o = NULL;
    wst_image *image = NULL;
    odd->rounding_before = fesetround(FE_UPWARD) == 0 ? fegetround() : -1;
    odd->status = wst_model_open(odd->folder, NULL, &model, NULL);
    if (odd->status == WST_OK) {
        o = quick_options(model, 7);
        odd->status = wst_generate(model, o, &image, 1, NULL);
        odd->same = same_image(odd->plain, image);
    }
    odd->rounding_after = fegetround();
    wst_image_free(image);
    wst_generate_options_free(o);
    wst_model_free(model);
    return NULL;
}

static void odd_hosts(const char *folder, const wst_model *model) {
    wst_generate_options *o = quick_options(model, 7);
    wst_image *plain = NULL;
    OK(wst_generate(model, o, &plain, 1, &error));
    odd_t odd = {.folder = folder, .plain = plain};
    pthread_attr_t attributes;
    pthread_t id;
    pthread_attr_init(&attributes);
    CHECK(pthread_attr_setstacksize(&attributes, 256 << 10) == 0);
    CHECK(pthread_create(&id, &attributes, odd_thread, &odd) == 0);
    pthread_join(id, NULL);
    pthread_attr_destroy(&attributes);
    CHECK(odd.status == WST_OK);
    CHECK(odd.rounding_before == FE_UPWARD && odd.rounding_after == FE_UPWARD);
    CHECK(odd.same);
    wst_image_free(plain);
    wst_generate_options_free(o);
}

static wst_cancel *on_signal;
static volatile sig_atomic_t signals;

static void handler(int number) {
    (void)number;
    ++signals;
    wst_cancel_request(on_signal);
}

static void raise_once(const wst_progress *p, void *user_data) {
    int *raised = user_data;
    if (p->stage == WST_STAGE_C && !*raised) *raised = raise(SIGUSR1) == 0;
}

/* Cancelled by a signal handler; the host's handler stays. */
static void cancel_by_signal(const wst_model *model) {
    struct sigaction ours = {.sa_handler = handler}, before, after;
    int raised = 0;
    sigemptyset(&ours.sa_mask);
    on_signal = wst_cancel_new();
    CHECK(sigaction(SIGUSR1, &ours, &before) == 0);
    wst_generate_options *o = quick_options(model, 1);
    OK(wst_generate_options_set_cancel(o, on_signal, &error));
    OK(wst_generate_options_set_progress(o, raise_once, &raised, &error));
    wst_image *image = NULL;
    FAILS(WST_CANCELLED, "", wst_generate(model, o, &image, 1, &error));
    CHECK(signals == 1 && image == NULL);
    CHECK(sigaction(SIGUSR1, &before, &after) == 0 && after.sa_handler == handler);
    wst_generate_options_free(o);
    wst_cancel_free(on_signal);
}

/* A defect: WST_INTERNAL, and afterwards only free works. Its neighbours are well. */
static void panics(const char *folder, const wst_model *healthy) {
    const char *where[] = {"caller", "thread"};
    for (int i = 0; i < 2; ++i) {
        wst_model_options *m = wst_model_options_new();
        INVALID("test.panic", wst_model_options_set(m, "test.panic", "elsewhere", &error));
        FAILS(WST_INTERNAL, "asked for", wst_model_options_set(m, "test.panic", where[i], &error));
        FAILS(WST_INTERNAL, "only be freed", wst_model_options_set_threads(m, 1, &error));
        wst_model *model = NULL;
        FAILS(WST_INTERNAL, "only be freed", wst_model_open(folder, m, &model, &error));
        wst_model_options_free(m);
        wst_generate_options *o = quick_options(healthy, 1);
        FAILS(WST_INTERNAL, "asked for", wst_generate_options_set(o, "test.panic", where[i], &error));
        wst_image *image = NULL;
        FAILS(WST_INTERNAL, "only be freed", wst_generate(healthy, o, &image, 1, &error));
        wst_generate_options_free(o);
    }
    for (int job_too = 0; job_too < 2; ++job_too) {
        wst_model *model = NULL;
        wst_image *image = NULL;
        wst_job *job = NULL;
        int32_t done = 0;
        OK(wst_model_open(folder, NULL, &model, &error));
        wst_generate_options *o = quick_options(model, 1);
        OK(wst_generate_options_set(o, "test.panic", "generate", &error));
        if (job_too) {
            OK(wst_job_start(model, o, &job, &error));
            OK(wst_job_wait(job, -1, &done, &error));
            FAILS(WST_INTERNAL, "asked for", wst_job_images(job, &image, 1, &error));
            FAILS(WST_INTERNAL, "only be freed", wst_job_wait(job, -1, &done, &error));
            wst_job_free(job);
        } else {
            FAILS(WST_INTERNAL, "asked for", wst_generate(model, o, &image, 1, &error));
        }
        FAILS(WST_INTERNAL, "model", wst_generate(model, o, &image, 1, &error));
        wst_generate_options_free(o);
        wst_model_free(model);
    }
    wst_generate_options *o = quick_options(healthy, 1);
    wst_image *image = NULL;
    OK(wst_generate(healthy, o, &image, 1, &error));
    wst_image_free(image);
    wst_generate_options_free(o);
}

int main(int argc, char **argv) {
    if (argc < 2) return 2; /* MODEL [JOBS] */
    int job_count = argc > 2 ? atoi(argv[2]) : 1000;
    wst_model *model = NULL;
    OK(wst_model_open(argv[1], NULL, &model, &error));
    if (!model) return summary("run");
    wst_model_info_t info = {.struct_size = sizeof info};
    OK(wst_model_info(model, &info, &error));
    /* A call hears its reports beside the run; v2's small model is through before a cancel comes. */
    int slow = info.generation == 1;
    if (slow) progress_and_cancel(model);
    jobs(model);
    orders(argv[1]);
    random_jobs(model, job_count);
    if (job_count >= 100) threads(model);
    odd_hosts(argv[1], model);
    if (slow) cancel_by_signal(model);
    panics(argv[1], model);
    wst_model_free(model);
    return summary("run");
}
