//! hotdesk for Zig: what a plugin says and is asked, after sdk/wit. Kept by hand; a test holds it to the WIT.
//!
//! A plugin is one file that imports this one, declares the functions that it wants to be called, and ends with
//! `comptime { hotdesk.plugin(@This()); }`. The functions, by the interfaces that the plugin's world exports:
//!
//!     middleware  before(Turn) !Decision, after(Turn, Reply) !Decision; either may be left out
//!     chunks      transform(Turn, text, last: bool) !Piece
//!     bot         respond(Turn) !Decision
//!     tools       tools: an array of Tool, callTool(name, arguments) ![]const u8
//!     intake, delivery   receive(Request) !Intake, deliver(conversation, Reply) !void
//!     events      onEvent(name, data) void
//!     lifecycle   setup(config) !void, configure(config) !bool, probe() !void, exportState() ?[]const u8,
//!                 importState(state, version) !void; any of them may be left out, but not all
//!
//! Every text that a function gets or makes with `allocator` lives until its call is over. What is to stay needs an
//! allocator of its own, such as `std.heap.wasm_allocator`.

const std = @import("std");

pub const Text = []const u8;

pub const Turn = struct { id: Text, conversation: Text, text: Text, extra: Text };
pub const Reply = struct { text: Text, extra: Text = "" };
pub const Handover = struct { reason: Text, text: Text = "" };
pub const Piece = struct { text: Text, held: Text = "" };
pub const Tool = struct { name: Text, description: Text, parameters: Text, extra: Text = "" };
pub const Request = struct { method: Text, path: Text, query: Text, headers: Text, body: Text, extra: Text };
pub const Inbound = struct { conversation: Text, text: Text, id: Text = "", extra: Text = "" };
pub const Response = struct { status: u16 = 200, headers: Text = "{}", body: Text = "", extra: Text = "" };
pub const Intake = struct { messages: []const Inbound = &.{}, answer: Response = .{} };
pub const Level = enum(u32) { debug, info, warning, err };

/// What becomes of a turn. The order is the contract's.
pub const Decision = union(enum(u8)) {
    next,
    leave,
    rewrite: Text,
    answer: Reply,
    hand_over: Handover,
    drop: Text,
    model: Text,
    other: Text,
};

/// Why the host did not do what was asked; `why` has its text. The order is the contract's.
pub const Error = error{ Denied, Invalid, TooLarge, Timeout, Unavailable, Other };

/// The text of the call's last error.
pub var why: Text = "";

/// The error that fails a call with a text: `return hotdesk.fail("no order {s}", .{number})`.
pub fn fail(comptime text: Text, values: anytype) error{Failed} {
    why = format(text, values);
    return error.Failed;
}

// ---- memory: what a call allocates is gone when the next one begins -----------------------------------------------

var arena: std.heap.ArenaAllocator = .init(std.heap.wasm_allocator);
var over = false;

pub const allocator = arena.allocator();

fn begin() void {
    if (over) {
        _ = arena.reset(.{ .retain_with_limit = 1 << 20 });
        why = ""; // it was in there
    }
    over = false;
}

export fn cabi_realloc(old: ?[*]u8, had: usize, alignment: usize, size: usize) [*]u8 {
    begin();
    if (size == 0) return @ptrFromInt(alignment);
    const fresh = allocator.alignedAlloc(u8, .@"8", size) catch @trap();
    if (old) |bytes| @memcpy(fresh[0..@min(had, size)], bytes[0..@min(had, size)]);
    return fresh.ptr;
}

// ---- texts and JSON -----------------------------------------------------------------------------------------------

/// A text, formatted.
pub fn format(comptime text: Text, values: anytype) Text {
    return std.fmt.allocPrint(allocator, text, values) catch @trap();
}

pub fn has(text: Text, what: Text) bool {
    return std.mem.find(u8, text, what) != null;
}

/// The same, whatever the case of ASCII letters.
pub fn mentions(text: Text, what: Text) bool {
    return std.ascii.findIgnoreCase(text, what) != null;
}

/// The first digits that stand right behind `before`.
pub fn digitsAfter(text: Text, before: Text) ?Text {
    var parts = std.mem.splitSequence(u8, text, before);
    _ = parts.next();
    while (parts.next()) |part| {
        const len = std.mem.findNone(u8, part, "0123456789") orelse part.len;
        if (len > 0) return part[0..len];
    }
    return null;
}

