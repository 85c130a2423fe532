package hotdesk

import "unsafe"

// How texts cross the line, as the component model lays them out. Both sides read and write this module's memory. What
// the host writes is in buffers of cabi_realloc; what the host reads is kept until the next call begins. A component is
// never called while it is in a call, so one of each will do.
var (
	incoming [][]byte   // what the host wrote since the call began
	outgoing []string   // what the host reads after the call
	list     []uint32   // the elements of a list in that
	area     [10]uint32 // where the host finds the result of the call; the largest result has ten words
)

//go:wasmexport cabi_realloc
func realloc(old unsafe.Pointer, oldSize, align, size uint32) unsafe.Pointer {
	buffer := make([]byte, max(size, 8)) // eight, so that it is aligned for every type of the contract
	copy(buffer, unsafe.Slice((*byte)(old), oldSize))
	incoming = append(incoming, buffer)
	return unsafe.Pointer(unsafe.SliceData(buffer))
}

// begin lets go of what the call before needed. The buffers of this call live on through the texts that lie in them.
func begin() {
	incoming, outgoing, list = nil, nil, nil
}

// text is a parameter of an export.
func text(data unsafe.Pointer, size uint32) string {
	return unsafe.String((*byte)(data), size)
}

// textAt is a text in the result of an import: its address and its size.
func textAt(words []uint32) string {
	return unsafe.String((*byte)(unsafe.Add(nil, words[0])), words[1])
}

// textsAt is a list of texts in the result of an import: the address and the size of each.
func textsAt(words []uint32) []uint32 {
	return unsafe.Slice((*uint32)(unsafe.Add(nil, words[0])), 2*words[1])
}

// fields are the addresses and the sizes of texts that the host reads after the call.
func fields(texts ...string) []uint32 {
	words := make([]uint32, 0, 2*len(texts))
	for _, text := range texts {
		words = append(words, uint32(uintptr(unsafe.Pointer(unsafe.StringData(text)))), uint32(len(text)))
	}
	outgoing = append(outgoing, texts...)
	return words
}

// listOf are the address and the length of a list whose elements are these words.
func listOf(words []uint32, length int) []uint32 {
	list = words
	return []uint32{uint32(uintptr(unsafe.Pointer(unsafe.SliceData(words)))), uint32(length)}
}

// result is what an export gives.
func result(first uint32, rest ...uint32) unsafe.Pointer {
	area[0] = first
	copy(area[1:], rest)
	return unsafe.Pointer(&area)
}

// ok is the result of an export that went well, failed of one that did not.
func ok(words ...uint32) unsafe.Pointer { return result(0, words...) }
func failed(err error) unsafe.Pointer   { return result(1, fields(err.Error())...) }

// okOr is the one or the other.
func okOr(err error, words ...uint32) unsafe.Pointer {
	if err != nil {
		return failed(err)
	}
	return ok(words...)
}

// explain is deferred by each export: it tells the host's log of a panic, and lets it go on to become a trap.
func explain() {
	value := recover()
	if value == nil {
		return
	}
	reason := "a value that is neither a text nor an error"
	switch value := value.(type) {
	case error:
		reason = value.Error()
	case string:
		reason = value
	}
	Log(Error, "panic", Object("reason", reason))
	panic(value)
}
