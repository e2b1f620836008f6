// The strings of one line of JSON, for lines that leave no doubt.
//
// A line that `JsonLine::read` refuses is not always wrong: it may have nested values, escapes in its keys, or a key
// that is missing. Then the caller has to parse it in full, and finds out what there is to say about it. What is read is
// what every strict parser reads: UTF-8, escapes, numbers and white space are checked.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "encoder.h"

class JsonLine {
public:
    // `keys` lists the names that each field may have; the first one found is used.
    explicit JsonLine(const std::vector<std::vector<std::string>>& keys) : keys_(keys) {
        for (const auto& names : keys) fields_.emplace_back(names.size());
    }

    // Reads a line. False unless it is an object of plain values with one string, not empty, for each field.
    bool read(const uint8_t* line, size_t size) {
        line_ = line;
        size_ = size;
        at_ = 0;
        unescaped_.resize(0);
        unescaped_.reserve(size + PADDING);  // no escape is shorter than what it stands for
        for (Field& field : fields_) field.assign(field.size(), Text{});
        if (next() != '{') return false;
        int separator;
        do {
            if (next() != '"' || !read_key() || next() != ':' || !read_value()) return false;
            separator = next();
        } while (separator == ',');
        return separator == '}' && next() == NOTHING && take_texts();
    }

    // After `read`: the text of a field, with PADDING bytes behind it that can be read.
    const uint8_t* text(size_t field) const { return unescaped_.data() + texts_[field].start; }
    size_t size(size_t field) const { return texts_[field].size; }

private:
    static constexpr int NOTHING = -1;

    struct Text {
        size_t start = 0, size = 0;  // in `unescaped_`
        bool found = false;
    };
    using Field = std::vector<Text>;  // by name

    // The next character that is not white space.
    int next() {
        while (at_ < size_) {
            const uint8_t c = line_[at_++];
            if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return c;
        }
        return NOTHING;
    }

    bool read_key() {
        const size_t start = unescaped_.size();
        if (!read_string()) return false;
        const std::string_view key(reinterpret_cast<const char*>(unescaped_.data() + start), unescaped_.size() - start);
        wanted_.clear();
        for (size_t field = 0; field < keys_.size(); ++field)
            for (size_t name = 0; name < keys_[field].size(); ++name)
                if (keys_[field][name] == key) wanted_.push_back(&fields_[field][name]);
        unescaped_.resize(start);
        return true;
    }

    bool read_value() {
        const size_t start = unescaped_.size();
        const int c = next();
        if (c != '"') return wanted_.empty() && read_other(c);
        if (!read_string()) return false;
        for (Text* text : wanted_) *text = {start, unescaped_.size() - start, true};
        if (wanted_.empty()) unescaped_.resize(start);
        return true;
    }

    // A number or a word; `at_` is behind its first character, `c`.
    bool read_other(int c) {
        if (c == 't' || c == 'f' || c == 'n') {
            --at_;
            return read_word(c == 't' ? "true" : c == 'f' ? "false" : "null");
        }
        if (c == '-') c = at_ < size_ ? line_[at_++] : NOTHING;
        if (c < '0' || c > '9') return false;
        if (c != '0') read_digits();
        if (at_ < size_ && line_[at_] == '.' && (++at_, !read_digits())) return false;
        if (at_ < size_ && (line_[at_] | 0x20) == 'e') {
            ++at_;
            if (at_ < size_ && (line_[at_] == '+' || line_[at_] == '-')) ++at_;
            return read_digits();
        }
        return true;
    }

    bool read_word(std::string_view word) {
        if (size_ - at_ < word.size() || std::memcmp(line_ + at_, word.data(), word.size()) != 0) return false;
        at_ += word.size();
        return true;
    }

    bool read_digits() {
        const size_t start = at_;
        while (at_ < size_ && line_[at_] >= '0' && line_[at_] <= '9') ++at_;
        return at_ > start;
    }

    // Appends a string to `unescaped_`; `at_` is behind its first quote, and moves behind the other.
    bool read_string() {
        uint8_t* out = unescaped_.reserve(0);
        for (;;) {
            out = copy_plain(out);
            if (at_ >= size_) return false;
            const uint8_t c = line_[at_];
            if (c == '"') {
                ++at_;
                unescaped_.end_at(out);
                return true;
            }
            if (c < 0x20) return false;
            out = c == '\\' ? read_escape(out) : c >= 0x80 ? copy_character(out) : copy_byte(out);
            if (out == nullptr) return false;
        }
    }

