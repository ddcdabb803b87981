// Recipes, line by line. Numbers are bounded here, so that no later arithmetic on them can overflow.
#include <limits>
#include <sstream>

#include "bundle.h"
#include "report.h"

namespace mlac
{
namespace
{
constexpr char const* kTensorNames[kTensors]
    = {"query", "new_rows", "cache", "past_lengths", "page_table", "sinks", "tree_mask", "sums", "lse"};
constexpr char const* kNumberNames[] = {"batch", "page_stride", "cache_pages", "scale"};
constexpr uint32_t kMaxBlock = 4096;
constexpr uint64_t kMaxSize = uint64_t{1} << 40;

// The words of one line.
class Line
{
public:
    Line(std::string const& line, size_t number)
        : mLine(line)
        , mNumber(number)
        , mWords(line)
    {
        mWords >> mKey;
    }

    std::string const& key() const
    {
        return mKey;
    }

    [[noreturn]] void wrong(std::string const& expected) const
    {
        throw refusal(text("recipe, line ", mNumber), expected, text('`', mLine.substr(0, 80), '`'),
            "use the plugin library of the mlac that built the engine");
    }

    std::string word()
    {
        std::string word;
        if (!(mWords >> word))
        {
            wrong("one more word");
        }
        return word;
    }

    uint64_t number(uint64_t least, uint64_t most)
    {
        std::string const digits = word();
        uint64_t value = 0;
        bool good = digits.size() <= 18;
        for (char const digit : digits)
        {
            good = good && digit >= '0' && digit <= '9';
            value = good ? value * 10 + static_cast<uint64_t>(digit - '0') : 0;
        }
        if (!good || value < least || value > most)
        {
            wrong(text("a number from ", least, " to ", most));
        }
        return value;
    }

    bool flag()
    {
        return number(0, 1) == 1;
    }

    void end()
    {
        std::string word;
        if (mWords >> word)
        {
            wrong("the end of the line");
        }
    }

private:
    std::string mLine;
    size_t mNumber;
    std::istringstream mWords;
    std::string mKey;
};

class Reader
{
public:
    explicit Reader(std::string const& text)
    {
        std::istringstream lines(text);
        std::string words;
        for (size_t number = 1; std::getline(lines, words); ++number)
        {
            Line line(words, number);
            read(line, number);
            line.end();
        }
        finish();
    }

    Kernel kernel{};

private:
    // Every fact of the head exactly once, in the order in which recipes are written.
    void read(Line& line, size_t number)
    {
        constexpr int64_t kMany = 1 << 20;
        auto const integer = [&](int64_t most) { return static_cast<int64_t>(line.number(0, static_cast<uint64_t>(most))); };
        static constexpr char const* kHead[] = {"mlac-recipe", "kernel", "capability", "dtype", "heads", "query_tokens", "kv_lora_rank",
            "rope_dim", "mask", "window", "sinks", "page"};
        constexpr size_t kHeadLines = sizeof kHead / sizeof kHead[0];
        if (number <= kHeadLines && line.key() != kHead[number - 1])
        {
            line.wrong(text('`', kHead[number - 1], "` here"));
        }
        switch (number)
        {
        case 1: line.number(1, 1); return;
        case 2: kernel.name = line.word(); return;
        case 3:
            kernel.major = static_cast<int>(line.number(1, 99));
            kernel.minor = static_cast<int>(line.number(0, 9));
            return;
        case 4: kernel.f16 = choice(line, "bf16", "f16"); return;
        case 5: kernel.heads = static_cast<int64_t>(line.number(1, 1024)); return;
        case 6: kernel.queryTokens = static_cast<int64_t>(line.number(1, 64)); return;
        case 7: kernel.rank = static_cast<int64_t>(line.number(1, 4096)); return;
        case 8: kernel.rope = integer(4096); return;
        case 9: kernel.tree = choice(line, "causal", "tree"); return;
        case 10: kernel.window = integer(kMany * 1024); return;
        case 11: kernel.sinks = line.flag(); return;
        case 12: kernel.page = static_cast<int64_t>(line.number(1, 1024)); return;
        default: body(line);
        }
    }

    static bool choice(Line& line, char const* no, char const* yes)
    {
        std::string const word = line.word();
        if (word != no && word != yes)
        {
            line.wrong(text(no, " or ", yes));
        }
        return word == yes;
    }

    void body(Line& line)
    {
        std::string const& key = line.key();
        if (key == "region")
        {
            region(line);
        }
        else if (key == "launch")
        {
            launch(line);
        }
        else if (key == "block")
        {
            Argument block{};
            block.bytes = static_cast<uint32_t>(line.number(4, kMaxBlock));
            last(line).arguments.push_back(block);
        }
        else if (key == "pointer" || key == "number" || key == "constant")
        {
            field(line);
        }
        else if (key == "map")
        {
            map(line);
        }
        else
        {
            line.wrong("region, launch, block, pointer, number, constant or map");
        }
    }

