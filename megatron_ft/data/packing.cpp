// Packing of documents into rows of at most `capacity` tokens, in two orders, and the interleaving of weighted data sets.
//
// Everything is a pure function of its arguments: the same lengths and seed give the same rows on every machine, so
// an index that one process built is the index that any other would have built. The GIL is released while a
// function works.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;
using Lengths = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Weights = py::array_t<double, py::array::c_style | py::array::forcecast>;

namespace {

// A vector handed to numpy without a copy.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
    auto* owned = new std::vector<T>(std::move(values));
    py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
    return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

// SplitMix64 (Steele, Lea and Flood 2014): the standard library's distributions differ between implementations, this does not.
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

// Set of integers in [0, size) that finds the smallest member >= x by looking at one word a level.
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

// The mtf branch's order: documents as they come, a row ends where the next document does not fit. A document longer
// than a row ends the row before it and is left out.
std::pair<std::vector<int64_t>, int64_t> greedy_rows(const int32_t* lengths, const int64_t* order, int64_t count, int64_t capacity) {
    std::vector<int64_t> rows;
    int64_t start = 0, filled = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = lengths[order[i]];
        filled += length;
        if (filled <= capacity) continue;
        if (i > start) {
            rows.push_back(start);
            rows.push_back(i);
        }
        const bool fits = length <= capacity;
        start = fits ? i : i + 1;
        filled = fits ? length : 0;
    }
    return {std::move(rows), start};
}

// Best-fit decreasing within a window of the shuffled documents.
//
// A window holds `lookahead` documents and never less than MIN_ROWS rows of tokens. Its documents, longest first, each go
// into the fullest row that has room. Rows that came out full are emitted; the emptiest, at most half, are taken apart and
// their documents wait in the next window for better company. The last window emits everything.
class BestFit {
public:
    BestFit(const int32_t* lengths, int64_t capacity, int64_t lookahead, uint64_t seed)
        : lengths_(lengths), capacity_(capacity), lookahead_(lookahead), random_(seed), spaces_(capacity + 1), row_with_(capacity + 1, NONE) {}

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
            while (next < order.size() && (static_cast<int64_t>(window_.size()) < lookahead_ || tokens < MIN_ROWS * capacity_)) {
                const int64_t document = order[next++];
                window_.push_back({lengths_[document], document});
                tokens += lengths_[document];
            }
            fill_rows();
            tokens = emit(next == order.size());
        }
    }

    std::vector<int64_t> documents;  // every document once, row by row
    std::vector<int64_t> ends;       // where each row ends in `documents`

private:
    static constexpr int32_t NONE = -1;
    static constexpr int64_t MIN_ROWS = 8;
    static constexpr int64_t SLACK = 512;  // a row is full when less than 1/SLACK of it is free

    struct Document {
        int32_t length;
        int64_t id;
    };
    struct Row {
        int64_t space;       // tokens still free
        int32_t first;       // newest document of the row in window_, linked by chain_
        int32_t same_space;  // another row with as much space
    };

    void fill_rows() {
        sort_longest_first();
        rows_.clear();
        chain_.assign(window_.size(), NONE);
        for (size_t i = 0; i < window_.size(); ++i) {
            const int64_t space = spaces_.at_least(window_[i].length);
            int32_t row;
            if (space < 0) {
                row = static_cast<int32_t>(rows_.size());
                rows_.push_back({capacity_, NONE, NONE});
            } else {
                row = take(space);
            }
            chain_[i] = rows_[row].first;
            rows_[row].first = static_cast<int32_t>(i);
            rows_[row].space -= window_[i].length;
            put(row);
        }
        for (const Row& row : rows_) {
            row_with_[row.space] = NONE;
            spaces_.erase(row.space);
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
        const int32_t row = row_with_[space];
        row_with_[space] = rows_[row].same_space;
        if (row_with_[space] == NONE) spaces_.erase(space);
        return row;
    }

    void put(int32_t row) {
        const int64_t space = rows_[row].space;
        rows_[row].same_space = row_with_[space];
        row_with_[space] = row;
        spaces_.insert(space);
    }

    // Append finished rows in random order and keep the other rows' documents as the next window; returns their tokens.
    int64_t emit(bool last) {
        std::stable_sort(rows_.begin(), rows_.end(), [](const Row& a, const Row& b) { return a.space < b.space; });
        size_t finished = rows_.size();
        if (!last)
            while (finished > (rows_.size() + 1) / 2 && rows_[finished - 1].space * SLACK >= capacity_) --finished;
        std::vector<Document> waiting;
        int64_t tokens = 0;
        for (size_t r = finished; r < rows_.size(); ++r)
            for (int32_t i = rows_[r].first; i != NONE; i = chain_[i]) {
                waiting.push_back(window_[i]);
                tokens += window_[i].length;
            }
        rows_.resize(finished);
        const bool unfinished_last = last && finished > 1;
        const Row emptiest = rows_.back();
        if (unfinished_last) rows_.pop_back();
        random_.shuffle(rows_);
        if (unfinished_last) rows_.push_back(emptiest);
        for (const Row& row : rows_) {
            for (int32_t i = row.first; i != NONE; i = chain_[i]) documents.push_back(window_[i].id);
            ends.push_back(static_cast<int64_t>(documents.size()));
        }
        window_ = std::move(waiting);
        return tokens;
    }

    const int32_t* lengths_;
    const int64_t capacity_, lookahead_;
    Random random_;
    OrderedSet spaces_;              // the free spaces that some row has
    std::vector<int32_t> row_with_;  // a row with that space, the others linked by same_space
    std::vector<Document> window_, sorted_;
    std::vector<int32_t> chain_;
    std::vector<Row> rows_;
};

