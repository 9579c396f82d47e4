// A safetensors file, mapped into memory: https://github.com/huggingface/safetensors describes the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace pymtl::runtime {

enum class DType { f32, bf16, i8 };

// A tensor of a file; its numbers stay valid while the file is open.
struct TensorView {
  DType dtype;
  std::vector<int64_t> shape;
  const void* data;  // row-major, aligned as its dtype asks for
};

class File {
 public:
  // Maps the file. Nobody may shorten it while it is open; to replace it, move another one into its place.
  //
  // Throws Error (Fault::file): the file is missing, is no safetensors file, or a tensor's place, shape or dtype does
  // not fit.
  explicit File(const std::string& path);
  File(const File&) = delete;
  ~File();

  // What the header's __metadata__ holds under a key. Throws Error (Fault::file) if it holds nothing there.
  const std::string& metadata(const std::string& key) const;

  // Throws Error (Fault::file) if there is no such tensor, or one of another dtype or shape. A dimension of -1 may be
  // of any size.
  const TensorView& tensor(const std::string& name, DType dtype, const std::vector<int64_t>& shape) const;
  const TensorView& tensor(const std::string& name) const;

 private:
  void read_header();

  std::string_view bytes_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace pymtl::runtime
