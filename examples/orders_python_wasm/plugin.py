"""Orders: answers what became of an order, masks words, and hands over to a person who is asked for."""

import json
import re
from types import SimpleNamespace

import hotdesk_wasm as desk
from wit_world.imports import kv

STATUS = {"1001": "shipped", "1002": "packed", "1003": "damn late"}
NUMBER = {"type": "object", "properties": {"number": {"type": "string"}}, "required": ["number"]}
now = SimpleNamespace(words=[], answered=0)


class Lifecycle(desk.Lifecycle):  # its setup calls configure
    def configure(self, config):
        words = desk.parse(config).get("words")
        desk.require(desk.are_texts(words), "words must be a list of texts")
        now.words = words
        return True

    def export_state(self):
        return str(now.answered)

    def import_state(self, state, version):
        desk.require(re.fullmatch("[0-9]{1,10}", state) and int(state) < 2**31, "state is not a number")
        now.answered = int(state)


class Middleware:
    def before(self, turn):
        if "human" in turn.text:
            return desk.hand_over("asked for a human", "A person will be with you shortly.")
        if "spam" in turn.text:
            return desk.drop("spam")
        return desk.rewrite(turn.text[4:]) if turn.text.startswith("say ") else desk.NEXT

    def after(self, turn, reply):
        return desk.changed(reply.text, desk.mask(reply.text, now.words))


class Chunks:
    def transform(self, turn, text, last):
        return desk.mask_piece(text, now.words, last)


class Bot:
    def respond(self, turn):
        if asked := re.search("order ([0-9]+)", turn.text):
            return desk.answer(tell(asked[1]))
        if "count" in turn.text:
            return desk.answer(f"Answered {now.answered}.")
        if "secret" in turn.text:
            name = desk.denied(lambda: kv.get("secret"))
            return desk.answer(f"Denied: {name}." if name else "Not denied.")
        desk.require("fail" not in turn.text, "told to fail")
        if "trap" in turn.text:
            raise RuntimeError("told to trap")  # any exception but Err
        return desk.NEXT


def tell(number):
    now.answered += 1
    if number not in STATUS:
        return f"There is no order {number}."
    desk.emit("Order ", number, " is ")
    return f"{STATUS[number]}."  # what was streamed and then this is the reply


class Tools:
    def list_tools(self):
        return [desk.tool("order_status", "What became of an order.", NUMBER)]

    def call_tool(self, name, arguments):
        number = desk.parse(arguments).get("number")
        desk.require(name == "order_status", f"no tool {name}")
        desk.require(number in STATUS, f"no order {number}")
        return json.dumps({"number": number, "status": STATUS[number]})
