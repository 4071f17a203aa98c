// Training by the C++ face: steps, samples, loaders, checkpoints, exceptions out of sums.
#include "wuerstchen.hpp"

#include <filesystem>
#include <fstream>
#include <thread>
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

static std::vector<wst::Image> pictures() {
    std::vector<wst::Image> images;
    for (unsigned seed = 0; seed < 3; ++seed) {
        std::vector<std::uint8_t> rgb(3 * 64 * 64);
        for (std::size_t i = 0; i < rgb.size(); ++i) rgb[i] = static_cast<std::uint8_t>(i * (seed + 3) / 7);
        images.emplace_back(64, 64, rgb);
    }
    return images;
}

static wst::TrainOptions quick(wst_stage stage) {
    wst::TrainOptions options(stage);
    options.set_learning_rate(1e-3f).set_betas(0.9f, 0.95f).set_weight_decay(0.0f).set_warmup_steps(0).set_grad_clip(1.0f);
    options.set_grad_accumulation(1).set_ema(0.5f, 2, 1).set_text_dropout(0.1f).set_seed(5).set_compute_dtype(WST_F32);
    options.set("adam_eps", "1e-8");
    return options;
}

static bool same(const wst_train_metrics &a, const wst_train_metrics &b) { return memcmp(&a, &b, sizeof a) == 0; }

static void steps(const wst::Model &model, const std::string &scratch) {
    const auto images = pictures();
    const std::vector<std::string> captions{"a red apple", "", "a dog"};
    wst::Trainer trainer(model, quick(WST_STAGE_C)), other(model, quick(WST_STAGE_C));
    wst::Samples samples = other.prepare(images, captions);
    CHECK(samples.size() == 3);
    const auto first = trainer.step(images, captions);
    CHECK(first.step == 1 && first.loss > 0 && same(first, other.step(samples)));
    const std::vector<std::size_t> indices{2, 0};
    CHECK(other.step(samples, indices).step == 2);
    other.recaption(samples, 1, "a pear");
    samples.append(samples);
    CHECK(samples.size() == 6 && other.progress().samples == 5);
    CHECK(status_of([&] { trainer.step(images, std::vector<std::string>{"one"}); }) == WST_INVALID_ARGUMENT);
    CHECK(status_of([&] { trainer.step(images, std::vector<std::string>{"a", std::string("b\0c", 3), "d"}); }) == WST_INVALID_ARGUMENT);
    CHECK(status_of([&] { wst::TrainOptions(9); }) == WST_INVALID_ARGUMENT);

    trainer.save(scratch + "/checkpoint");
    other.load(scratch + "/checkpoint");
    wst::Trainer moved = std::move(trainer);
    CHECK(same(moved.step(images, captions), other.step(images, captions)));
    moved.export_model(scratch + "/exported");
    CHECK(wst::Model(scratch + "/exported").info().generation == 1);
}

static void folders(const wst::Model &model, const std::string &base, const std::string &scratch) {
    const auto images = pictures();
    const std::vector<std::string> captions{"a red apple", "", "a dog"};
    wst::Trainer trainer(model, quick(WST_STAGE_C).set("lora_rank", "2"));
    trainer.step(images, captions);
    const std::string adapter = scratch + "/adapter.safetensors", merged = scratch + "/merged", fresh = scratch + "/fresh";
    trainer.save_adapter(adapter);
    wst::merge_adapter(base, adapter, 0.5f, merged);
    wst::ModelOptions options;
    options.add_lora(adapter, 0.5f);
    CHECK(wst::Model(merged).info().stage_c_parameters == wst::Model(base, options).info().stage_c_parameters);
    wst::create_model(base, fresh, 1);
    wst::train_tokenizer(captions, 600, fresh + "/tokenizer");
    CHECK(wst::Model(fresh).info().generation == 1);
    CHECK(status_of([&] { wst::create_model("/nowhere", fresh, 1); }) == WST_IO);
}

