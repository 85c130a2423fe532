"""`[llm]`: what may be written there, what is said of what may not, and whose key goes where."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer, Script

from conftest import StartDesk, wait_until
from hotdesk.config import Config, LlmSettings, load_config
from hotdesk.errors import ConfigError

LONG_KEY = "sk-marked-key-0123456789"


PLUGINS = Path(__file__).parents[2] / "plugins"
CHATGPT = {name: (PLUGINS / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}


def load(tmp_path: Path, toml: str = "", **environ: str) -> LlmSettings:
    file = tmp_path / "hotdesk.toml"
    file.write_text(toml)
    return load_config({}, environ, file=str(file)).llm


WRONG = {
    'llm = "x"': ("llm", "write it as a table"),
    "[llm]\ntemprature = 1": ("llm.temprature", "did you mean 'temperature'?"),
    "[llm]\nnothing_like_it = 1": ("llm.nothing_like_it", "there is no such setting"),
    "[llm]\ntemperature = 3": ("llm.temperature", "<= 2"),
    '[llm]\nmax_tokens = "many"': ("llm.max_tokens", "Expected `int"),
    "[llm]\nfirst_token_s = 0": ("llm.first_token_s", "> 0"),
    "[llm]\nretries = -1": ("llm.retries", ">= 0"),
    '[llm]\nbase_url = "provider.test/v1"': ("llm.base_url", "write it as https://HOST/v1"),
    '[llm]\nbase_url = "ftp://provider.test"': ("llm.base_url", "write it as https://HOST/v1"),
    '[llm]\nbase_url = "https://a.test"\napi_version = "1"': ("llm.api_version", "Azure needs base_url and api_key"),
    '[llm]\napi_key = "k"\nfallback = ["b"]': ("llm.fallback", "no model is called that; there are default"),
    '[llm]\nfallback = "b"': ("llm.fallback", "Expected `array`"),
    "[llm.models]\nb = 1": ("llm.models", "write each model as a table"),
    '[llm.models.default]\napi_key = "k"': ("llm.models.default", "the model called default is [llm] itself"),
    '[llm.models.b]\nmodel = "x"': ("llm.models.b.api_key", "OpenAI needs a key; other servers need base_url"),
    '[llm.models.b]\nbase_url = "http://a.test"\nmodl = "x"': ("llm.models.b.modl", "did you mean 'model'?"),
    '[llm]\napi_key = "two\\nlines"': ("llm.api_key", "one line of ASCII"),
    '[llm]\napi_key = "schlüssel"': ("llm.api_key", "one line of ASCII"),
    '[llm]\nbase_url = "http://a.test"\nheaders = {X = "a\\r\\nb"}': ("llm.headers", "one line of ASCII"),
}


@pytest.mark.parametrize("toml", WRONG)
def test_a_wrong_setting_stops_the_start_with_its_name_and_a_remedy(tmp_path: Path, toml: str) -> None:
    """The name as it is written, where it was read, and what would be right."""
    name, remedy = WRONG[toml]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml)
    text = str(caught.value)
    assert name in text
    assert remedy in text
    assert "hotdesk.toml" in text


@pytest.mark.parametrize(
    ("toml", "environ"),
    [
        (f'[llm]\napi_key = "{LONG_KEY}\\n"', {}),
        (f'[llm]\napi_key = ["{LONG_KEY}"]', {}),
        (f'[llm]\napi_kye = "{LONG_KEY}"', {}),
        (f'[llm]\nheaders = "{LONG_KEY}"', {}),
        (f'[llm]\nheaders = {{Authorization = ["{LONG_KEY}"]}}', {}),
        (f'[llm.models.b]\nbase_url = "http://a.test"\napi_key = ["{LONG_KEY}"]', {}),
        (f'[llm]\nheaders = {{Authorization = "{LONG_KEY}\\n"}}\nbase_url = "http://a.test"', {}),
        ("", {"HOTDESK_LLM_API_KEY": f"{LONG_KEY}\n"}),
    ],
)
def test_a_wrong_key_is_not_repeated(tmp_path: Path, toml: str, environ: dict[str, str]) -> None:
    """An error text goes to logs and screens."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, **environ)
    assert LONG_KEY not in str(caught.value)
    assert LONG_KEY not in repr(caught.value)


