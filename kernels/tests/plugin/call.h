// A step from a file: twelve numbers of 4 bytes, the scale, then the tensors (../plugin.rs writes it).
#pragma once

#include "host.h"

// Device memory: exactly as long as it must be, so that the sanitizer sees what goes beyond.
struct Memory
{
    explicit Memory(size_t bytes, int fill = 0xff)
        : bytes(bytes)
        , data(std::aligned_alloc(256, (bytes + 255) / 256 * 256), &std::free)
    {
        std::memset(data.get(), fill, bytes);
    }
    size_t bytes;
    std::unique_ptr<void, decltype(&std::free)> data;
};

struct Call
{
    explicit Call(std::string const& path)
        : file(readFile(path))
    {
        auto const number = [&](size_t i) {
            int32_t value;
            std::memcpy(&value, file.data() + 4 * i, sizeof value);
            return static_cast<int64_t>(value);
        };
        batch = number(0), tokens = number(1), heads = number(2), row = number(3), rank = static_cast<int32_t>(number(4));
        half = number(5) != 0 ? trt::DataType::kHALF : trt::DataType::kBF16;
        int64_t const first = number(6), second = number(7), stride = number(8);
        optional = static_cast<int32_t>(number(9)), withLse = static_cast<int32_t>(number(10)), window = static_cast<int32_t>(number(11));
        std::memcpy(&scale, file.data() + 48, sizeof scale);
        char const* at = file.data() + 52;
        auto const input = [&](std::vector<int64_t> const& dims, trt::DataType type) {
            types.push_back(type);
            shapes.push_back(dims);
            inputs.emplace_back(bytesOf(dims, type));
            std::memcpy(inputs.back().data.get(), at, inputs.back().bytes);
            at += inputs.back().bytes;
        };
        input({batch, tokens, heads, row}, half);
        input({batch, tokens, row}, half);
        input({first, second, row}, half);
        input({batch}, trt::DataType::kINT32);
        if (optional & 1)
        {
            input({batch, stride}, trt::DataType::kINT32);
        }
        if (optional & 2)
        {
            input({heads}, trt::DataType::kFLOAT);
        }
        if (optional & 4)
        {
            input({batch, tokens}, trt::DataType::kINT64);
        }
        expect(at == file.data() + file.size(), "the call's file has another length");
        auto const output = [&](std::vector<int64_t> const& dims, trt::DataType type) {
            types.push_back(type);
            shapes.push_back(dims);
        };
        output({batch, tokens, heads, rank}, half);
        output({first, second, row}, half);
        if (withLse)
        {
            output({batch, tokens, heads}, trt::DataType::kFLOAT);
        }
    }

    static size_t bytesOf(std::vector<int64_t> const& dims, trt::DataType type)
    {
        size_t bytes = type == trt::DataType::kINT64 ? 8 : type == trt::DataType::kHALF || type == trt::DataType::kBF16 ? 2 : 4;
        for (int64_t const size : dims)
        {
            bytes *= static_cast<size_t>(size);
        }
        return bytes;
    }

    int32_t inputCount() const
    {
        return static_cast<int32_t>(inputs.size());
    }
    int32_t outputCount() const
    {
        return static_cast<int32_t>(shapes.size() - inputs.size());
    }

    static trt::Dims dims(std::vector<int64_t> const& sizes)
    {
        trt::Dims dims{};
        dims.nbDims = static_cast<int32_t>(sizes.size());
        std::copy(sizes.begin(), sizes.end(), dims.d);
        return dims;
    }

    // Inputs, then outputs.
    std::vector<trt::PluginTensorDesc> descs() const
    {
        std::vector<trt::PluginTensorDesc> descs;
        for (size_t i = 0; i < shapes.size(); ++i)
        {
            descs.push_back({dims(shapes[i]), types[i], trt::TensorFormat::kLINEAR, 1.0f});
        }
        return descs;
    }

    // The same with batch and cache unknown, as a profile has them.
    std::vector<trt::DynamicPluginTensorDesc> dynamicDescs() const
    {
        std::vector<trt::DynamicPluginTensorDesc> dynamic;
        for (trt::PluginTensorDesc const& desc : descs())
        {
            trt::DynamicPluginTensorDesc one{desc, desc.dims, desc.dims, desc.dims};
            one.desc.dims.d[0] = -1;
            dynamic.push_back(one);
        }
        return dynamic;
    }

    Bytes file;
    int64_t batch, tokens, heads, row;
    int32_t rank, optional, withLse, window;
    float scale;
    trt::DataType half;
    std::vector<Memory> inputs;
    std::vector<trt::DataType> types;         // inputs, then outputs
    std::vector<std::vector<int64_t>> shapes; // inputs, then outputs
};

// The fields of a node, which tests may spoil.
struct Node
{
    Node(Call const& call, Bytes const& bundle)
        : rank(call.rank)
        , window(call.window)
        , optional(call.optional)
        , withLse(call.withLse)
        , scale(call.scale)
        , kernels(bundle)
    {
        using Type = trt::PluginFieldType;
        fields = {{"kv_lora_rank", &rank, Type::kINT32, 1}, {"scale", &scale, Type::kFLOAT32, 1},
            {"sliding_window", &window, Type::kINT32, 1}, {"optional_inputs", &optional, Type::kINT32, 1},
            {"with_lse", &withLse, Type::kINT32, 1},
            {"kernels", kernels.data(), Type::kCHAR, static_cast<int32_t>(kernels.size())}};
    }
    Node(Node const&) = delete;

    trt::PluginFieldCollection collection() const
    {
        return {static_cast<int32_t>(fields.size()), fields.data()};
    }

    int32_t rank, window, optional, withLse;
    float scale;
    Bytes kernels;
    std::vector<trt::PluginField> fields;
};
