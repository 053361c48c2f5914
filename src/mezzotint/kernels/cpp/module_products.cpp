// Python's view of the products with packed weights: checks shapes, lays out memory, divides outputs among threads.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <numeric>
#include <string>
#include <vector>

#include "module.h"
#include "parallel.h"
#include "products_levels.h"

namespace nb = nanobind;

namespace mezzotint {

void bind_products(nb::module_& m);

namespace {

// Tensors arrive as addresses: taking one as an array costs two microseconds, a product with a small matrix ten. Their
// owner, products.py, has checked what they are.
template <typename T>
T* at_address(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct Level {
    const char* name;
    ProductKernels kernels;
};

std::vector<Level> usable_levels() {
    std::vector<Level> found{{"portable", portable::product_table()}};
#if defined(MEZZOTINT_HAS_AVX2)
    if (runs_avx2()) found.push_back({"avx2", avx2::product_table()});
#endif
#if defined(MEZZOTINT_HAS_VNNI)
    if (runs_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
        found.push_back({"vnni", vnni::product_table()});
#endif
    return found;
}

const std::vector<Level>& levels() {
    static const std::vector<Level> found = usable_levels();
    return found;
}

const ProductKernels& kernels_of(const std::string& level) {
    for (const Level& candidate : levels())
        if (level.empty() ? &candidate == &levels().back() : level == candidate.name) return candidate.kernels;
    throw std::invalid_argument("level '" + level + "' is not available on this processor");
}

constexpr std::int64_t round_up(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

// Rows of x with those of zeros after them: a multiple of `most` and a power of two.
std::int64_t padded_rows(std::int64_t batch, std::int64_t most) {
    std::int64_t rest = 1;
    while (rest < batch % most) rest *= 2;
    return batch - batch % most + (batch % most == 0 ? 0 : rest);
}

// One allocation cut into arrays that start on cache lines.
class Arrays {
  public:
    template <typename T>
    void add(T*& array, std::int64_t count) {
        wanted_.push_back({reinterpret_cast<void**>(&array), floats_});
        floats_ += round_up(static_cast<std::int64_t>(sizeof(T)) * count, 64) / 4;
    }
    void allocate() {
        memory_ = std::make_unique<Scratch>(floats_);
        for (const Wanted& array : wanted_) *array.where = memory_->get() + array.offset;
    }

  private:
    struct Wanted {
        void** where;
        std::int64_t offset;
    };
    std::vector<Wanted> wanted_;
    std::int64_t floats_ = 0;
    std::unique_ptr<Scratch> memory_;
};

// Nanoseconds an output takes, roughly: weights and what each further row of x adds.
double cost(std::int64_t weights, std::int64_t batch, double per_second) {
    return static_cast<double>(weights) / per_second * (1.0 + 0.15 * static_cast<double>(batch));
}

void trellis(std::uintptr_t x, std::uintptr_t packed, std::uintptr_t out, std::int64_t batch, std::int64_t in_tiles,
             std::int64_t out_tiles, int rate, int states, int threads, const std::string& level) {
    const ProductKernels& kernels = kernels_of(level);
    require(states == 12 || states == 16, "states has to be 12 or 16");
    require(rate >= kLeastRate && rate <= kMostRate, "packed has to have 8 to 48 words a tile");
    TrellisProductArgs a{};
    a.x = at_address<const float>(x), a.packed = at_address<const std::uint32_t>(packed), a.out = at_address<float>(out);
    a.batch = batch, a.padded = padded_rows(batch, kMostTrellisRows);
    a.in_tiles = in_tiles, a.out_tiles = out_tiles, a.rate = rate, a.states = states;
    nb::gil_scoped_release release;
    Arrays arrays;
    arrays.add(a.q, a.padded * a.in_tiles * 16);
    arrays.add(a.offset, a.padded * (round_up(a.in_tiles, kTilesPerBlock) / kTilesPerBlock) * 8);
    arrays.add(a.unit, a.batch);
    arrays.allocate();
    kernels.trellis_inputs(a);
    over_rows(a.out_tiles, threads, cost(256 * a.in_tiles, a.batch, 15.0), [&](Rows part, std::size_t) {
        const Scratch scratch(kTrellisScratch);
        kernels.trellis(a, part, scratch.get());
    });
}

// Columns that every piece can have: 32, 64 or 128, or 0 if groups do not allow it.
int regular_piece(std::int64_t group_size) {
    const std::int64_t piece = std::gcd(group_size, kMostPiece);
    return piece >= 32 ? static_cast<int>(piece) : 0;
}

struct Pieces {
    std::vector<std::int32_t> begin, group;
    std::int64_t count = 0;

    Pieces(std::int64_t n, std::int64_t group_size, std::int64_t longest) {
        std::int64_t at = 0;
        for (std::int64_t g = 0; at < n; ++g)
            for (const std::int64_t end = std::min(n, (g + 1) * group_size); at < end; at = std::min(end, at + longest)) {
                begin.push_back(static_cast<std::int32_t>(at));
                group.push_back(static_cast<std::int32_t>(g));
            }
        count = static_cast<std::int64_t>(begin.size());
        begin.resize(static_cast<std::size_t>(round_up(count, 16) + 1), static_cast<std::int32_t>(n));
        group.resize(static_cast<std::size_t>(round_up(count, 16)));
    }
};

// Lays out what numbers and tables have in common, and calls work(kernels, a, outputs, thread's scratch of that many
// floats) on the outputs, divided among threads.
template <typename Work>
void in_groups(PackedArgs a, std::int64_t group_size, int threads, const std::string& level, double per_second,
               std::int64_t scratch_bytes, const Work& work) {
    const ProductKernels& kernels = kernels_of(level);
    require(a.n <= std::int64_t(1) << 30, "x has too many columns");
    require(group_size >= 1, "group_size has to be positive");
    a.padded = padded_rows(a.batch, kMostPackedRows);
    a.row_bytes = (a.n / a.width * a.bits + 31) / 32 * 4, a.groups = a.n == 0 ? 0 : (a.n - 1) / group_size + 1;
    a.padded_n = round_up(a.n, kColumns) + kMostPiece;  // not a power of two: rows would compete for the same cache lines
    nb::gil_scoped_release release;
    if (a.groups == 1) group_size = a.padded_n;  // the same groups, and a size that the fast kernels take
    a.piece = regular_piece(group_size);
    const Pieces pieces(a.n, group_size, a.piece ? a.piece : kMostPiece);
    a.begin_of_piece = pieces.begin.data(), a.group_of_piece = pieces.group.data();
    a.piece_count = pieces.count, a.padded_pieces = round_up(pieces.count, 16);
    a.piece_is_group = pieces.count == a.groups;
    Arrays arrays;
    arrays.add(a.q, a.padded * a.padded_n);
    arrays.add(a.high, a.padded * a.padded_n);
    arrays.add(a.low, a.padded * a.padded_n);
    arrays.add(a.piece_sum, a.padded * a.padded_pieces);
    arrays.add(a.unit, a.batch);
    arrays.allocate();
    kernels.packed_inputs(a);
    over_rows(a.out_rows, threads, cost(a.n, a.batch, per_second), [&](Rows part, std::size_t) {
        const Scratch scratch(a.padded_n * scratch_bytes / 4);
        work(kernels, a, part, scratch.get());
    });
}

void packed(std::uintptr_t x, std::uintptr_t words, std::uintptr_t scale, std::uintptr_t zero_point, std::uintptr_t out,
            std::int64_t batch, std::int64_t n, std::int64_t rows, std::int64_t group_size, int bits, int threads,
            const std::string& level) {
    require(bits >= 2 && bits <= 8, "bits has to be 2 to 8");
    PackedArgs a{};
    a.x = at_address<const float>(x), a.words = at_address<const std::uint8_t>(words), a.out = at_address<float>(out);
    a.scale = at_address<const float>(scale), a.zero_point = at_address<const float>(zero_point);
    a.batch = batch, a.n = n, a.bits = bits, a.out_rows = rows, a.width = 1, a.step = 1.0;
    in_groups(a, group_size, threads, level, 30.0, 1,
              [](const ProductKernels& kernels, const PackedArgs& args, Rows part, float* scratch) {
                  kernels.packed(args, part, scratch);
              });
}

void table(std::uintptr_t x, std::uintptr_t words, std::uintptr_t scale, std::uintptr_t levels, double step,
           std::uintptr_t out, std::int64_t batch, std::int64_t n, std::int64_t rows, std::int64_t group_size, int width,
           int bits, int threads, const std::string& level) {
    require(width == 1 || width == 2, "a code has to stand for 1 or 2 columns");
    require(bits >= 2 && bits <= 12, "bits has to be 2 to 12");
    require(n % width == 0, "x has to have whole codes of columns");
    PackedArgs a{};
    a.x = at_address<const float>(x), a.words = at_address<const std::uint8_t>(words), a.out = at_address<float>(out);
    a.scale = at_address<const float>(scale), a.levels = at_address<const std::int16_t>(levels), a.step = step;
    a.batch = batch, a.n = n, a.bits = bits, a.out_rows = rows, a.width = width;
    in_groups(a, group_size, threads, level, bits <= 8 ? 20.0 : 4.0, 2,
              [](const ProductKernels& kernels, const PackedArgs& args, Rows part, float* scratch) {
                  kernels.table(args, part, scratch);
              });
}

std::vector<std::string> product_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.emplace_back(level.name);
    return names;
}

}  // namespace

void bind_products(nb::module_& m) {
    const auto at = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("product_levels", &product_levels);
    m.def("trellis_matmul", &trellis, at("x"), at("packed"), at("out"), at("batch"), at("in_tiles"), at("out_tiles"),
          at("rate"), at("states"), at("threads"), at("level"));
    m.def("packed_matmul", &packed, at("x"), at("words"), at("scale"), at("zero_point"), at("out"), at("batch"), at("n"),
          at("rows"), at("group_size"), at("bits"), at("threads"), at("level"));
    m.def("table_matmul", &table, at("x"), at("words"), at("scale"), at("levels"), at("step"), at("out"), at("batch"),
          at("n"), at("rows"), at("group_size"), at("width"), at("bits"), at("threads"), at("level"));
}

}  // namespace mezzotint
