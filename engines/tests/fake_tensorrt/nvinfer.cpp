// A libnvinfer.so.11 for tests, of TensorRT's own virtual classes: it takes engine files of a text, and runs them on the CPU over
// memory of the fake driver. stubs.h, made by the test from TensorRT's headers, ends the process in every function that is not here.
//
// An engine file: words, each with its numbers.
//   fake-engine                          first
//   vocab V  batch B  capacity C  piece P  context T
//   logits 0|1                           f32 or f16
//   latent LAYER WIDTH                   a cache in place
//   grows LAYER HEADS WIDTH WINDOW       keys and values that grow; window 0: all tokens
//
// What it computes is small integers: a token writes `row = (3 id + 5 position + 7 layer) mod 97` into its rows, and
// logits[j] = (sum over layers and rows that it sees of row * (distance mod 7 + 1) + 31 j) mod 251. So a row in another slot, a
// stale length, a wrong position or a cache that was not updated changes the numbers.
//
// MLAC_FAKE_VERSION  TensorRT's version number
// MLAC_FAKE_STOP     number of cached tokens at which a run fails
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "NvInfer.h"
#include "stubs.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace nvinfer1;

namespace {
using Shape = std::vector<int64_t>;

long setting(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atol(value);
}

bool on_device(const void* address, size_t bytes) {
  static auto holds = [] {
    void* driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<int (*)(uint64_t, size_t)>(driver == nullptr ? nullptr : dlsym(driver, "fakeHolds"));
  }();
  return holds != nullptr && holds(reinterpret_cast<uint64_t>(address), bytes) == 1;
}

// Integers below 2048 are exact.
uint16_t half(int value) {
  if (value == 0) return 0;
  int exponent = 31 - __builtin_clz(value);
  return static_cast<uint16_t>((exponent + 15) << 10 | ((value << (10 - exponent)) & 0x3ff));
}

struct Layer {
  int number, heads, width, window;
  bool latent;
};

struct Tensor {
  std::string name;
  DataType type;
  bool output;
  // By profile; of an input.
  std::vector<Shape> min, opt, max;
};

struct Model {
  int vocab = 0, batch = 1, capacity = 0, piece = 1, context = 0, f16 = 1;
  std::vector<Layer> layers;
  std::vector<Tensor> tensors;

  bool read(const void* bytes, size_t size) {
    std::istringstream text(std::string(static_cast<const char*>(bytes), size));
    std::string word;
    if (!(text >> word) || word != "fake-engine") return false;
    while (text >> word) {
      Layer layer{};
      if (word == "vocab") text >> vocab;
      else if (word == "batch") text >> batch;
      else if (word == "capacity") text >> capacity;
      else if (word == "piece") text >> piece;
      else if (word == "context") text >> context;
      else if (word == "logits") text >> f16;
      else if (word == "latent") {
        layer.latent = true;
        text >> layer.number >> layer.width;
        layers.push_back(layer);
      } else if (word == "grows") {
        text >> layer.number >> layer.heads >> layer.width >> layer.window;
        layers.push_back(layer);
      } else return false;
      if (!text) return false;
    }
    describe();
    return true;
  }

  // An input's shapes in the profiles of pieces and of single tokens.
  void input(const std::string& name, DataType type, const std::vector<Shape>& least, const std::vector<Shape>& usual,
             const std::vector<Shape>& most) {
    tensors.push_back({name, type, false, least, usual, most});
  }
  void output(const std::string& name, DataType type) { tensors.push_back({name, type, true, {}, {}, {}}); }