/// A JSON text as a value of a type: keys that the type does not have are ignored.
pub fn parse(comptime T: type, json: Text) !T {
    return std.json.parseFromSliceLeaky(T, allocator, json, .{ .ignore_unknown_fields = true });
}

/// The value of a JSON object's key.
pub fn get(json: Text, key: Text) ?std.json.Value {
    const all = parse(std.json.Value, json) catch return null;
    return if (all == .object) all.object.get(key) else null;
}

/// The text of a JSON object's key; empty if there is none.
pub fn getText(json: Text, key: Text) Text {
    const value = get(json, key) orelse .null;
    return if (value == .string) value.string else "";
}

/// A value as JSON.
pub fn stringify(value: anytype) Text {
    return std.json.Stringify.valueAlloc(allocator, value, .{}) catch @trap();
}

/// The answer to a webhook's caller.
pub fn response(status: u16, body: anytype) Response {
    return .{ .status = status, .headers = "{\"content-type\":\"application/json\"}", .body = stringify(body) };
}

/// The decision that this is the answer.
pub fn answer(comptime text: Text, values: anytype) Decision {
    return .{ .answer = .{ .text = format(text, values) } };
}

/// Words that must not be seen; they are kept from one call to the next.
pub const Words = struct {
    arena: std.heap.ArenaAllocator = .init(std.heap.wasm_allocator),
    list: []const Text = &.{},

    /// Take the words of a config's key. An error says that it is no list of texts; the old ones stay then.
    pub fn set(words: *Words, json: Text, comptime key: Text) !void {
        const value = get(json, key) orelse .null;
        const fresh = if (value == .array) value.array.items else return fail(key ++ " must be a list of texts", .{});
        for (fresh) |word| if (word != .string) return fail(key ++ " must be a list of texts", .{});
        _ = words.arena.reset(.retain_capacity);
        const keep = words.arena.allocator();
        const kept = keep.alloc(Text, fresh.len) catch @trap();
        for (kept, fresh) |*to, from| to.* = keep.dupe(u8, from.string) catch @trap();
        words.list = kept;
    }

    /// Masks them, overlapping ones too, an asterisk a character, whatever the case of ASCII letters. Holds back the
    /// tail that may become a word, and a word that reaches into it, unless it is the last.
    pub fn mask(words: Words, text: Text, last: bool) Piece {
        var out = std.ArrayList(u8).initCapacity(allocator, text.len) catch @trap();
        var until: usize = 0; // where the words end that began so far
        var cut: usize = 0; // the last place that none of them spans
        var shown: usize = 0; // what is out up to there
        for (text, 0..) |byte, i| {
            const rest = text[i..];
            if (i >= until) {
                cut = i;
                shown = out.items.len;
            }
            for (words.list) |word| {
                if (!last and word.len > rest.len and std.ascii.startsWithIgnoreCase(word, rest))
                    return .{ .text = out.items[0..shown], .held = text[cut..] };
                if (std.ascii.startsWithIgnoreCase(rest, word)) until = @max(until, i + word.len);
            }
            if (i >= until) {
                out.appendAssumeCapacity(byte);
            } else if (byte & 0xc0 != 0x80) out.appendAssumeCapacity('*');
        }
        return .{ .text = out.items };
    }
};

// ---- what the host does for a plugin ------------------------------------------------------------------------------

/// Log a line; `fields` is a struct.
pub fn log(level: Level, event: Text, fields: anytype) void {
    const json = stringify(fields);
    imports.log(level, at(event), event.len, at(json), json.len);
}

/// The config, as a JSON object.
pub fn config() Text {
    var given: Raw = undefined;
    imports.config(&given);
    return given.text();
}

/// Milliseconds until the call's deadline.
pub fn timeLeft() u32 {
    return imports.@"time-left"();
}

pub fn emit(text: Text) Error!void {
    _ = try ask(imports.emit, .{ at(text), text.len });
}

pub fn send(conversation: Text, text: Text) Error!Text {
    const result = try ask(imports.send, .{ at(conversation), conversation.len, at(text), text.len });
    return result.as.text.text();
}

pub fn history(limit: u32) Error!Text {
    const result = try ask(imports.history, .{limit});
    return result.as.text.text();
}

/// The conversation's state.
pub const state = struct {
    pub fn get(key: Text) Error!?Text {
        const result = try ask(imports.@"state-get", .{ at(key), key.len });
        return result.optional();
    }

    /// Null takes the value away.
    pub fn set(key: Text, value: ?Text) Error!void {
        const some = @intFromBool(value != null);
        const given = value orelse "";
        _ = try ask(imports.@"state-set", .{ at(key), key.len, some, at(given), given.len });
    }
};

