// The trellis code (trellis_code.h): Viterbi search for the states of a tile, and back from bits to weights.
//
// Before element i the search is in a node, the L - k_i bits of the last state that are kept; k_i new bits make the state
// x. Of x, the low L - k_{i+1} bits are the next node and the high k_{i+1} bits, called `top`, tell the survivors of that
// node apart: its predecessors in rising order. All costs are whole numbers times 2^s, s the largest k, so that `top`
// fits below them and the smallest sum is at once the smallest cost and, among equals, the lower predecessor.
//
// Why 32 bits are enough. A step costs v v - v t, |v| <= 510 and |t| <= 4080: between -1820700 and 2340900, D = 4161600
// apart. After m = ceil((L - min k) / min k) steps every node can be reached from the best one, so reachable nodes are at
// most m D apart. Nodes that a pinned start excludes begin m D + 1 above it: the steps until they are excluded no longer
// cannot make up for that, and they end at most 2 m D + 1 above the lowest. Two steps more are in a sum, since the minimum
// is subtracted one step late. So sums stay within 2 m D + 1 + 2 * 2340900, times 2^s: the most is 1.90e9 (L = 16, k of 5
// and 6, m = 3), less than 2^31.

constexpr std::int32_t kStepSpread = 4161600;
constexpr int kTilesAtOnce = 4;  // share every load of the tables

struct Search {
    const TrellisArgs* args;
    std::int32_t *cost, *next;   // [tiles][nodes]
    std::uint8_t* survivors;     // [256][tiles][nodes]: low s bits are the top of the state
    std::int16_t* targets;       // [tiles][256]
    std::uint16_t* states;       // [tiles][256]
    std::int64_t nodes;          // most in any step
};

static inline int lower_shift(const TrellisArgs& a) { return a.rate / 8; }
static inline int upper_shift(const TrellisArgs& a) { return (a.rate + 7) / 8; }

// Costs of all states of one element; `shift` is k of this element, or where that is more, the whole register's.
template <int tiles, int shift>
static void step(const Search& f, int element, std::uint8_t* survivors, std::int32_t* lowest_cost) {
    const TrellisArgs& a = *f.args;
    const int k = trellis_shift(element, a.rate), k_next = trellis_shift(element + 1, a.rate);
    const int high = a.states - k_next - k;  // a predecessor is its top bits over the high bits of the node
    const std::int64_t nodes = std::int64_t{1} << (a.states - k_next), stride = f.nodes;
    const std::int32_t* costs = f.cost;
    std::int32_t* next = f.next;
    const std::int32_t* table = a.tables + (k_next == lower_shift(a) ? 0 : std::int64_t{2} << a.states);
    const Ints keep = splat_int(-(1 << upper_shift(a)));
    Ints target[tiles], before[tiles], smallest[tiles];
    for (int s = 0; s < tiles; ++s) {
        target[s] = splat_int(static_cast<std::uint16_t>(-f.targets[s * kTile + element]));
        before[s] = splat_int(lowest_cost[s]);
        smallest[s] = splat_int(INT32_MAX);
    }
    for (std::int64_t node = 0; node < nodes; node += kInts) {
        const std::int32_t* entry = table + ((node & -16) << (k_next + 1)) + (node & 15);
        const std::int32_t* cost = costs + (node >> k);
        Ints best[tiles];
        for (int s = 0; s < tiles; ++s) best[s] = splat_int(INT32_MAX);
        for (int top = 0; top < 1 << k_next; ++top, entry += 32, cost += std::int64_t{1} << high) {
            const Ints slope = load_ints(entry), square = load_ints(entry + 16);
#pragma GCC unroll 4
            for (int s = 0; s < tiles; ++s) {
                const Ints branch = multiply_short(slope, target[s]) + square;
                best[s] = min(best[s], branch + spread<shift>(cost + s * stride));
            }
        }
        for (int s = 0; s < tiles; ++s) {
            store_bytes(survivors + s * stride + node, best[s]);
            const Ints left = (best[s] & keep) - before[s];
            store_ints(next + s * stride + node, left);
            smallest[s] = min(smallest[s], left);
        }
    }
    for (int s = 0; s < tiles; ++s) lowest_cost[s] = lowest(smallest[s]);
}