    uint8_t* copy_byte(uint8_t* out) {
        *out = line_[at_++];
        return out + 1;
    }

    // Copies what needs no attention, as far as 16 bytes can be taken at a time.
    uint8_t* copy_plain(uint8_t* out) {
#if defined(__SSE2__)
        for (; at_ + 16 <= size_; at_ += 16, out += 16) {
            const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line_ + at_));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), c);
            const __m128i quote = _mm_cmpeq_epi8(c, _mm_set1_epi8('"'));
            const __m128i escape = _mm_cmpeq_epi8(c, _mm_set1_epi8('\\'));
            const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(c, _mm_set1_epi8(0x1F)), c);
            // The highest bit of what is not ASCII is set already.
            const int stops = _mm_movemask_epi8(_mm_or_si128(_mm_or_si128(c, quote), _mm_or_si128(escape, control)));
            if (stops != 0) {
                const int plain = __builtin_ctz(static_cast<unsigned>(stops));
                at_ += static_cast<size_t>(plain);
                return out + plain;
            }
        }
#endif
        return out;
    }

    // Copies a character that is not ASCII; null if it is not valid UTF-8.
    uint8_t* copy_character(uint8_t* out) {
        const uint8_t first = line_[at_];
        const size_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
        if (first < 0xC2 || first > 0xF4 || size_ - at_ < length) return nullptr;
        const uint8_t second = line_[at_ + 1];
        const uint8_t lowest = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
        const uint8_t highest = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
        if (second < lowest || second > highest) return nullptr;
        for (size_t i = 2; i < length; ++i)
            if ((line_[at_ + i] & 0xC0) != 0x80) return nullptr;
        std::memcpy(out, line_ + at_, length);
        at_ += length;
        return out + length;
    }

    // Appends what an escape stands for; null if it is none, or half a surrogate pair.
    uint8_t* read_escape(uint8_t* out) {
        if (size_ - at_ < 2) return nullptr;
        const uint8_t c = line_[at_ + 1];
        at_ += 2;
        if (c != 'u') {
            static constexpr std::string_view NAMES = "\"\\/bfnrt", MEANT = "\"\\/\b\f\n\r\t";
            const size_t i = NAMES.find(static_cast<char>(c));
            if (i == std::string_view::npos) return nullptr;
            *out = static_cast<uint8_t>(MEANT[i]);
            return out + 1;
        }
        int32_t point = read_hex();
        if (point >= 0xD800 && point < 0xE000) {
            if (point >= 0xDC00 || !read_word("\\u")) return nullptr;
            const int32_t low = read_hex();
            if (low < 0xDC00 || low >= 0xE000) return nullptr;
            point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
        }
        if (point < 0) return nullptr;
        const int more = point < 0x80 ? 0 : point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
        static constexpr uint8_t FIRST[] = {0, 0xC0, 0xE0, 0xF0};
        *out++ = static_cast<uint8_t>(FIRST[more] | point >> (6 * more));
        for (int i = more - 1; i >= 0; --i) *out++ = static_cast<uint8_t>(0x80 | (point >> (6 * i) & 0x3F));
        return out;
    }

    // Four hexadecimal digits; -1 if they are not.
    int32_t read_hex() {
        if (size_ - at_ < 4) return -1;
        int32_t value = 0;
        for (int i = 0; i < 4; ++i) {
            const uint8_t c = line_[at_++], letter = c | 0x20;
            const int digit = c >= '0' && c <= '9' ? c - '0' : letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
            if (digit < 0) return -1;
            value = value << 4 | digit;
        }
        return value;
    }

    bool take_texts() {
        texts_.clear();
        for (const Field& field : fields_) {
            const auto text = std::find_if(field.begin(), field.end(), [](const Text& text) { return text.found; });
            if (text == field.end() || text->size == 0) return false;
            texts_.push_back(*text);
        }
        return true;
    }

    const std::vector<std::vector<std::string>> keys_;
    std::vector<Field> fields_;   // where each name's text is, as far as the line is read
    std::vector<Text*> wanted_;   // those of the last key
    std::vector<Text> texts_;     // by field
    Buffer<uint8_t> unescaped_;
    const uint8_t* line_ = nullptr;
    size_t size_ = 0, at_ = 0;
};