/// The plugin's own keys.
pub const kv = struct {
    pub fn get(key: Text) Error!?Text {
        const result = try ask(imports.get, .{ at(key), key.len });
        return result.optional();
    }

    pub fn set(key: Text, value: Text) Error!void {
        _ = try ask(imports.set, .{ at(key), key.len, at(value), value.len });
    }

    pub fn delete(key: Text) Error!void {
        _ = try ask(imports.delete, .{ at(key), key.len });
    }

    pub fn keys(prefix: Text) Error![]const Text {
        const result = try ask(imports.keys, .{ at(prefix), prefix.len });
        const found = allocator.alloc(Text, result.as.list.len) catch @trap();
        for (found, 0..) |*key, i| key.* = result.as.list.items[i].text();
        return found;
    }
};

/// The language model: JSON in, JSON out.
pub fn complete(request: Text) Error!Text {
    const result = try ask(imports.complete, .{ at(request), request.len });
    return result.as.text.text();
}

/// HTTP; the headers are a JSON object.
pub fn fetch(method: Text, url: Text, headers: Text, body: Text) Error!Response {
    const what = .{ at(method), method.len, at(url), url.len, at(headers), headers.len, at(body), body.len };
    const got = (try ask(imports.fetch, what)).as.response;
    return .{ .status = got.status, .headers = got.headers.text(), .body = got.body.text(), .extra = got.extra.text() };
}

/// What the host gives for these arguments, unless it refuses.
fn ask(comptime function: anytype, arguments: anytype) Error!Result {
    var result: Result = undefined;
    @call(.auto, function, arguments ++ .{&result});
    try result.check();
    return result;
}

const At = [*]const u8;

/// An empty text may be nowhere; the host wants it within the memory.
fn at(text: Text) At {
    return if (text.len == 0) "" else text.ptr;
}

const imports = struct {
    extern "hotdesk:plugin/base@1.0.0" fn log(Level, At, usize, At, usize) void;
    extern "hotdesk:plugin/base@1.0.0" fn config(*Raw) void;
    extern "hotdesk:plugin/base@1.0.0" fn @"time-left"() u32;
    extern "hotdesk:plugin/base@1.0.0" fn emit(At, usize, *Result) void;
    extern "hotdesk:plugin/base@1.0.0" fn @"state-get"(At, usize, *Result) void;
    extern "hotdesk:plugin/base@1.0.0" fn @"state-set"(At, usize, u32, At, usize, *Result) void;
    extern "hotdesk:plugin/base@1.0.0" fn history(u32, *Result) void;
    extern "hotdesk:plugin/base@1.0.0" fn send(At, usize, At, usize, *Result) void;
    extern "hotdesk:plugin/kv@1.0.0" fn get(At, usize, *Result) void;
    extern "hotdesk:plugin/kv@1.0.0" fn set(At, usize, At, usize, *Result) void;
    extern "hotdesk:plugin/kv@1.0.0" fn delete(At, usize, *Result) void;
    extern "hotdesk:plugin/kv@1.0.0" fn keys(At, usize, *Result) void;
    extern "hotdesk:plugin/llm@1.0.0" fn complete(At, usize, *Result) void;
    extern "hotdesk:plugin/http@1.0.0" fn fetch(At, usize, At, usize, At, usize, At, usize, *Result) void;
};

// ---- the component model's ABI ------------------------------------------------------------------------------------

const Raw = extern struct {
    start: At,
    len: usize,

    fn of(from: Text) Raw {
        return .{ .start = at(from), .len = from.len };
    }

    fn text(raw: Raw) Text {
        return raw.start[0..raw.len];
    }
};

const RawResponse = extern struct { status: u16, headers: Raw, body: Raw, extra: Raw };
const RawInbound = extern struct { conversation: Raw, text: Raw, id: Raw, extra: Raw };
const RawTool = extern struct { name: Raw, description: Raw, parameters: Raw, extra: Raw };

/// A result, of an import or an export, whose sides are whatever fits.
const Result = extern struct {
    failed: bool,
    as: extern union {
        text: Raw,
        flag: bool,
        list: extern struct { items: [*]const Raw, len: usize },
        tagged: extern struct { tag: u8, one: Raw, two: Raw = .of("") },
        pair: [2]Raw,
        response: RawResponse,
        intake: extern struct { messages: [*]const RawInbound, len: usize, answer: RawResponse },
    },

    fn check(result: *const Result) Error!void {
        if (!result.failed) return;
        why = result.as.tagged.one.text();
        return switch (result.as.tagged.tag) {
            0 => error.Denied,
            1 => error.Invalid,
            2 => error.TooLarge,
            3 => error.Timeout,
            4 => error.Unavailable,
            else => error.Other,
        };
    }

    fn optional(result: *const Result) ?Text {
        return if (result.as.tagged.tag == 0) null else result.as.tagged.one.text();
    }
};

