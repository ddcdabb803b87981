// Plugin fields to a plugin: the attributes of an ONNX node when an engine is built, the fields of the engine when it is read.
#include <cstring>
#include <limits>

#include "plugin.h"
#include "report.h"

namespace mlac
{
namespace
{
using Type = trt::PluginFieldType;
constexpr char const* kAttributeNames[] = {"kv_lora_rank", "scale", "sliding_window", "optional_inputs", "with_lse", "kernels"};
constexpr char const* kMajor = "tensorrt_major";

class Fields
{
public:
    Fields(char const* layer, trt::PluginFieldCollection const* collection, bool engine)
        : mSubject(text("mlac::LatentAttention `", layer == nullptr ? "" : layer, '`'))
        , mFix(engine ? "build the engine again with `mlac build`" : "build with `mlac build`, which adds the kernels to the node")
    {
        if (collection == nullptr || collection->nbFields < 0 || (collection->nbFields > 0 && collection->fields == nullptr))
        {
            throw refusal(mSubject, "a collection of fields", "none", mFix);
        }
        for (int32_t i = 0; i < collection->nbFields; ++i)
        {
            trt::PluginField const& field = collection->fields[i];
            std::string const name = field.name == nullptr ? "" : field.name;
            bool known = engine && name == kMajor;
            for (char const* const attribute : kAttributeNames)
            {
                known = known || name == attribute;
            }
            if (!known)
            {
                throw refusal(mSubject, "the fields that the creator names", text('`', name.substr(0, 80), '`'), mFix);
            }
            if (mFields.count(name) != 0)
            {
                throw refusal(mSubject, text("one field `", name, '`'), "two", mFix);
            }
            if (field.data == nullptr || field.length < 1)
            {
                wrong(name, "a value", text(field.length, " elements"));
            }
            mFields[name] = &field;
        }
    }

    bool has(char const* name) const
    {
        return mFields.count(name) != 0;
    }

    int32_t integer(char const* name) const
    {
        trt::PluginField const& field = find(name);
        int64_t value = 0;
        if (field.type == Type::kINT32 && field.length == 1)
        {
            int32_t narrow;
            std::memcpy(&narrow, field.data, sizeof narrow);
            value = narrow;
        }
        else if (field.type == Type::kINT64 && field.length == 1)
        {
            std::memcpy(&value, field.data, sizeof value);
        }
        else
        {
            wrong(name, "one integer", shown(field));
        }
        if (value < 0 || value > std::numeric_limits<int32_t>::max())
        {
            wrong(name, "a number of 31 bits", text(value));
        }
        return static_cast<int32_t>(value);
    }

    float real(char const* name) const
    {
        trt::PluginField const& field = find(name);
        if (field.type != Type::kFLOAT32 || field.length != 1)
        {
            wrong(name, "one number of type kFLOAT32", shown(field));
        }
        float value;
        std::memcpy(&value, field.data, sizeof value);
        return value;
    }

    std::shared_ptr<Bundle const> kernels() const
    {
        trt::PluginField const& field = find("kernels");
        if (field.type != Type::kCHAR && field.type != Type::kUNKNOWN && field.type != Type::kINT8)
        {
            wrong("kernels", "bytes", shown(field));
        }
        return Bundle::read(field.data, static_cast<size_t>(field.length));
    }

    [[noreturn]] void wrong(std::string const& name, std::string const& expected, std::string const& found) const
    {
        throw refusal(text(mSubject, ", field `", name, '`'), expected, found, mFix);
    }

    std::string const& subject() const
    {
        return mSubject;
    }

private:
    trt::PluginField const& find(char const* name) const
    {
        auto const found = mFields.find(name);
        if (found == mFields.end())
        {
            throw refusal(mSubject, text("field `", name, '`'), "none", mFix);
        }
        return *found->second;
    }

    static std::string shown(trt::PluginField const& field)
    {
        return text(field.length, " of type ", static_cast<int32_t>(field.type), " of nvinfer1::PluginFieldType");
    }

    std::string mSubject, mFix;
    std::map<std::string, trt::PluginField const*> mFields;
};
} // namespace

LatentAttentionCreator::LatentAttentionCreator()
{
    for (char const* const name : kAttributeNames)
    {
        Type const type = std::strcmp(name, "scale") == 0 ? Type::kFLOAT32
            : std::strcmp(name, "kernels") == 0           ? Type::kCHAR
                                                          : Type::kINT32;
        mFields.emplace_back(name, nullptr, type, 1);
    }
    mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
}

trt::IPluginV3* LatentAttentionCreator::createPlugin(
    trt::AsciiChar const* name, trt::PluginFieldCollection const* collection, trt::TensorRTPhase phase) noexcept
{
    return guarded<trt::IPluginV3*>(nullptr, nullptr, [&]() -> trt::IPluginV3* {
        bool const engine = phase == trt::TensorRTPhase::kRUNTIME;
        Fields const fields(name, collection, engine);
        if (engine && fields.integer(kMajor) != NV_TENSORRT_MAJOR)
        {
            throw refusal(text(fields.subject(), " of an engine"),
                text("built with the plugin library for TensorRT ", NV_TENSORRT_MAJOR),
                text("one for TensorRT ", fields.integer(kMajor)), "load the library of that version, or build the engine again",
                trt::ErrorCode::kUNSUPPORTED_STATE);
        }
        Attributes attributes{};
        attributes.rank = fields.integer("kv_lora_rank");
        attributes.scale = fields.real("scale");
        attributes.window = fields.has("sliding_window") ? fields.integer("sliding_window") : 0;
        attributes.optionalInputs = fields.integer("optional_inputs");
        attributes.withLse = fields.integer("with_lse");
        return new LatentAttention(attributes, fields.kernels());
    });
}

trt::PluginFieldCollection const* LatentAttentionCreator::getFieldNames() noexcept
{
    return &mCollection;
}

trt::AsciiChar const* LatentAttentionCreator::getPluginName() const noexcept
{
    return kName;
}

trt::AsciiChar const* LatentAttentionCreator::getPluginVersion() const noexcept
{
    return kPluginVersion;
}

trt::AsciiChar const* LatentAttentionCreator::getPluginNamespace() const noexcept
{
    return kNamespace;
}
} // namespace mlac
