"""A component is looked into before anything is compiled, and a refusal says what is wrong and what to do."""

from __future__ import annotations

import random
import time

import pytest
import wasmtime
from tests.wasm.components import FOREIGN, NEXT, PACKAGE, component, leb, section

from hotdesk.errors import LoadFailed
from hotdesk.runtime.wit_contract import EXPORTS, IMPORTS
from hotdesk.runtime.wit_inspect import MAX_NAME, MAX_NAMES, Inspected, inspect_component

HEAD = b"\0asm\x0d\0\x01\0"
GOOD = component({"respond": NEXT})


def inspected(data: bytes, max_bytes: int = 1 << 24) -> Inspected:
    return inspect_component("orders", data, file="orders.wasm", max_bytes=max_bytes)


def refusal(data: bytes, max_bytes: int = 1 << 24) -> str:
    with pytest.raises(LoadFailed) as failed:
        inspected(data, max_bytes)
    text = str(failed.value)
    assert "orders.wasm" in text
    assert "'orders'" in text
    return text


def exports(*names: bytes) -> bytes:
    """A component whose only section says that it exports functions of these names."""
    return HEAD + section(11, leb(len(names)) + b"".join(b"\0" + leb(len(n)) + n + b"\x01\0\0" for n in names))


def imports(*names: bytes) -> bytes:
    own = exports(f"{PACKAGE}/bot@1.0.0".encode())[len(HEAD) :]
    return HEAD + section(10, leb(len(names)) + b"".join(b"\0" + leb(len(n)) + n + b"\x05\0" for n in names)) + own


def test_a_component_says_what_it_exports_and_imports() -> None:
    """Interfaces of the contract by their short names, others by their whole ones."""
    data = component({"respond": NEXT, "setup": "(i32.const 8)"}, imports={"kv": ("get",)}, foreign=True)
    assert inspected(data) == Inspected("1.0.0", ("bot", "lifecycle"), ("kv",), (FOREIGN,))


@pytest.mark.parametrize("interface", EXPORTS)
def test_each_export_of_the_contract_is_known(interface: str) -> None:
    """Alone it is enough for a plugin."""
    assert inspected(exports(f"{PACKAGE}/{interface}@1.0.0".encode())).exports == (interface,)


@pytest.mark.parametrize("interface", IMPORTS)
def test_each_import_of_the_contract_is_known(interface: str) -> None:
    """And none of them is foreign."""
    found = inspected(imports(f"{PACKAGE}/{interface}@1.0.0".encode()))
    assert (found.imports, found.foreign) == ((interface,), ())


