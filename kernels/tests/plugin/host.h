// TensorRT's side of a plugin library, without TensorRT: loads it, and stands in for the objects that TensorRT would hand to it.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace trt = nvinfer1;
using Bytes = std::vector<char>;

[[noreturn]] inline void fail(std::string const& text)
{
    std::fprintf(stderr, "FAILED: %s\n", text.c_str());
    std::exit(1);
}

inline void expect(bool holds, std::string const& text)
{
    if (!holds)
    {
        fail(text);
    }
}

inline Bytes readFile(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    expect(file.good(), "cannot read " + path);
    return Bytes((std::istreambuf_iterator<char>(file)), {});
}

class Logger : public trt::ILogger
{
public:
    void log(Severity, char const* message) noexcept override
    {
        last = message;
    }
    std::string last;
};

class Finder : public trt::ILoggerFinder
{
public:
    trt::ILogger* findLogger() override
    {
        return &logger;
    }
    Logger logger;
};

class Recorder : public trt::IErrorRecorder
{
public:
    int32_t getNbErrors() const noexcept override
    {
        return static_cast<int32_t>(errors.size());
    }
    trt::ErrorCode getErrorCode(int32_t i) const noexcept override
    {
        return codes[static_cast<size_t>(i)];
    }
    ErrorDesc getErrorDesc(int32_t i) const noexcept override
    {
        return errors[static_cast<size_t>(i)].c_str();
    }
    bool hasOverflowed() const noexcept override
    {
        return false;
    }
    void clear() noexcept override
    {
        errors.clear();
        codes.clear();
    }
    bool reportError(trt::ErrorCode code, ErrorDesc text) noexcept override
    {
        expect(std::strlen(text) <= kMAX_DESC_LENGTH, "an error text is longer than the recorder takes");
        codes.push_back(code);
        errors.push_back(text);
        return true;
    }
    RefCount incRefCount() noexcept override
    {
        return ++count;
    }
    RefCount decRefCount() noexcept override
    {
        return --count;
    }
    std::vector<std::string> errors;
    std::vector<trt::ErrorCode> codes;
    RefCount count{0};
};

class ResourceContext : public trt::IPluginResourceContext
{
public:
    trt::IGpuAllocator* getGpuAllocator() const noexcept override
    {
        return nullptr;
    }
    trt::IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return &recorder;
    }
    mutable Recorder recorder;
};

// A size that is known only when inputs are: an axis of an input, a constant, or an operation on two.
class Size : public trt::IDimensionExpr, public trt::apiv::VDimensionExpr
{
public:
    explicit Size(std::function<int64_t()> evaluate, bool constant = false)
        : value(std::move(evaluate))
        , mConstant(constant)
    {
        mImpl = this;
    }
    ~Size() noexcept override = default;
    bool isConstant() const override
    {
        return mConstant;
    }
    int64_t getConstantValue() const override
    {
        expect(mConstant, "the value of a size that is not constant was asked for");
        return value();
    }
    bool isSizeTensor() const override
    {
        return false;
    }
    std::function<int64_t()> value;

private:
    bool mConstant;
};

class Expressions : public trt::IExprBuilder, public trt::apiv::VExprBuilder
{
public:
    Expressions()
    {
        mImpl = this;
    }
    ~Expressions() noexcept override = default;
    trt::IDimensionExpr const* constant(int64_t value) override
    {
        return keep(std::make_unique<Size>([value] { return value; }, true));
    }
    trt::IDimensionExpr const* operation(
        trt::DimensionOperation op, trt::IDimensionExpr const& first, trt::IDimensionExpr const& second) override
    {
        auto const a = static_cast<Size const&>(first).value, b = static_cast<Size const&>(second).value;
        return keep(std::make_unique<Size>([=]() -> int64_t {
            switch (op)
            {
            case trt::DimensionOperation::kSUM: return a() + b();
            case trt::DimensionOperation::kPROD: return a() * b();
            case trt::DimensionOperation::kSUB: return a() - b();
            case trt::DimensionOperation::kFLOOR_DIV: return a() / b();
            default: fail("an operation on sizes that this host does not know");
            }
        }));
    }
    trt::IDimensionExpr const* declareSizeTensor(int32_t, trt::IDimensionExpr const&, trt::IDimensionExpr const&) override
    {
        fail("a size tensor was declared");
    }
    trt::IDimensionExpr const* variable(int64_t const& size)
    {
        return keep(std::make_unique<Size>([&size] { return size; }));
    }

private:
    trt::IDimensionExpr const* keep(std::unique_ptr<Size> size)
    {
        mSizes.push_back(std::move(size));
        return mSizes.back().get();
    }
    std::vector<std::unique_ptr<Size>> mSizes;
};

// The library, opened as IPluginRegistry::loadLibrary does.
class Plugins
{
public:
    explicit Plugins(char const* path)
    {
        void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        expect(library != nullptr, library == nullptr ? dlerror() : "");
        auto setFinder = reinterpret_cast<void (*)(trt::ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
        auto creators = reinterpret_cast<trt::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
        mLastError = reinterpret_cast<char const* (*)()>(dlsym(library, "mlac_trt_plugin_last_error"));
        auto version = reinterpret_cast<int32_t (*)()>(dlsym(library, "mlac_trt_plugin_tensorrt"));
        expect(setFinder != nullptr && creators != nullptr && mLastError != nullptr && version != nullptr, "an entry point is missing");
        expect(version() / 10000 == NV_TENSORRT_MAJOR, "the library is of another TensorRT than this program");
        setFinder(&finder);
        int32_t count = 0;
        trt::IPluginCreatorInterface* const* list = creators(count);
        expect(count == 1 && list != nullptr && list[0] != nullptr, "not one creator");
        trt::InterfaceInfo const info = list[0]->getInterfaceInfo();
        expect(std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1, "the creator is of another kind");
        creator = static_cast<trt::IPluginCreatorV3One*>(list[0]);
    }

    std::string lastError() const
    {
        return mLastError();
    }

    trt::IPluginCreatorV3One* creator{};
    Finder finder;

private:
    char const* (*mLastError)(){};
};
