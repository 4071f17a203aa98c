// Draws pictures of prompts, or reconstructs a picture through the latents of Stage B.
//
//   build/generate --out apple.png "a red apple"
//   build/generate --reconstruct apple.png --out again.png

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <wuerstchen.hpp>

namespace {

const char usage[] =
    "usage: generate [options] PROMPT...\n"
    "  --model FOLDER       the model (examples/models/emoji-v1)\n"
    "  --decoder FOLDER     its other half, where --model is the prior of v2\n"
    "  --out FILE.png       what to write (out.png); several pictures become FILE-1.png, …, and\n"
    "                       FILE.png then shows all of them\n"
    "  --negative TEXT      what the pictures should not show\n"
    "  --size WxH           in pixels (the model's own size)\n"
    "  --steps N            steps of Stage C (the model's own number)\n"
    "  --guidance W         weight of the prompt in Stage C (the model's own)\n"
    "  --seed N             the noise of the first picture (0)\n"
    "  --images N           pictures of each prompt (1)\n"
    "  --device NAME        auto, cpu, cuda, cuda:1 (auto)\n"
    "  --threads N          CPU threads (one per core)\n"
    "  --reconstruct FILE   encode a picture and decode it again, instead of a prompt\n";

struct Arguments {
    std::string model = "examples/models/emoji-v1", out = "out.png", device = "auto", decoder, reconstruct;
    std::string negative;
    bool has_negative = false;
    uint32_t threads = 0;
    std::vector<std::string> prompts;
    // Names and values for GenerateOptions::set: what is not here stays as the model recommends it.
    std::vector<std::pair<std::string, std::string>> settings;
};

Arguments parse(int argc, char **argv) {
    Arguments a;
    for (int i = 1; i < argc; i++) {
        const std::string word = argv[i];
        if (word.compare(0, 2, "--") != 0) {
            a.prompts.push_back(word);
            continue;
        }
        if (word == "--help" || i + 1 == argc) throw std::invalid_argument(usage);
        const std::string value = argv[++i];
        if (word == "--model") a.model = value;
        else if (word == "--decoder") a.decoder = value;
        else if (word == "--out") a.out = value;
        else if (word == "--device") a.device = value;
        else if (word == "--threads") a.threads = static_cast<uint32_t>(std::stoul(value));
        else if (word == "--negative") a.negative = value, a.has_negative = true;
        else if (word == "--steps") a.settings.emplace_back("stage_c_steps", value);
        else if (word == "--guidance") a.settings.emplace_back("stage_c_guidance", value);
        else if (word == "--seed") a.settings.emplace_back("seed", value);
        else if (word == "--images") a.settings.emplace_back("images_per_prompt", value);
        else if (word == "--reconstruct") a.reconstruct = value;
        else if (word == "--size") {
            const size_t x = value.find('x');
            if (x == std::string::npos) throw std::invalid_argument("--size: expected WxH, found " + value);
            a.settings.emplace_back("width", value.substr(0, x));
            a.settings.emplace_back("height", value.substr(x + 1));
        } else throw std::invalid_argument(word + " is not known\n" + usage);
    }
    if (a.prompts.empty() && a.reconstruct.empty()) throw std::invalid_argument(usage);
    return a;
}

// One line such as "C [#####.....] 5/10  0.4 s", and nothing where no one would see it.
void draw_bar(const wst::Progress &p) {
    const uint32_t width = 30;
    const uint32_t done = p.steps ? width * p.step / p.steps : 0;
    const std::string bar = std::string(done, '#') + std::string(width - done, '.');
    std::fprintf(stderr, "\r\033[K%c [%s] %u/%u  %.1f s", "ABC"[p.stage], bar.c_str(), p.step, p.steps, p.seconds);
}

// "pictures/apple.png", 2 -> "pictures/apple-2.png"
std::string numbered(const std::string &path, size_t number) {
    const size_t dot = path.rfind('.');
    const size_t slash = path.rfind('/');
    const bool has_extension = dot != std::string::npos && (slash == std::string::npos || dot > slash);
    const size_t end = has_extension ? dot : path.size();
    return path.substr(0, end) + "-" + std::to_string(number) + path.substr(end);
}

// All pictures in a grid as square as can be, on white, with a gap between them.
wst::Image contact_sheet(const std::vector<wst::Image> &images) {
    const uint32_t gap = 8;
    const auto columns = static_cast<uint32_t>(std::ceil(std::sqrt(static_cast<double>(images.size()))));
    const auto rows = (static_cast<uint32_t>(images.size()) + columns - 1) / columns;
    const uint32_t w = images[0].width(), h = images[0].height();
    const uint32_t width = columns * (w + gap) - gap, height = rows * (h + gap) - gap;
    std::vector<uint8_t> sheet(size_t{3} * width * height, 0xff);
    for (size_t i = 0; i < images.size(); i++) {
        const size_t left = i % columns * (w + gap), top = i / columns * (h + gap);
        const uint8_t *rgb = images[i].data().data();
        for (size_t y = 0; y < h; y++)
            std::memcpy(&sheet[3 * ((top + y) * width + left)], rgb + 3 * y * w, size_t{3} * w);
    }
    return wst::Image(width, height, sheet);
}

void write(const wst::Image &image, const std::string &path) {
    image.write_png(path);
    std::printf("%s\n", path.c_str());
}

wst::GenerateOptions options_for(const wst::Model &model, const Arguments &a) {
    wst::GenerateOptions options(model);
    for (const auto &setting : a.settings) options.set(setting.first, setting.second);
    if (isatty(STDERR_FILENO)) options.set_progress(draw_bar);
    return options;
}

void generate(const wst::Model &model, const Arguments &a) {
    wst::GenerateOptions options = options_for(model, a);
    for (const std::string &prompt : a.prompts) {
        if (a.has_negative) options.add_prompt(prompt, a.negative);
        else options.add_prompt(prompt);
    }
    const std::vector<wst::Image> images = model.generate(options);
    if (isatty(STDERR_FILENO)) std::fprintf(stderr, "\r\033[K");
    if (images.size() == 1) {
        write(images[0], a.out);
        return;
    }
    for (size_t i = 0; i < images.size(); i++) write(images[i], numbered(a.out, i + 1));
    write(contact_sheet(images), a.out);
}

// Float pixels [1, 3, H, W] in 0..1 to a picture.
wst::Image image_of(const wst::Tensor &pixels) {
    const auto shape = pixels.shape();
    const auto height = static_cast<uint32_t>(shape[2]), width = static_cast<uint32_t>(shape[3]);
    const auto planes = pixels.data<float>();
    const size_t count = size_t{width} * height;
    std::vector<uint8_t> rgb(3 * count);
    for (size_t i = 0; i < count; i++)
        for (size_t c = 0; c < 3; c++)
            rgb[3 * i + c] = static_cast<uint8_t>(std::lround(255 * std::clamp(planes[c * count + i], 0.0f, 1.0f)));
    return wst::Image(width, height, rgb);
}

// Picture -> latents (image encoder) -> tokens (Stage B) -> picture (Stage A): the paper's Figure 4.
void reconstruct(const wst::Model &model, const Arguments &a) {
    const wst::Image picture = wst::Image::read(a.reconstruct);
    const wst::GenerateOptions options = options_for(model, a);
    const wst::Tensor latents = model.encode_image({&picture, 1});
    const std::string prompt = a.prompts.empty() ? "" : a.prompts[0];
    const wst::Tensor text = model.encode_text(WST_STAGE_B, {&prompt, 1});
    const wst::Tensor tokens = model.stage_b_sample(latents, text, nullptr, options);
    if (isatty(STDERR_FILENO)) std::fprintf(stderr, "\r\033[K");
    write(image_of(model.stage_a_decode(tokens)), a.out);
}

}  // namespace

int main(int argc, char **argv) {
    try {
        const Arguments a = parse(argc, argv);
        wst::ModelOptions model_options;
        model_options.set_device(a.device);
        model_options.set_threads(a.threads);
        model_options.set("decoder_path", a.decoder);
        const wst::Model model(a.model, model_options);
        if (a.reconstruct.empty()) generate(model, a);
        else reconstruct(model, a);
        return EXIT_SUCCESS;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "generate: %s\n", error.what());
        return EXIT_FAILURE;
    }
}
