/* hotdesk for C: memory, JSON, and the component model's ABI under the names of hotdesk.h. Kept by hand. */

#include "hotdesk.h"

#include <stdarg.h>

void *memcpy(void *to, const void *from, size_t len) { return __builtin_memcpy(to, from, len); }
void *memmove(void *to, const void *from, size_t len) { return __builtin_memmove(to, from, len); }
void *memset(void *to, int value, size_t len) { return __builtin_memset(to, value, len); }

int memcmp(const void *a, const void *b, size_t len) {
    const unsigned char *x = a, *y = b;
    for (; len && *x == *y; x++, y++) len--;
    return len ? *x - *y : 0;
}

size_t strlen(const char *text) {
    size_t len = 0;
    while (text[len]) len++;
    return len;
}

/* ---- memory: a chain of blocks that each call fills from the first one on ---------------------------------------- */

#define PAGE 65536u

typedef struct block {
    struct block *next;
    char *end;
} block;

extern char __heap_base;
static block *first, *current;
static char *at;
static bool over = true; /* the last call's texts have been read; the next one may write over them */

static char *end_of_memory(void) { return (char *)(__builtin_wasm_memory_size(0) * PAGE); }

static char *pages(size_t size) {
    size_t count = (size + PAGE - 1) / PAGE;
    size_t page = __builtin_wasm_memory_grow(0, count);
    if (count > PAGE || page == (size_t)-1) __builtin_trap();
    return (char *)(page * PAGE);
}

static void enter(block *into) { current = into, at = (char *)(into + 1); }

void hd_begin(void) {
    if (!over) return;
    over = false;
    if (!first) {
        first = (block *)(((uintptr_t)&__heap_base + 15) & ~(uintptr_t)15);
        if ((char *)(first + 1) > end_of_memory()) first = (block *)pages(PAGE); /* the data end where a page does */
        first->next = NULL, first->end = end_of_memory();
    }
    enter(first);
}

void *hd_alloc(size_t size) {
    if (size > 0x7fff0000) __builtin_trap();
    size = (size + 7) & ~(size_t)7;
    while ((size_t)(current->end - at) < size) {
        if (!current->next) {
            block *fresh = (block *)pages(size + sizeof(block));
            if ((char *)fresh == current->end) { /* the last block grows, whoever asks for more and more */
                current->end = end_of_memory();
                continue;
            }
            fresh->next = NULL, fresh->end = end_of_memory();
            current->next = fresh;
        }
        enter(current->next);
    }
    void *given = at;
    at += size;
    return given;
}

__attribute__((export_name("cabi_realloc"))) void *hd_realloc(void *old, size_t had, size_t align, size_t size) {
    hd_begin();
    if (!size) return (void *)align;
    void *fresh = hd_alloc(size);
    if (old) memcpy(fresh, old, had < size ? had : size);
    return fresh;
}

/* What stays has its own memory, and is moved to twice as much when it outgrows it. */
hd_text hd_keep(hd_kept *slot, hd_text text) {
    static char *spare, *spare_end;
    if (text.len > slot->room) {
        size_t room = (text.len * 2 + 15) & ~(size_t)7;
        if ((size_t)(spare_end - spare) < room) {
            spare = pages(room);
            spare_end = end_of_memory();
        }
        slot->text.at = spare, slot->room = room;
        spare += room;
    }
    memmove((char *)slot->text.at, text.at, text.len);
    slot->text.len = text.len;
    return slot->text;
}

/* ---- texts ------------------------------------------------------------------------------------------------------- */

static hd_text text_of(const char *text) { return (hd_text){text, strlen(text)}; }
static bool digit(char c) { return c >= '0' && c <= '9'; }

bool hd_same(hd_text a, hd_text b) { return a.len == b.len && !memcmp(a.at, b.at, a.len); }
bool hd_is(hd_text text, const char *what) { return hd_same(text, text_of(what)); }
bool hd_has(hd_text text, const char *what) { return hd_find(text, text_of(what)) >= 0; }

bool hd_begins(hd_text text, const char *with) {
    hd_text start = text_of(with);
    return text.len >= start.len && !memcmp(text.at, start.at, start.len);
}

ptrdiff_t hd_find(hd_text in, hd_text what) {
    for (size_t i = 0; i + what.len <= in.len; i++)
        if (!memcmp(in.at + i, what.at, what.len)) return (ptrdiff_t)i;
    return -1;
}

hd_text hd_skip(hd_text text, size_t count) {
    if (count > text.len) count = text.len;
    return (hd_text){text.at + count, text.len - count};
}

