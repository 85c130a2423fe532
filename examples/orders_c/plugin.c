/* Orders: answers questions about them, masks words, and can be told to misbehave. */

#include "hotdesk.h"

static const struct { const char *number, *status; } orders[] = {
    {"1001", "shipped"}, {"1002", "packed"}, {"1003", "damn late"}};
static hd_words words;
static int answered;

static const char *status(hd_text number) {
    for (int i = 0; i < 3; i++) if (hd_is(number, orders[i].number)) return orders[i].status;
    return NULL;
}

static hd_decision before(const hd_turn *turn) {
    if (hd_has(turn->text, "human"))
        return hd_hand_over(HD("asked for a human"), HD("A person will be with you shortly."));
    if (hd_has(turn->text, "spam")) return hd_drop(HD("spam"));
    if (hd_begins(turn->text, "say ")) return hd_rewrite(hd_skip(turn->text, 4));
    return hd_next();
}

static hd_decision after(const hd_turn *turn, const hd_reply *reply) {
    hd_text masked = hd_mask(&words, reply->text, true).text;
    return hd_same(masked, reply->text) ? hd_next() : hd_rewrite(masked);
}

static hd_piece transform(const hd_turn *turn, hd_text text, bool last) { return hd_mask(&words, text, last); }

static hd_decision respond(const hd_turn *turn) {
    hd_text number = hd_digits_after(turn->text, "order ");
    if (number.len) {
        answered++;
        if (!status(number)) return hd_answer(hd_format("There is no order %t.", number));
        HD_TRY(hd_emit(HD("Order "))); HD_TRY(hd_emit(number)); HD_TRY(hd_emit(HD(" is ")));
        return hd_answer(hd_format("%s.", status(number)));
    }
    if (hd_has(turn->text, "count")) return hd_answer(hd_format("Answered %d.", answered));
    if (hd_has(turn->text, "secret")) {
        hd_result got = hd_kv_get(HD("secret"));
        return hd_answer(got.why == HD_DENIED ? hd_format("Denied: %t.", got.text) : HD("Not denied."));
    }
    if (hd_has(turn->text, "fail")) return hd_fail(HD("told to fail"));
    if (hd_has(turn->text, "trap")) __builtin_trap();
    return hd_next();
}

static const hd_tool tools[] = {{.name = HD("order_status"), .description = HD("What became of an order."), .parameters = HD(
    "{\"type\":\"object\",\"properties\":{\"number\":{\"type\":\"string\"}},\"required\":[\"number\"]}")}};

static hd_outcome call_tool(hd_text name, hd_text arguments) {
    hd_text number = HD("");
    if (!hd_is(name, "order_status")) return hd_error(hd_format("no tool %t", name));
    hd_json_text(hd_json_get(arguments, "number"), &number);
    if (!status(number)) return hd_error(hd_format("no order %t", number));
    return hd_done_with(hd_format("{\"number\":%q,\"status\":\"%s\"}", number, status(number)));
}

static hd_outcome configure(hd_text config) {
    return hd_words_set(&words, hd_json_get(config, "words")) ? hd_done() : hd_error(HD("words must be a list of texts"));
}

static hd_outcome export_state(void) { return hd_done_with(hd_format("%d", answered)); }

static hd_outcome import_state(hd_text state, hd_text version) {
    return hd_int(state, &answered) && answered >= 0 ? hd_done() : hd_error(HD("state is not a number"));
}

HD_MIDDLEWARE(before, after)
HD_CHUNKS(transform)
HD_BOT(respond)
HD_TOOLS(tools, call_tool)
HD_LIFECYCLE(configure, configure, hd_done, export_state, import_state)
