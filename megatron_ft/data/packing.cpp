// Packing of documents into sequences of at most `capacity` tokens, in two orders, and the interleaving of weighted
// datasets.
//
// Every function is pure: the same lengths and seed give the same sequences on every machine, so it does not matter
// which process builds an index. The GIL is released during the work.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
using Lengths = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Weights = py::array_t<double, py::array::c_style | py::array::forcecast>;

namespace {

// Bounds that all code below relies on: no index leaves its array, and no sum of lengths overflows.
void check(const Lengths& lengths, int64_t capacity) {
    if (capacity < 1 || capacity > INT32_MAX - 1) throw std::invalid_argument("capacity must be positive and fit 31 bits");
    if (lengths.size() > INT32_MAX) throw std::invalid_argument("more than 2^31 - 1 documents");
    const int32_t* length = lengths.data();
    for (py::ssize_t i = 0; i < lengths.size(); ++i)
        if (length[i] < 0) throw std::invalid_argument("document " + std::to_string(i) + " has a negative length");
}

// A numpy array that takes over a vector without a copy.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

// SplitMix64 (Steele, Lea and Flood 2014). The standard library's distributions differ between implementations.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t next() {
        uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }

    // Uniform in [0, bound), without bias (Lemire 2019).
    uint64_t below(uint64_t bound) {
        auto product = static_cast<unsigned __int128>(next()) * bound;
        if (static_cast<uint64_t>(product) < bound) {
            const uint64_t threshold = -bound % bound;
            while (static_cast<uint64_t>(product) < threshold) product = static_cast<unsigned __int128>(next()) * bound;
        }
        return static_cast<uint64_t>(product >> 64);
    }

    template <typename T>
    void shuffle(std::vector<T>& values) {
        for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
    }

private:
    uint64_t state_;
};

// Set of integers in [0, size) that finds the smallest member >= x by reading one word per level.
class OrderedSet {
public:
    explicit OrderedSet(size_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(size_t x) {
        for (auto& level : levels_) {
            level[x / 64] |= uint64_t{1} << (x % 64);
            x /= 64;
        }
    }

    void erase(size_t x) {
        for (auto& level : levels_) {
            if (level[x / 64] &= ~(uint64_t{1} << (x % 64))) return;
            x /= 64;
        }
    }

    // Smallest member >= x, or -1.
    int64_t at_least(size_t x) const {
        for (size_t depth = 0; depth < levels_.size(); ++depth) {
            if (x / 64 >= levels_[depth].size()) return -1;
            const uint64_t above = levels_[depth][x / 64] & (~uint64_t{0} << (x % 64));
            if (above) {
                x = (x / 64) * 64 + __builtin_ctzll(above);
                while (depth-- > 0) x = x * 64 + __builtin_ctzll(levels_[depth][x]);
                return static_cast<int64_t>(x);
            }
            x = x / 64 + 1;
        }
        return -1;
    }

private:
    std::vector<std::vector<uint64_t>> levels_;
};

// The mtf branch's packing: documents in the given order, and a sequence ends where the next document does not fit. A
// document longer than `capacity` ends the sequence before it and is left out. Returns start and end of each sequence in
// `order`, and the start of the incomplete last sequence.
std::pair<std::vector<int64_t>, int64_t> greedy_bounds(const int32_t* lengths, const int64_t* order, int64_t count, int64_t capacity) {
    std::vector<int64_t> bounds;
    int64_t start = 0, filled = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = lengths[order[i]];
        filled += length;
        if (filled <= capacity) continue;
        if (i > start) {
            bounds.push_back(start);
            bounds.push_back(i);
        }
        const bool fits = length <= capacity;
        start = fits ? i : i + 1;
        filled = fits ? length : 0;
    }
    return {std::move(bounds), start};
}

// Best-fit decreasing within a window of the shuffled documents.
//
// A window holds `lookahead` documents, and at least MIN_SEQUENCES sequences of tokens. Its documents, longest first, each
// go into the fullest sequence that has room. Full sequences are emitted; the emptiest, at most half, are broken up and
// their documents move to the next window. The last window emits everything.
class BestFit {
public:
    BestFit(const int32_t* lengths, int64_t capacity, int64_t lookahead, uint64_t seed)
        : lengths_(lengths), capacity_(capacity), lookahead_(lookahead), random_(seed), spaces_(capacity + 1), sequence_with_(capacity + 1, NONE) {}

