/* hotdesk for C: what a plugin says and is asked, after sdk/wit. This file is kept by hand; a test holds it to the WIT.
 *
 * A plugin is one C file that includes this one, defines functions, and names them at its end:
 *
 *     static hd_decision respond(const hd_turn *turn) {
 *         return hd_has(turn->text, "hello") ? hd_answer(HD("Hello!")) : hd_next();
 *     }
 *     HD_BOT(respond)
 *
 * Every text that a function gets or makes lives until its call is over: nothing is freed by hand. What is to stay goes
 * through hd_keep. There is no libc; memcpy and the like are here.
 */
#ifndef HOTDESK_H
#define HOTDESK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- texts ------------------------------------------------------------------------------------------------------- */

/* UTF-8, not ended by a zero. */
typedef struct {
    const char *at;
    size_t len;
} hd_text;

#define HD(literal) ((hd_text){"" literal, sizeof(literal) - 1})

bool hd_same(hd_text a, hd_text b);
bool hd_is(hd_text text, const char *what);
bool hd_has(hd_text text, const char *what);
bool hd_begins(hd_text text, const char *with);
/* The same as hd_has, whatever the case of ASCII letters. */
bool hd_mentions(hd_text text, const char *what);
/* Where `what` begins in `in`, or -1. */
ptrdiff_t hd_find(hd_text in, hd_text what);
/* Without the first `count` bytes; without white space at both ends. */
hd_text hd_skip(hd_text text, size_t count);
hd_text hd_trim(hd_text text);
/* The first digits that stand right behind `before`; empty if there are none, or `before` is. */
hd_text hd_digits_after(hd_text text, const char *before);
/* The whole text as a number. */
bool hd_int(hd_text text, int *number);
/* %t: hd_text; %q: hd_text as a JSON string; %s: C string; %d: int; %%. */
hd_text hd_format(const char *format, ...);

/* Memory until the end of the call; and a text that stays, in place of the one that `slot` had. */
void *hd_alloc(size_t size);
typedef struct {
    hd_text text;
    size_t room;
} hd_kept;
hd_text hd_keep(hd_kept *slot, hd_text text);

/* ---- JSON: the value's own text is its handle -------------------------------------------------------------------- */

/* The value of a key of an object; empty if there is none. */
hd_text hd_json_get(hd_text object, const char *key);
/* What a JSON string says. False: it is none. */
bool hd_json_text(hd_text value, hd_text *text);
/* The next item of a list; begin with `*rest` as the list itself. False: that was all, or it is no list. */
bool hd_json_next(hd_text *rest, hd_text *item);

/* ---- words that must not be seen --------------------------------------------------------------------------------- */

typedef struct {
    hd_kept bytes, ends;
    size_t count;
} hd_words;

/* Take the words of a JSON list of texts, and keep them. False: it is no such list, and the old ones stay. */
bool hd_words_set(hd_words *words, hd_text list);

/* ---- what goes over the line ------------------------------------------------------------------------------------- */

typedef struct {
    hd_text id, conversation, text, extra;
} hd_turn;

typedef struct {
    hd_text text, extra;
} hd_reply;

/* What becomes of a turn. Made by the functions below. */
typedef struct {
    uint8_t kind;
    hd_text text, more;
} hd_decision;

hd_decision hd_next(void);
hd_decision hd_leave(void);
hd_decision hd_rewrite(hd_text text);
hd_decision hd_answer(hd_text text);
hd_decision hd_answer_with(hd_text text, hd_text extra);
hd_decision hd_hand_over(hd_text reason, hd_text text);
hd_decision hd_drop(hd_text reason);
hd_decision hd_model(hd_text json);
hd_decision hd_other(hd_text json);
/* The call failed. */
hd_decision hd_fail(hd_text error);

/* What a call came to that decides nothing. */
typedef struct {
    bool failed, plain;
    hd_text text;
} hd_outcome;

hd_outcome hd_done(void);
hd_outcome hd_done_with(hd_text text); /* from `export_state`: the state, where hd_done says that there is none */
/* From `configure`: load the plugin anew. */
hd_outcome hd_load_anew(void);
hd_outcome hd_error(hd_text error);

