// Byte-level BPE: texts, or blocks of JSONL rows, as token ids. The GIL is released during the work.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "encoder.h"
#include "json_line.h"

namespace py = pybind11;

namespace {

using Pairs = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;
using Names = std::vector<std::vector<std::string>>;

template <typename Id>
std::shared_ptr<Encoder<Id>> make_encoder(const Pairs& merges, const std::vector<uint32_t>& ids, bool digits,
                                          const std::vector<std::pair<std::string, uint32_t>>& specials) {
    if (merges.ndim() != 2 || merges.shape(1) != 2) throw std::invalid_argument("expected two symbols per merge");
    std::vector<std::pair<Symbol, Symbol>> pairs;
    for (py::ssize_t i = 0; i < merges.shape(0); ++i) pairs.emplace_back(merges.at(i, 0), merges.at(i, 1));
    return std::make_shared<Encoder<Id>>(pairs, ids, digits, specials);
}

template <typename Id>
py::bytes to_bytes(const Buffer<Id>& ids) {
    return py::bytes(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(Id));
}

template <typename T>
py::array_t<T> to_numpy(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// The ids of a text, or its first code point that is UNASSIGNED.
template <typename Id>
py::object encode(Encoder<Id>& encoder, std::string_view text) {
    Buffer<Id> ids;
    size_t done;
    uint32_t point = 0;
    {
        const py::gil_scoped_release release;
        Buffer<uint8_t> padded;
        std::memcpy(padded.reserve(text.size() + PADDING), text.data(), text.size());
        std::memset(padded.data() + text.size(), 0, PADDING);
        auto cache = encoder.borrow();
        done = encoder.encode(padded.data(), text.size(), *cache, ids);
        encoder.give_back(std::move(cache));
        if (done < text.size()) point = CodePoints::next_point(padded.data(), done);
    }
    if (point != 0) return py::int_(point);
    return to_bytes(ids);
}

template <typename Id>
void set_class(Encoder<Id>& encoder, uint32_t point, char name) {
    encoder.points().set(point, class_of(name));
}

// The rows of a block of lines, encoded one after another.
template <typename Id>
class Rows {
public:
    Rows(std::shared_ptr<Encoder<Id>> encoder, py::list lines, const Names& keys, std::optional<Id> end)
        : encoder_(std::move(encoder)),
          lines_(std::move(lines)),
          line_(keys),
          end_(end),
          ids_(keys.size()),
          sizes_(keys.size()),
          totals_(keys.size()) {
        if (keys.empty()) throw std::invalid_argument("expected at least one field");
        for (const py::handle line : lines_) {
            char* text = nullptr;
            py::ssize_t size = 0;
            if (!line.is_none() && PyBytes_AsStringAndSize(line.ptr(), &text, &size) != 0) throw py::error_already_set();
            texts_.emplace_back(text, static_cast<size_t>(size));
        }
    }

    // Encodes rows up to the first one that the caller has to parse; returns its index, or the number of lines.
    size_t next() {
        const py::gil_scoped_release release;
        std::unique_ptr<Cache<Id>> cache = encoder_ ? encoder_->borrow() : nullptr;
        while (at_ < texts_.size()) {
            const std::string_view text = texts_[at_++];
            if (text.data() != nullptr && is_blank(text)) continue;
            if (cache == nullptr || text.data() == nullptr || !encode(text, *cache)) {
                --at_;
                break;
            }
        }
        if (cache) encoder_->give_back(std::move(cache));
        return at_++;
    }

    // Adds the row whose index `next` returned: the ids of each field.
    void add(const std::vector<py::array_t<Id, py::array::c_style>>& fields) {
        if (fields.size() != ids_.size()) throw std::invalid_argument("expected the ids of every field");
        for (size_t field = 0; field < fields.size(); ++field) {
            const auto count = static_cast<size_t>(fields[field].size());
            Id* out = ids_[field].reserve(count);
            ids_[field].end_at(std::copy(fields[field].data(), fields[field].data() + count, out));
        }
        end_row();
    }

    py::list data() const {
        py::list fields;
        for (const auto& ids : ids_) fields.append(to_bytes(ids));
        return fields;
    }
    py::list sizes() const {
        py::list fields;
        for (const auto& sizes : sizes_) fields.append(to_numpy(sizes));
        return fields;
    }
    int64_t ended() const { return ended_; }

    // How often each of these ids occurs.
    py::array_t<int64_t> count(const std::vector<Id>& wanted) const {
        std::vector<int64_t> counts(wanted.size());
        {
            const py::gil_scoped_release release;
            if (!wanted.empty()) {
                const auto [low, high] = std::minmax_element(wanted.begin(), wanted.end());
                std::vector<int64_t> found(static_cast<size_t>(*high - *low) + 1);
                for (const auto& ids : ids_)
                    for (size_t i = 0; i < ids.size(); ++i) {
                        const auto place = static_cast<size_t>(ids.data()[i]) - static_cast<size_t>(*low);
                        if (place < found.size()) ++found[place];
                    }
                for (size_t i = 0; i < wanted.size(); ++i) counts[i] = found[static_cast<size_t>(wanted[i] - *low)];
            }
        }
        return to_numpy(counts);
    }

private:
    // What Python's bytes.isspace() takes for blank, or nothing.
    static bool is_blank(std::string_view text) { return text.find_first_not_of(" \t\n\r\v\f") == std::string_view::npos; }

    // False, without a trace, if the row is one that the caller has to parse, or a field has no ids.
    bool encode(std::string_view text, Cache<Id>& cache) {
        if (!line_.read(reinterpret_cast<const uint8_t*>(text.data()), text.size())) return false;
        for (size_t field = 0; field < ids_.size(); ++field) {
            const size_t size = line_.size(field), before = totals_[field];
            if (encoder_->encode(line_.text(field), size, cache, ids_[field]) < size || ids_[field].size() == before) {
                for (size_t undone = 0; undone <= field; ++undone) ids_[undone].resize(totals_[undone]);
                return false;
            }
        }
        end_row();
        return true;
    }

    void end_row() {
        for (size_t field = 0; field < ids_.size(); ++field) {
            auto& ids = ids_[field];
            if (end_ && field + 1 == ids_.size()) {
                ended_ += ids.size() > totals_[field] && ids.data()[ids.size() - 1] == *end_;
                *ids.reserve(1) = *end_;
                ids.resize(ids.size() + 1);
            }
            sizes_[field].push_back(static_cast<int32_t>(ids.size() - totals_[field]));
            totals_[field] = ids.size();
        }
    }

    const std::shared_ptr<Encoder<Id>> encoder_;
    const py::list lines_;  // keeps the texts alive
    std::vector<std::string_view> texts_;
    JsonLine line_;
    const std::optional<Id> end_;
    size_t at_ = 0;
    std::vector<Buffer<Id>> ids_;              // by field
    std::vector<std::vector<int32_t>> sizes_;  // by field and row
    std::vector<size_t> totals_;               // ids of complete rows, by field
    int64_t ended_ = 0;
};

template <typename Id>
void define(py::module_& m, const std::string& suffix) {
    using E = Encoder<Id>;
    py::class_<E, std::shared_ptr<E>>(m, ("Encoder" + suffix).c_str(), "Encodes texts; for all threads.")
        .def(py::init(&make_encoder<Id>), py::arg("merges"), py::arg("ids"), py::arg("digits"), py::arg("specials"),
             "merges: uint32 [merges, 2], symbols: 0 to 255 are the bytes, 256 + i what merge i makes. ids: that of each\n"
             "symbol, 2**32 - 1 for a byte that the vocabulary lacks. digits: whether each digit is a pre-token.\n"
             "specials: text and id.")
        .def("encode", &encode<Id>, py::arg("text"), "UTF-8 -> ids, or the first code point in it whose class is not known.")
        .def("set_class", &set_class<Id>, py::arg("point"), py::arg("name"), "Make known the class of a code point.");
    py::class_<Rows<Id>>(m, ("Rows" + suffix).c_str(), "A block of JSONL rows, encoded one after another.")
        .def(py::init<std::shared_ptr<E>, py::list, const Names&, std::optional<Id>>(), py::arg("encoder"),
             py::arg("lines"), py::arg("keys"), py::arg("end"),
             "lines: bytes, or None. keys: the names that each field may have. end: id to append to the last field.")
        .def("next", &Rows<Id>::next,
             "Encode rows up to the first one that the caller has to parse; its index, or the number of lines.")
        .def("add", &Rows<Id>::add, py::arg("fields"), "Add the row that `next` returned.")
        .def("data", &Rows<Id>::data, "The ids of each field.")
        .def("sizes", &Rows<Id>::sizes, "int32 [rows], the number of ids of each row, for each field.")
        .def("count", &Rows<Id>::count, py::arg("ids"), "int64 [ids], how often each occurs.")
        .def_property_readonly("ended", &Rows<Id>::ended, "Rows whose last field ended with `end` already.");
}

}  // namespace

PYBIND11_MODULE(_bpe, m) {
    m.doc() = "Byte-level BPE.";
    m.attr("CODE_POINT_RUNS") = CODE_POINT_RUNS;
    define<uint16_t>(m, "16");
    define<int32_t>(m, "32");
}