    void pack(int64_t count) {
        std::vector<int64_t> order;
        order.reserve(count);
        for (int64_t i = 0; i < count; ++i)
            if (lengths_[i] <= capacity_) order.push_back(i);
        random_.shuffle(order);
        documents.reserve(order.size());
        size_t next = 0;
        int64_t tokens = 0;
        while (next < order.size() || !window_.empty()) {
            while (next < order.size() && (static_cast<int64_t>(window_.size()) < lookahead_ || tokens < MIN_SEQUENCES * capacity_)) {
                const int64_t document = order[next++];
                window_.push_back({lengths_[document], document});
                tokens += lengths_[document];
            }
            fill_sequences();
            tokens = emit(next == order.size());
        }
    }

    std::vector<int64_t> documents;  // every document once, sequence by sequence
    std::vector<int64_t> ends;       // where each sequence ends in `documents`

private:
    static constexpr int32_t NONE = -1;
    static constexpr int64_t MIN_SEQUENCES = 8;
    static constexpr int64_t SLACK = 512;  // a sequence is full if less than 1/SLACK of it is free

    struct Document {
        int32_t length;
        int64_t id;
    };
    struct Sequence {
        int64_t space;       // free tokens
        int32_t first;       // its newest document in window_; chain_ links the others
        int32_t same_space;  // another sequence with as much space
    };

    void fill_sequences() {
        sort_longest_first();
        sequences_.clear();
        chain_.assign(window_.size(), NONE);
        for (size_t i = 0; i < window_.size(); ++i) {
            const int64_t space = spaces_.at_least(window_[i].length);
            int32_t s;
            if (space < 0) {
                s = static_cast<int32_t>(sequences_.size());
                sequences_.push_back({capacity_, NONE, NONE});
            } else {
                s = take(space);
            }
            chain_[i] = sequences_[s].first;
            sequences_[s].first = static_cast<int32_t>(i);
            sequences_[s].space -= window_[i].length;
            put(s);
        }
        for (const Sequence& sequence : sequences_) {
            sequence_with_[sequence.space] = NONE;
            spaces_.erase(sequence.space);
        }
    }

    // Radix sort; equal lengths keep their shuffled order.
    void sort_longest_first() {
        constexpr int BITS = 11, DIGITS = 1 << BITS;
        for (int shift = 0; capacity_ >> shift; shift += BITS) {
            const auto digit = [&](const Document& d) { return ((capacity_ - d.length) >> shift) & (DIGITS - 1); };
            std::array<int32_t, DIGITS + 1> next{};
            for (const Document& document : window_) ++next[digit(document) + 1];
            for (int d = 0; d < DIGITS; ++d) next[d + 1] += next[d];
            sorted_.resize(window_.size());
            for (const Document& document : window_) sorted_[next[digit(document)]++] = document;
            std::swap(window_, sorted_);
        }
    }

    int32_t take(int64_t space) {
        const int32_t s = sequence_with_[space];
        sequence_with_[space] = sequences_[s].same_space;
        if (sequence_with_[space] == NONE) spaces_.erase(space);
        return s;
    }

    void put(int32_t s) {
        const int64_t space = sequences_[s].space;
        sequences_[s].same_space = sequence_with_[space];
        sequence_with_[space] = s;
        spaces_.insert(space);
    }

    // Append the finished sequences in random order and keep the others' documents as the next window; returns the
    // tokens of these documents.
    int64_t emit(bool last) {
        std::stable_sort(sequences_.begin(), sequences_.end(), [](const Sequence& a, const Sequence& b) { return a.space < b.space; });
        size_t finished = sequences_.size();
        if (!last)
            while (finished > (sequences_.size() + 1) / 2 && sequences_[finished - 1].space * SLACK >= capacity_) --finished;
        std::vector<Document> waiting;
        int64_t tokens = 0;
        for (size_t s = finished; s < sequences_.size(); ++s)
            for (int32_t i = sequences_[s].first; i != NONE; i = chain_[i]) {
                waiting.push_back(window_[i]);
                tokens += window_[i].length;
            }
        sequences_.resize(finished);
        const bool emptiest_last = last && finished > 1;
        const Sequence emptiest = sequences_.back();
        if (emptiest_last) sequences_.pop_back();
        random_.shuffle(sequences_);
        if (emptiest_last) sequences_.push_back(emptiest);
        for (const Sequence& sequence : sequences_) {
            for (int32_t i = sequence.first; i != NONE; i = chain_[i]) documents.push_back(window_[i].id);
            ends.push_back(static_cast<int64_t>(documents.size()));
        }
        window_ = std::move(waiting);
        return tokens;
    }

