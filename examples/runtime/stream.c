/* Answers of a model's file after each word:  stream FILE < WORDS
 *
 * Each line of standard input is a word; an empty line begins a new text. The model reads in one direction
 * (model.bidirectional = false), and keeps its states from word to word. Built as predict.c. */
#include <pymtl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void require(pymtl_status status) {
  if (status == PYMTL_OK) return;
  fprintf(stderr, "error: %s\n", pymtl_error());
  exit(1);
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: stream FILE < WORDS\n");
    return 2;
  }
  pymtl_model* model;
  pymtl_session* stream;
  require(pymtl_model_load(argv[1], NULL, &model));
  require(pymtl_stream_new(model, &stream));

  char line[4096];
  while (fgets(line, sizeof line, stdin) != NULL) {
    line[strcspn(line, "\r\n")] = '\0';
    if (line[0] == '\0') {
      require(pymtl_stream_reset(stream));
      printf("\n");
      continue;
    }
    const char* word = line;
    const int64_t length = 1;
    const pymtl_field words = {.name = "words", .strings = &word};
    require(pymtl_run(stream, 1, &length, 1, &words, NULL));
    printf("%s", line);
    for (int64_t task = 0; task < pymtl_task_count(model); ++task) {
      pymtl_task info;
      pymtl_answer answer;
      require(pymtl_get_task(model, task, &info));
      if (!info.streams) continue;
      require(pymtl_get_answer(stream, task, &answer));
      if (answer.starts[1] == 0) continue; /* a path is known at the end only */
      const char* label = pymtl_label(model, task, answer.ids[0]);
      printf(" %s=%s", info.name, label == NULL ? "?" : label);
    }
    printf("\n");
    fflush(stdout);
  }
  pymtl_session_free(stream);
  pymtl_model_free(model);
  return 0;
}
