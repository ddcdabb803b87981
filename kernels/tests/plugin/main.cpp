// Drives the plugin library through every virtual function, in TensorRT's order.
//
//   drive LIBRARY BUNDLE CALL ANSWER   a step through build, engine and run; with a libcuda.so.1 the answer is written
//   no-driver LIBRARY BUNDLE CALL      the same without one: a plain error where the GPU begins
//   fails LIBRARY BUNDLE CALL TEXT     the run must fail with that text in the recorder and the library's last error
//   hostile LIBRARY BUNDLE CALL        what must be refused
#include "call.h"

void hostile(Plugins& plugins, Bytes const& bundle, std::string const& path);

namespace
{
// What TensorRT asks while it builds.
void build(Plugins& plugins, Call& call, trt::IPluginV3* plugin)
{
    auto* core = static_cast<trt::IPluginV3OneCore*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kCORE));
    auto* builder = static_cast<trt::IPluginV3OneBuildV2*>(
        static_cast<trt::IPluginV3OneBuild*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kBUILD)));
    expect(core != nullptr && builder != nullptr, "a capability is missing");
    expect(std::string("LatentAttention") == core->getPluginName() && std::string("1") == core->getPluginVersion()
            && std::string("mlac") == core->getPluginNamespace(),
        "name, version or namespace");
    trt::InterfaceInfo const info = builder->getInterfaceInfo();
    expect(std::string("PLUGIN_V3ONE_BUILD") == info.kind && info.major == 2, "the build capability is not the one with aliases");

    int32_t const in = call.inputCount(), out = call.outputCount();
    expect(builder->getNbOutputs() == out, "number of outputs");
    for (int32_t i = 0; i < out; ++i)
    {
        expect(builder->getAliasedInput(i) == (i == 1 ? 2 : -1), "the alias of an output");
    }

    std::vector<trt::DataType> types(static_cast<size_t>(out));
    expect(builder->getOutputDataTypes(types.data(), out, call.types.data(), in) == 0, plugins.lastError());
    expect(std::equal(types.begin(), types.end(), call.types.begin() + in), "data types of the outputs");

    // Sizes as unknowns, evaluated after the plugin has spoken.
    Expressions expressions;
    std::vector<trt::DimsExprs> inputs(static_cast<size_t>(in)), outputs(static_cast<size_t>(out));
    for (size_t i = 0; i < inputs.size(); ++i)
    {
        inputs[i].nbDims = static_cast<int32_t>(call.shapes[i].size());
        for (size_t j = 0; j < call.shapes[i].size(); ++j)
        {
            inputs[i].d[j] = expressions.variable(call.shapes[i][j]);
        }
    }
    expect(builder->getOutputShapes(inputs.data(), in, nullptr, 0, outputs.data(), out, expressions) == 0, plugins.lastError());
    auto const same = [&] {
        for (size_t i = 0; i < outputs.size(); ++i)
        {
            std::vector<int64_t> const& wanted = call.shapes[inputs.size() + i];
            expect(outputs[i].nbDims == static_cast<int32_t>(wanted.size()), "rank of an output");
            for (size_t j = 0; j < wanted.size(); ++j)
            {
                expect(static_cast<Size const*>(outputs[i].d[j])->value() == wanted[j], "size of an output");
            }
        }
    };
    same();
    // The expressions follow their inputs.
    call.shapes[0][0] += 5, call.shapes[inputs.size()][0] += 5;
    if (call.withLse)
    {
        call.shapes.back()[0] += 5;
    }
    same();
    call.shapes[0][0] -= 5, call.shapes[inputs.size()][0] -= 5;
    if (call.withLse)
    {
        call.shapes.back()[0] -= 5;
    }

    // Every type in every format at every position, the ones before as they must be: exactly one combination is taken.
    std::vector<trt::DynamicPluginTensorDesc> dynamic = call.dynamicDescs();
    for (int32_t position = 0; position < in + out; ++position)
    {
        std::vector<trt::DynamicPluginTensorDesc> asked = dynamic;
        for (int32_t type = 0; type < trt::EnumMax<trt::DataType>(); ++type)
        {
            for (int32_t format = 0; format < trt::EnumMax<trt::TensorFormat>(); ++format)
            {
                auto& desc = asked[static_cast<size_t>(position)].desc;
                desc.type = static_cast<trt::DataType>(type);
                desc.format = static_cast<trt::TensorFormat>(format);
                bool const wanted = desc.format == trt::TensorFormat::kLINEAR && desc.type == call.types[static_cast<size_t>(position)];
                expect(builder->supportsFormatCombination(position, asked.data(), in, out) == wanted, "a format combination");
            }
        }
    }
    expect(builder->configurePlugin(dynamic.data(), in, dynamic.data() + in, out) == 0, plugins.lastError());
    expect(builder->getNbTactics() == 0 && builder->getFormatCombinationLimit() > 0, "tactics and formats");
    expect(builder->getTimingCacheID() != nullptr && *builder->getTimingCacheID() != 0, "timing cache");
    expect(builder->getMetadataString() != nullptr && *builder->getMetadataString() != 0, "metadata");
}