py::tuple greedy(const Lengths& lengths, const Ids& order, int64_t capacity) {
    const int64_t documents = lengths.size(), count = order.size();
    const int32_t* length = lengths.data();
    const int64_t* id = order.data();
    std::pair<std::vector<int64_t>, int64_t> result;
    {
        py::gil_scoped_release release;
        for (int64_t i = 0; i < count; ++i)
            if (id[i] < 0 || id[i] >= documents) throw std::out_of_range("order names a document without a length");
        result = greedy_rows(length, id, count, capacity);
    }
    const auto rows = static_cast<py::ssize_t>(result.first.size() / 2);
    return py::make_tuple(to_numpy(std::move(result.first)).reshape({rows, py::ssize_t{2}}), result.second);
}

py::tuple best_fit(const Lengths& lengths, int64_t capacity, int64_t lookahead, uint64_t seed) {
    if (capacity < 1 || capacity > INT32_MAX - 1 || lookahead < 1) throw std::invalid_argument("capacity and lookahead must be positive");
    const int64_t count = lengths.size();
    const int32_t* length = lengths.data();
    BestFit packer(length, capacity, lookahead, seed);
    {
        py::gil_scoped_release release;
        packer.pack(count);
    }
    return py::make_tuple(to_numpy(std::move(packer.documents)), to_numpy(std::move(packer.ends)));
}

// Which data set each sample comes from, and which of its samples: always the one furthest behind its share (Megatron's
// rule, the first one on a tie). A data set with a limit is left out once it has given that many.
py::tuple blend(const Weights& weights, const Ids& limits, int64_t size) {
    const int64_t sets = weights.size();
    if (sets < 1 || sets > INT16_MAX || limits.size() != sets) throw std::invalid_argument("one weight and one limit for each data set");
    const double* weight = weights.data();
    const int64_t* limit = limits.data();
    std::vector<int16_t> source(size);
    std::vector<int64_t> sample(size);
    {
        py::gil_scoped_release release;
        double total = 0;
        for (int64_t d = 0; d < sets; ++d) total += weight[d];
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
            if (behind < 0) throw std::invalid_argument("the limits add up to less than size");
            source[i] = static_cast<int16_t>(behind);
            sample[i] = given[behind]++;
        }
    }
    return py::make_tuple(to_numpy(std::move(source)), to_numpy(std::move(sample)));
}

}  // namespace

PYBIND11_MODULE(_packing, m) {
    m.doc() = "Packing of documents into rows, and interleaving of weighted data sets.";
    m.def("greedy", &greedy, py::arg("lengths"), py::arg("order"), py::arg("capacity"),
          "int32 [documents] lengths, int64 [n] document ids in the order to pack -> (int64 [rows, 2] start and end of each full row in\n"
          "`order`, start of the unfinished row).");
    m.def("best_fit", &best_fit, py::arg("lengths"), py::arg("capacity"), py::arg("lookahead"), py::arg("seed"),
          "int32 [documents] lengths -> (int64 document ids, row by row; int64 [rows] end of each row in them). Longer documents than\n"
          "`capacity` are left out.");
    m.def("blend", &blend, py::arg("weights"), py::arg("limits"), py::arg("size"),
          "-> (int16 [size] data set, int64 [size] its sample). A limit below 0 is none.");
}
