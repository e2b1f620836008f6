// Cuts text into pre-tokens as GPT-2's regular expression does, or StarCoder's, which first takes digits one by one:
//
//     '(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// A match depends on nothing before it. So 64 bytes at a time, from the start of a pre-token on, are compared with all
// classes at once, and the starts within them computed bit by bit; only what is not ASCII, or longer, is read character
// by character.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "code_points.h"

constexpr size_t PADDING = 64;  // bytes that can be read after the end of every text

enum Class : uint8_t { LETTER, NUMBER, BLANK, OTHER, UNASSIGNED, END };

// Bit i of each word is for byte i of the 64.
struct Classes {
    uint64_t letter, digit, blank, space, apostrophe, other, beyond_ascii;
};

#if defined(__SSE2__)

inline Classes classes_of(const uint8_t* text) {
    Classes all{};
    for (int i = 0; i < 4; ++i) {
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(text + 16 * i));
        // SSE2 compares signed bytes, so `x < n` for unsigned bytes is `x - 128 < n - 128`.
        const auto below = [](__m128i x, int first, int n) {
            const __m128i signed_x = _mm_add_epi8(x, _mm_set1_epi8(static_cast<char>(128 - first)));
            return _mm_cmplt_epi8(signed_x, _mm_set1_epi8(static_cast<char>(n - 128)));
        };
        const auto bits = [i](__m128i x) { return uint64_t{static_cast<uint32_t>(_mm_movemask_epi8(x))} << (16 * i); };
        const __m128i space = _mm_cmpeq_epi8(c, _mm_set1_epi8(' '));
        all.letter |= bits(below(_mm_or_si128(c, _mm_set1_epi8(0x20)), 'a', 26));
        all.digit |= bits(below(c, '0', 10));
        all.blank |= bits(_mm_or_si128(space, below(c, '\t', 5)));
        all.space |= bits(space);
        all.apostrophe |= bits(_mm_cmpeq_epi8(c, _mm_set1_epi8('\'')));
        all.beyond_ascii |= bits(c);
    }
    all.other = ~(all.letter | all.digit | all.blank | all.beyond_ascii);
    return all;
}

#else

// Eight bytes at a time: a comparison sets the highest bit of each byte, a multiplication gathers these bits.
inline Classes classes_of(const uint8_t* text) {
    constexpr uint64_t ONES = 0x0101010101010101ull, HIGH = 0x8080808080808080ull;
    Classes all{};
    for (int i = 0; i < 8; ++i) {
        uint64_t c = 0;
        for (int j = 0; j < 8; ++j) c |= uint64_t{text[8 * i + j]} << (8 * j);  // one load, once compiled
        const uint64_t high = c & HIGH, low = c & ~HIGH;
        // Bytes of `x` from `first` on, less than `n` of them; all of `x` are below 128.
        const auto within = [=](uint64_t x, uint64_t first, uint64_t n) {
            return (x + ONES * (128 - first)) & ~(x + ONES * (128 - first - n)) & ~high & HIGH;
        };
        const auto bits = [i](uint64_t x) { return ((x >> 7) * 0x0102040810204080ull >> 56) << (8 * i); };
        const uint64_t space = within(low, ' ', 1);
        all.letter |= bits(within(low | (ONES * 0x20), 'a', 26));
        all.digit |= bits(within(low, '0', 10));
        all.blank |= bits(space | within(low, '\t', 5));
        all.space |= bits(space);
        all.apostrophe |= bits(within(low, '\'', 1));
        all.beyond_ascii |= bits(high);
    }
    all.other = ~(all.letter | all.digit | all.blank | all.beyond_ascii);
    return all;
}

#endif

inline Class class_of(char name) {
    return name == 'L' ? LETTER : name == 'N' ? NUMBER : name == 'S' ? BLANK : name == 'O' ? OTHER : UNASSIGNED;
}

// The class of every code point. One that is UNASSIGNED may be given another class later, while other threads read.
class CodePoints {
public:
    CodePoints() : class_(0x110000) {
        size_t point = 0, length = 0;
        for (const char* c = CODE_POINT_RUNS; *c; ++c) {
            if (*c >= '0' && *c <= '9') {
                length = 10 * length + static_cast<size_t>(*c - '0');
            } else {
                for (; length > 0; --length) set(point++, class_of(*c));
            }
        }
    }

    void set(size_t point, Class kind) { class_.at(point).store(kind, std::memory_order_relaxed); }
    Class get(size_t point) const { return class_[point].load(std::memory_order_relaxed); }

    // The class of the character at `at`, or END; `at` moves behind it. The text is valid UTF-8.
    Class read(const uint8_t* text, size_t size, size_t& at) const {
        return at < size ? get(next_point(text, at)) : END;
    }

