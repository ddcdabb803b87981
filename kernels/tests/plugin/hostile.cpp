// What a plugin must refuse: every case says which words the refusal has. Nothing may crash, and the sanitizers watch.
#include "call.h"

namespace
{
std::unique_ptr<trt::IPluginV3> create(
    Plugins& plugins, trt::PluginFieldCollection const* fields, trt::TensorRTPhase phase = trt::TensorRTPhase::kBUILD)
{
    return std::unique_ptr<trt::IPluginV3>(plugins.creator->createPlugin("hostile", fields, phase));
}

void refused(Plugins& plugins, Node const& node, std::string const& words)
{
    trt::PluginFieldCollection const fields = node.collection();
    expect(create(plugins, &fields) == nullptr, "taken, though it should say: " + words);
    expect(plugins.lastError().find(words) != std::string::npos, "wanted `" + words + "` in: " + plugins.lastError());
}

// The checksum over the bytes behind the header, as whoever forges a file would write it.
void sign(Bytes& bundle)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    for (size_t i = 32; i < bundle.size(); ++i)
    {
        hash = (hash ^ static_cast<unsigned char>(bundle[i])) * 0x100000001b3ull;
    }
    uint64_t const total = bundle.size();
    std::memcpy(&bundle[16], &total, 8);
    std::memcpy(&bundle[24], &hash, 8);
}

// The first recipe with a text in place of another; lengths and checksum are right again.
Bytes withRecipe(Bytes const& bundle, std::string const& from, std::string const& to)
{
    uint64_t textBytes;
    std::memcpy(&textBytes, &bundle[32], 8);
    std::string recipe(&bundle[48], textBytes);
    size_t const at = recipe.find(from);
    expect(at != std::string::npos, "the recipe has no `" + from + "`");
    recipe.replace(at, from.size(), to);
    Bytes changed(bundle.begin(), bundle.begin() + 48);
    changed.insert(changed.end(), recipe.begin(), recipe.end());
    changed.insert(changed.end(), bundle.begin() + 48 + static_cast<std::ptrdiff_t>(textBytes), bundle.end());
    textBytes = recipe.size();
    std::memcpy(&changed[32], &textBytes, 8);
    sign(changed);
    return changed;
}

void fieldCases(Plugins& plugins, Call const& call, Bytes const& bundle)
{
    expect(create(plugins, nullptr) == nullptr, "no collection at all");
    trt::PluginFieldCollection none{3, nullptr};
    expect(create(plugins, &none) == nullptr, "a collection without its fields");
    none = {-1, nullptr};
    expect(create(plugins, &none) == nullptr, "a collection of -1 fields");

    using Change = std::function<void(Node&)>;
    using Type = trt::PluginFieldType;
    static int64_t const large = int64_t{1} << 40;
    std::pair<char const*, Change> const cases[] = {
        {"field `kernels`: expected a value, found 0 elements", [](Node& n) { n.fields[5].length = 0; }},
        {"field `kernels`: expected a value, found -7 elements", [](Node& n) { n.fields[5].length = -7; }},
        {"field `scale`: expected a value", [](Node& n) { n.fields[1].data = nullptr; }},
        {"field `scale`: expected one number of type kFLOAT32", [](Node& n) { n.fields[1].type = Type::kFLOAT64; }},
        {"field `kv_lora_rank`: expected one integer", [](Node& n) { n.fields[0].type = Type::kFLOAT32; }},
        {"field `kv_lora_rank`: expected one integer", [](Node& n) { n.fields[0].length = 2; }},
        {"field `kv_lora_rank`: expected a number of 31 bits",
            [](Node& n) { n.fields[0] = {"kv_lora_rank", &large, Type::kINT64, 1}; }},
        {"field `kernels`: expected bytes", [](Node& n) { n.fields[5].type = Type::kDIMS; }},
        {"expected the fields that the creator names, found `heads`", [](Node& n) { n.fields[2].name = "heads"; }},
        {"expected the fields that the creator names, found ``", [](Node& n) { n.fields[2].name = nullptr; }},
        {"expected the fields that the creator names, found `tensorrt_major`", [](Node& n) { n.fields[2].name = "tensorrt_major"; }},
        {"expected one field `scale`, found two", [](Node& n) { n.fields[2] = n.fields[1]; }},
        {"attribute `kv_lora_rank`: expected", [](Node& n) { n.rank += 64; }},
        {"attribute `sliding_window`: expected", [](Node& n) { n.window += 1; }},
        {"attribute `scale`: expected a positive number", [](Node& n) { n.scale = 0.0f; }},
        {"attribute `scale`: expected a positive number", [](Node& n) { n.scale = __builtin_nanf(""); }},
        {"attribute `scale`: expected a positive number", [](Node& n) { n.scale = __builtin_inff(); }},
        {"attribute `with_lse`: expected 0 or 1", [](Node& n) { n.withLse = 2; }},
        {"no key_mask (8)", [](Node& n) { n.optional |= 8; }},
        {"a sum of 1 (page_table), 2 (sinks) and 4 (tree_mask)", [](Node& n) { n.optional |= 16; }},
        {"optional_inputs, sinks`: expected", [](Node& n) { n.optional ^= 2; }},
        {"optional_inputs, tree_mask`: expected", [](Node& n) { n.optional ^= 4; }},
    };
    for (auto const& [words, change] : cases)
    {
        Node node(call, bundle);
        change(node);
        refused(plugins, node, words);
    }
    for (size_t i = 0; i < 6; ++i)
    {
        Node node(call, bundle);
        std::string const name = node.fields[i].name;
        node.fields.erase(node.fields.begin() + static_cast<std::ptrdiff_t>(i));
        if (name != "sliding_window") // which is 0 when it is left out
        {
            refused(plugins, node, "expected field `" + name + "`, found none");
        }
    }
}