static bool blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

static hd_text trimmed(hd_text text) {
    while (text.len && blank(*text.at)) text = hd_skip(text, 1);
    return text;
}

hd_text hd_trim(hd_text text) {
    text = trimmed(text);
    while (text.len && blank(text.at[text.len - 1])) text.len--;
    return text;
}

static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c; }

/* How many bytes the two begin with alike, whatever the case of ASCII letters. */
static size_t in_common(hd_text a, hd_text b) {
    size_t same = 0;
    while (same < a.len && same < b.len && lower(a.at[same]) == lower(b.at[same])) same++;
    return same;
}

bool hd_mentions(hd_text text, const char *what) {
    hd_text word = text_of(what);
    for (size_t i = 0; i + word.len <= text.len; i++)
        if (in_common(hd_skip(text, i), word) == word.len) return true;
    return false;
}

hd_text hd_digits_after(hd_text text, const char *before) {
    hd_text mark = text_of(before);
    size_t len = 0;
    if (!mark.len) return (hd_text){text.at, 0};
    for (ptrdiff_t at; !len && (at = hd_find(text, mark)) >= 0;) {
        text = hd_skip(text, (size_t)at + mark.len);
        while (len < text.len && digit(text.at[len])) len++;
    }
    return (hd_text){text.at, len};
}

bool hd_int(hd_text text, int *number) {
    bool minus = text.len && *text.at == '-';
    int sum = 0;
    if (text.len == minus) return false;
    for (size_t i = minus; i < text.len; i++) {
        if (!digit(text.at[i]) || __builtin_mul_overflow(sum, 10, &sum)) return false;
        if (__builtin_sub_overflow(sum, text.at[i] - '0', &sum)) return false;
    }
    if (!minus && sum == -2147483647 - 1) return false;
    *number = minus ? sum : -sum;
    return true;
}

static size_t quoted(char *to, hd_text text) {
    size_t len = 0;
    to[len++] = '"';
    for (size_t i = 0; i < text.len; i++) {
        unsigned char c = (unsigned char)text.at[i];
        if (c < 32) {
            memcpy(to + len, "\\u00", 4);
            to[len + 4] = "01"[c >> 4], to[len + 5] = "0123456789abcdef"[c & 15], len += 6;
            continue;
        }
        if (c == '"' || c == '\\') to[len++] = '\\';
        to[len++] = (char)c;
    }
    to[len++] = '"';
    return len;
}

hd_text hd_format(const char *format, ...) {
    char *out = NULL, number[12];
    size_t len = 0;
    for (int writing = 0; writing < 2; writing++) { /* measured, then written */
        va_list args;
        va_start(args, format);
        if (writing) out = hd_alloc(len);
        len = 0;
        for (const char *f = format; *f; f++) {
            hd_text piece = {f, 1};
            if (*f == '%') {
                switch (*++f) {
                case 't': piece = va_arg(args, hd_text); break;
                case 's': piece = text_of(va_arg(args, const char *)); break;
                case 'd': {
                    int value = va_arg(args, int);
                    unsigned left = value < 0 ? 0u - (unsigned)value : (unsigned)value;
                    char *p = number + sizeof number;
                    do *--p = (char)('0' + left % 10);
                    while (left /= 10);
                    if (value < 0) *--p = '-';
                    piece.at = p, piece.len = (size_t)(number + sizeof number - p);
                    break;
                }
                case 'q': {
                    hd_text text = va_arg(args, hd_text);
                    len += writing ? quoted(out + len, text) : text.len * 6 + 2;
                    continue;
                }
                case 0: f--; break; /* the format ends in a % */
                default: piece.at = f;
                }
            }
            if (writing) memcpy(out + len, piece.at, piece.len);
            len += piece.len;
        }
        va_end(args);
    }
    return (hd_text){out, len};
}

/* ---- JSON -------------------------------------------------------------------------------------------------------- */

/* The first value of the text, however deep; 0 is none. */
static size_t value_len(hd_text text) {
    size_t depth = 0;
    bool inside = false;
    for (size_t i = 0; i < text.len; i++) {
        char c = text.at[i];
        if (inside) {
            if (c == '\\') i++;
            else if (c == '"' && (inside = false, !depth)) return i + 1;
        } else if (c == '"') {
            if (i && !depth) return i;
            inside = true;
        } else if (c == '{' || c == '[') {
            depth++;
        } else if (c == '}' || c == ']') {
            if (!depth) return i;
            if (!--depth) return i + 1;
        } else if (!depth && (c == ',' || c == ':' || blank(c))) {
            return i;
        }
    }
    return depth || inside ? 0 : text.len;
}