/// The host has read it before it calls again.
var handed: Result = undefined;

fn done() *const Result {
    over = true;
    handed.failed = false;
    return &handed;
}

fn failed(err: anyerror) *const Result {
    const told = err == error.Failed or for (std.meta.tags(Error)) |one| {
        if (err == one) break true;
    } else false;
    handed.as = .{ .text = .of(if (told and why.len > 0) why else @errorName(err)) };
    _ = done();
    handed.failed = true;
    return &handed;
}

fn ended(outcome: anyerror!void) *const Result {
    outcome catch |err| return failed(err);
    return done();
}

fn decided(outcome: anyerror!Decision) *const Result {
    const decision = outcome catch |err| return failed(err);
    const one, const two = switch (decision) {
        .next, .leave => .{ "", "" },
        .rewrite, .drop, .model, .other => |text| .{ text, "" },
        .answer => |reply| .{ reply.text, reply.extra },
        .hand_over => |wish| .{ wish.reason, wish.text },
    };
    handed.as = .{ .tagged = .{ .tag = @backingInt(decision), .one = .of(one), .two = .of(two) } };
    return done();
}

fn lower(comptime T: type, from: anytype) T {
    var to: T = undefined;
    inline for (comptime std.meta.fieldNames(T)) |field| {
        const value = @field(from, field);
        @field(to, field) = if (@FieldType(T, field) == Raw) .of(value) else value;
    }
    return to;
}

fn rawTurn(id: At, id_len: usize, in: At, in_len: usize, text: At, len: usize, extra: At, extra_len: usize) Turn {
    begin();
    return .{
        .id = id[0..id_len],
        .conversation = in[0..in_len],
        .text = text[0..len],
        .extra = extra[0..extra_len],
    };
}

