/* Answers of a trained model, without torch and without Python.
 *
 * A model is a file that pymtl.export or `pymtl export RUN FILE.pymtl` wrote. It is loaded once and never changes; any
 * number of threads may share it. A session is one thread's use of it: it holds the memory of a call, and the answers
 * until the next call. A stream is a session that takes one text token by token.
 *
 *   pymtl_model* model;
 *   pymtl_session* session;
 *   if (pymtl_model_load("orders.pymtl", NULL, &model) != PYMTL_OK) fail(pymtl_error());
 *   if (pymtl_session_new(model, &session) != PYMTL_OK) fail(pymtl_error());
 *   const char* tokens[] = {"bring", "me", "a", "large", "coffee"};
 *   const int64_t length = 5;
 *   const pymtl_field words = {.name = "words", .strings = tokens};
 *   if (pymtl_run(session, 1, &length, 1, &words, NULL) != PYMTL_OK) fail(pymtl_error());
 *   pymtl_answer mood;
 *   pymtl_get_answer(session, pymtl_find_task(model, "mood"), &mood);
 *   puts(pymtl_label(model, pymtl_find_task(model, "mood"), mood.ids[0]));
 *
 * All text is UTF-8. Memory that a call returns belongs to the library: that of a model lives as long as the model,
 * that of a session until its next call of pymtl_run, and scores until the next step too. Sizes: B sequences, N tokens
 * of all sequences together, C columns of a task's logits. Wherever something is said of each token, those of the first
 * sequence come first, then those of the second, and so on.
 *
 * The instruction set is chosen at the first call; the environment variable PYMTL_ISA names another one. */
#ifndef PYMTL_H
#define PYMTL_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PYMTL_API __attribute__((visibility("default")))
#else
#define PYMTL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this interface: a library with another major number cannot be used with this header. Within a major number
 * functions are added, and fields at the end of structures that begin with `size`; nothing else changes. */
#define PYMTL_ABI_MAJOR 1
#define PYMTL_ABI_MINOR 1
PYMTL_API int32_t pymtl_abi_major(void);
PYMTL_API int32_t pymtl_abi_minor(void);

typedef enum pymtl_status {
  PYMTL_OK = 0,
  PYMTL_BAD_FILE = 1,      /* missing, damaged, or written by a newer version */
  PYMTL_BAD_ARGUMENT = 2,  /* something does not fit the model */
  PYMTL_NO_MEMORY = 3,     /* there is none left, or the model or the batch takes more than the limit */
  PYMTL_INTERNAL_ERROR = 4 /* a fault of this library: please report it */
} pymtl_status;

/* What went wrong in this thread's last call that did not return PYMTL_OK; valid until its next such call. */
PYMTL_API const char* pymtl_error(void);

/* The instruction set whose kernels run, as "avx512"; NULL if PYMTL_ISA names none that this machine has. */
PYMTL_API const char* pymtl_isa(void);

/* Models. */

typedef struct pymtl_model pymtl_model;

typedef struct pymtl_options {
  size_t size;     /* sizeof(pymtl_options) */
  int64_t threads; /* that a call may run on, at most 256; 0: as many as there are cores for this process. All calls of
                      a process share those beyond the caller's own: one call at a time has them. */
  size_t memory_limit; /* bytes that packed weights may take, and the buffers of a batch; 0: 4 GiB */
} pymtl_options;

/* Loads a file; options may be NULL. The file stays mapped: nobody may shorten it while the model lives. To replace it,
 * move another one into its place. */
PYMTL_API pymtl_status pymtl_model_load(const char* path, const pymtl_options* options, pymtl_model** model);

/* After its sessions. NULL is fine. */
PYMTL_API void pymtl_model_free(pymtl_model* model);

/* What the exporting side says of the model, as JSON: its kind, how texts are split into tokens, settings of tasks. */
PYMTL_API const char* pymtl_model_description(const pymtl_model* model);

typedef enum pymtl_input_kind { PYMTL_IDS = 0, PYMTL_CHARACTERS = 1, PYMTL_NUMBERS = 2 } pymtl_input_kind;

typedef struct pymtl_input {
  const char* name;      /* of the field */
  pymtl_input_kind kind; /* what a token has of it: an id, characters of its own, or numbers */
  int64_t size;          /* ids and characters are below it; of numbers how many a token has */
  int32_t takes_strings; /* whether the model knows their names */
} pymtl_input;

PYMTL_API int64_t pymtl_input_count(const pymtl_model* model);
PYMTL_API pymtl_status pymtl_get_input(const pymtl_model* model, int64_t index, pymtl_input* input);
PYMTL_API const char* pymtl_input_name(const pymtl_model* model, int64_t index,
                                       int64_t id); /* NULL if it has no name */

typedef enum pymtl_answer_kind {
  PYMTL_LOGITS = 0,   /* logits alone */
  PYMTL_CLASSES = 1,  /* the likeliest class of each sequence, or of each token */
  PYMTL_PATH = 2,     /* the likeliest path of a conditional random field: a tag of each token */
  PYMTL_CTC = 3,      /* labels in order, without their places: those of the likeliest path */
  PYMTL_ORDINAL = 4,  /* an ordered class of each sequence */
  PYMTL_LABELS = 5,   /* any number of labels of each sequence */
  PYMTL_VALUES = 6,   /* numbers of each sequence, in the units of the training data */
  PYMTL_GENERATED = 7 /* a sequence of ids for each sequence, written one after the other: by the likeliest each time,
                         or by steps of one's own, see pymtl_step */
} pymtl_answer_kind;

