package hotdesk

import (
	"errors"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// A small reader and writer of JSON. encoding/json works as well; it makes a plugin larger by 1.4 MiB, which the host
// compiles.

var errJSON = errors.New("this is not JSON")

// Parse reads JSON into map[string]any, []any, string, float64, bool and nil. An empty text stands for {}.
func Parse(text string) (any, error) {
	if text == "" {
		return map[string]any{}, nil
	}
	r := reader{rest: text}
	value := r.value(0)
	if r.space(); r.bad || r.rest != "" {
		return nil, errJSON
	}
	return value, nil
}

// Text is the text at a key of a JSON object, or "".
func Text(object, key string) string {
	value, _ := Parse(object)
	fields, _ := value.(map[string]any)
	text, _ := fields[key].(string)
	return text
}

// Texts reads the list of texts at a key of a JSON object. Where there is none, the error says so and *into stays.
func Texts(object, key string, into *[]string) error {
	value, _ := Parse(object)
	fields, _ := value.(map[string]any)
	items, fine := fields[key].([]any)
	texts := make([]string, len(items))
	for i, item := range items {
		text, is := item.(string)
		texts[i], fine = text, fine && is
	}
	if !fine {
		return errors.New(key + " must be a list of texts")
	}
	*into = texts
	return nil
}

// Object writes a JSON object of texts: Object("number", "1001", "status", "shipped").
func Object(keysAndTexts ...string) string {
	var out strings.Builder
	out.WriteByte('{')
	for i, text := range keysAndTexts {
		if i > 0 {
			out.WriteByte(",:"[i%2])
		}
		out.WriteString(Quote(text))
	}
	out.WriteByte('}')
	return out.String()
}

// Quote writes a text as JSON.
func Quote(text string) string {
	const hex = "0123456789abcdef"
	var out strings.Builder
	out.WriteByte('"')
	for _, char := range text {
		switch {
		case char == '"' || char == '\\':
			out.WriteByte('\\')
			out.WriteRune(char)
		case char < ' ':
			out.WriteString(`\u00`)
			out.WriteByte(hex[char>>4])
			out.WriteByte(hex[char&15])
		default:
			out.WriteRune(char)
		}
	}
	out.WriteByte('"')
	return out.String()
}

const deepest = 100 // levels; deeper JSON is refused before the stack ends

type reader struct {
	rest string
	bad  bool
}

func (r *reader) space() { r.rest = strings.TrimLeft(r.rest, " \t\r\n") }

// take gives whether the rest begins with a word, and skips it.
func (r *reader) take(word string) bool {
	r.space()
	rest, found := strings.CutPrefix(r.rest, word)
	r.rest = rest
	return found
}

func (r *reader) fail() any {
	r.bad, r.rest = true, ""
	return nil
}

func (r *reader) value(depth int) any {
	switch {
	case depth > deepest:
		return r.fail()
	case r.take("{"):
		fields := map[string]any{}
		for first := true; !r.take("}"); first = false {
			if !first && !r.take(",") || !r.take(`"`) {
				return r.fail()
			}
			key := r.quoted()
			if !r.take(":") {
				return r.fail()
			}
			fields[key] = r.value(depth + 1)
		}
		return fields
	case r.take("["):
		items := []any{}
		for first := true; !r.take("]"); first = false {
			if r.rest == "" || !first && !r.take(",") {
				return r.fail()
			}
			items = append(items, r.value(depth+1))
		}
		return items
	case r.take(`"`):
		return r.quoted()
	case r.take("true"):
		return true
	case r.take("false"):
		return false
	case r.take("null"):
		return nil
	}
	size := len(r.rest) - len(strings.TrimLeft(r.rest, "+-.0123456789Ee"))
	number, err := strconv.ParseFloat(r.rest[:size], 64)
	if err != nil {
		return r.fail()
	}
	r.rest = r.rest[size:]
	return number
}

// quoted reads a text whose opening quote is taken.
func (r *reader) quoted() string {
	var out strings.Builder
	for {
		end := strings.IndexAny(r.rest, `"\`)
		if end < 0 || end+1 == len(r.rest) && r.rest[end] == '\\' {
			r.fail()
			return ""
		}
		out.WriteString(r.rest[:end])
		if r.rest[end] == '"' {
			r.rest = r.rest[end+1:]
			return out.String()
		}
		escaped := r.rest[end+1]
		r.rest = r.rest[end+2:]
		switch at := strings.IndexByte(`"\/bfnrt`, escaped); {
		case at >= 0:
			out.WriteByte("\"\\/\b\f\n\r\t"[at])
		case escaped == 'u':
			char := r.unit()
			if utf16.IsSurrogate(char) && strings.HasPrefix(r.rest, `\u`) {
				r.rest = r.rest[2:]
				char = utf16.DecodeRune(char, r.unit())
			}
			out.WriteRune(char)
		default:
			r.fail()
			return ""
		}
	}
}

// unit reads the four digits of a \u.
func (r *reader) unit() rune {
	if len(r.rest) < 4 {
		r.fail()
		return utf8.RuneError
	}
	unit, err := strconv.ParseUint(r.rest[:4], 16, 16)
	if err != nil {
		r.fail()
		return utf8.RuneError
	}
	r.rest = r.rest[4:]
	return rune(unit)
}
