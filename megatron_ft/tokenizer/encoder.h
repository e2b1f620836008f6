// The ids of texts: special tokens, pre-tokens, and a cache of the ids of pre-tokens, most of which come again soon.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "merges.h"
#include "pre_tokens.h"

// An array that grows without being initialized: pages that are reserved but not written take no memory.
template <typename T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    // Makes room for `more` elements after the end, and returns the end.
    T* reserve(size_t more) {
        if (size_ + more > capacity_) {
            const size_t capacity = std::max(size_ + more, capacity_ + capacity_ / 2);
            auto* data = static_cast<T*>(std::realloc(data_, capacity * sizeof(T)));
            if (data == nullptr) throw std::bad_alloc();
            data_ = data;
            capacity_ = capacity;
        }
        return data_ + size_;
    }
    void resize(size_t size) { size_ = size; }
    void end_at(const T* end) { size_ = static_cast<size_t>(end - data_); }
    T* data() { return data_; }
    const T* data() const { return data_; }
    size_t size() const { return size_; }

private:
    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

// Ids of pre-tokens; for one thread. Each pre-token of up to 64 bytes has one place, which the last one to come keeps.
template <typename Id>
class Cache {
public:
    static constexpr size_t MORE = 31;

    Cache(const Merges& merges, const std::vector<Id>& ids)
        : ids_(ids), merger_(merges), short_(size_t{1} << SHORT_BITS), long_(size_t{1} << LONG_BITS) {}

    // Writes the ids of a pre-token to `out`, with room for MORE ids after one per byte, and returns their end. PADDING
    // bytes behind the pre-token can be read.
    Id* add(const uint8_t* text, size_t length, Id* out) {
        if (length > 16) return add_long(text, length, out);
        const auto& mask = MASKS.of[length];
        const uint64_t low = word(text) & mask[0], high = word(text + 8) & mask[1];
        Short& place = short_[spread(low ^ high * FACTOR) >> (64 - SHORT_BITS)];
        if (((place.low ^ low) | (place.high ^ high) | (place.length ^ length)) == 0) {
            std::memcpy(out, place.ids, sizeof place.ids);
            return out + place.count;
        }
        return add_new(text, length, out, place);
    }

private:
    static constexpr int SHORT_BITS = 16, LONG_BITS = 12;
    static constexpr uint64_t FACTOR = 0x9E3779B97F4A7C15ull;

    struct Short {
        uint64_t low = 0, high = 0;  // the text, padded with zeros
        uint8_t length = 0, count = 0;
        Id ids[7] = {};
    };
    struct Long {
        uint8_t text[64] = {};
        uint8_t length = 0, count = 0;
        Id ids[MORE] = {};
    };
    struct Masks {
        uint64_t of[17][2] = {};  // by length: which bytes of two words belong to a text
        constexpr Masks() {
            for (int length = 0; length <= 16; ++length)
                for (int byte = 0; byte < length; ++byte) of[length][byte / 8] |= uint64_t{0xFF} << (8 * (byte % 8));
        }
    };
    static constexpr Masks MASKS{};

    static uint64_t word(const uint8_t* text) {
        uint64_t word;
        std::memcpy(&word, text, sizeof word);
        return word;
    }
    static uint64_t spread(uint64_t x) { return (x ^ x >> 32) * FACTOR; }

    [[gnu::noinline]] Id* add_new(const uint8_t* text, size_t length, Id* out, Short& place) {
        Id* end = merge(text, length, out);
        if (static_cast<size_t>(end - out) <= std::size(place.ids)) {
            const auto& mask = MASKS.of[length];
            place.low = word(text) & mask[0];
            place.high = word(text + 8) & mask[1];
            fill(place, length, out, end);
        }
        return end;
    }

    [[gnu::noinline]] Id* add_long(const uint8_t* text, size_t length, Id* out) {
        if (length > sizeof(Long::text)) return merge(text, length, out);
        uint64_t hash = length;
        for (size_t i = 0; i + 8 < length; i += 8) hash = spread(hash ^ word(text + i));
        Long& place = long_[spread(hash ^ word(text + length - 8)) >> (64 - LONG_BITS)];
        if (place.length == length && std::memcmp(place.text, text, length) == 0) {
            std::memcpy(out, place.ids, sizeof place.ids);
            return out + place.count;
        }
        Id* end = merge(text, length, out);
        if (static_cast<size_t>(end - out) <= std::size(place.ids)) {
            std::memcpy(place.text, text, length);
            fill(place, length, out, end);
        }
        return end;
    }

    template <typename Place>
    static void fill(Place& place, size_t length, const Id* ids, const Id* end) {
        place.length = static_cast<uint8_t>(length);
        place.count = static_cast<uint8_t>(end - ids);
        std::copy(ids, end, place.ids);
    }

    Id* merge(const uint8_t* text, size_t length, Id* out) {
        symbols_.clear();
        merger_.apply(text, length, symbols_);
        return std::transform(symbols_.begin(), symbols_.end(), out, [this](Symbol symbol) { return ids_[symbol]; });
    }

    const std::vector<Id>& ids_;
    Merger merger_;
    std::vector<Symbol> symbols_;
    std::vector<Short> short_;
    std::vector<Long> long_;
};

// Tokens that are cut out of a text before all else: the first in the text, and there the longest.
class SpecialTokens {
public:
    struct Token {
        std::string text;
        uint32_t id;
    };

