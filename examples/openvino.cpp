// Judge a picture with an exported model in C++17, with OpenVINO and nothing else.
//
//     fettle export MODEL -o exported --format openvino
//     ./openvino exported/graph-*.xml exported/weights-*.bin part.ppm
//
// The picture is a binary PPM (P6, 8 bit) of the frame's size, see `frame` in manifest.json. There is no
// resizing, padding or region of interest here. Prints score and verdict. docs/export.md says how to build
// it. Whether parity passed, and the files' hashes, are in manifest.json and for the caller to check.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace {

struct Picture {
    std::size_t width = 0;
    std::size_t height = 0;
    std::vector<std::uint8_t> pixels;  // height x width x 3, RGB
};

std::size_t next_number(std::istream& file) {
    while ((file >> std::ws).peek() == '#') {  // a comment reaches to its line's end
        std::string comment;
        std::getline(file, comment);
    }
    std::size_t number = 0;
    if (!(file >> number) || number == 0 || number > 65535) {
        throw std::runtime_error("the picture's header is damaged");
    }
    return number;
}

Picture read_picture(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind(2, ' ');
    if (!file.read(kind.data(), 2) || kind != "P6") {
        throw std::runtime_error("'" + path + "' is no binary PPM (P6)");
    }
    Picture picture;
    picture.width = next_number(file);
    picture.height = next_number(file);
    if (next_number(file) != 255) {
        throw std::runtime_error("'" + path + "' does not have 8 bits a channel");
    }
    file.get();  // one blank before the pixels
    picture.pixels.resize(picture.height * picture.width * 3);
    const auto size = static_cast<std::streamsize>(picture.pixels.size());
    if (!file.read(reinterpret_cast<char*>(picture.pixels.data()), size)) {
        throw std::runtime_error("'" + path + "' ends too early");
    }
    return picture;
}

void judge(const std::string& graph, const std::string& weights, const std::string& path) {
    const Picture picture = read_picture(path);
    const std::size_t area = picture.height * picture.width;

    ov::Core core;
    const auto network = core.read_model(graph, weights);
    const ov::PartialShape taken = network->input("pictures").get_partial_shape();  // (any, 3, H, W)
    if (!taken.compatible(ov::Shape{1, 3, picture.height, picture.width})) {
        throw std::runtime_error("the picture does not have the frame's size, (batch, 3, height, width) = " +
                                 taken.to_string());
    }
    // Where a processor has bfloat16, OpenVINO takes it by itself, and moves scores past their thresholds.
    ov::CompiledModel model =
        core.compile_model(network, "CPU", ov::hint::inference_precision(ov::element::f32),
                           ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));

    ov::Tensor pictures(ov::element::f32, {1, 3, picture.height, picture.width});  // RGB in 0..1
    for (std::size_t i = 0; i < 3 * area; ++i) {
        pictures.data<float>()[i % 3 * area + i / 3] = static_cast<float>(picture.pixels[i]) / 255.0F;
    }
    ov::Tensor valid(ov::element::boolean, {1, 1, picture.height, picture.width});
    std::fill_n(valid.data<bool>(), area, true);  // false on padding and outside the region of interest

    ov::InferRequest request = model.create_infer_request();
    request.set_tensor("pictures", pictures);
    request.set_tensor("valid", valid);
    request.infer();

    const char* const verdicts[] = {"ok", "review", "reject"};
    const float score = request.get_tensor("score").data<float>()[0];
    std::cout << std::setprecision(9) << score << "  "
              << verdicts[request.get_tensor("verdict").data<std::int64_t>()[0]] << "\n";
}

}  // namespace

int main(int count, char** words) {
    if (count != 4) {
        std::cerr << "Usage: openvino GRAPH.xml WEIGHTS.bin PICTURE.ppm\n";
        return 2;
    }
    try {
        judge(words[1], words[2], words[3]);
    } catch (const std::exception& error) {
        std::cerr << "openvino: " << error.what() << ".\n";
        return 1;
    }
    return 0;
}
