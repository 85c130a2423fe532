"""The conformance suite can fail: each claim does on a plugin that breaks it and little else."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.wasm.toolchains import Unavailable, c

from hotdesk_sdk import HotdeskError
from hotdesk_sdk.conformance import CASES, ClaimFailed, run_case

ROOT = Path(__file__).parents[2]
ORDERS = ROOT / "examples" / "orders_python" / "orders.py"
BY_NAME = {case.name: case for case in CASES}

STREAM = 'now["words"].mask_stream(reply.chunks)'
STATE = "type(state) is not int or not 0 <= state < 2**31"
TAKEN = 'Words(config.get("words"))'
BREAKAGES = [
    ("masks_a_whole_reply", 'now["words"].mask(reply.text)', "reply.text"),
    ("masks_a_whole_reply", TAKEN, 'Words([word for word in config["words"] if word == word.lower()])'),
    ("leaves_a_clean_reply_alone", "mask(reply.text)", "mask(reply.text.lower())"),
    ("leaves_a_clean_reply_alone", TAKEN, 'Unicode(config.get("words"))'),
    ("masks_chinese_words", "mask(reply.text)", 'mask(reply.text).replace("**！", "******！")'),
    (
        "masks_the_longer_of_two_words",
        TAKEN,
        'Words([word for word in config["words"] if word not in ("hell", "damnation")])',
    ),
    ("masks_words_that_overlap", TAKEN, 'Apart(config.get("words"))'),
    ("masks_words_split_over_chunks", STREAM, '(now["words"].mask(chunk) async for chunk in reply.chunks)'),
    ("holds_back_no_more_than_it_must", STREAM, 'now["words"].mask_stream(all_at_once(reply.chunks))'),
    ("shows_at_the_end_what_it_held", STREAM, "shown_at_once(reply.chunks)"),
    ("rewrites_what_is_said", '.removeprefix("say ")', '.replace("say ", "")'),
    ("hands_over", '.hand_over("asked for a human")', '.tags.append("handoff")'),
    ("drops", 'None if "spam"', 'Reply("") if "spam"'),
    ("streams_an_answer", '("Order ", asked[1], " is ")', '(f"Order {asked[1]} is ",)'),
    ("answers_without_a_stream", "if status else ():", 'if status else ("There is ",):'),
    ("counts", '["answered"] += 1', '["answered"] += asked[1] in STATUS'),
    ("does_the_first_that_fits", 'if "count" in turn.text:', 'if "count" in turn.text and "secret" not in turn.text:'),
    ("keeps_its_state_over_a_swap", 'return int(now["answered"])', "return 0"),
    ("takes_state_from_another_language", '["answered"] = state', '["answered"] = min(state, 9)'),
    ("takes_state_from_another_language", STATE, STATE.replace("31", "30")),
    ("gives_state_to_another_language", 'int(now["answered"])', '{"answered": now["answered"]}'),
    ("refuses_a_bad_state", 'raise ValueError("state is not a number")', "state = 0"),
    ("refuses_a_bad_state", STATE, STATE.replace("type(state) is not int", "not isinstance(state, int)")),
    ("refuses_a_bad_state", STATE, STATE.replace("0 <= ", "")),
    ("refuses_a_bad_state", STATE, STATE.replace(" < 2**31", "")),
    ("takes_a_config_live", "return True", "return False"),
    ("refuses_a_bad_config", TAKEN, 'Words([*map(str, config["words"])])'),
    ("refuses_a_bad_config", TAKEN, 'taken_as_far_as_can_be(config.get("words"))'),
    ("lists_its_tool", '"What became of an order."', '""'),
    ("answers_its_tool", 'raise LookupError(f"no order {number}")', "return {}"),
    (
        "is_told_of_a_refused_capability",
        'await ctx.kv.get("secret")',
        'raise CapabilityDenied("", 1, "kv", asked=True)',
    ),
    ("is_told_of_a_refused_capability", 'return "Not denied."', 'return "Denied: kv."'),
    ("goes_on_after_an_error", "raise RuntimeError(", 'now["answered"] = 0\n        raise RuntimeError('),
    ("refuses_the_turn_where_it_must_not_be_skipped", "raise RuntimeError(", "return str("),
    ("traps_alone", '"trap" in turn.text', '"tarp" in turn.text'),
    (
        "serves_many_conversations_at_once",
        'now["answered"] += 1',
        'seen = now["answered"]\n        await asyncio.sleep(0.001)\n        now["answered"] = seen + 1',
    ),
    (
        "answers_one_conversation_in_order",
        'now["answered"] += 1',
        'asyncio.get_running_loop().call_later(0.02, lambda: now.update(answered=now["answered"] + 1))',
    ),
]
"""The case, what stands in the plugin, and what stands there instead."""

MORE = """
import asyncio


