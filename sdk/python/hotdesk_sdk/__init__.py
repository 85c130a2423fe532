"""What a hotdesk plugin is written against. Needs pluggy and msgspec, and nothing of the host."""

from .context import CallNext, Conversation, Ctx, Http, HttpResponse, Kv, Log, Metric, StoredReply, Turn
from .errors import (
    ApiUnsupported,
    CapabilityDenied,
    HotdeskError,
    LlmError,
    LlmRefused,
    LlmTimeout,
    LlmUnavailable,
    ManifestInvalid,
    PluginError,
    ScopeClosed,
)
from .hooks import HOOKS, Hooks, hookimpl, hookspec
from .llm import Completion, Llm, LlmStream, ToolCall, Usage
from .manifest import API_VERSIONS, Manifest, parse_manifest
from .messages import Answer, Attachment, InboundMessage, Intake, Message, Reply, Request, Sender, Tool

__all__ = [
    "API_VERSIONS",
    "HOOKS",
    "Answer",
    "ApiUnsupported",
    "Attachment",
    "CallNext",
    "CapabilityDenied",
    "Completion",
    "Conversation",
    "Ctx",
    "Hooks",
    "HotdeskError",
    "Http",
    "HttpResponse",
    "InboundMessage",
    "Intake",
    "Kv",
    "Llm",
    "LlmError",
    "LlmRefused",
    "LlmStream",
    "LlmTimeout",
    "LlmUnavailable",
    "Log",
    "Manifest",
    "ManifestInvalid",
    "Message",
    "Metric",
    "PluginError",
    "Reply",
    "Request",
    "ScopeClosed",
    "Sender",
    "StoredReply",
    "Tool",
    "ToolCall",
    "Turn",
    "Usage",
    "hookimpl",
    "hookspec",
    "parse_manifest",
]
