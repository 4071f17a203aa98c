// The C++ face: values, moves, exceptions out of callbacks, jobs.
#include "wuerstchen.hpp"
#include "wuerstchen.hpp"

#include <atomic>
#include <type_traits>

#include "check.h"

template <class F> static wst_status status_of(F f) {
    try {
        f();
    } catch (const wst::Error &error) {
        return error.what()[0] ? error.status() : -1;
    }
    return WST_OK;
}

struct Mine : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class F> static bool throws_mine(F f) {
    try {
        f();
    } catch (const Mine &mine) {
        return std::string(mine.what()) == "enough";
    } catch (...) {
    }
    return false;
}

static wst::GenerateOptions quick(const wst::Model &model) {
    wst::GenerateOptions o(model);
    o.add_prompt("a red apple").set_stage_c(3, 2.0f).set_stage_b(2, 1.0f).set_seed(7);
    return o;
}

// v2: two folders joined, and latents as a start.
static void joined(const std::string &folder) {
    wst::ModelOptions options;
    options.set("decoder_path", folder + "/decoder");
    wst::Model model(folder + "/prior", options);
    CHECK(model.info().generation == 2 && model.info().latent_channels == 8);
    wst::GenerateOptions o = quick(model);
    o.set_size(128, 128);
    const auto plain = model.generate(o);
    CHECK(plain.size() == 1 && plain[0].width() == 128);

    const std::vector<std::string> texts{"a red apple"};
    const wst::Tensor text = model.encode_text(WST_STAGE_C, texts);
    const wst::Tensor latents = model.stage_c_sample(text, nullptr, nullptr, o);
    CHECK(latents.shape().size() == 4 && latents.shape()[1] == 8 && latents.shape()[2] == 3);
    // The latents of the same run: the same picture without Stage C, another with some of it.
    CHECK(same_image(model.generate(o.set_init_latents(latents, 0.0f))[0].get(), plain[0].get()));
    CHECK(!same_image(model.generate(o.set_init_latents(latents, 0.6f))[0].get(), plain[0].get()));
    const std::vector<std::int64_t> shape{1, 7, 3, 3};
    const std::vector<float> zeros(63);
    const wst::Tensor narrow(shape, wst::span<const float>(zeros));
    CHECK(status_of([&] { o.set_init_latents(narrow, 0.5f); }) == WST_INVALID_ARGUMENT);
    CHECK(status_of([&] { o.set_init_latents(latents, 2.0f); }) == WST_INVALID_ARGUMENT);
    CHECK(status_of([&] { o.set_stage_b_choice(WST_ARGMAX); }) == WST_UNSUPPORTED);

    // Image variation needs the decoder only.
    wst::Model decoder(folder + "/decoder");
    wst::GenerateOptions alone = quick(decoder);
    alone.set_size(128, 128);
    CHECK(status_of([&] { (void)decoder.generate(alone); }) == WST_UNSUPPORTED);
    CHECK(same_image(decoder.generate(alone.set_init_latents(latents, 0.0f))[0].get(), plain[0].get()));
    options.set("decoder_path", folder + "/prior");
    CHECK(status_of([&] { wst::Model(folder + "/prior", options); }) == WST_INVALID_ARGUMENT);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2; // MODEL V2
    static_assert(!std::is_copy_constructible_v<wst::Model> && std::is_nothrow_move_constructible_v<wst::Model>);
    static_assert(!std::is_copy_constructible_v<wst::Image> && !std::is_copy_constructible_v<wst::Job>);
    CHECK(wst::version() == WST_VERSION);
    CHECK(wst::Device::all().at(0).name == "cpu");
    CHECK(status_of([] { wst::Model("/nowhere"); }) == WST_IO);
    CHECK(status_of([] { wst::Model(std::string("a\0b", 3)); }) == WST_INVALID_ARGUMENT);

    const std::vector<std::uint8_t> rgb{1, 2, 3, 4, 5, 6};
    wst::Image small(2, 1, rgb);
    CHECK(small.data().size() == 6 && small.data()[5] == 6);
    CHECK(status_of([&] { wst::Image(2, 2, rgb); }) == WST_INVALID_ARGUMENT);
    CHECK(status_of([&] { wst::Image(1, 2, rgb); }) == WST_OK);
    CHECK(status_of([&] { wst::Image(0, 2, rgb); }) == WST_INVALID_ARGUMENT);
    const std::vector<std::int64_t> shape{2, 2};
    const std::vector<float> values{1, 2, 3, 4};
    wst::Tensor tensor(shape, wst::span<const float>(values));
    CHECK(tensor.dtype() == WST_F32 && tensor.shape()[1] == 2 && tensor.data<float>()[3] == 4);
    CHECK(status_of([&] { (void)tensor.data<std::uint8_t>(); }) == WST_INVALID_ARGUMENT);
    CHECK(status_of([&] { wst::Tensor(shape, wst::span<const float>(values.data(), 3)); }) == WST_INVALID_ARGUMENT);

    std::atomic<int> lines{0};
    wst::ModelOptions model_options;
    model_options.set_threads(2).set_log(WST_LOG_DEBUG, [&](wst_log_level, std::string_view) {
        ++lines;
        throw Mine("dropped");
    });
    wst::Model model(argv[1], model_options);
    CHECK(lines > 0);
    CHECK(model.info().generation == 1);
    CHECK(model.tokenize(WST_STAGE_C, "apple").dtype() == WST_I64);

    wst::GenerateOptions options = quick(model);
    const auto plain = model.generate(options);
    CHECK(plain.size() == 1 && plain[0].width() > 0);
    int calls = 0;
    options.set_preview(1).set_progress([&](const wst::Progress &p) { calls += p.steps > 0; });
    wst::GenerateOptions moved = std::move(options);
    CHECK(same_image(model.generate(moved)[0].get(), plain[0].get()) && calls >= 5);

    // A callback throws: the run is cancelled, the exception comes out, and the next run works.
    moved.set_progress([&](const wst::Progress &p) {
        if (p.step == 2) throw Mine("enough");
    });
    CHECK(throws_mine([&] { (void)model.generate(moved); }));
    CHECK(throws_mine([&] { (void)model.generate(moved); }));
    wst::CancelToken token;
    moved.set_cancel(token);
    CHECK(throws_mine([&] { (void)model.generate(moved); }));
    moved.set_progress(nullptr);
    CHECK(status_of([&] { (void)model.generate(moved); }) == WST_CANCELLED); // sticky
    token.reset();
    CHECK(same_image(model.generate(moved)[0].get(), plain[0].get()));

    {
        wst::Job job(model, moved);
        CHECK(job.wait());
        CHECK(job.poll().second);
        CHECK(same_image(job.images()[0].get(), plain[0].get()));
    }
    {
        wst::GenerateOptions throwing = quick(model);
        throwing.set_progress([](const wst::Progress &) { throw Mine("enough"); });
        wst::Job job(model, throwing);
        CHECK(throws_mine([&] { job.wait(); }));
        CHECK(status_of([&] { (void)job.images(); }) == WST_CANCELLED);
        wst::Job other(model, throwing);
        while (!other.poll().second) {
        }
        CHECK(throws_mine([&] { (void)other.images(); }));
        // A running job outlives its options and model, and is moved.
        throwing.set_progress([](const wst::Progress &) {});
        wst::Job long_job(model, throwing.set_stage_c(400, 1.0f));
        wst::Job taken = std::move(long_job);
        CHECK(!taken.wait(0));
        taken.cancel();
        CHECK(taken.wait());
    }
    joined(argv[2]);
    return summary("wrapper");
}