static bool take(hd_text *rest, char c) {
    *rest = trimmed(*rest);
    if (!rest->len || *rest->at != c) return false;
    *rest = hd_skip(*rest, 1);
    return true;
}

static bool take_value(hd_text *rest, hd_text *value) {
    *rest = trimmed(*rest);
    *value = (hd_text){rest->at, value_len(*rest)};
    *rest = hd_skip(*rest, value->len);
    return value->len > 0;
}

hd_text hd_json_get(hd_text object, const char *key) {
    hd_text wanted = text_of(key), name, value, said;
    if (take(&object, '{'))
        while (take_value(&object, &name) && take(&object, ':') && take_value(&object, &value)) {
            if (hd_json_text(name, &said) && hd_same(said, wanted)) return value;
            if (!take(&object, ',')) break;
        }
    return (hd_text){"", 0};
}

bool hd_json_next(hd_text *rest, hd_text *item) {
    if (!take(rest, '[') && !take(rest, ',')) return false;
    return take_value(rest, item);
}

static int hex(const char *at, size_t len) {
    int value = 0;
    for (size_t i = 0; i < 4; i++) {
        char c = i < len ? at[i] : 'x';
        int d = digit(c) ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (d < 0) return -1;
        value = value * 16 + d;
    }
    return value;
}

static char *utf8(char *to, int point) {
    if (point < 0x80) return *to = (char)point, to + 1;
    int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    *to++ = (char)((0xf80 >> more) | point >> 6 * more);
    while (more--) *to++ = (char)(0x80 | (point >> 6 * more & 0x3f));
    return to;
}

bool hd_json_text(hd_text value, hd_text *text) {
    if (value.len < 2 || *value.at != '"' || value_len(value) != value.len) return false;
    const char *end = value.at + value.len - 1;
    char *out = hd_alloc(value.len), *to = out;
    for (const char *from = value.at + 1; from < end; from++) {
        if (*from != '\\') {
            *to++ = *from;
            continue;
        }
        switch (*++from) {
        case 'n': *to++ = '\n'; break;
        case 't': *to++ = '\t'; break;
        case 'r': *to++ = '\r'; break;
        case 'b': *to++ = '\b'; break;
        case 'f': *to++ = '\f'; break;
        case 'u': {
            int point = hex(from + 1, (size_t)(end - from - 1)), low = -1;
            if (point < 0) return false;
            from += 4;
            if (point >= 0xd800 && point < 0xdc00 && end - from > 6 && from[1] == '\\' && from[2] == 'u')
                low = hex(from + 3, 4);
            if (low >= 0xdc00 && low < 0xe000) point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00), from += 6;
            to = utf8(to, point >= 0xd800 && point < 0xe000 ? 0xfffd : point);
            break;
        }
        default: *to++ = *from;
        }
    }
    *text = (hd_text){out, (size_t)(to - out)};
    return true;
}

/* ---- words ------------------------------------------------------------------------------------------------------- */

bool hd_words_set(hd_words *words, hd_text list) {
    hd_text rest = trimmed(list), item, word;
    if (value_len(rest) < 2 || *rest.at != '[') return false;
    char *bytes = hd_alloc(list.len);
    size_t *ends = hd_alloc(list.len * sizeof *ends), count = 0, len = 0;
    while (hd_json_next(&rest, &item)) {
        if (!hd_json_text(item, &word)) return false;
        memcpy(bytes + len, word.at, word.len);
        len += word.len, ends[count++] = len;
    }
    if (!take(&rest, ']')) return false;
    hd_keep(&words->bytes, (hd_text){bytes, len});
    hd_keep(&words->ends, (hd_text){(const char *)ends, count * sizeof *ends});
    words->count = count;
    return true;
}

hd_piece hd_mask(const hd_words *words, hd_text text, bool last) {
    const size_t *ends = (const size_t *)words->ends.text.at;
    char *out = hd_alloc(text.len), *to = out, *shown = out;
    size_t until = 0, cut = 0; /* where the words end that began so far; the last place that none of them spans */
    for (size_t i = 0; i < text.len; i++) {
        hd_text rest = hd_skip(text, i);
        if (i >= until) cut = i, shown = to;
        for (size_t w = 0, from = 0; w < words->count; from = ends[w++]) {
            size_t len = ends[w] - from, same = in_common(rest, (hd_text){words->bytes.text.at + from, len});
            if (same == len && i + len > until) until = i + len;
            if (!last && same == rest.len && same < len) /* it may become this word */
                return (hd_piece){{out, (size_t)(shown - out)}, hd_skip(text, cut), HD("")};
        }
        if (i >= until) *to++ = text.at[i];
        else if ((text.at[i] & 0xc0) != 0x80) *to++ = '*';
    }
    return (hd_piece){{out, (size_t)(to - out)}, HD(""), HD("")};
}

