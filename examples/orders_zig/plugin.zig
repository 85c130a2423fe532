//! Orders: answers questions about them, masks words, and can be told to misbehave.

const hotdesk = @import("hotdesk");
const std = @import("std");

const orders = .{ .{ "1001", "shipped" }, .{ "1002", "packed" }, .{ "1003", "damn late" } };
const statuses: std.StaticStringMap([]const u8) = .initComptime(orders);
var words: hotdesk.Words = .{};
var answered: u32 = 0;

pub fn before(turn: hotdesk.Turn) !hotdesk.Decision {
    if (hotdesk.has(turn.text, "human"))
        return .{ .hand_over = .{ .reason = "asked for a human", .text = "A person will be with you shortly." } };
    if (hotdesk.has(turn.text, "spam")) return .{ .drop = "spam" };
    return if (std.mem.cutPrefix(u8, turn.text, "say ")) |rest| .{ .rewrite = rest } else .next;
}

pub fn after(_: hotdesk.Turn, reply: hotdesk.Reply) !hotdesk.Decision {
    const masked = words.mask(reply.text, true).text;
    return if (std.mem.eql(u8, masked, reply.text)) .next else .{ .rewrite = masked };
}

pub fn transform(_: hotdesk.Turn, text: []const u8, last: bool) !hotdesk.Piece {
    return words.mask(text, last);
}

pub fn respond(turn: hotdesk.Turn) !hotdesk.Decision {
    if (hotdesk.digitsAfter(turn.text, "order ")) |number| {
        answered += 1;
        const status = statuses.get(number) orelse return hotdesk.answer("There is no order {s}.", .{number});
        for ([_][]const u8{ "Order ", number, " is " }) |piece| try hotdesk.emit(piece);
        return hotdesk.answer("{s}.", .{status});
    }
    if (hotdesk.has(turn.text, "count")) return hotdesk.answer("Answered {d}.", .{answered});
    if (hotdesk.has(turn.text, "secret")) {
        const denied = if (hotdesk.kv.get("secret")) |_| false else |err| err == error.Denied;
        return if (denied) hotdesk.answer("Denied: {s}.", .{hotdesk.why}) else hotdesk.answer("Not denied.", .{});
    }
    if (hotdesk.has(turn.text, "fail")) return hotdesk.fail("told to fail", .{});
    if (hotdesk.has(turn.text, "trap")) @trap();
    return .next;
}

pub const tools = [_]hotdesk.Tool{.{ .name = "order_status", .description = "What became of an order.", .parameters =
    \\{"type":"object","properties":{"number":{"type":"string"}},"required":["number"]}
}};

pub fn callTool(name: []const u8, arguments: []const u8) ![]const u8 {
    if (!std.mem.eql(u8, name, "order_status")) return hotdesk.fail("no tool {s}", .{name});
    const number = hotdesk.getText(arguments, "number");
    const status = statuses.get(number) orelse return hotdesk.fail("no order {s}", .{number});
    return hotdesk.stringify(.{ .number = number, .status = status });
}

pub fn setup(config: []const u8) !void {
    try words.set(config, "words");
}

pub fn configure(config: []const u8) !bool {
    return if (setup(config)) true else |err| err;
}

pub fn exportState() ?[]const u8 {
    return hotdesk.format("{d}", .{answered});
}

pub fn importState(state: []const u8, _: []const u8) !void {
    answered = std.fmt.parseInt(u31, state, 10) catch return hotdesk.fail("state is not a number", .{});
}

comptime {
    hotdesk.plugin(@This());
}