  void describe() {
    const int64_t b = batch, p = piece, c = context;
    for (const char* name : {"input_ids", "position_ids"}) input(name, DataType::kINT64, {{1, p}, {1, 1}}, {{1, p}, {1, 1}}, {{b, p}, {b, 1}});
    input("past_lengths", DataType::kINT32, {{1}, {1}}, {{1}, {1}}, {{b}, {b}});
    output("logits", f16 ? DataType::kHALF : DataType::kFLOAT);
    for (const Layer& layer : layers) {
      const std::string number = std::to_string(layer.number);
      if (layer.latent) {
        const Shape one{1, capacity, layer.width}, all{b, capacity, layer.width};
        input("past_latent." + number, DataType::kHALF, {one, one}, {one, one}, {all, all});
        output("present_latent." + number, DataType::kHALF);
        continue;
      }
      auto rows = [&](int64_t past) { return layer.window != 0 && past > layer.window ? layer.window : past; };
      auto shape = [&](int64_t n, int64_t past) { return Shape{n, layer.heads, rows(past), layer.width}; };
      for (const char* part : {"key", "value"}) {
        input("past_key_values." + number + "." + part, DataType::kHALF, {shape(1, 0), shape(1, 0)}, {shape(1, 0), shape(1, c / 2)},
              {shape(b, c - p), shape(b, c - 1)});
        output("present." + number + "." + part, DataType::kHALF);
      }
    }
  }

  const Tensor* find(const char* name) const {
    for (const Tensor& tensor : tensors)
      if (tensor.name == name) return &tensor;
    return nullptr;
  }
};

Dims dims(const Shape& shape) {
  Dims result{};
  result.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) result.d[i] = shape[i];
  return result;
}

class Context final : public ContextStubs {
 public:
  Context(const Model& model, ILogger& logger) : model(model), logger(logger) {}

  bool setOptimizationProfileAsync(int32_t number, cudaStream_t) noexcept override {
    profile = number;
    return number == 0 || number == 1;
  }
  bool setInputShape(const char* name, const Dims& given) noexcept override {
    const Tensor* tensor = model.find(name);
    if (tensor == nullptr || tensor->output) return refuse("no such input");
    const Shape &least = tensor->min[profile], &most = tensor->max[profile];
    if (given.nbDims != static_cast<int32_t>(most.size())) return refuse("another rank");
    for (int i = 0; i < given.nbDims; ++i)
      if (given.d[i] < least[i] || given.d[i] > most[i]) return refuse("outside of the profile");
    shapes[name] = Shape(given.d, given.d + given.nbDims);
    return true;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    const Tensor* tensor = model.find(name);
    Dims none{};
    none.nbDims = -1;
    if (tensor == nullptr) return none;
    if (!tensor->output) return shapes.count(name) ? dims(shapes.at(name)) : none;
    const Shape ids = shape("input_ids");
    if (tensor->name == "logits") return dims({ids[0], ids[1], model.vocab});
    for (const Layer& layer : model.layers) {
      const std::string number = std::to_string(layer.number);
      if (layer.latent && tensor->name == "present_latent." + number) return dims(shape("past_latent." + number));
      const std::string present = "present." + number + ".";
      if (layer.latent || tensor->name.compare(0, present.size(), present) != 0) continue;
      Shape kept = shape("past_key_values." + number + "." + tensor->name.substr(present.size()));
      if (kept.size() != 4) return none;
      kept[2] += ids[1];
      if (layer.window != 0 && kept[2] > layer.window) kept[2] = layer.window;
      return dims(kept);
    }
    return none;
  }
  bool setTensorAddress(const char* name, void* data) noexcept override {
    if (model.find(name) == nullptr) return refuse("no such tensor");
    addresses[name] = data;
    return true;
  }
  bool enqueueV3(cudaStream_t) noexcept override {
    const Shape ids = shape("input_ids");
    const int batch = static_cast<int>(ids[0]), seq = static_cast<int>(ids[1]);
    for (const Tensor& tensor : model.tensors) {
      const Dims have = getTensorShape(tensor.name.c_str());
      size_t bytes = tensor.type == DataType::kINT64 ? 8 : tensor.type == DataType::kHALF ? 2 : 4;
      for (int i = 0; i < have.nbDims; ++i) bytes *= static_cast<size_t>(have.d[i] < 0 ? 0 : have.d[i]);
      if (have.nbDims < 0 || have.d[0] != batch) return refuse("a shape is missing or of another batch: " + tensor.name);
      if (addresses.count(tensor.name) == 0 || !on_device(addresses.at(tensor.name), bytes))
        return refuse("too little device memory: " + tensor.name);
    }
    std::vector<int64_t> sums(static_cast<size_t>(batch) * seq, 0);
    const auto* lengths = at<int32_t>("past_lengths");
    if (lengths[0] == setting("MLAC_FAKE_STOP", -1)) return refuse("told to fail");
    for (const Layer& layer : model.layers) {
      if (layer.latent ? !latent(layer, batch, seq, sums) : !grows(layer, batch, seq, sums)) return false;
    }
    for (int i = 0; i < batch * seq; ++i) {
      for (int j = 0; j < model.vocab; ++j) {
        const int value = static_cast<int>((sums[i] + 31 * j) % 251);
        const size_t place = static_cast<size_t>(i) * model.vocab + j;
        if (model.f16) at<uint16_t>("logits")[place] = half(value);
        else at<float>("logits")[place] = static_cast<float>(value);
      }
    }
    return true;
  }

