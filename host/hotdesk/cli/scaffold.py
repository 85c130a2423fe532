"""`hotdesk init` and `hotdesk new`: a desk folder of one's own, and plugins that work as generated.

Both decide everything before they write, and never write over anything.
"""

from __future__ import annotations

import importlib.resources
import re
import secrets
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from hotdesk_sdk import ManifestInvalid, parse_manifest

__all__ = ["init", "new"]

LANGUAGES = ("python", "rust", "go", "js", "c", "zig", "python-wasm")
CONTRACT = "1.0.0"
"""The version of sdk/wit that a component is written against."""
KINDS = ("bot", "middleware", "intake")


@click.command(short_help="A desk folder: hotdesk.toml, and plugins/ with the bundled ones.")
@click.argument("directory", metavar="[DIR]", type=click.Path(path_type=Path, file_okay=False), default=".")
def init(directory: Path) -> None:
    """Make a desk folder: hotdesk.toml with every setting in comments, and plugins/ with copies of the bundled plugins.

    DIR is the current folder if not given. Nothing is written over: if any of it is there, nothing is written.

    \b
    Example:
      hotdesk init desk && cd desk && hotdesk run
    """
    files = {Path("hotdesk.toml"): _template("hotdesk.toml").read_bytes()}
    files |= {Path("plugins", path): content for path, content in _bundled_files()}
    tops = {Path(*path.parts[:2]) for path in files}
    if taken := sorted(str(directory / top) for top in tops if (directory / top).exists()):
        raise click.ClickException(
            f"nothing was written, because of what is there already: {', '.join(taken)}\n"
            "  Name a new folder, as in: hotdesk init desk"
        )
    for path, content in files.items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    (directory / "plugins").mkdir(exist_ok=True)
    plugins = sorted({path.parts[1].removesuffix(".py") for path in files if _is_plugin(path)})
    where = "" if directory == Path(".") else f"cd {directory}\n  "
    click.echo(f"{_good(directory / 'hotdesk.toml')}  every setting, in comments")
    click.echo(f"{_good(directory / 'plugins')}  {', '.join(plugins) or 'empty'}")
    click.echo(
        f"\nNext:\n  {where}hotdesk run          serves on http://127.0.0.1:8080 and watches plugins/\n"
        "  hotdesk chat         in a second terminal: talk to it\n"
        "  hotdesk new hello    a plugin of your own; saved is live"
    )


@click.command(short_help="A plugin that works as generated.")
@click.argument("name")
@click.option("--lang", type=click.Choice(LANGUAGES), default="python", show_default=True, help="What to write it in.")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="bot",
    show_default=True,
    help="bot answers, middleware stands around every turn, intake brings a channel in.",
)
@click.option(
    "--dir",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default="plugins",
    show_default=True,
    help="The plugin folder to write it to.",
)
def new(name: str, lang: str, kind: str, folder: Path) -> None:
    """Write a plugin that works as generated.

    In Python: NAME/__init__.py, its plugin.toml, and a test; a host that watches the folder serves it at once. In any
    other language: its source and a Makefile; `make` builds plugin.wasm, and the host serves that.

    \b
    Examples:
      hotdesk new opening-hours
      hotdesk new shop --lang rust
      hotdesk new polite --kind middleware
      hotdesk new sms --kind intake --dir ../desk/plugins
    """
    _check_name(name)
    for taken in (folder / name, folder / f"{name}.py", folder / f"{name}.toml", folder / f"{name}.wasm"):
        if taken.exists():
            raise click.ClickException(f"nothing was written: {taken} is there already")
    test = f"test_{name.replace('-', '_')}.py"
    if lang == "python":
        given = {"__init__.py": "__init__.py.tmpl", "plugin.toml": "plugin.toml.tmpl", test: "test.py.tmpl"}
        files = {Path(file): _filled(_template(kind, tmpl).read_bytes(), name) for file, tmpl in given.items()}
    else:
        files = dict(_component_files(name, lang, kind))
    # Written under a name that no host looks at, then renamed: a host sees the plugin whole or not at all.
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".new-{name}-{secrets.token_hex(4)}"
    unfinished.mkdir()
    try:
        for file, content in files.items():
            (unfinished / file).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / file).write_bytes(content)
        unfinished.rename(folder / name)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if lang == "python":
        _tell_next(folder / name, name, kind, test)
    else:
        _tell_next_of_component(folder / name, name, kind, files)