// Fields as an engine file keeps them: copied, and the originals gone.
struct Engine
{
    explicit Engine(trt::PluginFieldCollection const& source)
    {
        for (int32_t i = 0; i < source.nbFields; ++i)
        {
            trt::PluginField const& field = source.fields[i];
            size_t const element = field.type == trt::PluginFieldType::kINT32 || field.type == trt::PluginFieldType::kFLOAT32 ? 4 : 1;
            auto const* data = static_cast<char const*>(field.data);
            names.push_back(std::make_unique<std::string>(field.name));
            values.push_back(std::make_unique<Bytes>(data, data + element * static_cast<size_t>(field.length)));
            fields.emplace_back(names.back()->c_str(), values.back()->data(), field.type, field.length);
        }
    }
    trt::PluginFieldCollection collection() const
    {
        return {static_cast<int32_t>(fields.size()), fields.data()};
    }
    std::vector<std::unique_ptr<std::string>> names;
    std::vector<std::unique_ptr<Bytes>> values;
    std::vector<trt::PluginField> fields;
};

trt::IPluginV3OneRuntime* runtimeOf(trt::IPluginV3* plugin)
{
    auto* runtime = static_cast<trt::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
    expect(runtime != nullptr, "no runtime capability");
    return runtime;
}

// One run of the step; what TensorRT's execution context does. False: it failed, as an error said.
bool run(Plugins& plugins, Call const& call, trt::IPluginV3* attached, size_t workspaceBytes, bool inPlace, std::vector<Memory>& outputs)
{
    auto* runtime = runtimeOf(attached);
    std::vector<trt::PluginTensorDesc> const descs = call.descs();
    int32_t const in = call.inputCount(), out = call.outputCount();
    if (runtime->onShapeChange(descs.data(), in, descs.data() + in, out) != 0)
    {
        return false;
    }
    expect(runtime->setTactic(0) == 0, plugins.lastError());
    Memory workspace(workspaceBytes);
    std::vector<void const*> inputs;
    for (Memory const& memory : call.inputs)
    {
        inputs.push_back(memory.data.get());
    }
    outputs.clear();
    std::vector<void*> places;
    for (size_t i = call.inputs.size(); i < call.shapes.size(); ++i)
    {
        outputs.emplace_back(Call::bytesOf(call.shapes[i], call.types[i]));
        places.push_back(outputs.back().data.get());
    }
    Memory cache(call.inputs[2].bytes);
    if (inPlace)
    {
        // A copy, so that the call can run again.
        std::memcpy(cache.data.get(), inputs[2], cache.bytes);
        inputs[2] = places[1] = cache.data.get();
    }
    Bytes const before(static_cast<char const*>(call.inputs[2].data.get()),
        static_cast<char const*>(call.inputs[2].data.get()) + call.inputs[2].bytes);
    bool const good
        = runtime->enqueue(descs.data(), descs.data() + in, inputs.data(), places.data(), workspace.data.get(), nullptr) == 0;
    expect(std::memcmp(before.data(), call.inputs[2].data.get(), before.size()) == 0, "an input was written that is not aliased");
    if (inPlace)
    {
        std::memcpy(outputs[1].data.get(), cache.data.get(), cache.bytes);
    }
    return good;
}

size_t workspaceOf(Plugins& plugins, Call const& call, trt::IPluginV3* plugin)
{
    auto* builder = static_cast<trt::IPluginV3OneBuild*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kBUILD));
    std::vector<trt::DynamicPluginTensorDesc> const dynamic = call.dynamicDescs();
    int32_t const in = call.inputCount(), out = call.outputCount();
    size_t const bytes = builder->getWorkspaceSize(dynamic.data(), in, dynamic.data() + in, out);
    expect(bytes > 0, plugins.lastError());
    return bytes;
}
} // namespace

