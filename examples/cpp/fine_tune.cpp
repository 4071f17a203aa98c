// Trains Stage C of a model on a folder of pictures with captions (NAME.png beside NAME.txt), and writes the model:
//
//   fine_tune MODEL PICTURES OUT [STEPS]
//
// Interrupted, the same command goes on from the last checkpoint, OUT.checkpoint.

#include <wuerstchen.hpp>

#include <cstdlib>
#include <filesystem>
#include <iostream>

namespace {

constexpr std::uint64_t default_steps = 1000, save_every = 100;
constexpr std::uint32_t batch_size = 4;

void run(const std::string &folder, const std::string &pictures, const std::string &out, std::uint64_t steps) {
    const wst::Model model(folder);
    wst::TrainOptions options(WST_STAGE_C);
    options.set_learning_rate(1e-4f).set_warmup_steps(steps / 10).set_ema(0.99f, 0, 1);
    wst::Trainer trainer(model, options);

    wst::LoaderOptions data(pictures);
    data.set_side(model.info().default_width).set_batch_size(batch_size);
    wst::Loader loader(data);

    const std::string checkpoint = out + ".checkpoint";
    if (std::filesystem::exists(checkpoint)) {
        trainer.load(checkpoint);
        loader.resume(trainer);
    }
    while (trainer.progress().step < steps) {
        const auto metrics = trainer.step(loader);
        if (!metrics) break;  // a single pass has ended
        if (metrics->step % save_every == 0 || metrics->step == steps) {
            trainer.save(checkpoint);
            std::cout << "step " << metrics->step << ": loss " << metrics->loss << std::endl;
        }
    }
    trainer.export_model(out);
}

}  // namespace

int main(int count, char **words) {
    if (count != 4 && count != 5) {
        std::cerr << "usage: fine_tune MODEL PICTURES OUT [STEPS]\n";
        return 2;
    }
    try {
        run(words[1], words[2], words[3], count == 5 ? std::strtoull(words[4], nullptr, 10) : default_steps);
    } catch (const std::exception &error) {
        std::cerr << "fine_tune: " << error.what() << '\n';
        return 1;
    }
}
