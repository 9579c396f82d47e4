// A model's file with every kind of instruction and decoder, made by hand; and how a batch of it is run.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../kernels/check.h"
#include "c/pymtl.h"
#include "runtime/json.h"

namespace pymtl::test {

// A safetensors file.
class FileWriter {
 public:
  explicit FileWriter(Random& random) : random_(random) {}

  // `zeros`: how many of the first numbers are 0.
  void floats(const std::string& name, const std::vector<int64_t>& shape, double size = 0.5, int64_t zeros = 0) {
    std::vector<float> numbers(count(shape));
    for (float& number : numbers) number = static_cast<float>(random_.uniform(-size, size));
    std::fill_n(numbers.begin(), zeros, 0.0f);
    add(name, "F32", shape, numbers.data(), numbers.size() * sizeof(float));
  }
  void halves(const std::string& name, const std::vector<int64_t>& shape) {
    std::vector<uint16_t> numbers(count(shape));
    for (uint16_t& number : numbers) number = static_cast<uint16_t>(0x3c00 + random_.below(0x200));
    add(name, "BF16", shape, numbers.data(), numbers.size() * sizeof(uint16_t));
  }
  void integers(const std::string& name, const std::vector<int64_t>& shape) {
    std::vector<int8_t> numbers(count(shape));
    for (int8_t& number : numbers) number = static_cast<int8_t>(random_.below(255) - 127);
    add(name, "I8", shape, numbers.data(), numbers.size());
  }

  std::string bytes(const std::string& program) const {
    std::string header = "{\"__metadata__\":{\"pymtl\":" + std::string(runtime::quoted(program)) + "}" + header_ + "}";
    header.append((8 - header.size() % 8) % 8, ' ');
    const uint64_t length = header.size();
    std::string whole(sizeof length, '\0');
    std::memcpy(whole.data(), &length, sizeof length);
    return whole + header + data_;
  }

 private:
  static size_t count(const std::vector<int64_t>& shape) {
    size_t product = 1;
    for (const int64_t size : shape) product *= static_cast<size_t>(size);
    return product;
  }

