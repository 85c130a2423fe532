// Package hotdesk is the thin layer of a hotdesk plugin in Go.
//
// A plugin says in an init what it does, with Serve, and in wit/world.wit which interfaces it exports. A function that is
// not set does nothing; one whose interface is not in the world is never called.
package hotdesk

import "errors"

// Plugin is what a plugin does.
type Plugin struct {
	// Before is asked before anybody further in; After, once somebody further in answered. Interface middleware.
	Before func(turn Turn) (Decision, error)
	After  func(turn Turn, reply Reply) (Decision, error)

	// Transform gives what is shown now of a streamed answer, and what is held back until the next piece.
	// Interface chunks.
	Transform func(turn Turn, text string, last bool) (shown, held string, err error)

	// Respond answers a turn, or leaves it to the next bot. Interface bot.
	Respond func(turn Turn) (Decision, error)

	// Tools are functions for the language model. Interface tools.
	Tools []Tool

	// Receive takes a webhook: the messages, and the answer that is sent once they are on disk. Interface intake.
	Receive func(request Request) ([]Inbound, Response, error)

	// Deliver takes a reply to where its conversation came from; an error has it tried again. Interface delivery.
	Deliver func(conversation string, reply Reply) error

	// OnEvent is told what happened; data is JSON. Interface events.
	OnEvent func(name, data string)

	// Configure gets the config, JSON: in setup, and when it changed; it may give LoadAnew. Probe is called after setup.
	// An error refuses the generation. Interface lifecycle, and so is the state.
	Configure func(config string) error
	Probe     func() error

	// State is carried from one generation to the next.
	State State
}

// State is what a plugin carries from one generation to the next, as JSON.
type State interface {
	Export() string
	Import(state, version string) error
}

// LoadAnew is what Configure gives when it can't take a change live: the host loads the plugin anew. In setup it is no
// error.
var LoadAnew = errors.New("load anew")

// Serve says what the plugin does. Call it in an init: a component has no main.
func Serve(p Plugin) { plugin = p }

var plugin Plugin

// Turn is one message being answered. Extra is JSON: sender, channel, locale and so on.
type Turn struct{ ID, Conversation, Text, Extra string }

// Reply is an answer. Extra is JSON: metadata, tags, locale, close.
type Reply struct{ Text, Extra string }

// Tool is a function that the language model may call. Parameters are a JSON Schema of an object. Call gets arguments
// as JSON and gives JSON; its error is told to the model.
type Tool struct {
	Name, Description, Parameters, Extra string
	Call                                 func(arguments string) (string, error)
}

// Request is the HTTP request of a webhook. Headers are a JSON object; Body is base64 where Extra says so.
type Request struct{ Method, Path, Query, Headers, Body, Extra string }

// Inbound is a message that a webhook brought. ID is the channel's own; empty: the host makes one.
type Inbound struct{ Conversation, Text, ID, Extra string }

// Response is what a webhook's caller is answered, or what an HTTP server answered. Headers are a JSON object.
type Response struct {
	Status               uint16
	Headers, Body, Extra string
}

// Decision is what becomes of a turn. The zero Decision is Next.
type Decision struct {
	tag   uint32
	texts []string
}

// Next goes on: further in, or to the next bot. Leave goes on as well, and leaves the answer alone.
var (
	Next  = Decision{}
	Leave = Decision{tag: 1}
)

// Rewrite goes on with this text.
func Rewrite(text string) Decision { return Decision{2, []string{text}} }

// Answer is the answer.
func Answer(text string) Decision { return AnswerWith(Reply{Text: text}) }

// AnswerWith is the answer, with metadata, tags and the like.
func AnswerWith(reply Reply) Decision { return Decision{3, []string{reply.Text, reply.Extra}} }

// HandOver tags the conversation for a human agent; the visitor is told the text.
func HandOver(reason, text string) Decision { return Decision{4, []string{reason, text}} }

// Drop gives no answer at all.
func Drop(reason string) Decision { return Decision{5, []string{reason}} }

// Model lets the language model answer; options are JSON. It needs the capability llm.
func Model(options string) Decision { return Decision{6, []string{options}} }

// Other is a decision that came after this layer; JSON. A host that does not know it fails the call.
func Other(json string) Decision { return Decision{7, []string{json}} }
