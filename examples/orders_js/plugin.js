// Orders: answers what became of an order, masks words, and hands over to a person who is asked for.

import {
    answer, areTexts, changed, denied, drop, emit, handOver, mask, maskPiece, next, parse, rewrite, tool,
} from "./hotdesk.js";
import kv from "hotdesk:plugin/kv@1.0.0";

const STATUS = new Map([["1001", "shipped"], ["1002", "packed"], ["1003", "damn late"]]);
const NUMBER = { type: "object", properties: { number: { type: "string" } }, required: ["number"] };
let words = [];
let answered = 0;

function configure(config) {
    const wanted = parse(config).words;
    if (!areTexts(wanted)) throw new Error("words must be a list of texts");
    words = wanted;
    return true;
}

export const lifecycle = {
    setup: configure,
    configure,
    probe() {},
    exportState: () => String(answered),
    importState(state) {
        if (!/^\d+$/.test(state) || Number(state) >= 2 ** 31) throw new Error("state is not a number");
        answered = Number(state);
    },
};

export const middleware = {
    before({ text }) {
        if (text.includes("human")) return handOver("asked for a human", "A person will be with you shortly.");
        if (text.includes("spam")) return drop("spam");
        return text.startsWith("say ") ? rewrite(text.slice(4)) : next;
    },
    after: (turn, { text }) => changed(text, mask(text, words)),
};

export const chunks = { transform: (turn, text, last) => maskPiece(text, words, last) };

function tell(number) {
    answered += 1;
    if (!STATUS.has(number)) return `There is no order ${number}.`;
    emit("Order ", number, " is ");
    return `${STATUS.get(number)}.`; // what was streamed and then this is the reply
}

const secret = (denial) => (denial ? `Denied: ${denial}.` : "Not denied.");

export const bot = {
    respond({ text }) {
        const number = /order (\d+)/.exec(text)?.[1];
        if (number) return answer(tell(number));
        if (text.includes("count")) return answer(`Answered ${answered}.`);
        if (text.includes("secret")) return answer(secret(denied(() => kv.get("secret"))));
        if (text.includes("fail")) throw new Error("told to fail");
        return text.includes("trap") ? undefined : next; // undefined is no decision, and traps
    },
};

export const tools = {
    listTools: () => [tool("order_status", "What became of an order.", NUMBER)],
    callTool(name, args) {
        const { number } = parse(args);
        if (name !== "order_status") throw new Error(`no tool ${name}`);
        if (!STATUS.has(number)) throw new Error(`no order ${number}`);
        return JSON.stringify({ number, status: STATUS.get(number) });
    },
};