 private:
  const Model& model;
  ILogger& logger;
  int profile = -1;
  std::map<std::string, Shape> shapes;
  std::map<std::string, void*> addresses;

  bool refuse(const std::string& why) {
    logger.log(ILogger::Severity::kERROR, ("fake: " + why).c_str());
    return false;
  }
  Shape shape(const std::string& name) const { return shapes.count(name) ? shapes.at(name) : Shape(2, -1); }
  template <typename T>
  T* at(const std::string& name) {
    return static_cast<T*>(addresses.at(name));
  }
  // The row of new token `t` of sequence `b`.
  uint16_t row(const Layer& layer, int b, int t, int seq) {
    const int64_t id = at<int64_t>("input_ids")[b * seq + t], position = at<int64_t>("position_ids")[b * seq + t];
    return static_cast<uint16_t>((3 * id + 5 * position + 7 * layer.number) % 97);
  }

  // Stores into cache_out and then reads it, as the plugin does with one memory for both.
  bool latent(const Layer& layer, int batch, int seq, std::vector<int64_t>& sums) {
    auto* rows = at<uint16_t>("present_latent." + std::to_string(layer.number));
    if (rows != at<uint16_t>("past_latent." + std::to_string(layer.number))) return refuse("the cache is not in place");
    const auto* lengths = at<int32_t>("past_lengths");
    for (int b = 0; b < batch; ++b) {
      if (lengths[b] < 0 || lengths[b] + seq > model.capacity) return refuse("no room in the cache");
      uint16_t* own = rows + static_cast<size_t>(b) * model.capacity * layer.width;
      for (int t = 0; t < seq; ++t)
        for (int i = 0; i < layer.width; ++i) own[(lengths[b] + t) * layer.width + i] = row(layer, b, t, seq);
      for (int t = 0; t < seq; ++t)
        for (int p = 0; p <= lengths[b] + t; ++p)
          sums[b * seq + t] += own[p * layer.width + layer.width - 1] * ((lengths[b] + t - p) % 7 + 1);
    }
    return true;
  }

  // Cached rows in, the last of cached and new rows out.
  bool grows(const Layer& layer, int batch, int seq, std::vector<int64_t>& sums) {
    for (const char* part : {"key", "value"}) {
      const std::string number = std::to_string(layer.number);
      const std::string from = "past_key_values." + number + "." + part, to = "present." + number + "." + part;
      const int cached = static_cast<int>(shape(from)[2]), total = cached + seq;
      const int kept = static_cast<int>(getTensorShape(to.c_str()).d[2]);
      const auto* past = at<uint16_t>(from);
      auto* present = at<uint16_t>(to);
      if (past == present) return refuse("a cache that grows is read and written in one place");
      for (int b = 0; b < batch; ++b) {
        for (int h = 0; h < layer.heads; ++h) {
          const int head = b * layer.heads + h;
          std::vector<uint16_t> all;
          for (int p = 0; p < cached; ++p) all.push_back(past[(head * cached + p) * layer.width]);
          for (int t = 0; t < seq; ++t) all.push_back(row(layer, b, t, seq));
          for (int p = 0; p < kept; ++p)
            for (int i = 0; i < layer.width; ++i) present[(head * kept + p) * layer.width + i] = all[total - kept + p];
          for (int t = 0; t < seq; ++t)
            for (int p = 0; p <= cached + t; ++p) {
              const int distance = cached + t - p;
              if (layer.window == 0 || distance < layer.window) sums[b * seq + t] += all[p] * (distance % 7 + 1);
            }
        }
      }
    }
    return true;
  }
};