template <int tiles>
static void any_step(const Search& f, int element, std::uint8_t* survivors, std::int32_t* lowest_cost) {
    const int k = trellis_shift(element, f.args->rate);
    if (k == 1) return step<tiles, 1>(f, element, survivors, lowest_cost);
    if constexpr (kIntsLog > 2)
        if (k == 2) return step<tiles, 2>(f, element, survivors, lowest_cost);
    if constexpr (kIntsLog > 3)
        if (k == 3) return step<tiles, 3>(f, element, survivors, lowest_cost);
    step<tiles, kIntsLog>(f, element, survivors, lowest_cost);
}

// Finds the states of `steps` elements from `first` on, round the end of the tile. `pinned` is the node of each tile before
// the first and after the last of them; without it both are free.
template <int tiles>
static void search_states(Search f, int first, int steps, const std::int32_t* pinned) {
    const TrellisArgs& a = *f.args;
    const std::int32_t reach = (a.states - 1) / lower_shift(a), unit = 1 << upper_shift(a);
    std::int32_t lowest_cost[tiles];
    for (int s = 0; s < tiles; ++s) {
        for (std::int64_t i = 0; i < f.nodes; ++i) f.cost[s * f.nodes + i] = pinned ? (reach * kStepSpread + 1) * unit : 0;
        if (pinned) f.cost[s * f.nodes + pinned[s]] = 0;
        lowest_cost[s] = 0;
    }
    for (int i = 0; i < steps; ++i) {
        any_step<tiles>(f, (first + i) % kTile, f.survivors + i * tiles * f.nodes, lowest_cost);
        std::int32_t* spent = f.cost;
        f.cost = f.next, f.next = spent;
    }
    for (int s = 0; s < tiles; ++s) {
        const std::int32_t* cost = f.cost + s * f.nodes;
        std::int32_t node = pinned ? pinned[s] : 0;
        const std::int32_t ends = 1 << (a.states - trellis_shift(first + steps, a.rate));
        for (std::int32_t i = 0; !pinned && i < ends; ++i) node = cost[i] < cost[node] ? i : node;
        for (int i = steps - 1; i >= 0; --i) {
            const int element = (first + i) % kTile;
            const std::int32_t top = f.survivors[(i * tiles + s) * f.nodes + node] & (unit - 1);
            const std::int32_t state = top << (a.states - trellis_shift(element + 1, a.rate)) | node;
            f.states[s * kTile + element] = static_cast<std::uint16_t>(state);
            node = state >> trellis_shift(element, a.rate);
        }
    }
}

// The new bits of all states, one after another from the highest bit of the first word on.
static void pack_states(const std::uint16_t* states, int rate, std::int32_t* packed) {
    std::uint64_t bits = 0;
    for (int i = 0, waiting = 0; i < kTile; ++i) {
        const int k = trellis_shift(i, rate);
        bits = bits << k | (states[i] & ((1u << k) - 1));
        waiting += k;
        if (waiting < 32) continue;
        waiting -= 32;
        *packed++ = static_cast<std::int32_t>(static_cast<std::uint32_t>(bits >> waiting));
    }
}

static inline std::int16_t trellis_target(float value) {
    float twice = value * (2 * kTrellisUnit);
    twice = twice > -4080.0f ? twice : -4080.0f;
    twice = twice < 4080.0f ? twice : 4080.0f;
    return static_cast<std::int16_t>(rint_scalar(twice));
}

