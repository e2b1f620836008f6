// The merges of a byte-level BPE, and the symbols that they make of one pre-token.
//
// Symbols are numbered 0 to 255 for the bytes and 256 + i for what merge i makes, so that a number is also a rank. The
// pair with the lowest rank is merged first, and of equal ones the leftmost.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <queue>
#include <stdexcept>
#include <utility>
#include <vector>

using Symbol = uint32_t;
constexpr Symbol NONE = ~Symbol{0};

class Merges {
public:
    static constexpr int BITS = 21;  // of a symbol: three of them fill a word
    static constexpr size_t MAX_SYMBOLS = (size_t{1} << BITS) - 1;

    // `pairs` has the two symbols of each merge, by rank; `known` whether each byte is in the vocabulary.
    Merges(const std::vector<std::pair<Symbol, Symbol>>& pairs, const std::vector<bool>& known) : known_(known) {
        if (256 + pairs.size() > MAX_SYMBOLS) throw std::invalid_argument("more merges than fit the table");
        while (capacity() < 2 * pairs.size()) --shift_;
        table_.assign(capacity(), EMPTY);
        lengths_.assign(256, 1);
        for (const auto& [left, right] : pairs) {
            const auto made = static_cast<Symbol>(lengths_.size());
            if (left >= made || right >= made) throw std::invalid_argument("a merge comes before those that it needs");
            if (merged(left, right) != NONE) throw std::invalid_argument("a pair that is merged twice");
            lengths_.push_back(lengths_[left] + lengths_[right]);
            size_t i = slot(key_of(left, right));
            while (table_[i] != EMPTY) i = (i + 1) & (table_.size() - 1);
            table_[i] = key_of(left, right) << BITS | made;
        }
    }

    // The symbol that a pair becomes, or NONE.
    Symbol merged(Symbol left, Symbol right) const {
        const uint64_t key = key_of(left, right);
        for (size_t i = slot(key);; i = (i + 1) & (table_.size() - 1)) {
            const uint64_t entry = table_[i];
            if (entry >> BITS == key) return static_cast<Symbol>(entry & MAX_SYMBOLS);
            if (entry == EMPTY) return NONE;
        }
    }

    size_t length(Symbol symbol) const { return lengths_[symbol]; }
    bool knows(uint8_t byte) const { return known_[byte]; }

private:
    static constexpr uint64_t EMPTY = ~uint64_t{0};
    static uint64_t key_of(Symbol left, Symbol right) { return uint64_t{left} << BITS | right; }
    size_t capacity() const { return size_t{1} << (64 - shift_); }
    size_t slot(uint64_t key) const { return key * 0x9E3779B97F4A7C15ull >> shift_; }

    std::vector<bool> known_;        // by byte
    std::vector<uint64_t> table_;    // open addressing; each entry is left, right and what they become
    std::vector<uint32_t> lengths_;  // bytes of each symbol
    int shift_ = 64 - 10;
};

// Makes symbols of pre-tokens; for one thread.
class Merger {
public:
    explicit Merger(const Merges& merges) : merges_(merges) {}

    // Appends the symbols of a pre-token. Bytes that the vocabulary does not have are left out, as `tokenizers` does.
    void apply(const uint8_t* text, size_t size, std::vector<Symbol>& symbols) {
        const auto unknown = [this](uint8_t byte) { return !merges_.knows(byte); };
        if (std::any_of(text, text + size, unknown)) {
            bytes_.clear();
            std::remove_copy_if(text, text + size, std::back_inserter(bytes_), unknown);
            text = bytes_.data();
            size = bytes_.size();
        }
        if (size <= SCANNED) {
            scan(text, size);
            symbols.insert(symbols.end(), work_.begin(), work_.end());
        } else {
            by_windows(text, size, symbols);
        }
    }

private:
    static constexpr size_t SCANNED = 96;   // bytes up to which looking at all pairs is faster than a heap
    static constexpr size_t WINDOW = 8192;  // bytes of a long pre-token that are merged at a time
    static constexpr size_t OVERLAP = 64;   // symbols at the end of a window that are made again with the next one