    void region(Line& line)
    {
        Region region;
        region.name = line.word();
        region.fixed = line.number(0, kMaxSize);
        region.perRequest = line.number(0, kMaxSize >> 16);
        region.perEntry = line.number(0, 1024);
        if (!kernel.launches.empty() || kernel.regions.size() >= 32)
        {
            line.wrong("at most 32 regions, before the first launch");
        }
        kernel.regions.push_back(region);
    }

    void launch(Line& line)
    {
        Launch launch;
        launch.function = line.word();
        launch.threads = static_cast<uint32_t>(line.number(1, 1024));
        launch.sharedBytes = static_cast<uint32_t>(line.number(0, 1 << 20));
        launch.dependent = line.flag();
        launch.fixed = line.number(0, 1 << 30);
        launch.perRequest = line.number(0, 1 << 30);
        launch.divisor = line.number(1, 1 << 20);
        if (kernel.launches.size() >= 16)
        {
            line.wrong("at most 16 launches");
        }
        kernel.launches.push_back(launch);
    }

    Launch& last(Line& line)
    {
        if (kernel.launches.empty() || kernel.launches.back().arguments.size() >= 16)
        {
            line.wrong("a launch before its arguments, at most 16");
        }
        return kernel.launches.back();
    }

    uint32_t address(Line& line)
    {
        std::string const name = line.word();
        for (uint32_t i = 0; i < kTensors; ++i)
        {
            if (name == kTensorNames[i])
            {
                return i;
            }
        }
        for (size_t i = 0; i < kernel.regions.size(); ++i)
        {
            if (name == kernel.regions[i].name)
            {
                return kTensors + static_cast<uint32_t>(i);
            }
        }
        line.wrong("a tensor of mlac::LatentAttention or a region of the workspace");
    }

    void field(Line& line)
    {
        if (kernel.launches.empty() || kernel.launches.back().arguments.empty() || kernel.launches.back().arguments.back().isMap)
        {
            line.wrong("a block before its fields");
        }
        Argument& block = kernel.launches.back().arguments.back();
        Field field{};
        field.kind = line.key() == "pointer" ? Field::kPointer : line.key() == "number" ? Field::kNumber : Field::kConstant;
        uint32_t const bytes = field.kind == Field::kPointer ? 8 : 4;
        field.offset = static_cast<uint32_t>(line.number(0, kMaxBlock));
        if (field.offset + bytes > block.bytes || block.fields.size() >= kMaxBlock / 4)
        {
            line.wrong(text("a field within the block's ", block.bytes, " bytes"));
        }
        if (field.kind == Field::kPointer)
        {
            field.address = address(line);
        }
        else if (field.kind == Field::kConstant)
        {
            field.constant = static_cast<int32_t>(line.number(0, std::numeric_limits<int32_t>::max()));
        }
        else
        {
            std::string const name = line.word();
            size_t i = 0;
            while (i < 4 && name != kNumberNames[i])
            {
                ++i;
            }
            if (i == 4)
            {
                line.wrong("batch, page_stride, cache_pages or scale");
            }
            field.number = static_cast<Number>(i);
        }
        block.fields.push_back(field);
    }

    void map(Line& line)
    {
        Argument argument{};
        argument.isMap = true;
        Map& map = argument.map;
        map.address = address(line);
        for (int* const word : {&map.dataType, &map.interleave, &map.swizzle, &map.promotion, &map.fill})
        {
            *word = static_cast<int>(line.number(0, 255));
        }
        for (uint32_t& edge : map.box)
        {
            edge = static_cast<uint32_t>(line.number(1, 256));
        }
        for (uint64_t& extent : map.extent)
        {
            extent = line.number(1, 1 << 24);
        }
        map.perRequest = line.number(0, 1 << 16);
        map.perPage = line.number(0, 1 << 16);
        last(line).arguments.push_back(argument);
    }

    void finish() const
    {
        if (kernel.launches.empty())
        {
            throw refusal("recipe", "at least one launch", "none", "build the engine again with `mlac build`: the recipe is cut short");
        }
        for (Launch const& launch : kernel.launches)
        {
            if (launch.arguments.empty())
            {
                throw refusal("recipe", text("arguments of ", launch.function), "none",
                    "build the engine again with `mlac build`: the recipe is cut short");
            }
        }
    }
};
} // namespace

char const* nameOf(Tensor tensor)
{
    return kTensorNames[tensor];
}

Kernel readRecipe(std::string const& text)
{
    return Reader(text).kernel;
}
} // namespace mlac