/* ---- what is decided, in the shape that the host reads ----------------------------------------------------------- */

enum { NEXT, LEAVE, REWRITE, ANSWER, HAND_OVER, DROP, MODEL, OTHER, FAILED };

hd_decision hd_next(void) { return (hd_decision){NEXT, HD(""), HD("")}; }
hd_decision hd_leave(void) { return (hd_decision){LEAVE, HD(""), HD("")}; }
hd_decision hd_rewrite(hd_text text) { return (hd_decision){REWRITE, text, HD("")}; }
hd_decision hd_answer(hd_text text) { return (hd_decision){ANSWER, text, HD("")}; }
hd_decision hd_answer_with(hd_text text, hd_text extra) { return (hd_decision){ANSWER, text, extra}; }
hd_decision hd_hand_over(hd_text reason, hd_text text) { return (hd_decision){HAND_OVER, reason, text}; }
hd_decision hd_drop(hd_text reason) { return (hd_decision){DROP, reason, HD("")}; }
hd_decision hd_model(hd_text json) { return (hd_decision){MODEL, json, HD("")}; }
hd_decision hd_other(hd_text json) { return (hd_decision){OTHER, json, HD("")}; }
hd_decision hd_fail(hd_text error) { return (hd_decision){FAILED, error, HD("")}; }

hd_outcome hd_done(void) { return (hd_outcome){false, true, HD("")}; }
hd_outcome hd_done_with(hd_text text) { return (hd_outcome){false, false, text}; }
hd_outcome hd_load_anew(void) { return (hd_outcome){false, false, HD("")}; }
hd_outcome hd_error(hd_text error) { return (hd_outcome){true, false, error}; }

hd_response hd_json_response(uint16_t status, hd_text json) {
    return (hd_response){status, HD("{\"content-type\":\"application/json\"}"), json, HD("")};
}

/* The host has read it before it calls again. */
static struct {
    uint8_t failed;
    union {
        hd_decision decision;
        struct {
            hd_text text, held;
        } piece;
        struct {
            const hd_inbound *messages;
            size_t count;
            hd_response answer;
        } intake;
        hd_text text;
        uint8_t flag;
    } as;
} result;

static void *failed(hd_text error) {
    over = true;
    result.failed = 1, result.as.text = error;
    return &result;
}

static void *fine(void) {
    over = true;
    result.failed = 0;
    return &result;
}

void *hd_decided(hd_decision decision) {
    if (decision.kind == FAILED) return failed(decision.text);
    result.as.decision = decision;
    return fine();
}

void *hd_pieced(hd_piece piece) {
    if (piece.error.len) return failed(piece.error);
    result.as.piece.text = piece.text, result.as.piece.held = piece.held;
    return fine();
}

void *hd_listed(const hd_tool *tools, size_t count) {
    static struct {
        const hd_tool *tools;
        size_t count;
    } list;
    over = true;
    list.tools = tools, list.count = count;
    return &list;
}

void *hd_called(hd_outcome outcome) {
    if (outcome.failed) return failed(outcome.text);
    result.as.text = outcome.text;
    return fine();
}

void *hd_ended(hd_outcome outcome) { return outcome.failed ? failed(outcome.text) : fine(); }

void *hd_configured(hd_outcome outcome) {
    if (outcome.failed) return failed(outcome.text);
    result.as.flag = outcome.plain;
    return fine();
}

void *hd_exported(hd_outcome outcome) {
    fine();
    result.failed = !outcome.failed && !outcome.plain; /* an option: 1 is some */
    result.as.text = outcome.text;
    return &result;
}

void *hd_received(hd_intake intake) {
    if (intake.error.len) return failed(intake.error);
    result.as.intake.messages = intake.messages, result.as.intake.count = intake.count;
    result.as.intake.answer = intake.answer;
    return fine();
}

/* ---- what the host does ------------------------------------------------------------------------------------------ */