/* A piece of a stream: what is shown now, and what is held back. A text in `error` fails the call. */
typedef struct {
    hd_text text, held, error;
} hd_piece;

/* Masks the words, overlapping ones too, an asterisk a character. Holds back the tail that may become a word, and a
 * word that reaches into it, unless it is the last. */
hd_piece hd_mask(const hd_words *words, hd_text text, bool last);

typedef struct {
    hd_text name, description, parameters, extra;
} hd_tool;

typedef struct {
    hd_text method, path, query, headers, body, extra;
} hd_request;

typedef struct {
    hd_text conversation, text, id, extra;
} hd_inbound;

typedef struct {
    uint16_t status;
    hd_text headers, body, extra;
} hd_response;

hd_response hd_json_response(uint16_t status, hd_text json);

/* What is in a webhook. A text in `error` fails the call. */
typedef struct {
    const hd_inbound *messages;
    size_t count;
    hd_response answer;
    hd_text error;
} hd_intake;

/* ---- what the host does for a plugin ----------------------------------------------------------------------------- */

typedef enum { HD_DEBUG, HD_INFO, HD_WARNING, HD_ERROR } hd_level;
typedef enum { HD_OK, HD_DENIED, HD_INVALID, HD_TOO_LARGE, HD_TIMEOUT, HD_UNAVAILABLE, HD_OTHER } hd_why;

/* `why` is HD_OK and `text` what was asked for, `none` if there is none; or `text` says what was wrong. What hd_kv_keys
 * and hd_http_fetch were asked for is where their last arguments point. */
typedef struct {
    hd_why why;
    bool none;
    hd_text text;
} hd_result;

/* In a function that decides: ask this of the host; what it refuses fails the call, with its text. */
#define HD_TRY(asked)                                                                                                  \
    do {                                                                                                               \
        hd_result hd_got = (asked);                                                                                    \
        if (hd_got.why != HD_OK) return hd_fail(hd_got.text);                                                          \
    } while (0)

void hd_log(hd_level level, hd_text event, hd_text fields);
hd_text hd_config(void);
hd_text hd_config_text(const char *key); /* a text of the config; empty if there is none */
uint32_t hd_time_left(void);
hd_result hd_emit(hd_text text);
hd_result hd_state_get(hd_text key);
hd_result hd_state_set(hd_text key, const hd_text *value); /* NULL takes it away */
hd_result hd_history(uint32_t limit);
hd_result hd_send(hd_text conversation, hd_text text);

hd_result hd_kv_get(hd_text key);
hd_result hd_kv_set(hd_text key, hd_text value);
hd_result hd_kv_delete(hd_text key);
hd_result hd_kv_keys(hd_text prefix, const hd_text **keys, size_t *count);

hd_result hd_llm_complete(hd_text request);
hd_result hd_http_fetch(hd_text method, hd_text url, hd_text headers, hd_text body, hd_response *response);

/* ---- what a plugin does: one line for each interface that its world exports -------------------------------------- */

#define HD_MIDDLEWARE(before, after)                                                                                   \
    HD_EXPORT("middleware", "before") void *hd_x_before(HD_TURN) { return hd_decided(before(HD_THE_TURN)); }           \
    HD_EXPORT("middleware", "after") void *hd_x_after(HD_TURN, HD_ARG(text), HD_ARG(extra)) {                          \
        return hd_decided(after(HD_THE_TURN, &(hd_reply){HD_THE(text), HD_THE(extra)}));                               \
    }

#define HD_CHUNKS(transform)                                                                                           \
    HD_EXPORT("chunks", "transform") void *hd_x_transform(HD_TURN, HD_ARG(text), int last) {                           \
        return hd_pieced(transform(HD_THE_TURN, HD_THE(text), last != 0));                                             \
    }

#define HD_BOT(respond)                                                                                                \
    HD_EXPORT("bot", "respond") void *hd_x_respond(HD_TURN) { return hd_decided(respond(HD_THE_TURN)); }