typedef struct pymtl_task {
  const char* name;
  pymtl_answer_kind kind;
  int32_t of_tokens; /* whether there are logits for each token, not for each sequence or hypothesis */
  int64_t columns;   /* C */
  int64_t labels;    /* how many ids have names */
  int32_t streams;   /* whether a stream has its logits and, but of PYMTL_PATH and PYMTL_CTC, its answers */
} pymtl_task;

PYMTL_API int64_t pymtl_task_count(const pymtl_model* model);
PYMTL_API pymtl_status pymtl_get_task(const pymtl_model* model, int64_t task, pymtl_task* info);
PYMTL_API int64_t pymtl_find_task(const pymtl_model* model, const char* name);         /* -1 if there is none */
PYMTL_API const char* pymtl_label(const pymtl_model* model, int64_t task, int64_t id); /* NULL if it has no name */

/* Sessions. One thread at a time may use one. */

typedef struct pymtl_session pymtl_session;

PYMTL_API pymtl_status pymtl_session_new(const pymtl_model* model, pymtl_session** session);
PYMTL_API void pymtl_session_free(pymtl_session* session);

/* A session for one sequence whose tokens come in several calls of pymtl_run, one or more at a time: each goes on from
 * the states that the one before ended with. It has answers of the tasks that `streams` tells; of a task of sequences
 * the answer for all tokens so far. Of PYMTL_PATH and PYMTL_CTC it has the logits alone. */
PYMTL_API pymtl_status pymtl_stream_new(const pymtl_model* model, pymtl_session** stream);

/* Begins a new sequence. */
PYMTL_API pymtl_status pymtl_stream_reset(pymtl_session* stream);

/* A stream's states, to keep and to put back: `count` numbers. */
PYMTL_API pymtl_status pymtl_stream_state(pymtl_session* stream, float** state, int64_t* count);

/* What a batch has of an input: one of the three. A task of PYMTL_GENERATED that may copy tokens of its sequence has an
 * input of its own, its name with "/sources" behind it: `ids` say which of the task's ids each token is. Tokens that
 * are none of the C that the task knows have C, C + 1 and so on: each different one of a sequence has its own. Answers
 * may then have these ids, which pymtl_label has no names of. The input may be missing if the task is not asked for. */
typedef struct pymtl_field {
  const char* name; /* of the input */
  const char* const*
      strings;          /* [N] names of ids; of characters, the words: not needed if they are those of the words */
  const int64_t* ids;   /* [N]; of characters [N, width], 0 behind a word's end */
  const float* numbers; /* [N, width] */
  int64_t width;        /* of ids of characters, and of numbers */
} pymtl_field;

typedef struct pymtl_request {
  size_t size;           /* sizeof(pymtl_request) */
  const int64_t* tasks;  /* [task_count] those wanted; NULL: all */
  int64_t task_count;    /* 0 if tasks is NULL */
  int32_t probabilities; /* whether answers say how probable each of their ids is, where there are several to a
                            sequence; of a path this takes as long again */
  int64_t by_steps;      /* whether answers of PYMTL_GENERATED are left to pymtl_step (since 1.1) */
} pymtl_request;

/* Runs a batch of sequences, each of at least one token; `lengths` [batch]. Results depend on a sequence alone, bit for
 * bit, and not on the batch. `request` may be NULL. */
PYMTL_API pymtl_status pymtl_run(pymtl_session* session, int64_t batch, const int64_t* lengths, int64_t field_count,
                                 const pymtl_field* fields, const pymtl_request* request);

typedef struct pymtl_answer {
  const int64_t* ids;         /* of all sequences: classes, tags or labels */
  const int64_t* starts;      /* [B + 1] where each sequence's ids begin */
  const double* numbers;      /* [B, C] of PYMTL_VALUES, else NULL */
  const double* probability;  /* [B] of each whole answer; NaN if it was not asked for or is not known */
  const float* probabilities; /* of each of the ids of tokens and of PYMTL_GENERATED, if asked for; NULL if not, or if
                                 there are no ids */
} pymtl_answer;

PYMTL_API pymtl_status pymtl_get_answer(const pymtl_session* session, int64_t task, pymtl_answer* answer);

/* Rows of a task's logits, one for each token or each sequence: [rows, columns]. PYMTL_GENERATED has none. */
PYMTL_API pymtl_status pymtl_get_logits(const pymtl_session* session, int64_t task, const float** logits, int64_t* rows,
                                        int64_t* columns);

/* Answers of PYMTL_GENERATED, step by step (since 1.1). A hypothesis is the beginning of an answer. A step reads one id
 * of each of some hypotheses, and gives logits of each one's next id. Id 0 ends an answer; it is also what the first
 * step reads. Which hypotheses go on, and with which ids, is for the caller to choose: so any search can be made of
 * steps. */
typedef struct pymtl_scores {
  const float* logits;    /* [count, columns] */
  const float* attention; /* [count, T] how much each hypothesis has just read of each token of its sequence, 0 behind
                             its last; NULL if nothing is attended to */
  int64_t columns; /* C, or more where the batch has further tokens to copy; a logit is -inf if its token stands in
                      other sequences alone */
  int64_t steps;   /* T, the tokens of the longest sequence of the batch */
} pymtl_scores;

/* A step of hypotheses of a task that the last pymtl_run asked for. `ids` [count] are what they read. `parents` [count]
 * are the hypotheses of the step before that they go on from. Where it is NULL they begin, each with a sequence of the
 * batch, `sequences` [count], which otherwise is NULL. The scores are valid until the next call of pymtl_step for the
 * task or of pymtl_run for the session. After an error hypotheses still go on from the step before. */
PYMTL_API pymtl_status pymtl_step(pymtl_session* session, int64_t task, int64_t count, const int64_t* ids,
                                  const int64_t* parents, const int64_t* sequences, pymtl_scores* scores);

#ifdef __cplusplus
}
#endif

#endif