class PublicContext final : public IExecutionContext {
 public:
  explicit PublicContext(Context* made) : owned(made) { mImpl = made; }

 private:
  std::unique_ptr<Context> owned;
};

class Engine final : public EngineStubs {
 public:
  explicit Engine(ILogger& logger) : logger(logger) {}
  Model model;

  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
    return new PublicContext(new Context(model, logger));
  }
  int32_t getNbOptimizationProfiles() const noexcept override { return 2; }
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(model.tensors.size()); }
  const char* getIOTensorName(int32_t index) const noexcept override { return model.tensors[index].name.c_str(); }
  DataType getTensorDataType(const char* name) const noexcept override { return model.find(name)->type; }
  TensorLocation getTensorLocation(const char*) const noexcept override { return TensorLocation::kDEVICE; }
  TensorFormat getTensorFormat(const char*) const noexcept override { return TensorFormat::kLINEAR; }
  TensorIOMode getTensorIOMode(const char* name) const noexcept override {
    return model.find(name)->output ? TensorIOMode::kOUTPUT : TensorIOMode::kINPUT;
  }
  Dims getTensorShape(const char* name) const noexcept override {
    const Tensor* tensor = model.find(name);
    if (!tensor->output) return dims(Shape(tensor->max[0].size(), -1));
    if (tensor->name == "logits") return dims({-1, -1, model.vocab});
    return dims(Shape(tensor->name.rfind("present.", 0) == 0 ? 4 : 3, -1));
  }
  Dims getProfileShape(const char* name, int32_t profile, OptProfileSelector select) const noexcept override {
    const Tensor* tensor = model.find(name);
    if (tensor == nullptr || tensor->output || profile > 1) return dims({});
    if (select == OptProfileSelector::kMIN) return dims(tensor->min[profile]);
    return dims(select == OptProfileSelector::kOPT ? tensor->opt[profile] : tensor->max[profile]);
  }
  const char* getAliasedInputTensor(const char* name) const noexcept override {
    const std::string output = name, prefix = "present_latent.";
    if (output.rfind(prefix, 0) != 0) return nullptr;
    const Tensor* input = model.find(("past_latent." + output.substr(prefix.size())).c_str());
    return input == nullptr ? nullptr : input->name.c_str();
  }

 private:
  ILogger& logger;
};

class PublicEngine final : public ICudaEngine {
 public:
  explicit PublicEngine(Engine* made) : owned(made) { mImpl = made; }

 private:
  std::unique_ptr<Engine> owned;
};

class Runtime final : public RuntimeStubs {
 public:
  explicit Runtime(ILogger& logger) : logger(logger) {}
  ICudaEngine* deserializeCudaEngine(const void* bytes, std::size_t size) noexcept override {
    auto engine = std::make_unique<Engine>(logger);
    if (engine->model.read(bytes, size)) return new PublicEngine(engine.release());
    logger.log(ILogger::Severity::kERROR, "fake: no engine");
    return nullptr;
  }

 private:
  ILogger& logger;
};

class PublicRuntime final : public IRuntime {
 public:
  explicit PublicRuntime(Runtime* made) : owned(made) { mImpl = made; }

 private:
  std::unique_ptr<Runtime> owned;
};

// Takes one plugin library, and a second of the same plugin never, as TensorRT.
class Registry final : public RegistryStubs {
 public:
  PluginLibraryHandle loadLibrary(const AsciiChar* path) noexcept override {
    if (library != nullptr) return nullptr;
    return library = dlopen(path, RTLD_NOW);
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override { return *count = 0, nullptr; }

 private:
  void* library = nullptr;
};
}  // namespace

EXPORT int32_t getInferLibVersion() noexcept { return static_cast<int32_t>(setting("MLAC_FAKE_VERSION", NV_TENSORRT_VERSION)); }
EXPORT void* createInferBuilder_INTERNAL(void*, int32_t) noexcept { return nullptr; }
EXPORT void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept {
  return new PublicRuntime(new Runtime(*static_cast<ILogger*>(logger)));
}
EXPORT IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}
// Of the parser's library, which is this file too.
EXPORT void* createNvOnnxParser_INTERNAL(void*, void*, int) noexcept { return nullptr; }
