/* The median microseconds of one step of a stream with one frame:  step FILE STEPS */
#include <pymtl.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return 1e6 * (double)time.tv_sec + 1e-3 * (double)time.tv_nsec;
}

static int compare(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

int main(int argc, char** argv) {
  pymtl_model* model;
  pymtl_session* stream;
  pymtl_input input;
  const pymtl_options options = {.size = sizeof options, .threads = 1};
  if (argc != 3 || pymtl_model_load(argv[1], &options, &model) != PYMTL_OK ||
      pymtl_stream_new(model, &stream) != PYMTL_OK || pymtl_get_input(model, 0, &input) != PYMTL_OK) {
    fprintf(stderr, "usage: step FILE STEPS: %s\n", pymtl_error());
    return 1;
  }
  const int64_t steps = atoll(argv[2]), length = 1;
  double* const taken = malloc((size_t)steps * sizeof(double));
  float* const frame = calloc((size_t)input.size, sizeof(float));
  const pymtl_field field = {.name = input.name, .numbers = frame, .width = input.size};
  for (int64_t i = 0; i < steps; ++i) {
    frame[0] = (float)(i % 7);
    const double start = now();
    if (pymtl_run(stream, 1, &length, 1, &field, NULL) != PYMTL_OK) return 1;
    taken[i] = now() - start;
  }
  qsort(taken, (size_t)steps, sizeof(double), compare);
  printf("%.3f\n", taken[steps / 2]);
  free(taken);
  free(frame);
  pymtl_session_free(stream);
  pymtl_model_free(model);
  return 0;
}