    // Leaves the symbols of a short text in `work_`.
    void scan(const uint8_t* text, size_t size) {
        work_.assign(text, text + size);
        if (size < 2) return;
        ranks_.resize(size - 1);
        for (size_t i = 0; i + 1 < size; ++i) ranks_[i] = merges_.merged(work_[i], work_[i + 1]);
        while (!ranks_.empty()) {
            const auto lowest = std::min_element(ranks_.begin(), ranks_.end());
            if (*lowest == NONE) return;
            const auto i = static_cast<size_t>(lowest - ranks_.begin());
            work_[i] = *lowest;
            work_.erase(work_.begin() + static_cast<std::ptrdiff_t>(i) + 1);
            ranks_.erase(lowest);
            if (i > 0) ranks_[i - 1] = merges_.merged(work_[i - 1], work_[i]);
            if (i < ranks_.size()) ranks_[i] = merges_.merged(work_[i], work_[i + 1]);
        }
    }

    // Leaves the symbols of a longer text in `work_`.
    void by_heap(const uint8_t* text, size_t size) {
        work_.assign(text, text + size);
        next_.resize(size);
        previous_.resize(size);
        ranks_.assign(size, NONE);  // of each symbol with the one after it
        std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap;
        const auto rank = [&](size_t i) {
            ranks_[i] = next_[i] < size ? merges_.merged(work_[i], work_[next_[i]]) : NONE;
            if (ranks_[i] != NONE) heap.push(uint64_t{ranks_[i]} << 32 | i);
        };
        for (size_t i = 0; i < size; ++i) {
            next_[i] = static_cast<uint32_t>(i + 1);
            previous_[i] = static_cast<uint32_t>(i - 1);
        }
        for (size_t i = 0; i < size; ++i) rank(i);
        while (!heap.empty()) {
            const auto made = static_cast<Symbol>(heap.top() >> 32);
            const auto i = static_cast<uint32_t>(heap.top());
            heap.pop();
            if (ranks_[i] != made) continue;  // merged since
            const uint32_t gone = next_[i];
            work_[i] = made;
            next_[i] = next_[gone];
            if (next_[i] < size) previous_[next_[i]] = i;
            work_[gone] = ranks_[gone] = NONE;
            rank(i);
            if (i > 0) rank(previous_[i]);
        }
        work_.erase(std::remove(work_.begin(), work_.end(), NONE), work_.end());
    }

    // Merges a long text window by window. Symbols are those of their text exactly if every two neighbors are. So a
    // window may take over from the one before it at any symbol that both have at the same byte.
    void by_windows(const uint8_t* text, size_t size, std::vector<Symbol>& symbols) {
        const size_t first = symbols.size();
        size_t start = 0, common = first;  // the symbols from `common` on are those of the bytes from `start` on
        for (size_t window = WINDOW;;) {
            const size_t end = std::min(size, start + window);
            by_heap(text + start, end - start);
            const auto [old, fresh] = start == 0 ? std::pair{first, size_t{0}} : joint(symbols, common);
            if (start > 0 && old == symbols.size()) {  // of no trained vocabulary so far; all at once is always right
                start = 0;
                window = size;
                continue;
            }
            symbols.resize(old);
            symbols.insert(symbols.end(), work_.begin() + static_cast<std::ptrdiff_t>(fresh), work_.end());
            if (end == size) return;
            start = end;
            common = symbols.size();
            while (common > first && symbols.size() - common < OVERLAP) start -= merges_.length(symbols[--common]);
            while (start + window < end + WINDOW / 2) window *= 2;
        }
    }

    // Where the symbols from `common` on and those of `work_`, of the same text, have the same one at the same byte: its
    // index in both. The ends of both if there is none.
    std::pair<size_t, size_t> joint(const std::vector<Symbol>& symbols, size_t common) const {
        size_t i = common, j = 0, ahead = 0, behind = 0;  // bytes before symbols i and j
        while (i < symbols.size() && j < work_.size()) {
            if (ahead == behind && symbols[i] == work_[j]) return {i, j};
            if (ahead <= behind) {
                ahead += merges_.length(symbols[i++]);
            } else {
                behind += merges_.length(work_[j++]);
            }
        }
        return {symbols.size(), work_.size()};
    }

    const Merges& merges_;
    // Reused between calls.
    std::vector<uint8_t> bytes_;  // those that the vocabulary has
    std::vector<Symbol> work_, ranks_;
    std::vector<uint32_t> next_, previous_;
};