template <int tiles>
static void encode_tiles(const Search& f, std::int64_t first) {
    const TrellisArgs& a = *f.args;
    for (int i = 0; i < tiles * kTile; ++i) f.targets[i] = trellis_target(a.values[first * kTile + i]);
    search_states<tiles>(f, kTile - a.window, 2 * a.window, nullptr);
    std::int32_t seam[tiles];
    for (int s = 0; s < tiles; ++s) seam[s] = f.states[s * kTile] >> trellis_shift(0, a.rate);
    search_states<tiles>(f, 0, kTile, seam);
    for (int s = 0; s < tiles; ++s) pack_states(f.states + s * kTile, a.rate, a.packed + (first + s) * a.rate);
}

static void trellis_encode(const TrellisArgs& a, Rows tiles, float* scratch) {
    const std::int64_t nodes = std::int64_t{1} << (a.states - lower_shift(a));
    std::int32_t* costs = reinterpret_cast<std::int32_t*>(scratch);
    std::uint8_t* survivors = reinterpret_cast<std::uint8_t*>(costs + 2 * kTilesAtOnce * nodes);
    std::int16_t* targets = reinterpret_cast<std::int16_t*>(survivors + kTile * kTilesAtOnce * nodes);
    std::uint16_t* states = reinterpret_cast<std::uint16_t*>(targets + kTilesAtOnce * kTile);
    const Search f{&a, costs, costs + kTilesAtOnce * nodes, survivors, targets, states, nodes};
    std::int64_t i = tiles.begin;
    for (; i + kTilesAtOnce <= tiles.end; i += kTilesAtOnce) encode_tiles<kTilesAtOnce>(f, i);
    for (; i < tiles.end; ++i) encode_tiles<1>(f, i);
}

// Where the states of sixteen elements are: each ends in word `start + index`, `shift` bits before that word's end, and may
// begin in the word before.
struct Places {
    std::int32_t start, index[16];
    std::uint32_t shift[16];
};

static void trellis_decode(const TrellisArgs& a, Rows tiles) {
    Places places[kTile / 16];
    for (int i = 0; i < kTile; ++i) {
        const int last = trellis_bits(i + 1, a.rate) - 1;
        Places& p = places[i / 16];
        if (i % 16 == 0) p.start = last / 32;
        p.index[i % 16] = last / 32 - p.start;
        p.shift[i % 16] = static_cast<std::uint32_t>(31 - last % 32);
    }
    const std::uint32_t mask = (1u << a.states) - 1;
    std::uint32_t words[1 + kHighestRate + 16] = {};  // the last word goes before the first; pick may read sixteen
    for (std::int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        __builtin_memcpy(words + 1, a.packed + tile * a.rate, sizeof(std::int32_t) * static_cast<std::size_t>(a.rate));
        words[0] = words[a.rate];
        for (int i = 0; i < kTile; i += 16) {
            const Places& p = places[i / 16];
            std::uint32_t before[16], last[16], bits[16];
            pick(before, words + p.start, p.index);
            pick(last, words + p.start + 1, p.index);
            float values[16];
            for (int l = 0; l < 16; ++l) {
                const std::uint32_t state = (before[l] << 1 << (31 - p.shift[l]) | last[l] >> p.shift[l]) & mask;
                values[l] = static_cast<float>(trellis_value(state)) * static_cast<float>(1 / 147.7);
            }
            const std::int64_t to = tile * kTile + i;
            if (a.dtype == Dtype::f32) {
                __builtin_memcpy(static_cast<float*>(a.decoded) + to, values, sizeof values);
                continue;
            }
            __builtin_memcpy(bits, values, sizeof bits);
            std::uint16_t* out = static_cast<std::uint16_t*>(a.decoded) + to;
            for (int l = 0; l < 16; ++l)  // to the nearest; none of the 1021 values lies half-way
                out[l] = static_cast<std::uint16_t>((bits[l] + 0x8000u) >> 16);
        }
    }
}