    const int32_t* lengths_;
    const int64_t capacity_, lookahead_;
    Random random_;
    OrderedSet spaces_;                   // the free spaces that some sequence has
    std::vector<int32_t> sequence_with_;  // by space: a sequence with that space; same_space links the others
    std::vector<Document> window_, sorted_;
    std::vector<int32_t> chain_;
    std::vector<Sequence> sequences_;
};

py::tuple greedy(const Lengths& lengths, const Ids& order, int64_t capacity) {
    check(lengths, capacity);
    const int64_t documents = lengths.size(), count = order.size();
    const int32_t* length = lengths.data();
    const int64_t* id = order.data();
    std::pair<std::vector<int64_t>, int64_t> result;
    {
        py::gil_scoped_release release;
        for (int64_t i = 0; i < count; ++i)
            if (id[i] < 0 || id[i] >= documents) throw std::out_of_range("`order` has a document without a length");
        result = greedy_bounds(length, id, count, capacity);
    }
    const auto sequences = static_cast<py::ssize_t>(result.first.size() / 2);
    return py::make_tuple(to_numpy(std::move(result.first)).reshape({sequences, py::ssize_t{2}}), result.second);
}

py::tuple best_fit(const Lengths& lengths, int64_t capacity, int64_t lookahead, uint64_t seed) {
    check(lengths, capacity);
    if (lookahead < 1) throw std::invalid_argument("lookahead must be positive");
    const int64_t count = lengths.size();
    const int32_t* length = lengths.data();
    BestFit packer(length, capacity, lookahead, seed);
    {
        py::gil_scoped_release release;
        packer.pack(count);
    }
    return py::make_tuple(to_numpy(std::move(packer.documents)), to_numpy(std::move(packer.ends)));
}

// The dataset of each sample, and the sample's number in that dataset: always the dataset furthest below its weight
// (Megatron's rule; the first one on a tie). A dataset with a limit is skipped once it has supplied that many.
py::tuple blend(const Weights& weights, const Ids& limits, int64_t size) {
    const int64_t sets = weights.size();
    if (sets < 1 || sets > INT16_MAX || limits.size() != sets) throw std::invalid_argument("expected one weight and one limit per dataset");
    if (size < 0) throw std::invalid_argument("size must not be negative");
    const double* weight = weights.data();
    const int64_t* limit = limits.data();
    double total = 0;
    for (int64_t d = 0; d < sets; ++d) {
        if (!(weight[d] > 0)) throw std::invalid_argument("weights must be positive");
        total += weight[d];
    }
    if (!std::isfinite(total)) throw std::invalid_argument("the sum of weights must be finite");
    std::vector<int16_t> source(size);
    std::vector<int64_t> sample(size);
    {
        py::gil_scoped_release release;
        std::vector<int64_t> given(sets, 0);
        for (int64_t i = 0; i < size; ++i) {
            const double drawn = std::max(static_cast<double>(i), 1.0);
            int64_t behind = -1;
            double most = 0;
            for (int64_t d = 0; d < sets; ++d) {
                if (limit[d] >= 0 && given[d] >= limit[d]) continue;
                const double error = weight[d] / total * drawn - static_cast<double>(given[d]);
                if (behind < 0 || error > most) {
                    most = error;
                    behind = d;
                }
            }
            if (behind < 0) throw std::invalid_argument("the limits add up to less than `size`");
            source[i] = static_cast<int16_t>(behind);
            sample[i] = given[behind]++;
        }
    }
    return py::make_tuple(to_numpy(std::move(source)), to_numpy(std::move(sample)));
}

}  // namespace

PYBIND11_MODULE(_packing, m) {
    m.doc() = "Packing of documents into sequences, and interleaving of weighted datasets.";
    m.def("greedy", &greedy, py::arg("lengths"), py::arg("order"), py::arg("capacity"),
          "int32 [documents] lengths, int64 [n] document ids in the order to pack -> (int64 [sequences, 2] start and end of each\n"
          "complete sequence in `order`, start of the incomplete last sequence).");
    m.def("best_fit", &best_fit, py::arg("lengths"), py::arg("capacity"), py::arg("lookahead"), py::arg("seed"),
          "int32 [documents] lengths -> (int64 document ids, sequence by sequence; int64 [sequences] end of each sequence in\n"
          "them). Documents longer than `capacity` are left out.");
    m.def("blend", &blend, py::arg("weights"), py::arg("limits"), py::arg("size"),
          "-> (int16 [size] dataset, int64 [size] number of the sample in it). A limit below 0 means no limit.");
}
