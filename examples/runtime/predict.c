/* Answers of a model's file for the words of one text:  predict FILE WORD...
 *
 *   cc predict.c $(python -m pymtl_runtime flags) -o predict
 *
 * The words are tokens as training split texts into, and in small
 * letters where training made them small. */
#include <pymtl.h>
#include <stdio.h>
#include <stdlib.h>

static void require(pymtl_status status) {
  if (status == PYMTL_OK) return;
  fprintf(stderr, "error: %s\n", pymtl_error());
  exit(1);
}

static void print_ids(const pymtl_model* model, int64_t task, const pymtl_answer* answer) {
  for (int64_t i = answer->starts[0]; i < answer->starts[1]; ++i) {
    const char* label = pymtl_label(model, task, answer->ids[i]);
    if (label != NULL) {
      printf(" %s", label);
    } else {
      printf(" %lld", (long long)answer->ids[i]);
    }
  }
}

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: predict FILE WORD...\n");
    return 2;
  }
  pymtl_model* model;
  pymtl_session* session;
  require(pymtl_model_load(argv[1], NULL, &model));
  require(pymtl_session_new(model, &session));

  const int64_t length = argc - 2;
  const pymtl_field words = {.name = "words", .strings = (const char* const*)argv + 2};
  const pymtl_request request = {.size = sizeof request, .probabilities = 1};
  require(pymtl_run(session, 1, &length, 1, &words, &request));

  for (int64_t task = 0; task < pymtl_task_count(model); ++task) {
    pymtl_task info;
    pymtl_answer answer;
    require(pymtl_get_task(model, task, &info));
    require(pymtl_get_answer(session, task, &answer));
    printf("%s:", info.name);
    print_ids(model, task, &answer);
    for (int64_t i = 0; answer.numbers != NULL && i < info.columns; ++i) printf(" %g", answer.numbers[i]);
    if (answer.probability[0] == answer.probability[0]) printf(" (%.1f %%)", 100 * answer.probability[0]); /* no NaN */
    printf("\n");
  }
  pymtl_session_free(session);
  pymtl_model_free(model);
  return 0;
}