    explicit SpecialTokens(const std::vector<std::pair<std::string, uint32_t>>& tokens) {
        for (const auto& [text, id] : tokens) {
            if (text.empty()) throw std::invalid_argument("a special token without text");
            (text.size() < HEAD ? short_ : by_head_[head(text.data())]).push_back({text, id});
            first_[static_cast<uint8_t>(text[0])] = true;
        }
        const auto longer = [](const Token& a, const Token& b) { return a.text.size() > b.text.size(); };
        std::stable_sort(short_.begin(), short_.end(), longer);
        for (auto& [_, tokens] : by_head_) std::stable_sort(tokens.begin(), tokens.end(), longer);
        if (std::count(first_.begin(), first_.end(), true) == 1) only_first_ = tokens[0].first[0];
    }

    // The next token of a text from `at` on, and `at` moves to its start; null, and `at` moves to the end, if there is
    // none. PADDING bytes behind the text can be read.
    const Token* next(const uint8_t* text, size_t size, size_t& at) const {
        for (; (at = next_first(text, size, at)) < size; ++at) {
            const std::string_view rest(reinterpret_cast<const char*>(text + at), size - at);
            const auto found = by_head_.find(head(rest.data()));
            if (found != by_head_.end())
                if (const Token* token = first_in(found->second, rest)) return token;
            if (const Token* token = first_in(short_, rest)) return token;
        }
        return nullptr;
    }

private:
    static constexpr size_t HEAD = 4;

    static uint32_t head(const char* text) {
        uint32_t head;
        std::memcpy(&head, text, HEAD);
        return head;
    }

    static const Token* first_in(const std::vector<Token>& tokens, std::string_view text) {
        for (const Token& token : tokens)
            if (text.substr(0, token.text.size()) == token.text) return &token;
        return nullptr;
    }

    size_t next_first(const uint8_t* text, size_t size, size_t at) const {
        if (only_first_ != 0) {
            const void* found = std::memchr(text + at, static_cast<uint8_t>(only_first_), size - at);
            return found == nullptr ? size : static_cast<size_t>(static_cast<const uint8_t*>(found) - text);
        }
        if (short_.empty() && by_head_.empty()) return size;
        while (at < size && !first_[text[at]]) ++at;
        return at;
    }

    std::unordered_map<uint32_t, std::vector<Token>> by_head_;  // by their first bytes, longest first
    std::vector<Token> short_;                                  // those without that many bytes, longest first
    std::array<bool, 256> first_{};                             // the bytes that tokens begin with
    char only_first_ = 0;                                       // that byte if it is the same for all
};

// Encodes texts; for all threads.
template <typename Id>
class Encoder {
public:
    // `pairs` has the two symbols of each merge, `ids` the id of each symbol, NONE for a byte that the vocabulary lacks.
    Encoder(const std::vector<std::pair<Symbol, Symbol>>& pairs, const std::vector<uint32_t>& ids, bool digits,
            const std::vector<std::pair<std::string, uint32_t>>& specials)
        : merges_(pairs, known(ids)), ids_(ids.begin(), ids.end()), digits_(digits), specials_(specials) {
        if (ids.size() != 256 + pairs.size()) throw std::invalid_argument("expected one id per symbol");
    }

    // Appends the ids of a text, valid UTF-8 with PADDING bytes behind it that can be read. Returns its size; or, after
    // appending nothing, where it has a code point that is UNASSIGNED.
    size_t encode(const uint8_t* text, size_t size, Cache<Id>& cache, Buffer<Id>& ids) const {
        const size_t before = ids.size();
        Id* out = ids.reserve(size + Cache<Id>::MORE);
        const auto add = [&](const uint8_t* start, size_t length) { out = cache.add(start, length, out); };
        for (size_t start = 0, at = 0;;) {
            const SpecialTokens::Token* special = specials_.next(text, size, at);
            const size_t length = at - start;
            const size_t done = digits_ ? PreTokens<true>::split(points_, text + start, length, add)
                                        : PreTokens<false>::split(points_, text + start, length, add);
            if (done < length) {
                ids.resize(before);
                return start + done;
            }
            if (special == nullptr) break;
            *out++ = static_cast<Id>(special->id);
            start = at += special->text.size();
        }
        ids.end_at(out);
        return size;
    }

    CodePoints& points() { return points_; }

    // A cache that no other thread uses.
    std::unique_ptr<Cache<Id>> borrow() {
        {
            const std::lock_guard lock(mutex_);
            if (!idle_.empty()) {
                auto cache = std::move(idle_.back());
                idle_.pop_back();
                return cache;
            }
        }
        return std::make_unique<Cache<Id>>(merges_, ids_);
    }
    void give_back(std::unique_ptr<Cache<Id>> cache) {
        const std::lock_guard lock(mutex_);
        idle_.push_back(std::move(cache));
    }

private:
    static std::vector<bool> known(const std::vector<uint32_t>& ids) {
        std::vector<bool> known(256);
        for (size_t byte = 0; byte < known.size() && byte < ids.size(); ++byte) known[byte] = ids[byte] != NONE;
        return known;
    }

    const Merges merges_;
    const std::vector<Id> ids_;  // by symbol
    const bool digits_;
    const SpecialTokens specials_;
    CodePoints points_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Cache<Id>>> idle_;
};