def test_the_key_is_in_no_repr(tmp_path: Path) -> None:
    """Whoever prints the settings, or one that holds them, prints no secret."""
    toml = f'[llm]\napi_key = "{LONG_KEY}"\nheaders = {{X-Token = "{LONG_KEY}"}}\nbase_url = "http://a.test/v1"'
    settings = load(tmp_path, toml)
    assert settings.models["default"].api_key == LONG_KEY
    for shown in (settings, settings.models, Config(llm=settings)):
        assert LONG_KEY not in f"{shown!r} {shown}"


def test_without_a_key_or_a_url_there_is_no_model(tmp_path: Path) -> None:
    """Also when other settings are there, as in the template."""
    assert load(tmp_path).models == {}
    assert load(tmp_path, '[llm]\nmodel = "m"\ntemperature = 0.5').models == {}
    assert load(tmp_path, HOTDESK_LLM_API_KEY="").models == {}


def test_a_key_is_enough(tmp_path: Path) -> None:
    """For OpenAI; the other settings have their defaults."""
    model = load(tmp_path, '[llm]\napi_key = "k"').models["default"]
    assert (model.base_url, model.model, model.retries) == ("", "gpt-4.1-mini", 2)


def test_the_environment_goes_over_the_file(tmp_path: Path) -> None:
    """For each setting that is no table."""
    toml = '[llm]\nbase_url = "http://a.test/v1"\napi_key = "k"\ntemperature = 1.5\nvision = true\nretries = 1'
    environ = {
        "BASE_URL": "http://b.test/v1",
        "API_KEY": "other",
        "TEMPERATURE": "0.5",
        "VISION": "false",
        "RETRIES": "7",
        "MODEL": "m",
        "TOTAL_S": "60",
    }
    model = load(tmp_path, toml, **{f"HOTDESK_LLM_{name}": value for name, value in environ.items()}).models["default"]
    assert (model.base_url, model.api_key, model.model) == ("http://b.test/v1", "other", "m")
    assert (model.temperature, model.vision, model.retries, model.total_s) == (0.5, False, 7, 60.0)


def test_a_wrong_value_of_the_environment_says_that_it_came_from_there(tmp_path: Path) -> None:
    """And not from the file, which does not have it."""
    with pytest.raises(ConfigError, match="HOTDESK_LLM"):
        load(tmp_path, HOTDESK_LLM_RETRIES="many", HOTDESK_LLM_API_KEY="k")


def test_the_official_clients_key_and_url_count_where_none_is_given(tmp_path: Path) -> None:
    """`OPENAI_API_KEY` and `OPENAI_BASE_URL`, as people have them set already."""
    model = load(tmp_path, OPENAI_API_KEY="k", OPENAI_BASE_URL="http://a.test/v1").models["default"]
    assert (model.api_key, model.base_url) == ("k", "http://a.test/v1")
    model = load(tmp_path, '[llm]\napi_key = "own"', OPENAI_API_KEY="k").models["default"]
    assert (model.api_key, model.base_url) == ("own", "")


def test_the_official_clients_key_is_not_shown_to_another_provider(tmp_path: Path) -> None:
    """A base URL of one's own has a key of its own, or none."""
    own = {"HOTDESK_LLM_BASE_URL": "http://own.test/v1"}
    for settings in (
        load(tmp_path, '[llm]\nbase_url = "http://own.test/v1"', OPENAI_API_KEY="k", OPENAI_BASE_URL="http://a.test"),
        load(tmp_path, OPENAI_API_KEY="k", **own),
    ):
        model = settings.models["default"]
        assert (model.base_url, model.api_key) == ("http://own.test/v1", "")


MANY = """
[llm]
api_key = "first-key"
model = "big"
temperature = 0.5
headers = {X-First = "1"}
body = {seed = 1}
fallback = ["small", "there"]

[llm.models.other]
model = "odd"

[llm.models.there]
base_url = "http://there.test/v1"
temperature = 1.0

[llm.models.small]
model = "small"
"""


def test_models_take_from_llm_what_they_do_not_say(tmp_path: Path) -> None:
    """But for the key, and what else is meant for one provider, where they have another base URL."""
    models = load(tmp_path, MANY).models
    small, there = models["small"], models["there"]
    assert (small.api_key, small.model, small.temperature) == ("first-key", "small", 0.5)
    assert small.headers == {"X-First": "1"}
    assert (there.api_key, there.headers, there.body, there.temperature) == ("", {}, {}, 1.0)


def test_the_first_model_is_llm_itself_and_then_the_fallbacks_in_their_order(tmp_path: Path) -> None:
    """Whatever the order of the tables."""
    settings = load(tmp_path, MANY)
    assert list(settings.models) == ["default", "small", "there", "other"]
    assert settings.fallback == ("small", "there")