/// Export the interfaces that the plugin has functions for.
pub fn plugin(comptime P: type) void {
    const Exports = struct {
        fn before(a: At, b: usize, c: At, d: usize, e: At, f: usize, g: At, h: usize) callconv(.c) *const Result {
            const turn = rawTurn(a, b, c, d, e, f, g, h);
            return decided(if (@hasDecl(P, "before")) P.before(turn) else .next);
        }

        fn after(
            a: At,
            b: usize,
            c: At,
            d: usize,
            e: At,
            f: usize,
            g: At,
            h: usize,
            text: At,
            text_len: usize,
            extra: At,
            extra_len: usize,
        ) callconv(.c) *const Result {
            const turn = rawTurn(a, b, c, d, e, f, g, h);
            const reply: Reply = .{ .text = text[0..text_len], .extra = extra[0..extra_len] };
            return decided(if (@hasDecl(P, "after")) P.after(turn, reply) else .next);
        }

        fn transform(
            a: At,
            b: usize,
            c: At,
            d: usize,
            e: At,
            f: usize,
            g: At,
            h: usize,
            text: At,
            len: usize,
            last: u32,
        ) callconv(.c) *const Result {
            const turn = rawTurn(a, b, c, d, e, f, g, h);
            const outcome: anyerror!Piece = P.transform(turn, text[0..len], last != 0);
            const piece = outcome catch |err| return failed(err);
            handed.as = .{ .pair = .{ .of(piece.text), .of(piece.held) } };
            return done();
        }

        fn respond(a: At, b: usize, c: At, d: usize, e: At, f: usize, g: At, h: usize) callconv(.c) *const Result {
            return decided(P.respond(rawTurn(a, b, c, d, e, f, g, h)));
        }

        fn listTools() callconv(.c) *const anyopaque {
            begin();
            const room = allocator.alloc(RawTool, P.tools.len + 1) catch @trap(); // never nowhere
            const list = room[0..P.tools.len];
            for (list, P.tools) |*to, from| to.* = lower(RawTool, from);
            const Listed = extern struct { items: [*]const RawTool, len: usize };
            const listed = allocator.create(Listed) catch @trap();
            listed.* = .{ .items = list.ptr, .len = list.len };
            over = true;
            return listed;
        }

        fn callTool(name: At, name_len: usize, arguments: At, len: usize) callconv(.c) *const Result {
            begin();
            const outcome: anyerror!Text = P.callTool(name[0..name_len], arguments[0..len]);
            handed.as = .{ .text = .of(outcome catch |err| return failed(err)) };
            return done();
        }

        fn receive(
            method: At,
            method_len: usize,
            path: At,
            path_len: usize,
            query: At,
            query_len: usize,
            headers: At,
            headers_len: usize,
            body: At,
            body_len: usize,
            extra: At,
            extra_len: usize,
        ) callconv(.c) *const Result {
            begin();
            const outcome: anyerror!Intake = P.receive(.{
                .method = method[0..method_len],
                .path = path[0..path_len],
                .query = query[0..query_len],
                .headers = headers[0..headers_len],
                .body = body[0..body_len],
                .extra = extra[0..extra_len],
            });
            const intake = outcome catch |err| return failed(err);
            const room = allocator.alloc(RawInbound, intake.messages.len + 1) catch @trap(); // never nowhere
            const messages = room[0..intake.messages.len];
            for (messages, intake.messages) |*to, from| to.* = lower(RawInbound, from);
            handed.as = .{ .intake = .{
                .messages = messages.ptr,
                .len = messages.len,
                .answer = lower(RawResponse, intake.answer),
            } };
            return done();
        }

        fn deliver(to: At, to_len: usize, text: At, len: usize, more: At, more_len: usize) callconv(.c) *const Result {
            begin();
            const reply: Reply = .{ .text = text[0..len], .extra = more[0..more_len] };
            return ended(P.deliver(to[0..to_len], reply));
        }

        fn onEvent(name: At, name_len: usize, data: At, len: usize) callconv(.c) void {
            begin();
            P.onEvent(name[0..name_len], data[0..len]);
            over = true;
        }

        fn setup(text: At, len: usize) callconv(.c) *const Result {
            begin();
            return ended(if (@hasDecl(P, "setup")) P.setup(text[0..len]) else {});
        }

        fn configure(text: At, len: usize) callconv(.c) *const Result {
            begin();
            const outcome: anyerror!bool = if (@hasDecl(P, "configure")) P.configure(text[0..len]) else false;
            handed.as = .{ .flag = outcome catch |err| return failed(err) };
            return done();
        }

        fn probe() callconv(.c) *const Result {
            begin();
            return ended(if (@hasDecl(P, "probe")) P.probe() else {});
        }

        fn exportState() callconv(.c) *const Result {
            begin();
            const kept: ?Text = if (@hasDecl(P, "exportState")) P.exportState() else null;
            handed.as = .{ .text = .of(kept orelse "") };
            _ = done();
            handed.failed = kept != null; // an option: 1 is some
            return &handed;
        }

        fn importState(kept: At, len: usize, version: At, version_len: usize) callconv(.c) *const Result {
            begin();
            if (!@hasDecl(P, "importState")) return done();
            return ended(P.importState(kept[0..len], version[0..version_len]));
        }
    };
    if (@hasDecl(P, "before") or @hasDecl(P, "after")) {
        exported(&Exports.before, "middleware", "before");
        exported(&Exports.after, "middleware", "after");
    }
    if (@hasDecl(P, "transform")) exported(&Exports.transform, "chunks", "transform");
    if (@hasDecl(P, "respond")) exported(&Exports.respond, "bot", "respond");
    if (@hasDecl(P, "tools")) {
        exported(&Exports.listTools, "tools", "list-tools");
        exported(&Exports.callTool, "tools", "call-tool");
    }
    if (@hasDecl(P, "receive")) exported(&Exports.receive, "intake", "receive");
    if (@hasDecl(P, "deliver")) exported(&Exports.deliver, "delivery", "deliver");
    if (@hasDecl(P, "onEvent")) exported(&Exports.onEvent, "events", "on-event");
    const lives = for (.{ "setup", "configure", "probe", "exportState", "importState" }) |decl| {
        if (@hasDecl(P, decl)) break true;
    } else false;
    if (lives) {
        exported(&Exports.setup, "lifecycle", "setup");
        exported(&Exports.configure, "lifecycle", "configure");
        exported(&Exports.probe, "lifecycle", "probe");
        exported(&Exports.exportState, "lifecycle", "export-state");
        exported(&Exports.importState, "lifecycle", "import-state");
    }
}

fn exported(comptime function: anytype, comptime interface: Text, comptime wit_name: Text) void {
    @export(function, .{ .name = "hotdesk:plugin/" ++ interface ++ "@1.0.0#" ++ wit_name });
}