def _component_files(name: str, lang: str, kind: str) -> Iterator[tuple[Path, bytes]]:
    """A component's folder: what every kind has, what this kind has, the language's thin layer, and the contract."""
    sdk = _shipped("sdk")
    for part in ("all", kind):
        for path, content in _files(sdk.joinpath(lang, "template", part), Path(), hidden=True):
            filled = path.suffix == ".tmpl"
            yield (path.with_suffix(""), _filled(content, name)) if filled else (path, content)
    for path, content in _files(sdk.joinpath(lang), Path()):
        if path.parts[0] not in ("template", "README.md"):
            yield path, content
    contract = sdk.joinpath("wit", CONTRACT, "hotdesk.wit").read_bytes()
    yield Path("wit", "deps", "hotdesk-plugin", "hotdesk.wit"), contract


def _filled(template: bytes, name: str) -> bytes:
    return string.Template(template.decode()).substitute(name=name).encode()


def _tell_next_of_component(path: Path, name: str, kind: str, files: Mapping[Path, bytes]) -> None:
    source = next(str(file) for file in files if file.stem == "plugin" and file.suffix not in (".toml", ".wasm"))
    _tell(
        path,
        {
            source: "the plugin",
            "plugin.toml": "what it says of itself",
            "README.md": "what to install, once",
            "Makefile": "builds plugin.wasm",
        },
        [
            f"make -C {path}",
            f"hotdesk check {path}",
            _hello(name, kind, '{"conversation": "c", "text": "hello", "id": "1"}'),
        ],
        "A host that watches the folder serves plugin.wasm as soon as it is built, and again after each `make`.",
    )


def _tell_next(path: Path, name: str, kind: str, test: str) -> None:
    _tell(
        path,
        {"__init__.py": "the plugin", "plugin.toml": "what it says of itself", test: "its test"},
        [
            f"hotdesk check {path}",
            f"pytest {path}        (needs pip install pytest)",
            _hello(name, kind, '{"id": "1", "sender": "ann", "text": "hello"}'),
        ],
        "A host that watches the folder serves it already; edit, save, and the new code answers.",
    )


def _tell(path: Path, files: Mapping[str, str], steps: Sequence[str], last: str) -> None:
    for file, what in files.items():
        click.echo(f"{_good(path / file)}  {what}")
    click.echo("\nNext:\n" + "".join(f"  {step}\n" for step in steps) + f"\n{last}")


def _hello(name: str, kind: str, webhook: str) -> str:
    """The command that shows the plugin at work; *webhook* is what its intake takes."""
    return {
        "bot": f"echo {name} | hotdesk chat",
        "middleware": "echo anything | hotdesk chat",
        "intake": f"curl http://127.0.0.1:8080/hooks/{name} -d '{webhook}'",
    }[kind]


def _good(path: Path) -> str:
    return f"{click.style('✓', fg='green')} {path}"


def _check_name(name: str) -> None:
    """Raise a usage error for a name that no host would load."""
    try:
        parse_manifest(name, None, file="")
    except ManifestInvalid as exc:
        better = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_0123456789")[:64]
        hint = f"; how about {better!r}?" if better else ""
        raise click.BadParameter(
            f"{name!r}. A plugin's name is a letter, then letters, digits, - or _{hint}", param_hint="NAME"
        ) from exc
    if name.startswith("test_"):
        raise click.BadParameter(f"{name!r} would be taken for a test; a host leaves those alone", param_hint="NAME")


def _template(*parts: str) -> Traversable:
    return importlib.resources.files("hotdesk.cli").joinpath("templates", *parts)


def _bundled_files() -> Iterator[tuple[Path, bytes]]:
    """The bundled plugins, each file with its path below plugins/: from the installed package, or from the checkout."""
    yield from _files(_shipped("plugins"), Path())


def _shipped(folder: str) -> Traversable:
    """A folder that the wheel has inside the package, and the checkout beside it."""
    packaged = importlib.resources.files("hotdesk").joinpath("bundled", folder)
    checkout = Path(__file__).parents[3] / folder
    root: Traversable = packaged if packaged.is_dir() else checkout
    if not root.is_dir():
        raise click.ClickException(f"{folder}/ is missing from this installation; install hotdesk again")
    return root


def _files(folder: Traversable, below: Path, *, hidden: bool = False) -> Iterator[tuple[Path, bytes]]:
    """Every file of a folder with its path; tests are left out, and what begins with a dot unless *hidden*."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.name.startswith("test_") or item.name in ("__pycache__", "tests", "conftest.py"):
            continue
        if item.name.startswith(".") and not hidden:
            continue
        if item.is_dir():
            yield from _files(item, below / item.name, hidden=hidden)
        else:
            yield below / item.name, item.read_bytes()


def _is_plugin(path: Path) -> bool:
    inside = path.parts[1:]
    return inside[-1:] == ("__init__.py",) or (len(inside) == 1 and path.suffix == ".py" and path.stem[0] not in "_.")