#define IMPORT(interface, name) __attribute__((import_module(HD_PACKAGE(interface)), import_name(name)))
#define TEXT const char *, size_t
#define PUT(text) (text).at, (text).len

/* A result of which each side may be a text, an option of one, a list, or nothing. */
typedef struct {
    uint8_t failed;
    union {
        hd_text text;
        struct {
            const hd_text *items;
            size_t count;
        } list;
        struct {
            uint8_t kind;
            hd_text text;
        } tagged; /* an error, or an option */
        hd_response response;
    } as;
} raw;

IMPORT("base", "log") void base_log(int, TEXT, TEXT);
IMPORT("base", "config") void base_config(hd_text *);
IMPORT("base", "time-left") uint32_t base_time_left(void);
IMPORT("base", "emit") void base_emit(TEXT, raw *);
IMPORT("base", "state-get") void base_state_get(TEXT, raw *);
IMPORT("base", "state-set") void base_state_set(TEXT, int, TEXT, raw *);
IMPORT("base", "history") void base_history(uint32_t, raw *);
IMPORT("base", "send") void base_send(TEXT, TEXT, raw *);
IMPORT("kv", "get") void kv_get(TEXT, raw *);
IMPORT("kv", "set") void kv_set(TEXT, TEXT, raw *);
IMPORT("kv", "delete") void kv_delete(TEXT, raw *);
IMPORT("kv", "keys") void kv_keys(TEXT, raw *);
IMPORT("llm", "complete") void llm_complete(TEXT, raw *);
IMPORT("http", "fetch") void http_fetch(TEXT, TEXT, TEXT, TEXT, raw *);

typedef enum { NOTHING, A_TEXT, AN_OPTION, ELSEWHERE } holds;

static hd_result came(const raw *from, holds what) {
    if (from->failed) return (hd_result){(hd_why)(HD_DENIED + from->as.tagged.kind), true, from->as.tagged.text};
    if (what == A_TEXT) return (hd_result){HD_OK, false, from->as.text};
    if (what == AN_OPTION && from->as.tagged.kind) return (hd_result){HD_OK, false, from->as.tagged.text};
    return (hd_result){HD_OK, what != ELSEWHERE, HD("")};
}

void hd_log(hd_level level, hd_text event, hd_text fields) { base_log((int)level, PUT(event), PUT(fields)); }
uint32_t hd_time_left(void) { return base_time_left(); }

hd_text hd_config(void) {
    hd_text config;
    return base_config(&config), config;
}

hd_text hd_config_text(const char *key) {
    hd_text text = HD("");
    hd_json_text(hd_json_get(hd_config(), key), &text);
    return text;
}

#define ASK(what, function, ...)                                                                                       \
    raw from;                                                                                                          \
    return function(__VA_ARGS__, &from), came(&from, what)

hd_result hd_emit(hd_text text) { ASK(NOTHING, base_emit, PUT(text)); }
hd_result hd_state_get(hd_text key) { ASK(AN_OPTION, base_state_get, PUT(key)); }
hd_result hd_history(uint32_t limit) { ASK(A_TEXT, base_history, limit); }
hd_result hd_send(hd_text conversation, hd_text text) { ASK(A_TEXT, base_send, PUT(conversation), PUT(text)); }
hd_result hd_kv_get(hd_text key) { ASK(AN_OPTION, kv_get, PUT(key)); }
hd_result hd_kv_set(hd_text key, hd_text value) { ASK(NOTHING, kv_set, PUT(key), PUT(value)); }
hd_result hd_kv_delete(hd_text key) { ASK(NOTHING, kv_delete, PUT(key)); }
hd_result hd_llm_complete(hd_text request) { ASK(A_TEXT, llm_complete, PUT(request)); }

hd_result hd_state_set(hd_text key, const hd_text *value) {
    hd_text given = value ? *value : HD("");
    ASK(NOTHING, base_state_set, PUT(key), value != NULL, PUT(given));
}

hd_result hd_kv_keys(hd_text prefix, const hd_text **keys, size_t *count) {
    raw from;
    kv_keys(PUT(prefix), &from);
    *keys = from.failed ? NULL : from.as.list.items, *count = from.failed ? 0 : from.as.list.count;
    return came(&from, ELSEWHERE);
}

hd_result hd_http_fetch(hd_text method, hd_text url, hd_text headers, hd_text body, hd_response *response) {
    raw from;
    http_fetch(PUT(method), PUT(url), PUT(headers), PUT(body), &from);
    if (!from.failed) *response = from.as.response;
    return came(&from, ELSEWHERE);
}