class Apart(Words):
    def __init__(self, given):
        super().__init__(given)
        self._word = re.compile(self._word.pattern.replace("(?=", "(?:"), self._word.flags)


class Unicode(Words):
    def __init__(self, given):
        super().__init__(given)
        self._word = re.compile(self._word.pattern, re.IGNORECASE)


def taken_as_far_as_can_be(given):
    if isinstance(given, list):
        now["words"] = Words([word for word in given if isinstance(word, str)])
    return Words(given)


async def all_at_once(chunks):
    yield "".join([chunk async for chunk in chunks])


async def shown_at_once(chunks):
    held = ""
    async for chunk in chunks:
        shown, held = now["words"].mask_piece(held + chunk)
        yield shown
"""


def broken(old: str, new: str, folder: Path) -> Path:
    """The plugin with *new* where *old* stands."""
    source = ORDERS.read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {ORDERS.name}"
    target = folder / "orders.py"
    target.write_text(source.replace(old, new) + MORE)
    return target


def test_every_case_has_its_breakage() -> None:
    """A new claim comes with a plugin that does not keep it."""
    assert list(dict.fromkeys(case for case, _, _ in BREAKAGES)) == [case.name for case in CASES]


@pytest.mark.parametrize(("case", "old", "new"), BREAKAGES, ids=[case for case, _, _ in BREAKAGES])
async def test_the_claim_fails(case: str, old: str, new: str, tmp_path: Path) -> None:
    """The plugin loads, and its case says what it did instead."""
    with pytest.raises(ClaimFailed, match="should"):
        await run_case(BY_NAME[case], broken(old, new, tmp_path))


@pytest.mark.timeout(600)  # the first test of C installs its tools
async def test_an_error_is_no_trap(tmp_path: Path) -> None:
    """A component that is told to trap, and only fails, keeps its instance; that is seen."""
    try:
        environment = {**os.environ, **c.ensure()}
    except Unavailable as exc:
        pytest.skip(str(exc))
    for folder in ("examples/orders_c", "sdk/c", "sdk/wit"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    source = tmp_path / "examples" / "orders_c" / "plugin.c"
    text = source.read_text()
    assert text.count("__builtin_trap()") == 1
    source.write_text(text.replace("__builtin_trap()", 'return hd_fail(HD("told to trap"))'))
    made = await asyncio.to_thread(
        subprocess.run, ["make", "-B"], cwd=source.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stdout + made.stderr
    with pytest.raises(ClaimFailed, match=r"the count after a trap: 'Answered 1\.', and should be 'Answered 0\.'"):
        await run_case(BY_NAME["traps_alone"], source.with_name("plugin.wasm"))


async def test_what_does_not_load_fails_every_case(tmp_path: Path) -> None:
    """No claim is kept by a plugin that is none, the claims that something is refused neither."""
    target = tmp_path / "orders.py"
    target.write_text("raise RuntimeError('no plugin')\n")
    for case in CASES:
        gc.freeze()  # the desk that ended last let all loose, and the next would look through it
        with pytest.raises((ClaimFailed, HotdeskError)):
            await run_case(case, target)


async def test_the_command_says_which_and_why(tmp_path: Path) -> None:
    """A line for each claim, the reason where one is not kept, and the exit status 1."""
    [breakage] = [one[1:] for one in BREAKAGES if one[0] == "drops"]
    path = broken(*breakage, tmp_path)
    done = await asyncio.to_thread(run, str(path), "--case", "drops", "--case", "counts")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert lines[0].startswith("✗ drops: To spam there is no answer")
    assert "and should be ()" in lines[1]
    assert lines[2].startswith("✓ counts: ")
    assert lines[3:] == ["1 of 2 claims are kept"]


async def test_the_command_is_content_with_a_good_one() -> None:
    """The exit status is 0 when every claim that was asked for is kept."""
    done = await asyncio.to_thread(run, str(ORDERS), "--case", "drops")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 of 1 claims are kept")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hotdesk_sdk.conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