/* `list` is an array of hd_tool. */
#define HD_TOOLS(list, call)                                                                                           \
    HD_EXPORT("tools", "list-tools") void *hd_x_list(void) {                                                           \
        return hd_begin(), hd_listed(list, sizeof list / sizeof *list);                                                \
    }                                                                                                                  \
    HD_EXPORT("tools", "call-tool") void *hd_x_call(HD_ARG(name), HD_ARG(arguments)) {                                 \
        return hd_begin(), hd_called(call(HD_THE(name), HD_THE(arguments)));                                           \
    }

#define HD_INTAKE(receive, deliver)                                                                                    \
    HD_EXPORT("intake", "receive")                                                                                     \
    void *hd_x_receive(HD_ARG(method), HD_ARG(path), HD_ARG(query), HD_ARG(headers), HD_ARG(body), HD_ARG(extra)) {    \
        return hd_begin(), hd_received(receive(&(hd_request){HD_THE(method), HD_THE(path), HD_THE(query),              \
                                                             HD_THE(headers), HD_THE(body), HD_THE(extra)}));          \
    }                                                                                                                  \
    HD_EXPORT("delivery", "deliver") void *hd_x_deliver(HD_ARG(conversation), HD_ARG(text), HD_ARG(extra)) {           \
        return hd_begin(), hd_ended(deliver(HD_THE(conversation), &(hd_reply){HD_THE(text), HD_THE(extra)}));          \
    }

#define HD_EVENTS(on_event)                                                                                            \
    HD_EXPORT("events", "on-event") void hd_x_event(HD_ARG(name), HD_ARG(data)) {                                      \
        hd_begin(), on_event(HD_THE(name), HD_THE(data)), hd_ended(hd_done());                                         \
    }

#define HD_LIFECYCLE(setup, configure, probe, export_state, import_state)                                              \
    HD_EXPORT("lifecycle", "setup") void *hd_x_setup(HD_ARG(config)) {                                                 \
        return hd_begin(), hd_ended(setup(HD_THE(config)));                                                            \
    }                                                                                                                  \
    HD_EXPORT("lifecycle", "configure") void *hd_x_configure(HD_ARG(config)) {                                         \
        return hd_begin(), hd_configured(configure(HD_THE(config)));                                                   \
    }                                                                                                                  \
    HD_EXPORT("lifecycle", "probe") void *hd_x_probe(void) { return hd_begin(), hd_ended(probe()); }                   \
    HD_EXPORT("lifecycle", "export-state") void *hd_x_export(void) { return hd_begin(), hd_exported(export_state()); } \
    HD_EXPORT("lifecycle", "import-state") void *hd_x_import(HD_ARG(state), HD_ARG(version)) {                         \
        return hd_begin(), hd_ended(import_state(HD_THE(state), HD_THE(version)));                                     \
    }

/* ---- what those lines are made of -------------------------------------------------------------------------------- */

#define HD_PACKAGE(interface) "hotdesk:plugin/" interface "@1.0.0"
#define HD_EXPORT(interface, name) __attribute__((export_name(HD_PACKAGE(interface) "#" name)))
#define HD_ARG(name) const char *name##_at, size_t name##_len
#define HD_THE(name) ((hd_text){name##_at, name##_len})
#define HD_TURN HD_ARG(turn_id), HD_ARG(turn_conversation), HD_ARG(turn_text), HD_ARG(turn_extra)
#define HD_THE_TURN                                                                                                    \
    (hd_begin(), &(hd_turn){HD_THE(turn_id), HD_THE(turn_conversation), HD_THE(turn_text), HD_THE(turn_extra)})

void hd_begin(void);
void *hd_decided(hd_decision decision);
void *hd_pieced(hd_piece piece);
void *hd_listed(const hd_tool *tools, size_t count);
void *hd_called(hd_outcome outcome);
void *hd_ended(hd_outcome outcome);
void *hd_configured(hd_outcome outcome);
void *hd_exported(hd_outcome outcome);
void *hd_received(hd_intake intake);

#endif