void bundleCases(Plugins& plugins, Call const& call, Bytes const& bundle)
{
    auto const taken = [&](Bytes const& bytes) {
        Node const node(call, bytes);
        trt::PluginFieldCollection const fields = node.collection();
        return create(plugins, &fields) != nullptr;
    };
    auto const says = [&](Bytes const& bytes, char const* words) {
        Node const node(call, bytes);
        refused(plugins, node, words);
    };
    expect(taken(bundle), plugins.lastError());
    // An ONNX string brings the zero at its end.
    Bytes longer = bundle;
    longer.push_back(0);
    expect(taken(longer), plugins.lastError());
    longer.back() = 1;
    says(longer, "field `kernels`: expected");
    longer.back() = 0;
    longer.push_back(0);
    says(longer, "field `kernels`: expected");
    // Every cut, every changed byte.
    for (size_t length = 1; length < bundle.size(); ++length)
    {
        expect(!taken(Bytes(bundle.begin(), bundle.begin() + static_cast<std::ptrdiff_t>(length))), "a bundle that is cut short");
    }
    for (size_t i = 0; i < bundle.size(); ++i)
    {
        for (unsigned char const change : {0x01, 0x80, 0xff})
        {
            Bytes damaged = bundle;
            damaged[i] = static_cast<char>(static_cast<unsigned char>(damaged[i]) ^ change);
            expect(!taken(damaged), "a damaged bundle");
            // With a checksum that fits, it may be another recipe, but never a crash.
            if (i >= 32)
            {
                sign(damaged);
                taken(damaged);
            }
        }
    }
    Bytes other = bundle;
    other[8] = 9;
    says(other, "expected form 1, found form 9");

    std::pair<char const*, std::pair<char const*, char const*>> const lines[] = {
        {"expected architecture sm_80, found sm_90", {"capability 9 0", "capability 8 0"}},
        {"recipe, line 1: expected a number from 1 to 1", {"mlac-recipe 1", "mlac-recipe 2"}},
        {"recipe, line 4: expected bf16 or f16", {"dtype bf16", "dtype fp8"}},
        {"expected a number from 1 to 1024", {"heads ", "heads -"}},
        {"expected a number from 1 to 1024", {"heads ", "heads 99999999999999999999"}},
        {"expected the end of the line", {"page 64", "page 64 7"}},
        {"expected one more word", {"page 64", "page"}},
        {"a field within the block's", {"pointer 0 new_rows", "pointer 66 new_rows"}},
        {"a field within the block's", {"number 48 batch", "number 4096 batch"}},
        {"a tensor of mlac::LatentAttention or a region", {"pointer 0 new_rows", "pointer 0 values"}},
        {"batch, page_stride, cache_pages or scale", {"number 48 batch", "number 48 heads"}},
        {"region, launch, block, pointer, number, constant or map", {"block ", "bloc "}},
        {"a launch before its arguments", {"launch mlac_store 128 0 0 0 1 4\n", ""}},
        {"`query_tokens` here", {"query_tokens", "tokens"}},
    };
    for (auto const& [words, change] : lines)
    {
        says(withRecipe(bundle, change.first, change.second), words);
    }
}

void engineCases(Plugins& plugins, Call const& call, Bytes const& bundle)
{
    auto const engine = [&](int32_t const* major, char const* words) {
        Node node(call, bundle);
        if (major != nullptr)
        {
            node.fields.emplace_back("tensorrt_major", major, trt::PluginFieldType::kINT32, 1);
        }
        trt::PluginFieldCollection const fields = node.collection();
        expect(create(plugins, &fields, trt::TensorRTPhase::kRUNTIME) == nullptr, "an engine that is not ours");
        expect(plugins.lastError().find(words) != std::string::npos, plugins.lastError());
    };
    int32_t const other = NV_TENSORRT_MAJOR - 1;
    std::string const both
        = "library for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ", found one for TensorRT " + std::to_string(other);
    engine(&other, both.c_str());
    engine(nullptr, "expected field `tensorrt_major`, found none");
}

