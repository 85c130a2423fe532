package hotdesk

import "errors"

// Refused is the error of an import: why the host did not do what was asked.
type Refused struct {
	Kind string // denied, invalid, too-large, timeout, unavailable, other
	Text string // for denied, the name of the capability
}

func (r *Refused) Error() string { return r.Kind + ": " + r.Text }

// Denied tells whether an error says that a capability was not asked for, or not granted.
func Denied(err error) bool {
	var refused *Refused
	return errors.As(err, &refused) && refused.Kind == "denied"
}

var kinds = []string{"denied", "invalid", "too-large", "timeout", "unavailable", "other"}

// answer is the result of an import: an error's texts are a word further on than a text.
type answer [8]uint32

func (a *answer) err() error {
	if a[0] == 0 {
		return nil
	}
	return &Refused{kinds[a[1]], textAt(a[2:])}
}

func (a *answer) text() (string, error) {
	if err := a.err(); err != nil {
		return "", err
	}
	return textAt(a[1:]), nil
}

func (a *answer) option() (string, bool, error) {
	if err := a.err(); err != nil || a[1] == 0 {
		return "", false, err
	}
	return textAt(a[2:]), true, nil
}

// The levels of a line in the log.
const (
	Debug uint32 = iota
	Info
	Warning
	Error
)

// Log writes a line in the host's log; fields are a JSON object, or empty.
//
//go:wasmimport hotdesk:plugin/base@1.0.0 log
func Log(level uint32, event, fields string)

// Config is the manifest's config with the operator's over it: a JSON object.
func Config() string {
	var at [2]uint32
	hostConfig(&at)
	return textAt(at[:])
}

// TimeLeft is how many milliseconds are left until this call's deadline.
//
//go:wasmimport hotdesk:plugin/base@1.0.0 time-left
func TimeLeft() uint32

// Emit sends chunks of a streamed answer; the text of the decision Answer comes after them.
func Emit(chunks ...string) error {
	for _, chunk := range chunks {
		var a answer
		hostEmit(chunk, &a)
		if err := a.err(); err != nil {
			return err
		}
	}
	return nil
}

// StateGet gives a value of the conversation's state, JSON, and whether there is one.
func StateGet(key string) (string, bool, error) {
	var a answer
	hostStateGet(key, &a)
	return a.option()
}

// StateSet sets a value of the conversation's state, JSON.
func StateSet(key, value string) error {
	var a answer
	hostStateSet(key, 1, value, &a)
	return a.err()
}

// StateDelete takes a value of the conversation's state away.
func StateDelete(key string) error {
	var a answer
	hostStateSet(key, 0, "", &a)
	return a.err()
}

// History gives the newest entries before this message, oldest first: a JSON list.
func History(limit uint32) (string, error) {
	var a answer
	hostHistory(limit, &a)
	return a.text()
}

// Send says something in a conversation outside a turn and gives the reply's id.
func Send(conversation, text string) (string, error) {
	var a answer
	hostSend(conversation, text, &a)
	return a.text()
}

// KVGet gives a value of the plugin's own keys, JSON, and whether there is one. KV needs the capability kv.
func KVGet(key string) (string, bool, error) {
	var a answer
	hostKVGet(key, &a)
	return a.option()
}

// KVSet sets a value, JSON.
func KVSet(key, value string) error {
	var a answer
	hostKVSet(key, value, &a)
	return a.err()
}

// KVDelete takes a value away.
func KVDelete(key string) error {
	var a answer
	hostKVDelete(key, &a)
	return a.err()
}

// KVKeys gives the keys that begin with the prefix.
func KVKeys(prefix string) ([]string, error) {
	var a answer
	hostKVKeys(prefix, &a)
	if err := a.err(); err != nil {
		return nil, err
	}
	var keys []string
	for words := textsAt(a[1:]); len(words) > 0; words = words[2:] {
		keys = append(keys, textAt(words))
	}
	return keys, nil
}

// Complete asks a language model and waits for the whole answer, JSON for JSON. It needs the capability llm.
// To answer a visitor, give the decision Model instead.
func Complete(request string) (string, error) {
	var a answer
	hostComplete(request, &a)
	return a.text()
}

// Fetch sends an HTTP request; headers are a JSON object. It needs the capability http:HOST.
func Fetch(method, url, headers, body string) (Response, error) {
	var a answer
	hostFetch(method, url, headers, body, &a)
	if err := a.err(); err != nil {
		return Response{}, err
	}
	return Response{uint16(a[1]), textAt(a[2:]), textAt(a[4:]), textAt(a[6:])}, nil
}

//go:wasmimport hotdesk:plugin/base@1.0.0 config
func hostConfig(at *[2]uint32)

//go:wasmimport hotdesk:plugin/base@1.0.0 emit
func hostEmit(text string, a *answer)

//go:wasmimport hotdesk:plugin/base@1.0.0 state-get
func hostStateGet(key string, a *answer)

//go:wasmimport hotdesk:plugin/base@1.0.0 state-set
func hostStateSet(key string, some uint32, value string, a *answer)

//go:wasmimport hotdesk:plugin/base@1.0.0 history
func hostHistory(limit uint32, a *answer)

//go:wasmimport hotdesk:plugin/base@1.0.0 send
func hostSend(conversation, text string, a *answer)

//go:wasmimport hotdesk:plugin/kv@1.0.0 get
func hostKVGet(key string, a *answer)

//go:wasmimport hotdesk:plugin/kv@1.0.0 set
func hostKVSet(key, value string, a *answer)

//go:wasmimport hotdesk:plugin/kv@1.0.0 delete
func hostKVDelete(key string, a *answer)

//go:wasmimport hotdesk:plugin/kv@1.0.0 keys
func hostKVKeys(prefix string, a *answer)

//go:wasmimport hotdesk:plugin/llm@1.0.0 complete
func hostComplete(request string, a *answer)

//go:wasmimport hotdesk:plugin/http@1.0.0 fetch
func hostFetch(method, url, headers, body string, a *answer)