def test_chatgpt_is_granted_llm_until_something_else_is_written(tmp_path: Path) -> None:
    """`[llm] grant`, which may be empty."""
    assert load(tmp_path, '[llm]\napi_key = "k"').grant == ("chatgpt",)
    assert load(tmp_path, '[llm]\napi_key = "k"\ngrant = []').grant == ()
    assert load(tmp_path, '[llm]\napi_key = "k"\ngrant = ["mine"]').grant == ("mine",)
    with pytest.raises(ConfigError, match=r"llm\.grant"):
        load(tmp_path, '[llm]\ngrant = "chatgpt"')


@pytest.mark.parametrize("value", ["k" * 300, "sk-proj-a_b-c.d", "with space"])
def test_any_printable_key_is_taken(tmp_path: Path, value: Any) -> None:
    """Providers have keys of many shapes."""
    assert load(tmp_path, HOTDESK_LLM_API_KEY=value).models["default"].api_key == value


@pytest.mark.parametrize(
    ("toml", "remedy"),
    [
        ('[lmm]\napi_key = "sk-secret"', "did you mean 'llm'"),
        ('[LLM]\napi_key = "sk-secret"', "there is no such setting"),
        ('api_key = "sk-secret"', "below [llm]"),
        ('llm = "sk-secret"', "write it as a table"),
        ('[llm]\nmodels = ["sk-secret"]', "write each model as a table"),
        ('[llm]\nmodels.spare = "sk-secret"', "write each model as a table"),
        ('[llm.model.spare]\napi_key = "sk-secret"', "llm.model"),
        ('[llm.models.default]\napi_key = "sk-secret"', "is [llm] itself"),
        ('[llm]\napikey = "sk-secret"', "did you mean 'api_key'"),
    ],
)
def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path: Path, toml: str, remedy: str) -> None:
    """Whatever was mistyped, the error says what would be right, and not what was written."""
    file = tmp_path / "hotdesk.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError) as caught:
        load_config({}, {}, file=str(file))
    assert "sk-secret" not in str(caught.value)
    assert remedy in str(caught.value)


def test_a_variable_that_is_no_setting_stops_the_start(tmp_path: Path) -> None:
    """It is named, with what was meant, and without its value."""
    with pytest.raises(ConfigError, match=r"HOTDESK_LLM_KEY.*did you mean 'api_key'") as caught:
        load_config({}, {"HOTDESK_LLM_KEY": "sk-secret"}, file=None)
    assert "sk-secret" not in str(caught.value)


def test_a_key_of_the_file_goes_to_no_url_of_the_environment(tmp_path: Path) -> None:
    """The official client's variables count together, or not at all."""
    llm = load(tmp_path, '[llm]\napi_key = "sk-1"', OPENAI_BASE_URL="http://other.test/v1")
    assert llm.models["default"].base_url == ""


async def test_settings_are_taken_while_the_host_runs(
    start_desk: StartDesk, model_server: ModelServer, tmp_path: Path
) -> None:
    """A changed key counts from the next request; an answer under way ends as it began; a bad file changes nothing."""
    file = tmp_path / "hotdesk.toml"
    file.write_text(f'[llm]\nbase_url = "{model_server.base_url}"\napi_key = "first-key"\n')
    config = load_config({}, {}, file=str(file))
    model_server.default = Script(text="one two three four five six seven eight", gap_s=0.05)
    desk = await start_desk(dict(CHATGPT), llm=config.llm, file=config.file)
    answering = asyncio.create_task(desk.say("hello", "a"))
    await wait_until(lambda: model_server.open == 1, what="an answer is under way")
    file.write_text(f'[llm]\nbase_url = "{model_server.base_url}"\napi_key = "other-key"\n')
    await wait_until(lambda: any(e["kind"] == "llm_configured" for e in desk.events), what="the change is taken")
    assert (await answering)["replies"][0]["text"] == "one two three four five six seven eight"
    await desk.say("hello", "b")
    keys = [seen.headers["authorization"] for seen in model_server.requests]
    assert keys == ["Bearer first-key", "Bearer other-key"]
    file.write_text("[llm]\nnonsense = 1\n")
    await wait_until(lambda: any(e["kind"] == "settings_failed" for e in desk.events), what="the mistake is told")
    await desk.say("hello", "c")
    assert model_server.requests[-1].headers["authorization"] == "Bearer other-key"
    file.write_text("")
    await wait_until(lambda: not desk.host.llm.models, what="no model is set any more")
    assert (await desk.say("hello", "d"))["replies"] == []
    assert "other-key" not in str(desk.events)