void callCases(Plugins& plugins, Call const& call, Bytes const& bundle)
{
    Node const node(call, bundle);
    trt::PluginFieldCollection const fields = node.collection();
    std::unique_ptr<trt::IPluginV3> plugin = create(plugins, &fields);
    auto* builder = static_cast<trt::IPluginV3OneBuild*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kBUILD));
    auto* aliased = static_cast<trt::IPluginV3OneBuildV2*>(builder);
    auto* runtime = static_cast<trt::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
    expect(plugin->getCapabilityInterface(static_cast<trt::PluginCapabilityType>(7)) == nullptr, "an unknown capability");
    expect(aliased->getAliasedInput(-1) == -1 && aliased->getAliasedInput(99) == -1, "the alias of no output");
    int32_t const in = call.inputCount(), out = call.outputCount();
    std::vector<trt::DynamicPluginTensorDesc> const good = call.dynamicDescs();
    auto const says = [&](bool refused, char const* words) {
        expect(refused && plugins.lastError().find(words) != std::string::npos, std::string(words) + " in: " + plugins.lastError());
    };

    says(builder->configurePlugin(good.data(), in - 1, good.data() + in, out) != 0, "inputs and");
    says(builder->configurePlugin(nullptr, in, nullptr, out) != 0, "expected descriptions, found none");
    says(!builder->supportsFormatCombination(-1, good.data(), in, out), "a position among inputs and outputs");
    says(!builder->supportsFormatCombination(in + out, good.data(), in, out), "a position among inputs and outputs");
    says(!builder->supportsFormatCombination(0, nullptr, in, out), "a position among inputs and outputs");
    says(!builder->supportsFormatCombination(0, good.data(), in, 0), "outputs, as");
    std::vector<trt::DataType> types(static_cast<size_t>(out));
    says(builder->getOutputDataTypes(nullptr, out, call.types.data(), in) != 0, "arrays of types");
    std::vector<trt::DataType> wrong = call.types;
    wrong[0] = trt::DataType::kFLOAT;
    says(builder->getOutputDataTypes(types.data(), out, wrong.data(), in) != 0, "input `query`: expected data type");
    Expressions expressions;
    std::vector<trt::DimsExprs> shapes(static_cast<size_t>(in + out));
    says(builder->getOutputShapes(shapes.data(), in, nullptr, 0, shapes.data() + in, out, expressions) != 0, "a query of 4 axes");
    says(builder->getOutputShapes(shapes.data(), in, nullptr, 2, shapes.data() + in, out, expressions) != 0, "no shape inputs");
    says(builder->getWorkspaceSize(nullptr, in, nullptr, out) == 0, "expected descriptions");

    // One axis of one input after the other, and its rank: configured for the largest profile.
    for (size_t i = 0; i < static_cast<size_t>(in); ++i)
    {
        std::string const name = i == 2 ? "cache" : "input `";
        for (int32_t axis = 0; axis < good[i].max.nbDims; ++axis)
        {
            for (int64_t const size : {int64_t{0}, int64_t{-1}, good[i].max.d[axis] + 1, int64_t{1} << 40})
            {
                std::vector<trt::DynamicPluginTensorDesc> bad = good;
                bad[i].max.d[axis] = size;
                bool const pages = (call.optional & 1) != 0 && ((i == 2 && axis == 0) || (i == 4 && axis == 1));
                if (pages && size > 0 && size < 1000)
                {
                    continue; // any number of pages, and any number of columns of their table, is one
                }
                expect(builder->configurePlugin(bad.data(), in, bad.data() + in, out) != 0, "a shape that contradicts the others");
            }
        }
        for (int32_t const rank : {0, 1, 8, good[i].max.nbDims + 1})
        {
            std::vector<trt::DynamicPluginTensorDesc> bad = good;
            bad[i].min.nbDims = rank;
            if (rank != good[i].max.nbDims)
            {
                says(builder->configurePlugin(bad.data(), in, bad.data() + in, out) != 0, name.c_str());
            }
        }
    }
    std::vector<trt::PluginTensorDesc> descs = call.descs();
    says(runtime->onShapeChange(nullptr, in, nullptr, out) != 0, "expected descriptions");
    says(runtime->enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0, "expected descriptions");
    says(runtime->enqueue(descs.data(), descs.data() + in, nullptr, nullptr, nullptr, nullptr) != 0, "arrays of addresses");
    std::vector<void const*> inputs(static_cast<size_t>(in), nullptr);
    std::vector<void*> outputs(static_cast<size_t>(out), nullptr);
    says(runtime->enqueue(descs.data(), descs.data() + in, inputs.data(), outputs.data(), nullptr, nullptr) != 0,
        "`query`: expected a device address");
    descs[0].type = trt::DataType::kFLOAT;
    says(runtime->onShapeChange(descs.data(), in, descs.data() + in, out) != 0, "`query`: expected linear");
}
} // namespace

void hostile(Plugins& plugins, Bytes const& bundle, std::string const& path)
{
    Call const call(path);
    fieldCases(plugins, call, bundle);
    if ((call.optional & 1) != 0)
    {
        bundleCases(plugins, call, bundle); // once is enough: they do not look at the call
    }
    engineCases(plugins, call, bundle);
    callCases(plugins, call, bundle);
}