static void sums(const wst::Model &model) {
    const auto images = pictures();
    const std::vector<std::string> captions{"a red apple", "", "a dog"};
    wst::Trainer trainer(model, quick(WST_STAGE_B));
    const auto caller = std::this_thread::get_id();
    std::size_t floats = 0, doubles = 0, foreign = 0;
    bool throws = false;
    trainer.set_reduce(0, 2, [&](wst::span<float> f, wst::span<double> d) {
        if (throws) throw Mine("enough");
        foreign += std::this_thread::get_id() != caller;
        for (float &value : f) value *= 2;
        for (double &value : d) value *= 2;
        floats += f.size();
        doubles += d.size();
    });
    CHECK(trainer.step(images, captions).step == 1 && floats > 1000 && doubles > 0 && foreign == 0);
    throws = true;
    bool mine = false;
    try {
        trainer.step(images, captions);
    } catch (const Mine &) {
        mine = true;
    }
    CHECK(mine && trainer.progress().step == 1);
    trainer.set_reduce(0, 1, nullptr);
    CHECK(trainer.step(images, captions).step == 2);

    wst::CancelToken token;
    wst::Trainer cancelled(model, quick(WST_STAGE_C).set_cancel(token));
    token.request();
    CHECK(status_of([&] { cancelled.step(images, captions); }) == WST_CANCELLED);
}

static void loaders(const wst::Model &model, const std::string &scratch) {
    const std::string folder = scratch + "/data";
    std::filesystem::create_directory(folder);
    int number = 0;
    for (const wst::Image &image : pictures()) {
        const std::string stem = folder + "/" + std::to_string(number++);
        image.write_png(stem + ".png");
        std::ofstream(stem + ".txt") << "a picture";
    }
    std::ofstream(folder + "/broken.png") << "no picture";
    std::ofstream(folder + "/broken.txt") << "text";
    int skips = 0;
    wst::LoaderOptions options(folder);
    options.set_side(64).set_crop(WST_CROP_CENTRE).set_flip(0.5f).set_batch_size(2).set_shuffle(100).set_seed(1);
    options.set_passes(WST_PASSES_ONE).set_threads(1).set_rank(0, 1).set("prefetch", "1");
    options.set_log([&](wst_log_level, std::string_view line) {
        skips += line.find("broken.png") != line.npos;
        throw Mine("dropped");
    });
    wst::Trainer trainer(model, quick(WST_STAGE_C)), other(model, quick(WST_STAGE_C));
    wst::Loader loader(options), by_hand(options);
    std::size_t seen = 0;
    for (int i = 0; i < 2; ++i) {
        const auto metrics = trainer.step(loader);
        const auto batch = by_hand.next();
        CHECK(metrics && batch && same(*metrics, other.step(*batch)));
        if (batch) seen += batch->size();
        if (batch) CHECK(std::string_view(batch->captions()[0]) == "a picture" && std::string_view(batch->keys()[0]).size() == 5);
        if (i == 0) other.follow(by_hand);
    }
    CHECK(seen == 3 && !trainer.step(loader) && !by_hand.next() && skips == 2);
    CHECK(loader.info().unreadable == 1);
    other.save(scratch + "/followed");
    trainer.load(scratch + "/followed");
    loader.resume(trainer);
    const auto rest = loader.next();
    CHECK(rest && rest->size() == 1);
    if (rest) CHECK(other.prepare(*rest).size() == 1);
    CHECK(status_of([&] { wst::Loader(wst::LoaderOptions("/no/such/folder")); }) == WST_IO);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2; // MODEL SCRATCH
    static_assert(!std::is_copy_constructible_v<wst::Trainer> && std::is_nothrow_move_constructible_v<wst::Trainer>);
    static_assert(!std::is_copy_constructible_v<wst::Loader> && !std::is_copy_constructible_v<wst::Samples>);
    try {
        const wst::Model model(argv[1]);
        steps(model, argv[2]);
        folders(model, argv[1], argv[2]);
        sums(model);
        loaders(model, argv[2]);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        CHECK(!"an exception");
    }
    return summary("train_wrapper");
}