  void add(const std::string& name, const char* dtype, const std::vector<int64_t>& shape, const void* numbers,
           size_t size) {
    data_.append((8 - data_.size() % 8) % 8, '\0');
    header_ += ",\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":[";
    for (size_t i = 0; i < shape.size(); ++i) {
      if (i > 0) header_ += ',';
      header_ += std::to_string(shape[i]);
    }
    header_ += "],\"data_offsets\":[" + std::to_string(data_.size()) + "," + std::to_string(data_.size() + size) + "]}";
    data_.append(static_cast<const char*>(numbers), size);
  }

  Random& random_;
  std::string header_, data_;
};

enum class SampleWeights { floats, halves, integers };

// Words, characters by convolutions or by a recurrent layer, and numbers; one direction or two.
inline std::string sample_bytes(SampleWeights weights, bool convolutions, bool bidirectional, Random& random) {
  FileWriter file(random);
  std::string recurrences;
  const auto recurrence = [&](const std::string& name, int64_t gates, int64_t input, int64_t hidden, bool reverse) {
    const auto matrix = [&](const std::string& kind, int64_t columns) {
      const std::vector<int64_t> shape = {gates * hidden, columns};
      if (weights == SampleWeights::floats) file.floats(name + ".w_" + kind, shape);
      if (weights == SampleWeights::halves) file.halves(name + ".w_" + kind, shape);
      if (weights == SampleWeights::integers) {
        file.integers(name + ".w_" + kind, shape);
        file.floats(name + ".s_" + kind, {gates * hidden}, 0.01);
      }
    };
    matrix("ih", input);
    matrix("hh", hidden);
    file.floats(name + ".b", {gates * hidden});
    std::string text = R"({"weight_ih":")" + name + R"(.w_ih","weight_hh":")" + name + R"(.w_hh","bias_ih":")" + name +
                       R"(.b","bias_hh":")" + name + R"(.b","reverse":)" + (reverse ? "true" : "false");
    if (weights == SampleWeights::integers) {
      text += R"(,"scale_ih":")" + name + R"(.s_ih","scale_hh":")" + name + R"(.s_hh")";
    }
    return text + "}";
  };
  file.floats("words", {6, 5});
  file.floats("letters", {4, 3}, 0.5, 3);
  file.floats("filters", {2 * (1 + 3), 3});
  file.floats("filter_bias", {4});
  for (const char* const name : {"l1", "l2", "m1", "m2", "e1", "e2", "e3"}) file.floats(name, {4, 8});
  file.floats("gate", {2, 10});
  file.floats("mask", {8, 8});
  file.floats("gain", {8});
  file.floats("bias4", {4});
  file.floats("bias8", {8});
  file.floats("scores", {2, 8});
  file.floats("alpha", {3, 2});
  file.floats("after", {8, 4});
  file.floats("whole", {4, 24});
  file.floats("transitions", {4, 4});
  file.floats("next", {8, 8});
  file.floats("symbols", {5, 3});
  file.floats("said", {5, 12}, 2.0);
  file.floats("switch", {1, 12}, 2.0);
  const std::string gru = recurrence("spell", 3, 3, 4, false);
  std::string writer = recurrence("write", 4, 3, 2, false);
  writer += "," + recurrence("write again", 4, 3, 2, false);
  std::string layer = recurrence("forward", 4, 10, 4, false);
  layer += "," + recurrence("second", 4, 10, 4, bidirectional);
  const std::string characters =
      convolutions
          ? R"({"op":"character_cnn","inputs":["characters"],"output":"c","table":"letters","weight":"filters","bias":"filter_bias","widths":[1,3],"filters":2})"
          : R"({"op":"gather","inputs":["characters"],"output":"ch","table":"letters","characters":true},
    {"op":"recurrent","inputs":["ch"],"output":"cs","mode":"GRU","hidden_size":4,"recurrences":[)" +
                gru + R"(]},{"op":"pool","inputs":["cs"],"output":"c","kind":"last","reverse":[false]})";
  const std::string reverse = bidirectional ? "[false,true]" : "[false,false]";
  return file.bytes(R"({"version":1,"description":"a sample","inputs":[
    {"name":"words","kind":"ids","count":6,"names":["<pad>","<unk>","a","b","c","né"],"unknown":1},
    {"name":"characters","kind":"characters","count":4,"names":["<pad>","<unk>","a","é"],"unknown":1,"max_length":5,"of":"words"},
    {"name":"signal","kind":"numbers","size":1},
    {"name":"copied/sources","kind":"ids","count":9}],
  "instructions":[{"op":"gather","inputs":["words"],"output":"w","table":"words"},)" +
                    characters + R"(,
    {"op":"concatenate","inputs":["w","c","signal"],"output":"x"},
    {"op":"recurrent","inputs":["x"],"output":"h","mode":"LSTM","hidden_size":4,"recurrences":[)" +
                    layer + R"(]},
    {"op":"linear","inputs":["h"],"output":"tokens","weight":"l1","bias":"bias4","parts":2},
    {"op":"pool","inputs":["h"],"output":"mean","kind":"mean","reverse":)" +
                    reverse + R"(},
    {"op":"pool","inputs":["h"],"output":"max","kind":"max","reverse":)" +
                    reverse + R"(},
    {"op":"pool","inputs":["h"],"output":"last","kind":"last","reverse":)" +
                    reverse + R"(},
    {"op":"linear","inputs":["mean"],"output":"class","weight":"m1"},
    {"op":"linear","inputs":["max"],"output":"many","weight":"m2","bias":"bias4"},
    {"op":"linear","inputs":["last"],"output":"values","weight":"l2"},
    {"op":"linear","inputs":["x"],"output":"g","weight":"gate"},
    {"op":"softmax","inputs":["g"],"output":"gs"},
    {"op":"recurrent","inputs":["x"],"output":"ex","mode":"LSTM","hidden_size":4,"recurrences":[)" +
                    layer + R"(],"zoneout_h":0.1,"zoneout_c":0.2},
    {"op":"mix","inputs":["ex","gs"],"output":"mixed"},
    {"op":"mix","inputs":["ex"],"output":"stitched","weights":"alpha"},
    {"op":"linear","inputs":["ex"],"output":"k","weight":"mask","bias":"bias8"},
    {"op":"activation","inputs":["k"],"output":"ks","kind":"sigmoid"},
    {"op":"multiply","inputs":["ks","ex"],"output":"masked"},
    {"op":"layer_norm","inputs":["masked"],"output":"normal","gain":"gain","groups":2},
    {"op":"linear","inputs":["normal"],"output":"t","weight":"next"},
    {"op":"activation","inputs":["t"],"output":"ts","kind":"tanh"},
    {"op":"linear","inputs":["ts"],"output":"q","weight":"scores"},
    {"op":"attention_pool","inputs":["normal","q"],"output":"attended"},
    {"op":"linear","inputs":["attended"],"output":"ordered","weight":"e1"},
    {"op":"softmax","inputs":["class"],"output":"cp"},
    {"op":"linear","inputs":["cp"],"output":"ce","weight":"after"},
    {"op":"spread","inputs":["ce"],"output":"cet"},
    {"op":"concatenate","inputs":["stitched","cet","mixed"],"output":"all","columns":[{"first":0,"count":12},{"first":0,"count":8},{"first":0,"count":4}]},
    {"op":"linear","inputs":["all"],"output":"ctc","weight":"whole"},
    {"op":"linear","inputs":["ex"],"output":"crf","weight":"e2","bias":"bias4"},
    {"op":"linear","inputs":["masked"],"output":"free","weight":"e3"}],
  "tasks":[{"name":"tokens","logits":"tokens","decoder":"classes","labels":["A","B","C","D"]},
    {"name":"class","logits":"class","decoder":"classes","labels":["one","two","three","four"]},
    {"name":"many","logits":"many","decoder":"labels"},
    {"name":"values","logits":"values","decoder":"numbers","mean":[0,1,2,3],"std":[1,2,1,1],"log":true},
    {"name":"ordered","logits":"ordered","decoder":"ordinal"},
    {"name":"ctc","logits":"ctc","decoder":"ctc"},
    {"name":"crf","logits":"crf","decoder":"crf","start":"bias4","end":"bias4","transitions":"transitions"},
    {"name":"free","logits":"free","decoder":"none"},
    {"name":"written","decoder":"generation","labels":["<end>","<unk>","s","t","u"],"max_length":4,"never":[1],"step":{
      "count":5,"state":"last","memories":{"keys":"tokens","values":"ex"},"logits":"said","instructions":[
        {"op":"gather","inputs":["token"],"output":"r","table":"symbols"},
        {"op":"recurrent","inputs":["r"],"output":"d","mode":"LSTM","hidden_size":2,"recurrences":[)" +
                    writer + R"(]},
        {"op":"attend","inputs":["d","keys","values"],"output":"a","heads":2,"score":"bias4"},
        {"op":"concatenate","inputs":["d","a"],"output":"da"},
        {"op":"linear","inputs":["da"],"output":"said","weight":"said"}]}},
    {"name":"copied","decoder":"generation","max_length":4,"never":[1],"step":{
      "count":5,"state":"last","memories":{"keys":"tokens","values":"ex"},"logits":"known",
      "copy":{"sources":"copied/sources","gate":"switch","unknown":1},"instructions":[
        {"op":"gather","inputs":["token"],"output":"r","table":"symbols"},
        {"op":"recurrent","inputs":["r"],"output":"d","mode":"LSTM","hidden_size":2,"recurrences":[)" +
                    writer + R"(]},
        {"op":"attend","inputs":["d","keys","values"],"output":"a","heads":2},
        {"op":"concatenate","inputs":["d","a"],"output":"da"},
        {"op":"linear","inputs":["da"],"output":"switch","weight":"switch"},
        {"op":"linear","inputs":["da"],"output":"known","weight":"said"}]}}]})");
}

// A file that is there as long as this object.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& bytes) {
    char name[] = "/tmp/pymtl_test_XXXXXX";
    const int file = mkstemp(name);
    CHECK(file >= 0);
    path_ = name;
    write(bytes, file);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  ~TemporaryFile() { unlink(path_.c_str()); }

  const char* path() const { return path_.c_str(); }

 private:
  void write(const std::string& bytes, int file) {
    CHECK(::write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
    close(file);
  }

  std::string path_;
};

// A batch that fits a model's inputs, whatever these are: small, since a damaged file may ask for wide ones.
class SampleBatch {
 public:
  SampleBatch(const pymtl_model* model, int64_t batch, int64_t longest, Random& random) {
    for (int64_t i = 0; i < batch; ++i) lengths.push_back(1 + random.below(longest));
    int64_t tokens = 0;
    for (const int64_t length : lengths) tokens += length;
    static const char* const kWords[] = {"a", "b", "né", "aéa", "", "zzzzzzz"};
    ids_.reserve(static_cast<size_t>(pymtl_input_count(model)));
    numbers_.reserve(ids_.capacity());
    for (int64_t i = 0; i < tokens; ++i) strings_.push_back(kWords[random.below(6)]);
    for (int64_t i = 0; i < pymtl_input_count(model); ++i) {
      pymtl_input input;
      CHECK(pymtl_get_input(model, i, &input) == PYMTL_OK);
      pymtl_field field{input.name, nullptr, nullptr, nullptr, 1};
      if (input.kind == PYMTL_NUMBERS) {
        numbers_.emplace_back(static_cast<size_t>(tokens * input.size));
        for (float& number : numbers_.back()) number = static_cast<float>(random.uniform(-1, 1));
        field.numbers = numbers_.back().data();
        field.width = input.size;
      } else if (input.takes_strings != 0 && random.flip()) {
        field.strings = strings_.data();
      } else {
        field.width = input.kind == PYMTL_CHARACTERS ? 3 : 1;
        ids_.emplace_back(static_cast<size_t>(tokens * field.width));
        for (int64_t& id : ids_.back()) id = random.below(std::min<int64_t>(input.size, 1000));
        field.ids = ids_.back().data();
      }
      fields.push_back(field);
    }
  }

  pymtl_status run(pymtl_session* session, const pymtl_request* request = nullptr) const {
    return pymtl_run(session, static_cast<int64_t>(lengths.size()), lengths.data(), static_cast<int64_t>(fields.size()),
                     fields.data(), request);
  }

  std::vector<int64_t> lengths;
  std::vector<pymtl_field> fields;

 private:
  std::vector<const char*> strings_;
  std::vector<std::vector<int64_t>> ids_;
  std::vector<std::vector<float>> numbers_;
};

// All that a session says of its last batch, read to the end.
inline double read_everything(const pymtl_model* model, const pymtl_session* session, size_t batch) {
  double sum = 0.0;
  for (int64_t task = 0; task < pymtl_task_count(model); ++task) {
    pymtl_task info;
    pymtl_answer answer;
    const float* logits;
    int64_t rows = 0, columns = 0;
    CHECK(pymtl_get_task(model, task, &info) == PYMTL_OK);
    if (pymtl_get_logits(session, task, &logits, &rows, &columns) != PYMTL_OK && info.kind != PYMTL_GENERATED) continue;
    for (int64_t i = 0; i < rows * columns; ++i) sum += logits[i];
    if (pymtl_get_answer(session, task, &answer) != PYMTL_OK) {
      const bool known =
          info.kind == PYMTL_GENERATED || std::strstr(pymtl_error(), "a stream has its logits alone") != nullptr;
      CHECK(known, pymtl_error());
      continue;
    }
    for (size_t i = 0; i < batch; ++i) sum += answer.probability[i];
    for (int64_t i = 0; i < answer.starts[batch]; ++i) {
      sum += static_cast<double>(answer.ids[i]) + (answer.probabilities == nullptr ? 0.0 : answer.probabilities[i]);
      pymtl_label(model, task, answer.ids[i]);
    }
    for (int64_t i = 0; answer.numbers != nullptr && i < static_cast<int64_t>(batch) * columns; ++i) {
      sum += answer.numbers[i];
    }
  }
  return sum;
}

}  // namespace pymtl::test
