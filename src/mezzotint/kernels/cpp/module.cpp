// Python's view of the kernels: checks shapes, chooses the build for this processor, divides rows among threads.
#include <nanobind/stl/vector.h>

#include <limits>
#include <vector>

#include "module.h"
#include "parallel.h"

namespace mezzotint {

namespace {

struct Level {
    const char* name;
    Kernels kernels;
};

std::vector<Level> usable_levels() {
    std::vector<Level> found{{"portable", portable::table()}};
#if defined(MEZZOTINT_HAS_AVX2)
    if (runs_avx2()) found.push_back({"avx2", avx2::table()});
#endif
#if defined(MEZZOTINT_HAS_AVX512)
    if (runs_avx512()) found.push_back({"avx512", avx512::table()});
#endif
    return found;
}

const std::vector<Level>& levels() {
    static const std::vector<Level> found = usable_levels();
    return found;
}

}  // namespace

const Kernels& kernels_of(const std::string& level) {
    for (const Level& candidate : levels())
        if (level.empty() ? &candidate == &levels().back() : level == candidate.name) return candidate.kernels;
    throw std::invalid_argument("level '" + level + "' is not available on this processor");
}

namespace {

// Groups of the columns, after checking that `per_group` is [rows, groups].
template <typename A>
std::int64_t groups_of(const A& per_group, std::int64_t rows, std::int64_t n, std::int64_t group_size) {
    require(group_size >= 1, "group_size has to be positive");
    const std::int64_t groups = (n + group_size - 1) / group_size;
    require(size(per_group, 0) == rows && size(per_group, 1) == groups, "scale and zero point have to be [rows, groups]");
    return groups;
}

float top_of(int bits) {
    require(bits >= 1 && bits <= 8, "bits has to be 1 to 8");
    return static_cast<float>((1 << bits) - 1);
}

PackArgs pack_args(std::uint8_t* code, std::int32_t* packed, std::int64_t n, std::int64_t words, int bits) {
    top_of(bits);
    require(words == (n * bits + 31) / 32, "packed has to have ceil(n * bits / 32) words a row");
    return {code, reinterpret_cast<std::uint8_t*>(packed), n, 4 * words, bits};
}

bool pack(Matrix<const std::uint8_t> code, Matrix<std::int32_t> packed, int bits, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    require(code.shape(0) == packed.shape(0), "code and packed have to have as many rows");
    const std::int64_t rows = size(code, 0), n = size(code, 1);
    const PackArgs a = pack_args(const_cast<std::uint8_t*>(code.data()), packed.data(), n, size(packed, 1), bits);
    nb::gil_scoped_release release;
    std::vector<char> fits(static_cast<std::size_t>(std::max(threads, 1)), 1);
    over_rows(rows, threads, 0.5 * static_cast<double>(n), [&](Rows part, std::size_t i) { fits[i] = kernels.pack(a, part); });
    return std::find(fits.begin(), fits.end(), 0) == fits.end();
}

void unpack(Matrix<const std::int32_t> packed, Matrix<std::uint8_t> code, int bits, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    require(code.shape(0) == packed.shape(0), "code and packed have to have as many rows");
    const std::int64_t rows = size(code, 0), n = size(code, 1);
    const PackArgs a = pack_args(code.data(), const_cast<std::int32_t*>(packed.data()), n, size(packed, 1), bits);
    nb::gil_scoped_release release;
    over_rows(rows, threads, 0.5 * static_cast<double>(n), [&](Rows part, std::size_t) { kernels.unpack(a, part); });
}

void encode(AnyMatrix values, Matrix<const float> scale, Matrix<const float> zero_point, Matrix<std::uint8_t> code,
            std::int64_t group_size, int bits, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(values, 0), n = size(values, 1);
    const std::int64_t groups = groups_of(scale, rows, n, group_size);
    require(same_shape(scale, zero_point) && same_shape(values, code), "shapes of values, code, scale, zero point differ");
    const AffineArgs a{values.data(), dtype_of(values), code.data(), nullptr, scale.data(), zero_point.data(),
                       n, group_size, groups, top_of(bits)};
    nb::gil_scoped_release release;
    over_rows(rows, threads, 0.5 * static_cast<double>(n), [&](Rows part, std::size_t) { kernels.encode(a, part); });
}

void decode(Matrix<const std::uint8_t> code, Matrix<const float> scale, Matrix<const float> zero_point,
            Matrix<float> decoded, std::int64_t group_size, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(code, 0), n = size(code, 1);
    const std::int64_t groups = groups_of(scale, rows, n, group_size);
    require(same_shape(scale, zero_point) && same_shape(code, decoded), "shapes of values, code, scale, zero point differ");
    const AffineArgs a{nullptr, Dtype::f32, const_cast<std::uint8_t*>(code.data()), decoded.data(), scale.data(),
                       zero_point.data(), n, group_size, groups, 0.0f};
    nb::gil_scoped_release release;
    over_rows(rows, threads, 0.5 * static_cast<double>(n), [&](Rows part, std::size_t) { kernels.decode(a, part); });
}

void min_max(AnyMatrix values, Matrix<float> lowest, Matrix<float> highest, std::int64_t group_size, int threads,
             const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(values, 0), n = size(values, 1);
    const std::int64_t groups = groups_of(lowest, rows, n, group_size);
    require(same_shape(lowest, highest), "lowest and highest have to have one shape");
    const MinMaxArgs a{values.data(), dtype_of(values), lowest.data(), highest.data(), n, group_size, groups};
    nb::gil_scoped_release release;
    over_rows(rows, threads, 0.3 * static_cast<double>(n), [&](Rows part, std::size_t) { kernels.min_max(a, part); });
}

// Importance by group, each group padded to whole lanes: what the kernel reads beside its padded values.
std::vector<float> padded_groups(const Vector<const float>& importance, const SearchArgs& a) {
    std::vector<float> out(static_cast<std::size_t>(a.groups * a.padded), 0.0f);
    for (std::int64_t j = 0; j < a.n; ++j)
        out[static_cast<std::size_t>(j / a.group_size * a.padded + j % a.group_size)] = importance.data()[j];
    return out;
}

// What scales are rounded to, by the bits that a float32 loses by it.
ScaleType scale_type_of(int dropped_bits) {
    switch (dropped_bits) {
        case 0: return {Dtype::f32, std::numeric_limits<float>::min(), std::numeric_limits<float>::max()};
        case 13: return {Dtype::f16, 0x1p-14f, 65504.0f};
        case 16: return {Dtype::bf16, std::numeric_limits<float>::min(), 0x1.fep127f};
        default: throw std::invalid_argument("unknown dtype of scales");
    }
}

void search(AnyMatrix values, nb::object importance, Matrix<const float> fractions, Matrix<float> scale,
            Matrix<float> zero_point, std::int64_t group_size, int bits, int span, bool symmetric, double power,
            int dropped_bits, int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(values, 0), n = size(values, 1);
    SearchArgs a{};
    a.groups = groups_of(scale, rows, n, group_size);
    require(same_shape(scale, zero_point), "scale and zero point have to have one shape");
    require(size(fractions, 0) == 2, "fractions has to be [2, steps]");
    require(span >= 0, "span has to be 0 or more");
    require(power == 2.0 || power == 2.5 || power == 3.0, "power has to be 2, 2.5 or 3");
    top_of(bits);
    a.values = values.data(), a.dtype = dtype_of(values);
    a.n = n, a.group_size = group_size, a.steps = size(fractions, 1);
    a.padded = (std::min(group_size, n) + kLanes - 1) / kLanes * kLanes;
    a.fractions = fractions.data(), a.midpoints = fractions.data() + a.steps;
    a.scale = scale.data(), a.zero_point = zero_point.data();
    a.bits = bits, a.span = span, a.symmetric = symmetric;
    a.power = power == 2.0 ? Power::two : power == 2.5 ? Power::two_and_a_half : Power::three;
    a.scale_type = scale_type_of(dropped_bits);
    std::vector<float> weights;
    if (!importance.is_none()) {
        const auto vector = nb::cast<Vector<const float>>(importance, false);
        require(size(vector, 0) == n, "importance has to have a value per column");
        weights = padded_groups(vector, a);
        a.importance = weights.data();
    }
    const double candidates = static_cast<double>(3 + a.steps * (symmetric ? 2 : 2 * span + 1));
    nb::gil_scoped_release release;
    over_rows(rows, threads, 0.1 * candidates * static_cast<double>(n), [&](Rows part, std::size_t) {
        const Scratch scratch(a.padded + 2 * a.steps);
        kernels.search(a, part, scratch.get());
    });
}

// The squares between the rows of blocks, checked to be [blocks * block, block], or null; `block` is 16 then.
const float* between_rows(const nb::object& given, std::int64_t rows, std::int64_t& block) {
    block = kLanes;
    if (given.is_none()) return nullptr;
    const auto squares = nb::cast<Matrix<const float>>(given, false);  // `given` keeps it alive
    block = size(squares, 1);
    require(block > 0 && block % kLanes == 0, "blocks of rows have to be a multiple of 16");
    require(size(squares, 0) == (rows + block - 1) / block * block, "there has to be a square for each block of rows");
    return squares.data();
}

// Calls work(Rows of blocks, part) for blocks of rows of k columns; `waiting` is what a weight costs more, in nanoseconds,
// where rows wait for each other.
template <typename Args, typename Work>
void over_blocks(const Args& a, bool joint, double waiting, int threads, const Work& work) {
    const double k = static_cast<double>(a.k), weight = 2.0 + 0.05 * k + (joint ? waiting : 0.0);
    over_rows((a.rows + a.block - 1) / a.block, threads, static_cast<double>(a.block) * k * weight, work);
}

void gptq(Matrix<float> work, Matrix<const float> factor, Matrix<const float> scale, Matrix<const float> zero_point,
          Matrix<std::uint8_t> code, Matrix<float> error, nb::object taken, int bits, int threads,
          const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(work, 0), k = size(work, 1);
    require(size(factor, 0) == k && size(factor, 1) == k, "factor has to be [k, k]");
    require(same_shape(work, scale) && same_shape(work, zero_point) && same_shape(work, code) && same_shape(work, error),
            "scale, zero point, code and error have to have the shape of work");
    GptqArgs a{work.data(), factor.data(), scale.data(), zero_point.data(), code.data(), error.data(),
               k, top_of(bits), nullptr, rows, kLanes};
    a.taken = between_rows(taken, rows, a.block);
    nb::gil_scoped_release release;
    over_blocks(a, a.taken != nullptr, 20.0, threads, [&](Rows blocks, std::size_t) {
        const Scratch scratch((3 * k + 1) * a.block);
        kernels.gptq(a, blocks, scratch.get());
    });
}

void descend(Matrix<float> value, Matrix<const float> gradient, Matrix<const float> gram, Matrix<const float> scale,
             Matrix<const float> zero_point, Matrix<std::uint8_t> code, nb::object curvature, int bits, int threads,
             const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(value, 0), k = size(value, 1);
    require(size(gram, 0) == k && size(gram, 1) == k, "gram has to be [k, k]");
    require(same_shape(value, gradient) && same_shape(value, scale) && same_shape(value, zero_point) &&
                same_shape(value, code),
            "gradient, scale, zero point and code have to have the shape of value");
    DescendArgs a{value.data(), gradient.data(), gram.data(), scale.data(), zero_point.data(), code.data(), k,
                  top_of(bits), nullptr, rows, kLanes};
    a.curvature = between_rows(curvature, rows, a.block);
    nb::gil_scoped_release release;
    over_blocks(a, a.curvature != nullptr, 30.0, threads, [&](Rows blocks, std::size_t) {
        const Scratch scratch(5 * k * a.block);
        kernels.descend(a, blocks, scratch.get());
    });
}

void refit(Vector<float> scale, Vector<float> zero_point, Matrix<float> pulls, Matrix<const float> bends, float flat,
           nb::object between, nb::object curvature, Matrix<float> steps, int bits, bool symmetric, int dropped_bits,
           int threads, const std::string& level) {
    const Kernels& kernels = kernels_of(level);
    const std::int64_t rows = size(scale, 0);
    require(size(zero_point, 0) == rows, "scale and zero point have to have one shape");
    require(size(pulls, 0) == 2 && size(pulls, 1) == rows && same_shape(pulls, bends) && same_shape(pulls, steps),
            "pulls, bends and steps have to be [2, rows]");
    RefitArgs a{};
    a.scale = scale.data(), a.zero_point = zero_point.data();
    a.pull = pulls.data(), a.lift = pulls.data() + rows;
    a.own = bends.data(), a.both = bends.data() + rows, a.flat = flat;
    a.stretch = steps.data(), a.shift = steps.data() + rows;
    a.rows = rows;
    a.between = between_rows(between, rows, a.block);
    std::int64_t block = 0;
    a.curvature = between_rows(curvature, rows, block);
    require(a.between && a.curvature && a.block == block, "between and curvature have to be squares of one size");
    a.top = top_of(bits), a.symmetric = symmetric, a.scale_type = scale_type_of(dropped_bits);
    nb::gil_scoped_release release;
    over_rows((rows + block - 1) / block, threads, static_cast<double>(block) * (30.0 + static_cast<double>(block)),
              [&](Rows blocks, std::size_t) { kernels.refit(a, blocks); });
}

std::vector<std::string> available_levels() {
    std::vector<std::string> names;
    for (const Level& level : levels()) names.emplace_back(level.name);
    return names;
}

}  // namespace
}  // namespace mezzotint