int main(int count, char** arguments)
{
    expect(count >= 5, "usage: drive|no-driver|fails|hostile LIBRARY BUNDLE CALL [ANSWER|TEXT]");
    std::string const mode = arguments[1];
    Plugins plugins(arguments[2]);
    Bytes const bundle = readFile(arguments[3]);
    if (mode == "hostile")
    {
        hostile(plugins, bundle, arguments[4]);
        std::puts("hostile: done");
        return 0;
    }
    Call call(arguments[4]);
    trt::PluginFieldCollection const* names = plugins.creator->getFieldNames();
    expect(names != nullptr && names->nbFields == 6, "the creator's fields");

    // Build: created from the node, cloned before each use, the original dropped.
    std::unique_ptr<trt::IPluginV3> original;
    {
        Node const node(call, bundle);
        trt::PluginFieldCollection const fields = node.collection();
        original.reset(plugins.creator->createPlugin("layer 3", &fields, trt::TensorRTPhase::kBUILD));
        expect(original != nullptr, plugins.lastError());
    }
    std::unique_ptr<trt::IPluginV3> clone(original->clone());
    expect(clone != nullptr, plugins.lastError());
    build(plugins, call, original.get());
    original.reset();
    build(plugins, call, clone.get());
    size_t const workspace = workspaceOf(plugins, call, clone.get());

    // The engine: fields copied, everything of the build gone.
    trt::PluginFieldCollection const* serialized = runtimeOf(clone.get())->getFieldsToSerialize();
    expect(serialized != nullptr, plugins.lastError());
    std::unique_ptr<Engine> engine = std::make_unique<Engine>(*serialized);
    clone.reset();
    trt::PluginFieldCollection const fields = engine->collection();
    std::unique_ptr<trt::IPluginV3> loaded(plugins.creator->createPlugin("layer 3", &fields, trt::TensorRTPhase::kRUNTIME));
    expect(loaded != nullptr, plugins.lastError());
    // Serialised again, an engine's plugin has the same fields.
    trt::PluginFieldCollection const* again = runtimeOf(loaded.get())->getFieldsToSerialize();
    Engine const copy(*again);
    expect(copy.fields.size() == engine->fields.size(), "number of fields");
    for (size_t i = 0; i < copy.fields.size(); ++i)
    {
        expect(*copy.names[i] == *engine->names[i] && *copy.values[i] == *engine->values[i], "a field changed on the way");
    }
    engine.reset();

    // Two contexts of one engine.
    std::vector<Memory> outputs;
    ResourceContext contexts[2];
    std::unique_ptr<trt::IPluginV3> attached[2];
    for (int i = 0; i < 2; ++i)
    {
        attached[i].reset(runtimeOf(loaded.get())->attachToContext(&contexts[i]));
        expect(attached[i] != nullptr, plugins.lastError());
    }
    loaded.reset();
    expect(workspaceOf(plugins, call, attached[0].get()) == workspace, "the workspace of an engine is another one");
    if (mode == "drive")
    {
        std::vector<Memory> others;
        expect(run(plugins, call, attached[0].get(), workspace, true, outputs), plugins.lastError());
        // Another context, another buffer for the cache's output: the same bits.
        expect(run(plugins, call, attached[1].get(), workspace, false, others), plugins.lastError());
        for (size_t i = 0; i < outputs.size(); ++i)
        {
            expect(std::memcmp(outputs[i].data.get(), others[i].data.get(), outputs[i].bytes) == 0, "two runs differ");
        }
        expect(contexts[0].recorder.errors.empty() && contexts[1].recorder.errors.empty(), "errors without a failure");
        std::ofstream answer(arguments[5], std::ios::binary);
        for (Memory const& memory : outputs)
        {
            answer.write(static_cast<char const*>(memory.data.get()), static_cast<std::streamsize>(memory.bytes));
        }
    }
    else
    {
        std::string const wanted = mode == "no-driver" ? "CUDA driver: expected libcuda.so.1" : arguments[5];
        for (int i = 0; i < 2; ++i) // a second try says the same
        {
            expect(!run(plugins, call, attached[0].get(), workspace, i == 0, outputs), "the run did not fail");
            expect(plugins.lastError().find(wanted) != std::string::npos, "another error: " + plugins.lastError());
            expect(contexts[0].recorder.errors.size() == static_cast<size_t>(i + 1), "the recorder was not told once");
            expect(plugins.finder.logger.last == plugins.lastError(), "the logger was told something else");
        }
        std::printf("%s\n", plugins.lastError().c_str());
    }
    attached[0].reset();
    attached[1].reset();
    // Of the fake driver only: what was loaded is unloaded.
    if (auto modules = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "fakeModules")))
    {
        expect(modules() == 0, "modules are left loaded");
    }
    std::printf("%s: done\n", mode.c_str());
    return 0;
}
