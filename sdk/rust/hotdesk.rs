//! hotdesk for Rust: what `wit_bindgen` makes of the WIT, under shorter names, and what most plugins want.
//!
//! The interfaces that the plugin's world exports are modules here (`bot`, `middleware`, `tools`, ...), each with a trait
//! `Guest` to implement for `Plugin`; those that it imports are `base`, `kv`, `llm` and `http`.

#![allow(dead_code, unused_imports)]

use std::sync::RwLock;

wit_bindgen::generate!({
    path: "wit",
    world: "plugin",
    generate_all,
    default_bindings_module: "crate::hotdesk",
});

/// What implements the traits.
pub struct Plugin;
export!(Plugin);

pub use self::exports::hotdesk::plugin::*;
pub use self::hotdesk::plugin::base::{self, Level};
pub use self::hotdesk::plugin::types::*;
pub use self::hotdesk::plugin::{http, kv, llm};
pub use serde_json::{json, Value};

/// What most functions give: a value, or the text of an error.
pub type Result<T> = std::result::Result<T, String>;

/// What the host refuses fails the call, with its text, where `?` passes it on.
impl From<Error> for String {
    fn from(error: Error) -> String {
        match error {
            Error::Denied(text) | Error::Invalid(text) | Error::TooLarge(text) => text,
            Error::Timeout(text) | Error::Unavailable(text) | Error::Other(text) => text,
        }
    }
}

/// The decision that this text is the answer.
pub fn answer(text: impl Into<String>) -> Decision {
    Decision::Answer(Reply { text: text.into(), extra: String::new() })
}

/// The decision that a human agent is wanted: why, for the agent, and what the visitor is told.
pub fn hand_over(reason: impl Into<String>, text: impl Into<String>) -> Decision {
    Decision::HandOver(Handover { reason: reason.into(), text: text.into() })
}

/// A function that the language model may call; the parameters are a JSON Schema of an object.
pub fn tool(name: &str, description: &str, parameters: Value) -> Tool {
    let parameters = parameters.to_string();
    Tool { name: name.into(), description: description.into(), parameters, extra: String::new() }
}

/// The answer to a webhook's caller.
pub fn response(status: u16, body: Value) -> Response {
    let headers = json!({"content-type": "application/json"}).to_string();
    Response { status, headers, body: body.to_string(), extra: String::new() }
}

/// A JSON text as a value; null where it is none.
pub fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_default()
}

/// The text of an object's key; empty where there is none.
pub fn text_of(object: &Value, key: &str) -> String {
    object[key].as_str().unwrap_or_default().to_owned()
}

/// The config as it is now.
pub fn config() -> Value {
    parse(&base::config())
}

/// A line in the host's log; the fields are an object.
pub fn log(level: Level, event: &str, fields: Value) {
    base::log(level, event, &fields.to_string());
}

/// The first digits that stand right behind `before`.
pub fn digits_after<'a>(text: &'a str, before: &str) -> Option<&'a str> {
    let digits = |rest: &'a str| &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())];
    text.split(before).skip(1).map(digits).find(|found| !found.is_empty())
}

/// Words that must not be seen; made to be a `static`.
pub struct Words(RwLock<Vec<String>>);

impl Words {
    pub const fn new() -> Self {
        Words(RwLock::new(Vec::new()))
    }

    /// Take the words of a config's key. An error says that it is no list of texts; the old ones stay then.
    pub fn set(&self, config: &str, key: &str) -> Result<()> {
        let text = |word: &Value| word.as_str().map(str::to_owned);
        let words = parse(config)[key].as_array().and_then(|list| list.iter().map(text).collect());
        *self.0.write().unwrap() = words.ok_or_else(|| format!("{key} must be a list of texts"))?;
        Ok(())
    }

    /// The text with an asterisk for each character of a word, whatever the case of its ASCII letters and also where
    /// words overlap; or none, if there is nothing to mask.
    pub fn mask(&self, text: &str) -> Option<String> {
        Some(self.mask_piece(text, true).text).filter(|masked| masked != text)
    }

    /// The same for a piece of a stream, always: the tail that may become a word is held back with a word that reaches
    /// into it, unless it is the last.
    pub fn mask_piece(&self, text: &str, last: bool) -> Piece {
        let mut shown = String::with_capacity(text.len());
        let mut until = 0; // where the words end that began so far
        let mut cut = (0, 0); // the last place that none of them spans, in what is shown and in the text
        let words = self.0.read().unwrap();
        for (at, char) in text.char_indices() {
            let rest = &text[at..];
            if at >= until {
                cut = (shown.len(), at);
            }
            if !last && words.iter().any(|word| word.len() > rest.len() && begins(word, rest)) {
                shown.truncate(cut.0);
                return Piece { text: shown, held: text[cut.1..].to_owned() };
            }
            let here = words.iter().filter(|word| begins(rest, word)).map(String::len).max().unwrap_or(0);
            until = until.max(at + here);
            shown.push(if at < until { '*' } else { char });
        }
        Piece { text: shown, held: String::new() }
    }
}

/// Whether the text begins so, whatever the case of ASCII letters.
fn begins(text: &str, with: &str) -> bool {
    text.len() >= with.len() && text.as_bytes()[..with.len()].eq_ignore_ascii_case(with.as_bytes())
}