    static uint32_t next_point(const uint8_t* text, size_t& at) {
        const uint32_t first = text[at++];
        if (first < 0x80) return first;
        const int more = first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
        uint32_t point = first & (0x3Fu >> more);
        for (int i = 0; i < more; ++i) point = point << 6 | (text[at++] & 0x3F);
        return point;
    }

private:
    std::vector<std::atomic<Class>> class_;
};

// The end of a contraction whose apostrophe is at `at`, or `at` if it is none.
inline size_t contraction_end(const uint8_t* text, size_t size, size_t at) {
    if (at + 1 >= size) return at;
    const uint8_t c = text[at + 1];
    if (c == 's' || c == 't' || c == 'm' || c == 'd') return at + 2;
    if (at + 2 >= size) return at;
    const uint8_t d = text[at + 2];
    return (d == 'e' && (c == 'r' || c == 'v')) || (d == 'l' && c == 'l') ? at + 3 : at;
}

// DIGITS: each digit is a pre-token, as in StarCoder's.
template <bool DIGITS>
class PreTokens {
public:
    // Calls `found(start, length)` for every pre-token, up to the first with a code point that is UNASSIGNED. Returns
    // where that code point is, or `size`.
    template <typename Found>
    static size_t split(const CodePoints& points, const uint8_t* text, size_t size, Found&& found) {
        for (size_t at = 0; at < size;) {
            const size_t left = size - at;
            uint64_t starts;
            size_t seen = known_starts(text + at, left, starts);
            if (seen < left) {  // the last one may continue
                seen = 63 - __builtin_clzll(starts);
                if (seen == 0) {
                    size_t unassigned = size;
                    const size_t end = end_of(points, text, size, at, unassigned);
                    if (unassigned < size) return unassigned;
                    found(text + at, end - at);
                    at = end;
                    continue;
                }
            }
            const uint8_t* start = text + at;
            at += seen;
            starts &= starts - 1;  // the first one is `start`
            for (starts &= low_bits(seen); starts; starts &= starts - 1) {
                const uint8_t* end = text + at - seen + __builtin_ctzll(starts);
                found(start, static_cast<size_t>(end - start));
                start = end;
            }
            found(start, static_cast<size_t>(text + at - start));
        }
        return size;
    }

private:
    static uint64_t low_bits(size_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

    // The starts of pre-tokens in the first bytes of a text that begins with one, and the number of these bytes.
    static size_t known_starts(const uint8_t* text, size_t size, uint64_t& starts) {
        const Classes all = classes_of(text);
        size_t seen = all.beyond_ascii ? __builtin_ctzll(all.beyond_ascii) : 64;
        if (size < seen) seen = size;
        const uint64_t in = low_bits(seen);
        const uint64_t letter = all.letter & in, digit = all.digit & in, blank = all.blank & in, other = all.other & in;
        const uint64_t after_space = (all.space & in) << 1;
        // A space before a word belongs to it; before that space, or another blank, the blanks end.
        const uint64_t words = letter | other | (DIGITS ? 0 : digit);
        starts = 1 | (letter & ~(letter << 1) & ~after_space) | (other & ~(other << 1) & ~after_space);
        starts |= DIGITS ? digit : digit & ~(digit << 1) & ~after_space;
        starts |= blank & (~(blank << 1) | (words >> 1));
        for (uint64_t quotes = all.apostrophe & starts; quotes; quotes &= quotes - 1) {
            const size_t quote = __builtin_ctzll(quotes);
            if (quote + 3 > seen && seen < size) {  // its letters are not known
                starts &= low_bits(quote + 1);
                break;
            }
            const size_t end = contraction_end(text, size, quote);
            if (end == quote) continue;
            starts &= ~(uint64_t{6} << quote);
            if (end < seen) starts |= uint64_t{1} << end;
        }
        return seen;
    }

    // The end of the pre-token at `start`. If a code point in or right behind it is UNASSIGNED, `unassigned` is set to
    // its place.
    static size_t end_of(const CodePoints& points, const uint8_t* text, size_t size, size_t start, size_t& unassigned) {
        if (text[start] == '\'') {
            const size_t end = contraction_end(text, size, start);
            if (end != start) return end;
        }
        size_t at = start, last = start;
        Class kind = points.read(text, size, at);
        if (text[start] == ' ') {
            size_t after = at;
            const Class next = points.read(text, size, after);
            if (starts_word(next)) {
                kind = next;
                at = after;
            }
        }
        if (kind == UNASSIGNED) unassigned = start;
        if (kind == NUMBER && DIGITS) return at;
        size_t count = 1;
        Class next;
        for (size_t after = at; (next = points.read(text, size, after)) == kind; at = after, ++count) last = at;
        if (next == UNASSIGNED) unassigned = std::min(unassigned, at);
        return kind == BLANK && count > 1 && starts_word(next) ? last : at;
    }

    // Whether the last of several blanks before it does not belong to the other blanks.
    static bool starts_word(Class kind) { return kind == LETTER || kind == OTHER || (kind == NUMBER && !DIGITS); }
};