NB_MODULE(_native, m) {
    using namespace mezzotint;
    m.doc() = "Kernels for the CPU; call them through mezzotint.kernels.";
    const auto at = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("available_levels", &available_levels);
    m.def("multiplies_bfloat16", &multiplies_bfloat16);
    m.def("pack", &pack, at("code"), at("packed"), at("bits"), at("threads"), at("level"));
    m.def("unpack", &unpack, at("packed"), at("code"), at("bits"), at("threads"), at("level"));
    m.def("encode", &encode, at("values"), at("scale"), at("zero_point"), at("code"), at("group_size"), at("bits"),
          at("threads"), at("level"));
    m.def("decode", &decode, at("code"), at("scale"), at("zero_point"), at("decoded"), at("group_size"), at("threads"),
          at("level"));
    m.def("min_max", &min_max, at("values"), at("lowest"), at("highest"), at("group_size"), at("threads"), at("level"));
    m.def("search", &search, at("values"), at("importance").none(), at("fractions"), at("scale"), at("zero_point"),
          at("group_size"), at("bits"), at("span"), at("symmetric"), at("power"), at("dropped_bits"), at("threads"),
          at("level"));
    m.def("gptq", &gptq, at("work"), at("factor"), at("scale"), at("zero_point"), at("code"), at("error"),
          at("taken").none(), at("bits"), at("threads"), at("level"));
    m.def("descend", &descend, at("value"), at("gradient"), at("gram"), at("scale"), at("zero_point"), at("code"),
          at("curvature").none(), at("bits"), at("threads"), at("level"));
    m.def("refit", &refit, at("scale"), at("zero_point"), at("pulls"), at("bends"), nb::arg("flat"),
          nb::arg("between"), nb::arg("curvature"), at("steps"), at("bits"), at("symmetric"), at("dropped_bits"),
          at("threads"), at("level"));
    bind_hadamard(m);
    bind_products(m);
    bind_trellis(m);
}