def test_the_types_of_the_contract_are_no_interface() -> None:
    """Toolchains import or export `types` beside what uses it."""
    assert inspected(imports(f"{PACKAGE}/types@1.0.0".encode())).imports == ()


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the file is empty"),
    "a text": (b"hello, world", "not WebAssembly"),
    "an archive": (b"PK\3\4" + bytes(100), "not WebAssembly"),
    "three bytes": (b"\0as", "cut off within its first 8 bytes"),
    "a core module": (b"\0asm\1\0\0\0", "it is a core module, and a plugin is a component"),
    "a layer that there is not": (b"\0asm\x0e\0\x02\0", "of an unknown kind"),
    "no section": (HEAD, "it exports no interface of hotdesk:plugin"),
    "a section that there is not": (HEAD + section(99, b""), "there is no section 99"),
    "a section that is cut off": (HEAD + b"\x0b\x7f", "cut off"),
    "a section without a size": (HEAD + b"\x0b", "cut off"),
    "a size of 40 bits": (HEAD + b"\x0b\xff\xff\xff\xff\xff\x01", "over 32 bits"),
    "more names than there are": (HEAD + section(11, leb(5)), "cut off"),
    "two thousand and one names": (HEAD + section(11, leb(MAX_NAMES + 1)), f"{MAX_NAMES + 1:,} imports or exports"),
    "a billion names": (HEAD + section(11, leb(1 << 30)), "imports or exports"),
    "a long name": (exports(b"x" * (MAX_NAME + 1)), f"a name of {MAX_NAME + 1:,} bytes"),
    "a name that is no text": (exports(b"\xff\xfe"), "no valid component"),
    "a name of an unknown kind": (HEAD + section(11, b"\1\7\1x\1\0\0"), "of unknown kind"),
    "a version of next year": (exports(b"hotdesk:plugin/bot@2.0.0"), "is newer than what this host speaks (1.0.0)"),
    "a version of last year": (exports(b"hotdesk:plugin/bot@0.3.0"), "is older than what this host speaks (1.0.0)"),
    "a version with a long number": (exports(b"hotdesk:plugin/bot@1.0." + b"9" * 300), "is newer than"),
    "no version": (exports(b"hotdesk:plugin/bot"), "without a version"),
    "a slip of the pen": (exports(b"hotdesk:plugin/middelware@1.0.0"), "did you mean 'middleware'?"),
    "something else": (exports(b"hotdesk:plugin/zzz@1.0.0"), "there are middleware, chunks, bot"),
    "an import that there is not": (imports(b"hotdesk:plugin/basis@1.0.0"), "did you mean 'base'?"),
    "another package": (imports(b"acme:db/store@1.0.0"), "it imports 'acme:db/store@1.0.0', which no host offers"),
    "a plain import": (imports(b"env"), "it imports 'env', which no host offers"),
    "an older import": (imports(b"hotdesk:plugin/base@0.9.0"), "is older than"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_says_what_is_wrong(kind: str) -> None:
    """In one sentence that names the plugin and the file."""
    data, says = REFUSED[kind]
    assert says in refusal(data)


def test_a_component_over_the_limit_is_refused_before_it_is_read() -> None:
    """By its size alone, with both sizes and a remedy."""
    assert f"{len(GOOD):,} bytes; a component may have {len(GOOD) - 1:,}" in refusal(GOOD, len(GOOD) - 1)
    assert inspected(GOOD, len(GOOD)).exports == ("bot",)


def test_wasi_is_foreign_and_not_refused() -> None:
    """It may be there and never be called; see the tests of what is called."""
    names = (b"wasi:cli/environment@0.2.3", b"wasi:random/random@0.2.0")
    assert inspected(imports(*names)).foreign == tuple(name.decode() for name in names)


def test_names_of_other_packages_that_are_exported_are_left_alone() -> None:
    """What a toolchain adds of its own is no reason to refuse."""
    data = exports(f"{PACKAGE}/bot@1.0.0".encode(), b"wasi:cli/run@0.2.0", b"_initialize")
    assert inspected(data).exports == ("bot",)


def test_any_bytes_are_answered_quickly() -> None:
    """Ten thousand changes of a good component: a result or a refusal, and no other exception, in no time."""
    chance = random.Random(4)
    slowest, longest = 0.0, 0
    for _ in range(10_000):
        data = bytearray(GOOD)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(4, len(data))] = chance.randrange(256)
        started = time.perf_counter()
        try:
            inspected(bytes(data))
        except LoadFailed as exc:
            longest = max(longest, len(str(exc)))
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.5
    assert 0 < longest < 4000


def test_a_component_of_many_megabytes_is_inspected_in_no_time() -> None:
    """Only headers are read: what is inside a section is stepped over."""
    custom = section(0, b"\4note" + bytes(30 * 1024 * 1024))
    started = time.perf_counter()
    assert inspected(GOOD[:8] + custom + GOOD[8:], 1 << 26).exports == ("bot",)
    assert time.perf_counter() - started < 0.5


def test_the_compiler_reads_what_the_inspection_reads() -> None:
    """Names that are found here are those that wasmtime finds."""
    data = component({"respond": NEXT, "before": NEXT}, imports={"base": ("log",)})
    engine = wasmtime.Engine()
    kind = wasmtime.component.Component(engine, data).type  # type: ignore[attr-defined]
    assert {f"{PACKAGE}/{name}@1.0.0" for name in inspected(data).exports} == set(kind.exports(engine))
    assert {f"{PACKAGE}/{name}@1.0.0" for name in inspected(data).imports} == set(kind.imports(engine))
