//! Orders: answers questions about them, masks words, and can be told to misbehave.

#[path = "../../sdk/rust/hotdesk.rs"] mod hotdesk;

use hotdesk::*;

const ORDERS: [(&str, &str); 3] = [("1001", "shipped"), ("1002", "packed"), ("1003", "damn late")];
const PARAMETERS: &str = r#"{"type":"object","properties":{"number":{"type":"string"}},"required":["number"]}"#;
static WORDS: Words = Words::new();
static ANSWERED: std::sync::Mutex<i32> = std::sync::Mutex::new(0);

fn status(number: &str) -> Option<&'static str> { ORDERS.iter().find(|order| order.0 == number).map(|order| order.1) }

impl middleware::Guest for Plugin {
    fn before(turn: Turn) -> Result<Decision> {
        Ok(match turn.text {
            text if text.contains("human") => hand_over("asked for a human", "A person will be with you shortly."),
            text if text.contains("spam") => Decision::Drop("spam".into()),
            text => text.strip_prefix("say ").map_or(Decision::Next, |rest| Decision::Rewrite(rest.into())),
        })
    }
    fn after(_: Turn, reply: Reply) -> Result<Decision> {
        Ok(WORDS.mask(&reply.text).map_or(Decision::Next, Decision::Rewrite))
    }
}

impl chunks::Guest for Plugin {
    fn transform(_: Turn, text: String, last: bool) -> Result<Piece> { Ok(WORDS.mask_piece(&text, last)) }
}

impl bot::Guest for Plugin {
    fn respond(turn: Turn) -> Result<Decision> {
        if let Some(number) = digits_after(&turn.text, "order ") {
            *ANSWERED.lock().unwrap() += 1;
            let Some(status) = status(number) else { return Ok(answer(format!("There is no order {number}."))) };
            for piece in ["Order ", number, " is "] { base::emit(piece)?; }
            return Ok(answer(format!("{status}.")));
        }
        Ok(match turn.text {
            text if text.contains("count") => answer(format!("Answered {}.", ANSWERED.lock().unwrap())),
            text if text.contains("secret") => match kv::get("secret") {
                Err(Error::Denied(name)) => answer(format!("Denied: {name}.")), _ => answer("Not denied."),
            },
            text if text.contains("fail") => return Err("told to fail".into()),
            text if text.contains("trap") => panic!("told to trap"),
            _ => Decision::Next,
        })
    }
}

impl tools::Guest for Plugin {
    fn list_tools() -> Vec<Tool> { vec![tool("order_status", "What became of an order.", parse(PARAMETERS))] }
    fn call_tool(name: String, arguments: String) -> Result<String> {
        if name != "order_status" { return Err(format!("no tool {name}")); }
        let number = text_of(&parse(&arguments), "number");
        let status = status(&number).ok_or(format!("no order {number}"))?;
        Ok(json!({"number": number, "status": status}).to_string())
    }
}

impl lifecycle::Guest for Plugin {
    fn setup(config: String) -> Result<()> { WORDS.set(&config, "words") }
    fn configure(config: String) -> Result<bool> { Self::setup(config).map(|()| true) }
    fn probe() -> Result<()> { Ok(()) }
    fn export_state() -> Option<String> { Some(ANSWERED.lock().unwrap().to_string()) }
    fn import_state(state: String, _: String) -> Result<()> {
        Ok(*ANSWERED.lock().unwrap() = state.parse().ok().filter(|n| *n >= 0).ok_or("state is not a number")?)
    }
}
