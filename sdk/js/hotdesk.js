// The thin layer of a hotdesk plugin in JavaScript: decisions, JSON, the log, masking. Use of it what you need.

import base from "hotdesk:plugin/base@1.0.0";

// What becomes of a turn.
export const next = { tag: "next" };
export const leave = { tag: "leave" };
export const rewrite = (text) => ({ tag: "rewrite", val: text });
export const changed = (was, is) => (was === is ? next : rewrite(is));
export const answer = (text, extra = {}) => ({ tag: "answer", val: { text, extra: JSON.stringify(extra) } });
export const handOver = (reason, text = "") => ({ tag: "hand-over", val: { reason, text } });
export const drop = (reason) => ({ tag: "drop", val: reason });
export const model = (options = {}) => ({ tag: "model", val: JSON.stringify(options) });

const DEEPEST = 100; // levels of JSON; deeper JSON is refused before the stack ends, which would be a trap

// Read JSON as the contract has it: an empty text stands for {}. What is not JSON, or too deep, is thrown.
export function parse(json) {
    const bare = json.replace(/\\./gs, "").replace(/"[^"]*"?/g, "");
    let depth = 0;
    for (const [bracket] of bare.matchAll(/[[\]{}]/g)) {
        depth += "[{".includes(bracket) ? 1 : -1;
        if (depth > DEEPEST) throw new Error(`this JSON nests deeper than ${DEEPEST}`);
    }
    return JSON.parse(json || "{}");
}

// Whether a value out of JSON is a list of texts.
export const areTexts = (value) => Array.isArray(value) && value.every((item) => typeof item === "string");

// The config: the manifest's, with the operator's over it.
export const config = () => parse(base.config());

// log.info("order_asked", { number: 1001 })
const logAt = (level) => (event, fields = {}) => base.log(level, event, JSON.stringify(fields));
export const log = { debug: logAt("debug"), info: logAt("info"), warning: logAt("warning"), error: logAt("error") };

// What the host refused, `{tag, val}` as in the contract's `error`, out of what an import threw; or null.
export const refusal = (thrown) => thrown?.payload?.tag ? thrown.payload : null;

// The capability that a call was denied for, or null: denied(() => kv.get("key")). Other errors go on.
export function denied(call) {
    try {
        call();
    } catch (thrown) {
        if (refusal(thrown)?.tag === "denied") return refusal(thrown).val;
        throw thrown;
    }
    return null;
}

// What the call gives: orFail(() => kv.set("key", value)). What the host refuses fails the plugin's own call, with its
// text; without this it would trap.
export function orFail(call) {
    try {
        return call();
    } catch (thrown) {
        throw refusal(thrown) ? new Error(refusal(thrown).val) : thrown;
    }
}

// Send chunks of a streamed answer; the text of the decision `answer` comes after them.
export const emit = (...chunks) => chunks.forEach((chunk) => orFail(() => base.emit(chunk)));

// What a webhook brought, and what its caller is answered.
export const inbound = (conversation, text, id = "", extra = {}) =>
    ({ conversation, text, id, extra: JSON.stringify(extra) });
export const response = (status, body) =>
    ({ status, headers: '{"content-type": "application/json"}', body: JSON.stringify(body), extra: "" });

// A function that the language model may call; the parameters are a JSON Schema of an object.
export const tool = (name, description, parameters) =>
    ({ name, description, parameters: JSON.stringify(parameters), extra: "" });

// A piece of a stream with an asterisk for each character of each of the words, whatever the case of its ASCII letters,
// and the tail that may yet become a word, held back unless this is the last piece: {text, held}.
export function maskPiece(text, words, last) {
    const lower = (string) => string.replace(/[A-Z]/g, (letter) => letter.toLowerCase());
    const lowered = lower(text);
    const wanted = words.filter((word) => word).map(lower);
    const mayBecome = (tail) => wanted.some((word) => word.length > tail.length && word.startsWith(tail));
    let cut = last ? text.length : Math.max(0, text.length - Math.max(0, ...wanted.map((word) => word.length)));
    while (cut < text.length && !mayBecome(lowered.slice(cut))) cut += 1;

    const found = [];
    for (const word of wanted) {
        for (let at = lowered.indexOf(word); at >= 0; at = lowered.indexOf(word, at + 1)) {
            found.push([at, at + word.length]);
        }
    }
    found.sort(([a], [b]) => a - b);
    // A word that the cut would split is held back whole.
    for (const [start, end] of found.toReversed()) if (start < cut && cut < end) cut = start;

    let shown = "";
    let at = 0;
    for (const [start, end] of found) {
        if (end <= at || end > cut) continue; // words may overlap
        const from = Math.max(at, start);
        shown += text.slice(at, from) + "*".repeat([...text.slice(from, end)].length);
        at = end;
    }
    return { text: shown + text.slice(at, cut), held: text.slice(cut) };
}

// The whole text, masked.
export const mask = (text, words) => maskPiece(text, words, true).text;
