#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>

#include "error.h"
#include "json.h"

namespace pymtl::runtime {
namespace {

constexpr uint64_t kLongestHeader = 100'000'000;  // as safetensors itself allows
constexpr int64_t kMostDimensions = 8;
constexpr int64_t kLargest = int64_t{1} << 40;

struct DTypeName {
  const char* name;
  DType dtype;
  int64_t bytes;
};
constexpr DTypeName kDTypes[] = {{"F32", DType::f32, 4}, {"BF16", DType::bf16, 2}, {"I8", DType::i8, 1}};

const DTypeName& of(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

std::string shown(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] < 0 ? "any" : std::to_string(shape[i]);
  }
  return text + "]";
}

// A file descriptor that is closed again.
struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) close(number);
  }
};

}  // namespace

File::File(const std::string& path) {
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  check(file.number >= 0, Fault::file, std::strerror(errno));
  struct stat status{};
  check(fstat(file.number, &status) == 0, Fault::file, std::strerror(errno));
  check(!S_ISDIR(status.st_mode), Fault::file,
        "is a folder: expected a file; of a run, 'pymtl export RUN FILE.pymtl' makes one");
  check(S_ISREG(status.st_mode), Fault::file, "expected a file, got something else");
  const size_t size = static_cast<size_t>(status.st_size);
  check(size > sizeof(uint64_t), Fault::file, "expected a file that pymtl.export has written, got one of ", size,
        " bytes");
  void* const memory = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number, 0);
  check(memory != MAP_FAILED, Fault::file, std::strerror(errno));
  bytes_ = {static_cast<const char*>(memory), size};
  try {
    read_header();
  } catch (...) {
    munmap(memory, size);
    throw;
  }
}

File::~File() { munmap(const_cast<char*>(bytes_.data()), bytes_.size()); }

void File::read_header() {
  uint64_t length;
  std::memcpy(&length, bytes_.data(), sizeof length);  // little-endian, as the machines are that there are kernels for
  const size_t first = sizeof length;
  check(length <= kLongestHeader && length <= bytes_.size() - first, Fault::file,
        "expected a file that pymtl.export has written (FILE.pymtl), got something else");
  const std::string_view data = bytes_.substr(first + length);
  const Json header = Json::parse(bytes_.substr(first, length));
  for (const auto& [name, value] : header.object("header")) {
    if (name == "__metadata__") {
      for (const auto& [key, text] : value.object(name)) metadata_[key] = text.string_itself(key);
      continue;
    }
    try {
      const std::string& dtype_name = value.string("dtype");
      std::optional<DType> dtype;
      for (const DTypeName& known : kDTypes) {
        if (dtype_name == known.name) dtype = known.dtype;
      }
      check(dtype.has_value(), Fault::file, "dtype: expected F32, BF16 or I8, got ", quoted(dtype_name));
      std::vector<int64_t> shape;
      int64_t bytes = of(*dtype).bytes;
      for (const Json& dimension : value.array("shape")) {
        shape.push_back(dimension.whole_itself("shape", 0, kLargest));
        check(shape.back() == 0 || bytes <= kLargest / shape.back(), Fault::file, "shape: too large");
        bytes *= shape.back();
      }
      check(static_cast<int64_t>(shape.size()) <= kMostDimensions, Fault::file, "shape: too many dimensions");
      const auto& offsets = value.array("data_offsets");
      check(offsets.size() == 2, Fault::file, "data_offsets: expected two");
      const int64_t begin = offsets[0].whole_itself("data_offsets", 0, static_cast<int64_t>(data.size()));
      const int64_t end = offsets[1].whole_itself("data_offsets", begin, static_cast<int64_t>(data.size()));
      check(end - begin == bytes, Fault::file, "data_offsets: expected ", bytes, " bytes, got ", end - begin);
      const char* const memory = data.data() + begin;
      check(reinterpret_cast<uintptr_t>(memory) % static_cast<uintptr_t>(of(*dtype).bytes) == 0, Fault::file,
            "data_offsets: expected numbers at a multiple of their size");
      tensors_[name] = {*dtype, std::move(shape), memory};
    } catch (const Error& error) {
      throw Error(error.fault(), "tensor ", quoted(name), ": ", error.what());
    }
  }
}

const std::string& File::metadata(const std::string& key) const {
  const auto found = metadata_.find(key);
  check(found != metadata_.end(), Fault::file, "expected a file that pymtl.export has written, got one without ",
        quoted(key), " in its metadata");
  return found->second;
}

const TensorView& File::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  check(found != tensors_.end(), Fault::file, "there is no tensor ", quoted(name));
  return found->second;
}

const TensorView& File::tensor(const std::string& name, DType dtype, const std::vector<int64_t>& shape) const {
  const TensorView& found = tensor(name);
  bool fits = found.dtype == dtype && found.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == found.shape[i];
  check(fits, Fault::file, "tensor ", quoted(name), ": expected ", of(dtype).name, " ", shown(shape), ", got ",
        of(found.dtype).name, " ", shown(found.shape));
  return found;
}

}  // namespace pymtl::runtime
