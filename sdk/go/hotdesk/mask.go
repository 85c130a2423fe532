package hotdesk

import "strings"

// Masker masks words in answers, streamed or not: its methods are an After and a Transform.
type Masker struct{ Words []string }

// After masks a whole answer.
func (m *Masker) After(_ Turn, reply Reply) (Decision, error) {
	if masked := Mask(reply.Text, m.Words); masked != reply.Text {
		return Rewrite(masked), nil
	}
	return Next, nil
}

// Transform masks a piece of a streamed answer.
func (m *Masker) Transform(_ Turn, text string, last bool) (shown, held string, err error) {
	shown, held = MaskPiece(text, m.Words, last)
	return shown, held, nil
}

// Mask gives the text with an asterisk for each character of each of the words, whatever the case of ASCII letters.
func Mask(text string, words []string) string {
	shown, _ := MaskPiece(text, words, true)
	return shown
}

// MaskPiece gives a masked piece of a stream, and the tail that may yet become a word, held back unless this is the last
// piece.
func MaskPiece(text string, words []string, last bool) (shown, held string) {
	cut := len(text)
	if !last {
		for cut = 0; cut < len(text) && !begins(text[cut:], words); cut++ {
		}
		for start := cut - 1; start >= 0; start-- {
			if start+longest(text[start:], words) > cut {
				cut = start // a word that the cut would split is held back whole
			}
		}
	}
	var out strings.Builder
	masked := 0 // up to here; words may overlap
	for at, char := range text[:cut] {
		masked = max(masked, at+longest(text[at:cut], words))
		if at < masked {
			char = '*'
		}
		out.WriteRune(char)
	}
	return out.String(), text[cut:]
}

// longest is the size of the longest of the words that the text begins with, or 0.
func longest(text string, words []string) int {
	size := 0
	for _, word := range words {
		if len(word) > size && len(word) <= len(text) && equal(text[:len(word)], word) {
			size = len(word)
		}
	}
	return size
}

// begins tells whether the whole text is a proper beginning of a word.
func begins(text string, words []string) bool {
	for _, word := range words {
		if len(text) < len(word) && equal(text, word[:len(text)]) {
			return true
		}
	}
	return false
}

func equal(a, b string) bool {
	for i := range len(a) {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(letter byte) byte {
	if 'A' <= letter && letter <= 'Z' {
		return letter + 'a' - 'A'
	}
	return letter
}
