"""order_status: a tool that the language model may call. Shows how a plugin lends the model a function.

Arguments are checked against `parameters` before the function is called. That there is no such order is an answer,
too: the model may ask for a better number. What a function raises is told to the model as well, but as the plugin's
failure, and counted as one. A shop's real one would ask its own system through `ctx.http`.
"""

from hotdesk_sdk import Ctx, Tool, hookimpl

PARAMETERS = {
    "type": "object",
    "properties": {"order": {"type": "string", "pattern": "^[0-9]{4,12}$", "description": "The order's number"}},
    "required": ["order"],
    "additionalProperties": False,
}


@hookimpl
async def tools(ctx: Ctx) -> list[Tool]:
    async def order_status(order: str) -> dict[str, str] | str:
        status = ctx.config["orders"].get(order)
        if status is None:
            return f"there is no order {order}"
        return {"order": order, "status": status}

    return [Tool("order_status", "Where an order is, by its number.", order_status, PARAMETERS)]


@hookimpl
async def configure() -> bool:
    """The function above reads the config at each call."""
    return True
